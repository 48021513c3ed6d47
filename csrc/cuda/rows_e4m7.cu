// e4m7 and lossless: bfloat16 rows with four bits for most exponents. Wire format: csrc/compressor/e4m7.cpp; bytes are the
// same as there.
//
// A block that lossless cannot carry (ask check_lossless before) comes back as NaN.
#include "row_launch.cuh"

namespace planmoe::cuda {
namespace {

constexpr int64_t kBlock = 128, kHead = 8;
constexpr unsigned kWindow = 14, kZero = 14, kEscape = 15, kNotFinite = 255;
constexpr int kPool = 7;

// Of bfloat16, to nearest even; a NaN stays one.
__device__ __forceinline__ unsigned half_of(float value) {
  const unsigned bits = __float_as_uint(value);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits >> 16 | 0x40u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}

// How many of the warp's codes are escapes, and how many of those come before this lane's.
struct Escapes {
  int all = 0;
  int before = 0;

  __device__ __forceinline__ Escapes(const unsigned (&codes)[4], int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned escaped = __ballot_sync(kAllLanes, codes[i] == kEscape);
      all += __popc(escaped);
      before += __popc(escaped & ((1u << lane) - 1));
    }
  }
};

// A block as lanes hold it, four values each; those beyond the row are 0.
struct Block {
  unsigned rest[4];  // sign and fraction
  unsigned exponents[4];
  unsigned codes[4];
  unsigned base;

  __device__ __forceinline__ explicit Block(const float (&values)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned half = half_of(values[i]);
      exponents[i] = half >> 7 & 0xFF;
      rest[i] = (half >> 8 & 0x80) | (half & 0x7F);
    }
  }

  __device__ __forceinline__ Escapes encode_with(unsigned new_base, int lane) {
    base = new_base;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned offset = base - exponents[i];  // far beyond the window where negative
      codes[i] = exponents[i] == 0 ? kZero : offset < kWindow ? offset : kEscape;
    }
    return {codes, lane};
  }

  // The escapes; more than kPool: the block does not fit.
  __device__ __forceinline__ Escapes encode(int lane) {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max(largest, exponents[i] == kNotFinite ? 0u : exponents[i]);
    const auto escapes = encode_with(warp_max(largest), lane);
    return escapes.all > kPool ? encode_with(best_base(), lane) : escapes;  // the same for all lanes, and rare
  }

  // The base with the fewest escapes, the largest of these: its window ends at an exponent that occurs, or at 255.
  __device__ unsigned best_base() const {
    int most = -1;
    unsigned best = 0;
    for (int candidate = 0; candidate < kBlock; ++candidate) {
      const int source = candidate / 4;
      unsigned lowest = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned of_source = __shfl_sync(kAllLanes, exponents[i], source);
        lowest = candidate % 4 == i ? of_source : lowest;
      }
      if (lowest == 0) continue;  // the same for all lanes
      const unsigned tried = min(lowest + kWindow - 1, 255u);
      int inside = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        inside += __popc(__ballot_sync(kAllLanes, exponents[i] != 0 && tried - exponents[i] < kWindow));
      if (inside > most || (inside == most && tried > best)) {
        most = inside;
        best = tried;
      }
    }
    return best;
  }

  // Without escapes: see csrc/compressor/e4m7.cpp.
  __device__ void round_off(bool refuse) {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max(largest, exponents[i]);
    largest = warp_max(largest);
    if (refuse) largest = kNotFinite;
    base = largest;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned offset = largest - exponents[i];
      if (largest == kNotFinite) {
        codes[i] = 0;
        rest[i] = 0x7F;
      } else if (exponents[i] == 0) {
        codes[i] = kZero;
      } else if (offset >= kWindow) {
        codes[i] = offset == kWindow ? kWindow - 1 : kZero;
        rest[i] &= 0x80;
      } else {
        codes[i] = offset;
      }
    }
  }
};

template <bool kRefuse>
struct E4M7 {
  using Value = float;
  static constexpr int kLaneValues = 4;
  static constexpr int kUnroll = 4;
  static constexpr int kWireBytes = 8;

  static __device__ __forceinline__ void encode(const WireRow& wire, int64_t unit, const float (&values)[4]) {
    const auto count = count_of(wire, unit);
    Block block(values);
    auto escapes = block.encode(wire.lane);
    if (escapes.all > kPool) {  // the same for all lanes, and rare
      block.round_off(kRefuse);
      escapes.all = 0;
    }
    store_rest(wire, unit, count, block.rest);
    store_codes(wire, codes_at(wire, unit), count, block.codes);
    uint8_t* head = head_at(wire, unit);
    if (wire.lane == 0) store_bytes(head, wire.full && wire.aligned, uint64_t{block.base});
    if (escapes.all == 0) return;
    __syncwarp();  // after the zeros of the pool
    int place = escapes.before;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (block.codes[i] == kEscape) head[1 + place++] = static_cast<uint8_t>(block.exponents[i]);
  }

