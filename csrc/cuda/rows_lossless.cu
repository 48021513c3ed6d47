// lossless: bfloat16 rows with four bits for most exponents. Wire format: csrc/compressor/lossless.cpp; bytes are the same
// as there. A warp works through a row from its beginning, since every block continues the pool of the one before.
//
// A row that cannot be carried (ask check_lossless before) comes back as NaN and infinities: its codes all become
// escapes, more than any pool holds.
#include "row_launch.cuh"

namespace planmoe::cuda {
namespace {

constexpr int64_t kBlock = 128;
constexpr unsigned kWindow = 14, kZero = 14, kEscape = 15;

struct Layout {
  int64_t blocks, codes, bases, pool;
  int room;  // of the pool

  __device__ __forceinline__ explicit Layout(int64_t hidden)
      : blocks((hidden + kBlock - 1) / kBlock),
        codes(hidden),
        bases(codes + (hidden + 1) / 2),
        pool(bases + blocks),
        room(static_cast<int>(3 * blocks + 2)) {}
};

__device__ __forceinline__ unsigned code_of(unsigned exponent, unsigned base) {
  const unsigned offset = base - exponent;  // far beyond the window where negative
  return exponent == 0 ? kZero : offset < kWindow ? offset : kEscape;
}

// A block's exponents as lanes hold them, four each; those beyond the row are 0.
struct Block {
  unsigned exponents[4];
  unsigned codes[4];
  unsigned base;
  int escapes;  // of all lanes
  int before;   // of the lanes before this one

  __device__ __forceinline__ void count_escapes(int lane) {
    escapes = before = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned escaped = __ballot_sync(kAllLanes, codes[i] == kEscape);
      escapes += __popc(escaped);
      before += __popc(escaped & ((1u << lane) - 1));
    }
  }

  __device__ __forceinline__ void encode_with(unsigned new_base, int lane) {
    base = new_base;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = code_of(exponents[i], base);
    count_escapes(lane);
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

  __device__ __forceinline__ void encode(const float (&values)[4], int lane) {
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      exponents[i] = __float_as_uint(values[i]) >> 23 & 0xFF;
      largest = max(largest, exponents[i] == 255 ? 0u : exponents[i]);
    }
    encode_with(warp_max(largest), lane);
    if (escapes > 1) encode_with(best_base(), lane);  // the same for all lanes, and rare
  }
};

struct Lossless {
  using Value = float;
  static constexpr int kLaneValues = 4;
  static constexpr int kUnroll = 4;
  static constexpr int kWireBytes = 4;
  static constexpr bool kWholeRows = true;

  static __device__ __forceinline__ int64_t count_of(const WireRow& wire, int64_t unit) {
    return wire.full ? kBlock : min(kBlock, wire.hidden - unit * kBlock);
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

  static __device__ __forceinline__ void encode(const WireRow& wire, int64_t unit, const float (&values)[4]) {
    const Layout at(wire.hidden);
    const auto count = count_of(wire, unit);
    Block block;
    block.encode(values, wire.lane);
    int place = wire.cursor + block.before;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (block.codes[i] != kEscape) continue;
      if (place < at.room) wire.bytes[at.pool + place] = static_cast<uint8_t>(block.exponents[i]);
      ++place;
    }
    wire.cursor += block.escapes;
    if (wire.lane == 0) wire.bytes[at.bases + unit] = static_cast<uint8_t>(block.base);
    store_rest(wire, unit, count, values);
    store_codes(wire, wire.bytes + at.codes + kBlock / 2 * unit, count, block.codes);
    if (unit + 1 == at.blocks) end_row(wire, at);
  }

