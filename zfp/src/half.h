// float16 and bfloat16 <-> float32, one value. Narrowing rounds to nearest even; finite values stay finite.
#pragma once

#include <cstdint>
#include <cstring>

#include "format.h"

namespace planmoe::zfp {

PLANMOE_ZFP_SHARED static inline std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

PLANMOE_ZFP_SHARED static inline float bits_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float widen_float16(std::uint16_t half) {
  std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  std::uint32_t exponent = (half >> 10) & 31u;
  std::uint32_t mantissa = half & 0x3FFu;
  if (exponent == 31) return bits_float(sign | 0x7F800000u | (mantissa << 13));
  if (exponent == 0) {
    float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return bits_float(sign | float_bits(magnitude));
  }
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

static inline float widen_bfloat16(std::uint16_t half) { return bits_float(static_cast<std::uint32_t>(half) << 16); }

static inline std::uint16_t narrow_float16(float value) {
  std::uint32_t bits = float_bits(value);
  std::uint32_t sign = (bits >> 16) & 0x8000u;
  std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u);
  if (magnitude > 0x477FE000u) magnitude = 0x477FE000u;  // 65504
  if (magnitude < 0x38800000u) {                         // below 2^-14: the unit is 2^-24, that of 0.5f
    magnitude = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
    return static_cast<std::uint16_t>(sign | magnitude);
  }
  magnitude += 0xFFFu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
}

static inline std::uint16_t narrow_bfloat16(float value) {
  std::uint32_t bits = float_bits(value);
  std::uint32_t sign = (bits >> 16) & 0x8000u;
  std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7FC0u);
  if (magnitude > 0x7F7F0000u) magnitude = 0x7F7F0000u;  // largest finite
  magnitude += 0x7FFFu + ((magnitude >> 16) & 1u);
  return static_cast<std::uint16_t>(sign | (magnitude >> 16));
}

}  // namespace planmoe::zfp
