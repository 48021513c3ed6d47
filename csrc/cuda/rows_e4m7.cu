// e4m7 and lossless: bfloat16 rows with four bits for most exponents. Wire format: csrc/compressor/e4m7.cpp; bytes are the
// same as there.
//
// A block that lossless cannot carry comes back as NaN, and it notes so. Half a warp works on a block, eight
// values per lane as `none` has for bfloat16: dot products add in the same order, and rows that fit give the same bits.
#include "row_launch.cuh"

namespace planmoe::cuda {
namespace {

constexpr int64_t kBlock = 128, kHead = 8;
constexpr unsigned kWindow = 14, kZero = 14, kEscape = 15, kNotFinite = 255;
constexpr int kPool = 7, kLaneValues = 8, kHalf = kWarp / 2;

// Of bfloat16, to nearest even; a NaN stays one.
__device__ __forceinline__ unsigned half_of(float value) {
  const unsigned bits = __float_as_uint(value);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? bits >> 16 | 0x40u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}

// Lanes of this lane's half for which `condition` holds, as bits.
__device__ __forceinline__ unsigned vote(bool condition, int lane) {
  return __ballot_sync(kAllLanes, condition) >> (lane & kHalf) & 0xFFFFu;
}

__device__ __forceinline__ unsigned half_max(unsigned value) {
#pragma unroll
  for (int step = kHalf / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// How many of the block's codes are escapes, and how many of those come before this lane's.
struct Escapes {
  int all = 0;
  int before = 0;

  __device__ __forceinline__ Escapes(const unsigned (&codes)[kLaneValues], int lane) {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const unsigned escaped = vote(codes[i] == kEscape, lane);
      all += __popc(escaped);
      before += __popc(escaped & ((1u << lane % kHalf) - 1));
    }
  }
};

// A lane's part of a block; values beyond the row are 0.
struct LanePart {
  unsigned rest[kLaneValues];  // sign and fraction
  unsigned exponents[kLaneValues];
  unsigned codes[kLaneValues];
  unsigned base;
  bool fits;

  // Finds the base and the codes.
  __device__ __forceinline__ LanePart(const float (&values)[kLaneValues], int lane) {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const unsigned half = half_of(values[i]);
      exponents[i] = half >> 7 & 0xFF;
      rest[i] = (half >> 8 & 0x80) | (half & 0x7F);
      largest = max(largest, exponents[i] == kNotFinite ? 0u : exponents[i]);
    }
    base = half_max(largest);
    fits = encode_with_base(lane);
    if (__all_sync(kAllLanes, fits)) return;
    const unsigned best = best_base(lane);
    base = fits ? base : best;
    fits = encode_with_base(lane);
  }

  __device__ __forceinline__ bool encode_with_base(int lane) {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const unsigned offset = base - exponents[i];  // far beyond the window where negative
      codes[i] = exponents[i] == 0 ? kZero : offset < kWindow ? offset : kEscape;
    }
    return Escapes(codes, lane).all <= kPool;
  }

  // The base with the fewest escapes, the largest of these: its window ends at an exponent that occurs, or at 255.
  __device__ unsigned best_base(int lane) const {
    int most = -1;
    unsigned best = 0;
    for (int source = 0; source < kHalf; ++source) {
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) {
        const unsigned lowest = __shfl_sync(kAllLanes, exponents[i], (lane & kHalf) + source);
        const unsigned tried = min(lowest + kWindow - 1, 255u);
        int inside = 0;
#pragma unroll
        for (int j = 0; j < kLaneValues; ++j)
          inside += __popc(vote(exponents[j] != 0 && tried - exponents[j] < kWindow, lane));
        if (lowest != 0 && (inside > most || (inside == most && tried > best))) {
          most = inside;
          best = tried;
        }
      }
    }
    return best;
  }