  static __device__ __forceinline__ void decode(const WireRow& wire, int64_t unit, float (&values)[4]) {
    const auto count = count_of(wire, unit);
    const auto head = load_bytes<uint64_t>(head_at(wire, unit), wire.full && wire.aligned);
    unsigned codes[4];
    load_codes(wire, codes_at(wire, unit), count, codes);
    const Escapes escapes(codes, wire.lane);
    const bool valid = escapes.all <= kPool;
    const unsigned base = head & 0xFF;
    uint64_t pool = head >> 8 >> (8 * min(escapes.before, kPool - 1));
    const uint8_t* rest = wire.bytes + kBlock * unit + 4 * wire.lane;
    const unsigned word = wire.full ? load_bytes<unsigned>(rest, wire.aligned) : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned exponent = codes[i] == kZero ? 0 : (base - codes[i]) & 0xFF;
      const bool escaped = codes[i] == kEscape;
      exponent = escaped ? static_cast<unsigned>(pool & 0xFF) : exponent;
      pool = escaped ? pool >> 8 : pool;
      unsigned bits = word >> (8 * i) & 0xFF;
      if (!wire.full) bits = 4 * wire.lane + i < count ? rest[i] : 0;
      const float value = __uint_as_float((bits & 0x80) << 24 | exponent << 23 | (bits & 0x7F) << 16);
      values[i] = valid ? value : __uint_as_float(0x7FC00000u);
    }
  }

 private:
  static __device__ __forceinline__ int64_t count_of(const WireRow& wire, int64_t unit) {
    return wire.full ? kBlock : min(kBlock, wire.hidden - unit * kBlock);
  }
  static __device__ __forceinline__ uint8_t* codes_at(const WireRow& wire, int64_t unit) {
    return wire.bytes + wire.hidden + kBlock / 2 * unit;
  }
  static __device__ __forceinline__ uint8_t* head_at(const WireRow& wire, int64_t unit) {
    return wire.bytes + wire.hidden + (wire.hidden + 1) / 2 + kHead * unit;
  }

  // The code of value `place` of the block, of any lane.
  static __device__ __forceinline__ unsigned code_at(const unsigned (&codes)[4], int place) {
    unsigned code = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned of_lane = __shfl_sync(kAllLanes, codes[i], place / 4 % kWarp);
      code = place % 4 == i ? of_lane : code;
    }
    return code;
  }

  static __device__ __forceinline__ void store_rest(const WireRow& wire, int64_t unit, int64_t count,
                                                    const unsigned (&rest)[4]) {
    uint8_t* to = wire.bytes + kBlock * unit + 4 * wire.lane;
    if (wire.full) return store_bytes(to, wire.aligned, rest[0] | rest[1] << 8 | rest[2] << 16 | rest[3] << 24);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * wire.lane + i < count) to[i] = static_cast<uint8_t>(rest[i]);
  }

  static __device__ __forceinline__ void store_codes(const WireRow& wire, uint8_t* packed, int64_t count,
                                                     const unsigned (&codes)[4]) {
    if (wire.full) {
      unsigned word = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) word |= codes[i] << (8 * i);
      word |= __shfl_down_sync(kAllLanes, word, 16) << 4;
      if (wire.lane < 16) store_bytes(packed + 4 * wire.lane, wire.aligned, word);
      return;
    }
    const int half = static_cast<int>((count + 1) / 2);
#pragma unroll
    for (int first = 0; first < kBlock / 2; first += kWarp) {
      const int place = first + wire.lane;
      const unsigned low = code_at(codes, place), high = code_at(codes, place + half);
      if (place < half) packed[place] = static_cast<uint8_t>(low | (place + half < count ? high << 4 : 0));
    }
  }

  static __device__ __forceinline__ void load_codes(const WireRow& wire, const uint8_t* packed, int64_t count,
                                                    unsigned (&codes)[4]) {
    if (wire.full) {
      const unsigned word = load_bytes<unsigned>(packed + 4 * (wire.lane % 16), wire.aligned);
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[i] = word >> (8 * i + (wire.lane < 16 ? 0 : 4)) & 15;
      return;
    }
    const int64_t half = (count + 1) / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t place = 4 * wire.lane + i;
      codes[i] = kZero;
      if (place < count) codes[i] = place < half ? packed[place] & 15 : packed[place - half] >> 4;
    }
  }
};

__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) check_kernel(const RowArguments rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= rows.num_rows) return;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const auto* values = static_cast<const __nv_bfloat16*>(rows.rows) + row * rows.hidden;
  const bool aligned = (reinterpret_cast<uintptr_t>(rows.rows) | rows.hidden * 2) % 8 == 0;
  for (int64_t start = 0; start < rows.hidden; start += kBlock) {
    float some[4];
    load_values(values, start + 4 * lane, rows.hidden, aligned, some);
    if (Block(some).encode(lane).all > kPool && lane == 0) *rows.refused = 1;
  }
}

bool add_both() {
  constexpr int kOwn = kScalarOf<__nv_bfloat16>;
  RowKernels rounding, refusing;
  add_kernels_for<E4M7<false>, float>(rounding);
  add_kernels_for<E4M7<false>, __nv_bfloat16>(rounding);
  rounding.add[0] = launch_add<E4M7<false>, float>;
  refusing.pack[kOwn] = launch_pack<E4M7<true>, __nv_bfloat16>;  // of tokens, which are not summed up
  refusing.unpack[kOwn] = rounding.unpack[kOwn];
  refusing.spread[kOwn] = rounding.spread[kOwn];
  return add_row_kernels("e4m7", Scalar::kBFloat16, rounding) &&
         add_row_kernels("lossless", Scalar::kBFloat16, refusing);
}

const bool added = add_both();

}  // namespace

cudaError_t check_lossless(const RowArguments& rows, cudaStream_t stream) {
  if (rows.num_rows == 0 || rows.hidden == 0) return cudaSuccess;
  const int64_t blocks = (rows.num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  check_kernel<<<static_cast<unsigned>(blocks), kWarpsPerBlock * kWarp, 0, stream>>>(rows);
  return cudaGetLastError();
}

}  // namespace planmoe::cuda
