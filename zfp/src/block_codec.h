// One block at a time, in portable C++: the reference for the vector kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#ifdef _MSC_VER
#include <intrin.h>
#endif

#include "bit_stream.h"
#include "format.h"
#include "half.h"
#include "planmoe_zfp/zfp.h"

namespace planmoe::zfp {

// Position of the lowest set bit; bits != 0.
PLANMOE_ZFP_SHARED static inline unsigned lowest_bit(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return static_cast<unsigned>(__ffs(static_cast<int>(bits)) - 1);
#elif defined(_MSC_VER)
  unsigned long index;
  _BitScanForward(&index, bits);
  return index;
#else
  return static_cast<unsigned>(__builtin_ctz(bits));
#endif
}

PLANMOE_ZFP_SHARED static inline std::uint32_t low_mask(unsigned count) {
  return count >= 32 ? ~0u : (1u << count) - 1;
}

PLANMOE_ZFP_SHARED static inline unsigned smaller(unsigned a, unsigned b) { return a < b ? a : b; }

// Integers wrap modulo 2^32; `half` is an arithmetic shift.
PLANMOE_ZFP_SHARED static inline std::uint32_t half(std::uint32_t value) {
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(value) >> 1);
}

PLANMOE_ZFP_SHARED static inline void forward_lift(std::uint32_t* values, int stride) {
  std::uint32_t x = values[0], y = values[stride], z = values[2 * stride], w = values[3 * stride];
  x = half(x + w), w -= x;
  z = half(z + y), y -= z;
  x = half(x + z), z -= x;
  w = half(w + y), y -= w;
  w += half(y), y -= half(w);
  values[0] = x, values[stride] = y, values[2 * stride] = z, values[3 * stride] = w;
}

PLANMOE_ZFP_SHARED static inline void inverse_lift(std::uint32_t* values, int stride) {
  std::uint32_t x = values[0], y = values[stride], z = values[2 * stride], w = values[3 * stride];
  y += half(w), w -= half(y);
  y += w, w = 2 * w - y;
  z += x, x = 2 * x - z;
  y += z, z = 2 * z - y;
  w += x, x = 2 * x - w;
  values[0] = x, values[stride] = y, values[2 * stride] = z, values[3 * stride] = w;
}

template <int kDimensions>
PLANMOE_ZFP_SHARED void forward_transform(std::uint32_t* values) {
  if constexpr (kDimensions == 1) {
    forward_lift(values, 1);
  } else {
    for (int y = 0; y < 4; ++y) forward_lift(values + 4 * y, 1);
    for (int x = 0; x < 4; ++x) forward_lift(values + x, 4);
  }
}

template <int kDimensions>
PLANMOE_ZFP_SHARED void inverse_transform(std::uint32_t* values) {
  if constexpr (kDimensions == 1) {
    inverse_lift(values, 1);
  } else {
    for (int x = 0; x < 4; ++x) inverse_lift(values + x, 4);
    for (int y = 0; y < 4; ++y) inverse_lift(values + 4 * y, 1);
  }
}

// Exponent field of the largest magnitude of the block; kNonFiniteExponent when it holds an infinity or a NaN.
template <int kValues>
std::uint32_t largest_exponent(const float* values) {
  std::uint32_t largest = 0;
  for (int i = 0; i < kValues; ++i) {
    std::uint32_t magnitude = float_bits(values[i]) & 0x7FFFFFFFu;
    if (magnitude > largest) largest = magnitude;
  }
  return largest >> 23;
}

// Writes the bit planes of `coefficients`, most significant first, until `budget` bits are spent; returns those left.
template <int kValues>
unsigned encode_planes(const std::uint32_t* coefficients, unsigned budget, BitWriter& writer) {
  unsigned significant = 0;  // leading coefficients that some plane so far has touched
  for (int plane = kNumPlanes - 1; plane >= 0 && budget > 0; --plane) {
    std::uint32_t bits = 0;
    for (int j = 0; j < kValues; ++j) bits |= ((coefficients[j] >> plane) & 1u) << j;
    unsigned verbatim = smaller(significant, budget);
    append_bits(writer, bits & low_mask(verbatim), verbatim);
    budget -= verbatim;
    bits >>= verbatim;
    while (significant < kValues && budget > 0) {
      append_bits(writer, bits != 0, 1);
      --budget;
      if (bits == 0) break;
      unsigned zeros = lowest_bit(bits);
      unsigned length = smaller(smaller(zeros + 1, kValues - 1 - significant), budget);
      append_bits(writer, (1u << zeros) & low_mask(length), length);
      budget -= length;
      significant += zeros + 1;
      bits >>= zeros + 1;
    }
  }
  return budget;
}