  // Without escapes, where the block does not fit: see csrc/compressor/e4m7.cpp.
  __device__ void round_off(bool refuse) {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) largest = max(largest, exponents[i]);
    largest = half_max(largest);
    if (fits) return;
    base = refuse ? kNotFinite : largest;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const unsigned offset = base - exponents[i];
      if (base == kNotFinite) {
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

// Bytes of eight numbers below 256.
__device__ __forceinline__ uint64_t to_bytes(const unsigned (&numbers)[kLaneValues]) {
  uint64_t bytes = 0;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) bytes |= static_cast<uint64_t>(numbers[i]) << (8 * i);
  return bytes;
}

// Where a lane's block is on the wire.
struct Place {
  uint8_t* rest;    // of the lane's values
  uint8_t* packed;  // codes of the block
  uint8_t* head;
  int count;  // values of the block, 0 beyond the row
  int first;  // the lane's first value

  __device__ __forceinline__ Place(const WireRow& wire, int64_t unit) {
    const int64_t block = 2 * unit + wire.lane / kHalf;
    first = kLaneValues * (wire.lane % kHalf);
    rest = wire.bytes + kBlock * block + first;
    packed = wire.bytes + wire.hidden + kBlock / 2 * block;
    head = wire.bytes + wire.hidden + (wire.hidden + 1) / 2 + kHead * block;
    count = wire.full ? kBlock : static_cast<int>(max(int64_t{0}, min(kBlock, wire.hidden - kBlock * block)));
  }
};

template <bool kRefuse>
struct E4M7 {
  using Value = float;
  static constexpr int kLaneValues = planmoe::cuda::kLaneValues;
  static constexpr int kUnroll = 2;
  static constexpr int kWireBytes = 8;

  static __device__ __forceinline__ void encode(const WireRow& wire, int64_t unit, const float (&values)[kLaneValues]) {
    const Place at(wire, unit);
    LanePart part(values, wire.lane);
    if (!__all_sync(kAllLanes, part.fits)) {
      part.round_off(kRefuse);
      if (kRefuse && !part.fits) *wire.refused = 1;
    }
    store_rest(wire, at, part.rest);
    store_codes(wire, at, part.codes);
    const bool aligned = wire.full && wire.aligned;
    if (wire.lane % kHalf == 0 && at.count > 0) store_bytes(at.head, aligned, uint64_t{part.base});
    const Escapes escapes(part.codes, wire.lane);
    if (__all_sync(kAllLanes, escapes.all == 0)) return;
    __syncwarp();  // after the zeros of the pool
    int place = escapes.before;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i)
      if (part.codes[i] == kEscape) at.head[1 + place++] = static_cast<uint8_t>(part.exponents[i]);
  }