  static __device__ __forceinline__ void decode(const WireRow& wire, int64_t unit, float (&values)[4]) {
    const Layout at(wire.hidden);
    const auto count = count_of(wire, unit);
    Block block;
    block.base = wire.bytes[at.bases + unit];
    load_codes(wire, wire.bytes + at.codes + kBlock / 2 * unit, count, block.codes);
    block.count_escapes(wire.lane);
    int place = wire.cursor + block.before;
    wire.cursor += block.escapes;
    const bool valid = wire.cursor <= at.room;
    const uint8_t* rest = wire.bytes + kBlock * unit + 4 * wire.lane;
    const unsigned word = wire.full ? load_bytes<unsigned>(rest, wire.aligned) : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unsigned exponent = block.codes[i] == kZero ? 0 : (block.base - block.codes[i]) & 0xFF;
      if (block.codes[i] == kEscape) {
        exponent = valid ? wire.bytes[at.pool + place] : 255;
        ++place;
      }
      unsigned bits = word >> (8 * i) & 0xFF;
      if (!wire.full) bits = 4 * wire.lane + i < count ? rest[i] : 0;
      const float value = __uint_as_float((bits & 0x80) << 24 | exponent << 23 | (bits & 0x7F) << 16);
      values[i] = valid ? value : __uint_as_float(0x7FC00000u);
    }
  }

 private:
  static __device__ __forceinline__ void store_rest(const WireRow& wire, int64_t unit, int64_t count,
                                                    const float (&values)[4]) {
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned bits = __float_as_uint(values[i]);
      word |= (bits >> 24 & 0x80 | bits >> 16 & 0x7F) << (8 * i);
    }
    uint8_t* rest = wire.bytes + kBlock * unit + 4 * wire.lane;
    if (wire.full) return store_bytes(rest, wire.aligned, word);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (4 * wire.lane + i < count) rest[i] = static_cast<uint8_t>(word >> (8 * i));
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

  // Zeros after the pool, or a row that says that it could not be carried.
  static __device__ __forceinline__ void end_row(const WireRow& wire, const Layout& at) {
    __syncwarp();  // after what the lanes have stored there
    const bool refused = wire.cursor > at.room;
    for (int i = (refused ? 0 : wire.cursor) + wire.lane; i < at.room; i += kWarp)
      wire.bytes[at.pool + i] = refused ? 0xFF : 0;
    if (!refused) return;
    for (int64_t i = at.codes + wire.lane; i < at.bases; i += kWarp) wire.bytes[i] = 0xFF;
  }
};

__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) check_kernel(const RowArguments rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= rows.num_rows) return;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const auto* values = static_cast<const __nv_bfloat16*>(rows.rows) + row * rows.hidden;
  const bool aligned = (reinterpret_cast<uintptr_t>(rows.rows) | rows.hidden * 2) % 8 == 0;
  const Layout at(rows.hidden);
  int escapes = 0;
  for (int64_t unit = 0; unit < at.blocks; ++unit) {
    float some[4];
    load_values(values, unit * kBlock + 4 * lane, rows.hidden, aligned, some);
    Block block;
    block.encode(some, lane);
    escapes += block.escapes;
  }
  if (lane == 0 && escapes > at.room) *rows.refused = 1;
}

bool add_lossless() {
  RowKernels kernels;
  constexpr int kOwn = kScalarOf<__nv_bfloat16>;
  kernels.pack[kOwn] = launch_pack<Lossless, __nv_bfloat16>;
  kernels.unpack[kOwn] = launch_unpack<Lossless, __nv_bfloat16>;
  kernels.spread[kOwn] = launch_spread<Lossless, __nv_bfloat16>;
  return add_row_kernels("lossless", Scalar::kBFloat16, kernels);
}

const bool added = add_lossless();

}  // namespace

cudaError_t check_lossless(const RowArguments& rows, cudaStream_t stream) {
  if (rows.num_rows == 0 || rows.hidden == 0) return cudaSuccess;
  const int64_t blocks = (rows.num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  check_kernel<<<static_cast<unsigned>(blocks), kWarpsPerBlock * kWarp, 0, stream>>>(rows);
  return cudaGetLastError();
}

}  // namespace planmoe::cuda
