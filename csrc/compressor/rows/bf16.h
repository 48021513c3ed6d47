// Rows of the codec bf16; the wire format is in ../bf16.cpp.
#pragma once

#include "blocks.h"

namespace planmoe::bf16 {

inline int64_t row_bytes(int64_t hidden) { return 2 * hidden; }

inline void encode(const float* values, int64_t hidden, uint8_t* wire, Vectors vectors = widest_vectors()) {
  with_vectors(vectors, [&](auto /*lanes*/) PLANMOE_INLINE {
    for (int64_t start = 0; start < hidden; start += kBlock) {
      const int64_t count = std::min(kBlock, hidden - start);
      uint16_t halves[kBlock];
      for (int64_t i = 0; i < count; ++i) halves[i] = to_bfloat16(values[start + i]);
      std::memcpy(wire + 2 * start, halves, 2 * count);
    }
  });
}

inline void decode(const uint8_t* wire, int64_t hidden, float* values, Vectors vectors = widest_vectors()) {
  with_vectors(vectors, [&](auto /*lanes*/) PLANMOE_INLINE {
    for (int64_t i = 0; i < hidden; ++i) {
      uint16_t half;
      std::memcpy(&half, wire + 2 * i, 2);
      values[i] = from_bfloat16(half);
    }
  });
}

}  // namespace planmoe::bf16