  static __device__ __forceinline__ void decode(const WireRow& wire, int64_t unit, float (&values)[kLaneValues]) {
    const Place at(wire, unit);
    const auto head = at.count > 0 ? load_bytes<uint64_t>(at.head, wire.full && wire.aligned) : uint64_t{0};
    unsigned codes[kLaneValues];
    load_codes(wire, at, codes);
    const Escapes escapes(codes, wire.lane);
    const bool valid = escapes.all <= kPool;
    const unsigned base = head & 0xFF;
    uint64_t pool = head >> 8 >> (8 * min(escapes.before, kPool - 1));
    uint64_t rest = 0;
    if (wire.full) {
      rest = load_bytes<uint64_t>(at.rest, wire.aligned);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i)
        if (at.first + i < at.count) rest |= static_cast<uint64_t>(at.rest[i]) << (8 * i);
    }
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const bool escaped = codes[i] == kEscape;
      unsigned exponent = codes[i] == kZero ? 0 : (base - codes[i]) & 0xFF;
      exponent = escaped ? static_cast<unsigned>(pool & 0xFF) : exponent;
      pool = escaped ? pool >> 8 : pool;
      const unsigned bits = static_cast<unsigned>(rest >> (8 * i)) & 0xFF;
      const float value = __uint_as_float((bits & 0x80) << 24 | exponent << 23 | (bits & 0x7F) << 16);
      values[i] = valid ? value : __uint_as_float(0x7FC00000u);
    }
  }

 private:
  // The code of value `place` of the block, of any lane.
  static __device__ __forceinline__ unsigned code_at(const unsigned (&codes)[kLaneValues], int place, int lane) {
    unsigned code = 0;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const unsigned of_lane = __shfl_sync(kAllLanes, codes[i], (lane & kHalf) + place / kLaneValues % kHalf);
      code = place % kLaneValues == i ? of_lane : code;
    }
    return code;
  }

  static __device__ __forceinline__ void store_rest(const WireRow& wire, const Place& at,
                                                    const unsigned (&rest)[kLaneValues]) {
    if (wire.full) return store_bytes(at.rest, wire.aligned, to_bytes(rest));
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i)
      if (at.first + i < at.count) at.rest[i] = static_cast<uint8_t>(rest[i]);
  }

  static __device__ __forceinline__ void store_codes(const WireRow& wire, const Place& at,
                                                     const unsigned (&codes)[kLaneValues]) {
    if (wire.full) {
      uint64_t bytes = to_bytes(codes);
      bytes |= __shfl_down_sync(kAllLanes, bytes, kHalf / 2) << 4;
      if (wire.lane % kHalf < kHalf / 2) store_bytes(at.packed + at.first, wire.aligned, bytes);
      return;
    }
    const int half = (at.count + 1) / 2;
    for (int place = wire.lane % kHalf; place < kBlock / 2; place += kHalf) {
      const unsigned low = code_at(codes, place, wire.lane), high = code_at(codes, place + half, wire.lane);
      if (place < half) at.packed[place] = static_cast<uint8_t>(low | (place + half < at.count ? high << 4 : 0));
    }
  }

  static __device__ __forceinline__ void load_codes(const WireRow& wire, const Place& at,
                                                    unsigned (&codes)[kLaneValues]) {
    if (wire.full) {
      const bool low = wire.lane % kHalf < kHalf / 2;
      const auto bytes = load_bytes<uint64_t>(at.packed + at.first % (kBlock / 2), wire.aligned) >> (low ? 0 : 4);
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) codes[i] = static_cast<unsigned>(bytes >> (8 * i)) & 15;
      return;
    }
    const int half = (at.count + 1) / 2;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int place = at.first + i;
      codes[i] = kZero;
      if (place < at.count) codes[i] = place < half ? at.packed[place] & 15 : at.packed[place - half] >> 4;
    }
  }
};

__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) check_kernel(const RowArguments rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= rows.num_rows) return;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const auto* values = static_cast<const __nv_bfloat16*>(rows.rows) + row * rows.hidden;
  const bool aligned = (reinterpret_cast<uintptr_t>(rows.rows) | rows.hidden * 2) % 16 == 0;
  for (int64_t start = 0; start < rows.hidden; start += kLaneValues * kWarp) {
    float some[kLaneValues];
    load_values(values, start + kLaneValues * lane, rows.hidden, aligned, some);
    if (!LanePart(some, lane).fits) *rows.refused = 1;
  }
}

bool add_both() {
  constexpr int kOwn = kScalarOf<__nv_bfloat16>;
  RowKernels rounding, refusing;
  add_kernels_for<E4M7<false>, float>(rounding);
  add_kernels_for<E4M7<false>, __nv_bfloat16>(rounding);
  rounding.add[0] = launch_add<E4M7<false>, float>;
  refusing = rounding;
  refusing.pack[kScalarOf<float>] = launch_pack<E4M7<true>, float>;
  refusing.pack[kOwn] = launch_pack<E4M7<true>, __nv_bfloat16>;
  refusing.fold[kScalarOf<float>] = launch_fold<E4M7<true>, float>;
  refusing.fold[kOwn] = launch_fold<E4M7<true>, __nv_bfloat16>;
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
