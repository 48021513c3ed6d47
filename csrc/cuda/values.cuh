// Values of rows as threads see them: conversions, and loads and stores of several neighbours at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace planmoe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int64_t kAlways = INT64_MAX;  // as the number of columns: no column needs a comparison

__device__ __forceinline__ void convert(float from, float& to) { to = from; }
__device__ __forceinline__ void convert(__half from, float& to) { to = __half2float(from); }
__device__ __forceinline__ void convert(__nv_bfloat16 from, float& to) { to = __bfloat162float(from); }
__device__ __forceinline__ void convert(float from, __half& to) { to = __float2half_rn(from); }
__device__ __forceinline__ void convert(float from, __nv_bfloat16& to) { to = __float2bfloat16_rn(from); }
// Bits that are only moved.
__device__ __forceinline__ void convert(uint8_t from, uint8_t& to) { to = from; }
__device__ __forceinline__ void convert(uint16_t from, uint16_t& to) { to = from; }
__device__ __forceinline__ void convert(uint32_t from, uint32_t& to) { to = from; }

template <int kBytes>
struct Word {
  using Type = uint4;  // of 16 bytes and above
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};

// What an address and a stride must be multiples of, for kCount values at once.
template <class Stored, int kCount>
constexpr int kVectorBytes = sizeof(Stored) * kCount < 16 ? sizeof(Stored) * kCount : 16;

template <class Stored, int kCount>
struct alignas(kVectorBytes<Stored, kCount>) Several {
  using Chunk = typename Word<kVectorBytes<Stored, kCount>>::Type;
  static constexpr int kChunks = sizeof(Stored) * kCount / sizeof(Chunk);
  Stored value[kCount];
};

// Numbers that may lie at any address.
template <class Number>
__device__ __forceinline__ Number load_bytes(const uint8_t* at, bool aligned) {
  if (aligned) return *reinterpret_cast<const Number*>(at);
  Number number;
#pragma unroll
  for (unsigned i = 0; i < sizeof(Number); ++i) reinterpret_cast<uint8_t*>(&number)[i] = at[i];
  return number;
}

template <class Number>
__device__ __forceinline__ void store_bytes(uint8_t* at, bool aligned, const Number& number) {
  if (aligned) {
    *reinterpret_cast<Number*>(at) = number;
    return;
  }
#pragma unroll
  for (unsigned i = 0; i < sizeof(Number); ++i) at[i] = reinterpret_cast<const uint8_t*>(&number)[i];
}

template <class Stored>
__device__ __forceinline__ bool is_aligned(const Stored* at) {
  return reinterpret_cast<uintptr_t>(at) % sizeof(Stored) == 0;
}

template <class Stored>
__device__ __forceinline__ const uint8_t* bytes_of(const Stored* at) {
  return reinterpret_cast<const uint8_t*>(at);
}

// values[i] = row[column + i] for columns below `count`, else 0. `aligned`: the row may be read several values at once.
template <class Stored, class Value, int kCount>
__device__ __forceinline__ void load_values(const Stored* row, int64_t column, int64_t count, bool aligned,
                                            Value (&values)[kCount]) {
  using Pack = Several<Stored, kCount>;
  using Chunk = typename Pack::Chunk;
  if (aligned && (count == kAlways || column + kCount <= count)) {
    Pack pack;
#pragma unroll
    for (int c = 0; c < Pack::kChunks; ++c)
      reinterpret_cast<Chunk*>(&pack)[c] = reinterpret_cast<const Chunk*>(row + column)[c];
#pragma unroll
    for (int i = 0; i < kCount; ++i) convert(pack.value[i], values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = Value{};
    if (column + i < count) convert(load_bytes<Stored>(bytes_of(row + column + i), is_aligned(row)), values[i]);
  }
}

template <class Stored, class Value, int kCount>
__device__ __forceinline__ void store_values(Stored* row, int64_t column, int64_t count, bool aligned,
                                             const Value (&values)[kCount]) {
  using Pack = Several<Stored, kCount>;
  using Chunk = typename Pack::Chunk;
  if (aligned && (count == kAlways || column + kCount <= count)) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) convert(values[i], pack.value[i]);
#pragma unroll
    for (int c = 0; c < Pack::kChunks; ++c)  // not by assignment, which may become several smaller stores
      __stwb(reinterpret_cast<Chunk*>(row + column) + c, reinterpret_cast<const Chunk*>(&pack)[c]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (column + i >= count) continue;
    Stored stored;
    convert(values[i], stored);
    store_bytes(reinterpret_cast<uint8_t*>(row + column + i), is_aligned(row), stored);
  }
}

__device__ __forceinline__ unsigned warp_max(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAllLanes, value);
#else
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = max(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
#endif
}

// The same order of additions whatever the card.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

}  // namespace planmoe::cuda