template <int kDimensions>
void encode_block(const float* values, unsigned block_bits, BitWriter& writer) {
  constexpr int kValues = kValuesPerBlock<kDimensions>;
  std::uint32_t exponent = largest_exponent<kValues>(values);
  if (exponent < kMinExponent || exponent == kNonFiniteExponent) {
    append_bits(writer, exponent == kNonFiniteExponent ? kEscapeHeader : 0, kHeaderBits);
    return append_zeros(writer, block_bits - kHeaderBits);
  }
  append_bits(writer, 2 * (exponent + 1) + 1, kHeaderBits);
  float scale = bits_float((kScaleBias - exponent) << 23);
  std::uint32_t integers[kValues], coefficients[kValues];
  for (int i = 0; i < kValues; ++i) {
    integers[i] = static_cast<std::uint32_t>(static_cast<std::int32_t>(values[i] * scale));
  }
  forward_transform<kDimensions>(integers);
  for (int j = 0; j < kValues; ++j) {
    coefficients[j] = (integers[value_index<kDimensions>(j)] + kNegabinary) ^ kNegabinary;
  }
  append_zeros(writer, encode_planes<kValues>(coefficients, block_bits - kHeaderBits, writer));
}

// What is known of the last plane a block's bits reach.
struct LastPlane {
  unsigned planes = kNumPlanes;  // planes read, at least in part; all of them, so no rounding, when none was read
  unsigned known = 0;            // leading coefficients whose bit of the last one is known
};

// Reads one plane from `window`, which holds the next bits of the block, zeros past the budget.
template <int kValues>
PLANMOE_ZFP_SHARED std::uint32_t decode_plane(std::uint32_t window, unsigned& budget, unsigned& significant,
                                              unsigned& known) {
  unsigned verbatim = smaller(significant, budget);
  std::uint32_t bits = window & low_mask(verbatim);
  window >>= verbatim;
  budget -= verbatim;
  known = verbatim;
  while (significant < kValues && (window & 1u) != 0) {
    window >>= 1;
    // The run of zeros ends at a 1, at the last coefficient, or with the budget.
    unsigned limit = smaller(budget - 1, kValues - 1 - significant);
    unsigned zeros = lowest_bit(window | (1u << limit));
    unsigned length = smaller(zeros + 1, limit);
    significant += zeros;
    bits |= 1u << significant;
    known = ++significant;
    window >>= length;
    budget -= 1 + length;
  }
  if (significant < kValues && budget > 0) {  // a 0 test
    --budget;
    known = kValues;
  }
  return bits;
}

template <int kValues>
LastPlane decode_planes(const BitReader& reader, std::size_t position, unsigned budget, std::uint32_t* coefficients) {
  LastPlane last;
  unsigned significant = 0;
  for (int plane = kNumPlanes - 1; plane >= 0 && budget > 0; --plane) {
    std::uint32_t window = read_bits32(reader, position) & low_mask(budget);
    unsigned before = budget;
    std::uint32_t bits = decode_plane<kValues>(window, budget, significant, last.known);
    position += before - budget;
    last.planes = static_cast<unsigned>(kNumPlanes - plane);
    for (int j = 0; bits != 0; ++j, bits >>= 1) coefficients[j] |= (bits & 1u) << plane;
  }
  return last;
}

template <int kValues>
PLANMOE_ZFP_SHARED void round_last(const LastPlane& last, std::uint32_t* coefficients) {
  if (last.planes >= 31) return;
  for (unsigned j = 0; j < kValues; ++j) {
    coefficients[j] += (j < last.known ? kRoundKnown : kRoundUnknown) >> last.planes;
  }
}

// False when the block's bits are ones that no encoder writes.
template <int kDimensions>
bool decode_block(const BitReader& reader, std::size_t position, unsigned block_bits, Rounding rounding,
                  float* values) {
  constexpr int kValues = kValuesPerBlock<kDimensions>;
  std::uint32_t header = read_bits32(reader, position) & low_mask(kHeaderBits);
  if ((header & 1u) == 0 || header == kEscapeHeader) {
    for (int i = 0; i < kValues; ++i) values[i] = header == kEscapeHeader ? bits_float(kQuietNan) : 0.0f;
    return all_bits_zero(reader, position + 1, position + block_bits);
  }
  std::uint32_t coefficients[kValues] = {}, integers[kValues];
  LastPlane last = decode_planes<kValues>(reader, position + kHeaderBits, block_bits - kHeaderBits, coefficients);
  if (rounding == Rounding::kLast) round_last<kValues>(last, coefficients);
  for (int j = 0; j < kValues; ++j) {
    integers[value_index<kDimensions>(j)] = (coefficients[j] ^ kNegabinary) - kNegabinary;
  }
  inverse_transform<kDimensions>(integers);
  // 2^(e - 30) as the product of two normal floats, so that no operand is subnormal.
  std::uint32_t exponent = header >> 1, first = (exponent + 97) >> 1;
  float first_scale = bits_float(first << 23);
  float second_scale = exponent < kMinDecodedExponent ? 0.0f : bits_float((exponent + 97 - first) << 23);
  for (int i = 0; i < kValues; ++i) {
    values[i] = static_cast<float>(static_cast<std::int32_t>(integers[i])) * first_scale * second_scale;
  }
  return true;
}

}  // namespace planmoe::zfp
