// Rows of the codec int8; the wire format is in ../int8.cpp.
#pragma once

#include "blocks.h"

namespace planmoe::int8 {

inline int64_t code_bytes(int64_t hidden) { return (hidden + 3) / 4 * 4; }
inline int64_t row_bytes(int64_t hidden) { return code_bytes(hidden) + 4 * num_blocks(hidden); }

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
      const Scale scale = scale_to(largest, 127.0f);
      to_codes(values + start, count, scale.inverse, wire + start);
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
      for (int64_t i = 0; i < count; ++i)
        values[start + i] = static_cast<float>(static_cast<int8_t>(wire[start + i])) * scale;
    }
  });
}

}  // namespace planmoe::int8
