// Rows of the codec hadamard_int8; the wire format is in ../hadamard_int8.cpp.
#pragma once

#include "blocks.h"

namespace planmoe::hadamard_int8 {

inline int64_t row_bytes(int64_t hidden) { return (kBlock + 4) * num_blocks(hidden); }

inline void encode(const float* values, int64_t hidden, uint8_t* wire, Vectors vectors = widest_vectors()) {
  with_vectors(vectors, [&](auto lanes) PLANMOE_INLINE {
    uint8_t* scales = wire + kBlock * num_blocks(hidden);
    for (int64_t start = 0; start < hidden; start += kBlock, scales += 4) {
      const int64_t count = std::min(kBlock, hidden - start);
      const uint32_t largest = largest_magnitude(values + start, count);
      if (largest < kTinyBits || largest >= kInfinityBits) {
        std::memset(wire + start, 0, kBlock);
        store_float(largest < kTinyBits ? 0.0f : kNaN, scales);
        continue;
      }
      alignas(64) float block[kBlock];
      const float unit = to_coefficients<decltype(lanes)::value>(values + start, count, largest, block);
      const Scale scale = scale_to(largest_magnitude(block, kBlock), 127.0f);
      to_codes(block, kBlock, scale.inverse, wire + start);
      store_float(scale.scale * (1.0f / kBlock) * unit, scales);
    }
  });
}

inline void decode(const uint8_t* wire, int64_t hidden, float* values, Vectors vectors = widest_vectors()) {
  with_vectors(vectors, [&](auto lanes) PLANMOE_INLINE {
    const uint8_t* scales = wire + kBlock * num_blocks(hidden);
    for (int64_t start = 0; start < hidden; start += kBlock, scales += 4) {
      alignas(64) float block[kBlock];
      for (int64_t i = 0; i < kBlock; ++i) block[i] = static_cast<float>(static_cast<int8_t>(wire[start + i]));
      const int64_t count = std::min(kBlock, hidden - start);
      from_coefficients<decltype(lanes)::value>(block, load_float(scales), count, values + start);
    }
  });
}

}  // namespace planmoe::hadamard_int8
