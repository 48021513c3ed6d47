// Rows of the codec fp8; the wire format is in ../fp8.cpp.
#pragma once

#include "blocks.h"

namespace planmoe::fp8 {

constexpr float kMost = 448.0f;

inline int64_t code_bytes(int64_t hidden) { return (hidden + 3) / 4 * 4; }
inline int64_t row_bytes(int64_t hidden) { return code_bytes(hidden) + 4 * num_blocks(hidden); }

// Nearest e4m3, ties to even; beyond 448 it is 448. Not for NaN.
PLANMOE_INLINE inline uint8_t to_e4m3(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  const uint32_t normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 the step is 2^-9, that of a float in [2^14, 2^15).
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 16384.0f) - 0x46800000;
  const uint32_t code = magnitude < (121u << 23) ? small : normal;
  return static_cast<uint8_t>(std::min<uint32_t>(code, 0x7E) | ((bits >> 24) & 0x80));
}

// 0x7F and 0xFF are NaN.
PLANMOE_INLINE inline float from_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7F;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const uint32_t small = std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
  uint32_t bits = magnitude < 8 ? small : normal;
  bits = magnitude == 0x7F ? 0x7FC00000 : bits;
  return std::bit_cast<float>(bits | (static_cast<uint32_t>(code & 0x80) << 24));
}

inline void encode(const float* values, int64_t hidden, uint8_t* wire, Vectors vectors = widest_vectors()) {
  std::memset(wire + hidden, 0, code_bytes(hidden) - hidden);
  with_vectors(vectors, [&](auto /*lanes*/) PLANMOE_INLINE {
    uint8_t* scales = wire + code_bytes(hidden);
    for (int64_t start = 0; start < hidden; start += kBlock, scales += 4) {
      const int64_t count = std::min(kBlock, hidden - start);
      const uint32_t largest = largest_magnitude(values + start, count);
      if (largest >= kInfinityBits) {
        std::memset(wire + start, 0, count);
        store_float(kNaN, scales);
        continue;
      }
      const Scale scale = scale_to(largest, kMost);
      uint8_t codes[kBlock];
      for (int64_t i = 0; i < count; ++i) codes[i] = to_e4m3(values[start + i] * scale.inverse);
      std::memcpy(wire + start, codes, count);
      store_float(scale.scale, scales);
    }
  });
}

inline void decode(const uint8_t* wire, int64_t hidden, float* values, Vectors vectors = widest_vectors()) {
  with_vectors(vectors, [&](auto /*lanes*/) PLANMOE_INLINE {
    const uint8_t* scales = wire + code_bytes(hidden);
    for (int64_t start = 0; start < hidden; start += kBlock, scales += 4) {
      const float scale = load_float(scales);
      const int64_t count = std::min(kBlock, hidden - start);
      for (int64_t i = 0; i < count; ++i) values[start + i] = from_e4m3(wire[start + i]) * scale;
    }
  });
}

}  // namespace planmoe::fp8
