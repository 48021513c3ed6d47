// Rows of the codec lossless; the wire format is in ../lossless.cpp.
#pragma once

#include "blocks.h"

namespace planmoe::lossless {

constexpr int32_t kWindow = 14;  // codes 0 to 13: exponents base, base - 1, ...
constexpr uint8_t kZero = 14;    // exponent field 0: zeros and subnormals
constexpr uint8_t kEscape = 15;  // the exponent is the next one of the pool

// Where the parts of a row begin.
struct Layout {
  int64_t codes;
  int64_t bases;
  int64_t pool;
  int64_t end;
};

inline Layout layout(int64_t hidden) {
  const int64_t blocks = num_blocks(hidden);
  const int64_t codes = hidden, bases = codes + (hidden + 1) / 2, pool = bases + blocks;
  return {codes, bases, pool, pool + 3 * blocks + 2};
}

inline int64_t row_bytes(int64_t hidden) { return layout(hidden).end; }

PLANMOE_INLINE inline uint8_t to_code(int32_t exponent, int32_t base) {
  const int32_t offset = base - exponent;
  const auto code = static_cast<uint8_t>(offset >= 0 && offset < kWindow ? offset : kEscape);
  return exponent == 0 ? kZero : code;
}

// How many of the exponents have no code with this base; writes all codes.
PLANMOE_INLINE inline int32_t to_codes(const uint8_t* exponents, int64_t count, uint8_t base, uint8_t* codes) {
  int32_t escapes = 0;
  for (int64_t i = 0; i < count; ++i) codes[i] = to_code(exponents[i], base);
  for (int64_t i = 0; i < count; ++i) escapes += codes[i] == kEscape ? 1 : 0;
  return escapes;
}

// The base with the fewest escapes, the largest of these.
inline uint8_t best_base(const uint8_t* exponents, int64_t count) {
  int32_t seen[256] = {};
  for (int64_t i = 0; i < count; ++i) ++seen[exponents[i]];
  int32_t inside = 0, most = -1, best = 0;
  for (int32_t base = 1; base < 256; ++base) {
    inside += seen[base];
    if (base > kWindow) inside -= seen[base - kWindow];
    if (inside >= most) most = inside, best = base;
  }
  return static_cast<uint8_t>(best);
}

// Exponents and the rest of up to 128 values.
struct Parts {
  uint8_t exponents[kBlock];
  uint8_t codes[kBlock];
  uint8_t base;
  int32_t escapes;
};

PLANMOE_INLINE inline void split(const float* values, int64_t count, uint8_t* rest, Parts& parts) {
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<uint32_t>(values[i]);
    parts.exponents[i] = static_cast<uint8_t>(bits >> 23);
    rest[i] = static_cast<uint8_t>(((bits >> 24) & 0x80) | ((bits >> 16) & 0x7F));
  }
  uint8_t largest = 0;  // not counting infinities and NaN
  for (int64_t i = 0; i < count; ++i)
    largest = std::max(largest, static_cast<uint8_t>(parts.exponents[i] == 255 ? 0 : parts.exponents[i]));
  parts.base = largest;
  parts.escapes = to_codes(parts.exponents, count, largest, parts.codes);
  if (parts.escapes > 1) {
    parts.base = best_base(parts.exponents, count);
    parts.escapes = to_codes(parts.exponents, count, parts.base, parts.codes);
  }
}

// False when the row needs more escapes than it has room for; the wire then holds nothing of use. values: bfloat16
// numbers.
inline bool encode(const float* values, int64_t hidden, uint8_t* wire, Vectors vectors = widest_vectors()) {
  const Layout at = layout(hidden);
  uint8_t* pool = wire + at.pool;
  bool fits = true;
  with_vectors(vectors, [&](auto /*lanes*/) PLANMOE_INLINE {
    Parts parts;
    for (int64_t start = 0; start < hidden; start += kBlock) {
      const int64_t count = std::min(kBlock, hidden - start);
      split(values + start, count, wire + start, parts);
      wire[at.bases + start / kBlock] = parts.base;
      if (parts.escapes > wire + at.end - pool) {
        fits = false;
        return;
      }
      for (int64_t i = 0; parts.escapes > 0 && i < count; ++i)
        if (parts.codes[i] == kEscape) *pool++ = parts.exponents[i];
      const int64_t half = (count + 1) / 2;
      if (count % 2 == 1) parts.codes[count] = 0;
      uint8_t* packed = wire + at.codes + start / 2;
      for (int64_t i = 0; i < half; ++i)
        packed[i] = static_cast<uint8_t>(parts.codes[i] | (parts.codes[half + i] << 4));
    }
  });
  std::memset(pool, 0, fits ? wire + at.end - pool : 0);
  return fits;
}

// False when the wire asks for more escapes than it has, as no encoder does; the values are then of no use.
inline bool decode(const uint8_t* wire, int64_t hidden, float* values, Vectors vectors = widest_vectors()) {
  const Layout at = layout(hidden);
  const uint8_t* pool = wire + at.pool;
  bool valid = true;
  with_vectors(vectors, [&](auto /*lanes*/) PLANMOE_INLINE {
    uint8_t codes[kBlock + 1], exponents[kBlock];
    for (int64_t start = 0; start < hidden; start += kBlock) {
      const int64_t count = std::min(kBlock, hidden - start), half = (count + 1) / 2;
      const uint8_t* packed = wire + at.codes + start / 2;
      for (int64_t i = 0; i < half; ++i) {
        codes[i] = packed[i] & 15;
        codes[half + i] = packed[i] >> 4;
      }
      const uint8_t base = wire[at.bases + start / kBlock];
      int32_t escapes = 0;
      for (int64_t i = 0; i < count; ++i) {
        exponents[i] = static_cast<uint8_t>(codes[i] == kZero ? 0 : base - codes[i]);
        escapes += codes[i] == kEscape ? 1 : 0;
      }
      if (escapes > wire + at.end - pool) {
        valid = false;
        return;
      }
      for (int64_t i = 0; escapes > 0 && i < count; ++i)
        if (codes[i] == kEscape) exponents[i] = *pool++;
      const uint8_t* rest = wire + start;
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t sign = rest[i] & 0x80, fraction = rest[i] & 0x7F, exponent = exponents[i];
        values[start + i] = std::bit_cast<float>((sign << 24) | (exponent << 23) | (fraction << 16));
      }
    }
  });
  return valid;
}

}  // namespace planmoe::lossless
