// Rows of the codec int4; the wire format is in ../int4.cpp.
#pragma once

#include <cmath>

#include "blocks.h"

namespace planmoe::int4 {

constexpr int64_t kHalf = kBlock / 2;
constexpr int64_t kBlockBytes = kHalf + 2;

// The eight positive levels of the 16-level quantizer with the least squared error for the normal distribution, and
// the seven thresholds half-way between them (computed by Lloyd's iteration; Max 1960 lists them to four digits).
constexpr float kLevel[8] = {0.12839503f, 0.388048299f, 0.656759119f, 0.942340456f,
                             1.2562312f,  1.61804639f,  2.06901723f,  2.73258957f};
constexpr float kThreshold[7] = {0.258221665f, 0.522403709f, 0.799549788f, 1.09928583f,
                                 1.43713879f,  1.84353181f,  2.4008034f};

inline int64_t row_bytes(int64_t hidden) { return kBlockBytes * num_blocks(hidden); }

PLANMOE_INLINE inline int32_t to_code(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const float magnitude = std::bit_cast<float>(bits & 0x7FFFFFFF);
  int32_t code = static_cast<int32_t>((bits >> 28) & 8);
  for (const float threshold : kThreshold) code += magnitude > threshold ? 1 : 0;
  return code;
}

// Root of the mean square, summed in sixteen parts: the same on every processor.
PLANMOE_INLINE inline float root_mean_square(const float* block) {
  float sums[16] = {};
  for (int64_t start = 0; start < kBlock; start += 16)
    for (int64_t i = 0; i < 16; ++i) sums[i] += block[start + i] * block[start + i];
  for (int64_t half = 8; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return std::sqrt(sums[0] * (1.0f / kBlock));
}

inline void encode(const float* values, int64_t hidden, uint8_t* wire, Vectors vectors = widest_vectors()) {
  with_vectors(vectors, [&](auto lanes) PLANMOE_INLINE {
    uint8_t* codes = wire;
    uint8_t* scales = wire + kHalf * num_blocks(hidden);
    for (int64_t start = 0; start < hidden; start += kBlock, codes += kHalf, scales += 2) {
      const int64_t count = std::min(kBlock, hidden - start);
      const uint32_t largest = largest_magnitude(values + start, count);
      uint16_t scale = largest < kTinyBits ? 0 : to_bfloat16(kNaN);
      if (largest < kTinyBits || largest >= kInfinityBits) {
        std::memset(codes, 0, kHalf);
        std::memcpy(scales, &scale, 2);
        continue;
      }
      alignas(64) float block[kBlock];
      const float unit = to_coefficients<decltype(lanes)::value>(values + start, count, largest, block);
      const float rms = from_bfloat16(to_bfloat16(root_mean_square(block)));
      const float inverse = 1.0f / rms;
      for (int64_t i = 0; i < kHalf; ++i)
        codes[i] = static_cast<uint8_t>(to_code(block[i] * inverse) | (to_code(block[i + kHalf] * inverse) << 4));
      scale = to_bfloat16(rms * (1.0f / kBlock) * unit);  // exact: powers of two
      std::memcpy(scales, &scale, 2);
    }
  });
}

// Levels of codes 0 to 15; bit 3 is the sign.
template <int lanes>
PLANMOE_INLINE inline void to_levels(const int32_t* codes, float* block) {
  if constexpr (lanes < 8) {
    for (int64_t i = 0; i < kBlock; ++i) block[i] = codes[i] < 8 ? kLevel[codes[i]] : -kLevel[codes[i] - 8];
  } else {
    typename VectorOf<lanes>::Floats table;
    for (int i = 0; i < lanes; ++i) table[i] = kLevel[i % 8];
    for (int64_t start = 0; start < kBlock; start += lanes) {
      typename VectorOf<lanes>::Integers code, bits;
      std::memcpy(&code, codes + start, sizeof(code));
      const typename VectorOf<lanes>::Floats magnitude = __builtin_shuffle(table, code & 7);
      std::memcpy(&bits, &magnitude, sizeof(bits));
      bits |= (code & 8) << 28;
      std::memcpy(block + start, &bits, sizeof(bits));
    }
  }
}

inline void decode(const uint8_t* wire, int64_t hidden, float* values, Vectors vectors = widest_vectors()) {
  with_vectors(vectors, [&](auto lanes) PLANMOE_INLINE {
    const uint8_t* packed = wire;
    const uint8_t* scales = wire + kHalf * num_blocks(hidden);
    for (int64_t start = 0; start < hidden; start += kBlock, packed += kHalf, scales += 2) {
      alignas(64) int32_t codes[kBlock];
      alignas(64) float block[kBlock];
      for (int64_t i = 0; i < kHalf; ++i) {
        codes[i] = packed[i] & 15;
        codes[i + kHalf] = packed[i] >> 4;
      }
      to_levels<decltype(lanes)::value>(codes, block);
      uint16_t scale;
      std::memcpy(&scale, scales, 2);
      const int64_t count = std::min(kBlock, hidden - start);
      from_coefficients<decltype(lanes)::value>(block, from_bfloat16(scale), count, values + start);
    }
  });
}

}  // namespace planmoe::int4
