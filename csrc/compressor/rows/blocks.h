// What the scaled codecs share: blocks of 128 values, their scales, rounding, the Hadamard transform.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vectors.h"

namespace planmoe {

constexpr int64_t kBlock = 128;
constexpr uint32_t kInfinityBits = 0x7F800000;
constexpr uint32_t kTinyBits = (127 - 100) << 23;  // 2^-100: blocks below it are zeros, so that 1 / scale is finite
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline int64_t num_blocks(int64_t hidden) { return hidden / kBlock + (hidden % kBlock != 0); }

// The bits of the largest magnitude; kInfinityBits or more when a value is not finite.
PLANMOE_INLINE inline uint32_t largest_magnitude(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(values[i]) & 0x7FFFFFFF);
  return largest;
}

// A block's scale; inverse is 0 for blocks of zeros. `largest`: bits of a finite magnitude.
struct Scale {
  float scale;
  float inverse;
};

PLANMOE_INLINE inline Scale scale_to(uint32_t largest, float most) {
  if (largest < kTinyBits) return {0.0f, 0.0f};
  const float scale = std::bit_cast<float>(largest) / most;
  return {scale, 1.0f / scale};
}

// Nearest integer, ties to even, of |value| < 2^22, by an addition that leaves it in the low bits.
PLANMOE_INLINE inline int32_t to_integer(float value) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return std::bit_cast<int32_t>(value + kMagic) - std::bit_cast<int32_t>(kMagic);
}

// code[i] = value[i] * inverse, rounded, in [-127, 127]
PLANMOE_INLINE inline void to_codes(const float* values, int64_t count, float inverse, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t code = to_integer(values[i] * inverse);
    codes[i] = static_cast<uint8_t>(std::min(127, std::max(-127, code)));
  }
}

PLANMOE_INLINE inline float load_float(const uint8_t* bytes) {
  float value;
  std::memcpy(&value, bytes, 4);
  return value;
}

PLANMOE_INLINE inline void store_float(float value, uint8_t* bytes) { std::memcpy(bytes, &value, 4); }

// Nearest even; a NaN stays one, large values become infinite.
PLANMOE_INLINE inline uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > kInfinityBits ? quiet : rounded);
}

PLANMOE_INLINE inline float from_bfloat16(uint16_t half) {
  return std::bit_cast<float>(static_cast<uint32_t>(half) << 16);
}

// -1 where the bits of the place i, taken in pairs, hold an odd number of pairs of ones, else 1. Flipping these signs
// first keeps the transform of a constant block flat: without it one coefficient would hold everything.
constexpr float hadamard_sign(int place) {
  return std::popcount(static_cast<unsigned>(place & (place >> 1) & 0x15)) % 2 == 1 ? -1.0f : 1.0f;
}

struct HadamardSigns {
  alignas(64) float value[kBlock];
  constexpr HadamardSigns() : value() {
    for (int i = 0; i < kBlock; ++i) value[i] = hadamard_sign(i);
  }
};
inline constexpr HadamardSigns kHadamardSigns;

template <int lanes>
struct VectorOf {
  typedef float Floats __attribute__((vector_size(4 * lanes)));
  typedef int32_t Integers __attribute__((vector_size(4 * lanes)));
};

// Exchanges lanes `step` apart and adds or subtracts: the butterflies inside a vector.
template <int lanes, int step>
PLANMOE_INLINE inline void butterflies_inside(float* block) {
  typename VectorOf<lanes>::Integers partner;
  typename VectorOf<lanes>::Floats sign, values;
  for (int lane = 0; lane < lanes; ++lane) {
    partner[lane] = lane ^ step;
    sign[lane] = (lane & step) ? -1.0f : 1.0f;
  }
  for (int64_t start = 0; start < kBlock; start += lanes) {
    std::memcpy(&values, block + start, sizeof(values));
    values = __builtin_shuffle(values, partner) + values * sign;
    std::memcpy(block + start, &values, sizeof(values));
  }
}

template <int step>
PLANMOE_INLINE inline void butterflies_between(float* block) {
  for (int64_t start = 0; start < kBlock; start += 2 * step) {
    for (int64_t i = start; i < start + step; ++i) {
      const float left = block[i], right = block[i + step];
      block[i] = left + right;
      block[i + step] = left - right;
    }
  }
}

template <int lanes, int step>
PLANMOE_INLINE inline void butterflies(float* block) {
  if constexpr (step < lanes)
    butterflies_inside<lanes, step>(block);
  else
    butterflies_between<step>(block);
}

// block[k] = sum over i of (-1)^popcount(i & k) * block[i], in place: not normalised, its square is 128 times identity.
// The order of the additions is the same for all `lanes`.
template <int lanes>
PLANMOE_INLINE inline void hadamard(float* block) {
  butterflies<lanes, 1>(block);
  butterflies<lanes, 2>(block);
  butterflies<lanes, 4>(block);
  butterflies<lanes, 8>(block);
  butterflies<lanes, 16>(block);
  butterflies<lanes, 32>(block);
  butterflies<lanes, 64>(block);
}

// `count` values (more are zeros), times 2^-exponent, signs flipped, transformed: coefficients below 2^9. Returns
// 2^exponent, where the largest magnitude lies in [2^exponent, 2^(exponent + 2)); `largest`: its bits, not tiny.
template <int lanes>
PLANMOE_INLINE inline float to_coefficients(const float* values, int64_t count, uint32_t largest, float* block) {
  const uint32_t exponent = std::min<uint32_t>(largest >> 23, 253);  // 2^-126 is the smallest normal factor
  const auto factor = std::bit_cast<float>((254 - exponent) << 23);
  for (int64_t i = 0; i < count; ++i) block[i] = values[i] * factor * kHadamardSigns.value[i];
  for (int64_t i = count; i < kBlock; ++i) block[i] = 0.0f;
  hadamard<lanes>(block);
  return std::bit_cast<float>(exponent << 23);
}

// The way back, for the first `count` values: block holds coefficients, and is overwritten. Rounding makes no infinity of
// the largest floats; a NaN stays one.
template <int lanes>
PLANMOE_INLINE inline void from_coefficients(float* block, float scale, int64_t count, float* values) {
  hadamard<lanes>(block);
  constexpr float kMost = std::numeric_limits<float>::max();
  for (int64_t i = 0; i < count; ++i)
    values[i] = std::min(std::max(block[i] * kHadamardSigns.value[i] * scale, -kMost), kMost);
}

}  // namespace planmoe
