// Rows of the codecs e4m7 and lossless; the wire format is in ../e4m7.cpp.
#pragma once

#include "blocks.h"

namespace planmoe::e4m7 {

constexpr int32_t kWindow = 14;       // codes 0 to 13: exponents base, base - 1, ...
constexpr uint8_t kZero = 14;         // exponent field 0: zeros and subnormals
constexpr uint8_t kEscape = 15;       // the exponent is the next one of the block's pool
constexpr int32_t kPool = 7;          // exponents that a block has room for
constexpr int64_t kHead = 1 + kPool;  // bytes: base and pool
constexpr uint8_t kNotFinite = 255;   // exponent field of infinities and NaN

// Where the parts of a row begin.
struct Layout {
  int64_t codes;
  int64_t heads;
  int64_t end;
};

inline Layout layout(int64_t hidden) {
  const int64_t codes = hidden, heads = codes + (hidden + 1) / 2;
  return {codes, heads, heads + kHead * num_blocks(hidden)};
}

inline int64_t row_bytes(int64_t hidden) { return layout(hidden).end; }

// A block of up to 128 values as bfloat16 numbers.
struct Block {
  uint8_t rest[kBlock];  // sign and fraction
  uint8_t exponents[kBlock];
  uint8_t codes[kBlock + 1];
  uint8_t base;
  int32_t escapes;
};

PLANMOE_INLINE inline void split(const float* values, int64_t count, Block& block) {
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = to_bfloat16(values[i]);
    block.exponents[i] = static_cast<uint8_t>(half >> 7);
    block.rest[i] = static_cast<uint8_t>(((half >> 8) & 0x80) | (half & 0x7F));
  }
}

PLANMOE_INLINE inline void encode_with(uint8_t base, int64_t count, Block& block) {
  block.base = base;
  block.escapes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t offset = base - block.exponents[i];
    const auto code = static_cast<uint8_t>(offset >= 0 && offset < kWindow ? offset : kEscape);
    block.codes[i] = block.exponents[i] == 0 ? kZero : code;
  }
  for (int64_t i = 0; i < count; ++i) block.escapes += block.codes[i] == kEscape ? 1 : 0;
}

PLANMOE_INLINE inline uint8_t largest_exponent(const Block& block, int64_t count) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, block.exponents[i]);
  return largest;
}

PLANMOE_INLINE inline uint8_t largest_finite_exponent(const Block& block, int64_t count) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < count; ++i)
    largest = std::max(largest, static_cast<uint8_t>(block.exponents[i] == kNotFinite ? 0 : block.exponents[i]));
  return largest;
}

// The base with the fewest escapes, the largest of these.
inline uint8_t best_base(const Block& block, int64_t count) {
  int32_t seen[256] = {};
  for (int64_t i = 0; i < count; ++i) ++seen[block.exponents[i]];
  int32_t inside = 0, most = -1, best = 0;
  for (int32_t base = 1; base < 256; ++base) {
    inside += seen[base];
    if (base > kWindow) inside -= seen[base - kWindow];
    if (inside >= most) most = inside, best = base;
  }
  return static_cast<uint8_t>(best);
}

enum class Misfits { kRounded, kNaN };

// Without escapes: values below the window become the nearest of zero and its smallest power of two, and a block with
// something that is not finite becomes NaN, as all do with kNaN.
inline void round_off(int64_t count, Misfits misfits, Block& block) {
  const uint8_t largest = misfits == Misfits::kNaN ? kNotFinite : largest_exponent(block, count);
  block.base = largest;
  block.escapes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t offset = largest - block.exponents[i];
    const bool kept = block.exponents[i] == 0 || offset < kWindow;
    if (largest == kNotFinite) {
      block.codes[i] = 0;
      block.rest[i] = 0x7F;
    } else if (!kept) {
      block.codes[i] = offset == kWindow ? kWindow - 1 : kZero;
      block.rest[i] &= 0x80;
    } else {
      block.codes[i] = static_cast<uint8_t>(block.exponents[i] == 0 ? kZero : offset);
    }
  }
}

// False when the pool of a block had no room for all, so that the block does not come back as it was.
inline bool encode(const float* values, int64_t hidden, uint8_t* wire, Vectors vectors = widest_vectors(),
                   Misfits misfits = Misfits::kRounded) {
  const Layout at = layout(hidden);
  bool exact = true;
  with_vectors(vectors, [&](auto /*lanes*/) PLANMOE_INLINE {
    Block block;
    for (int64_t start = 0; start < hidden; start += kBlock) {
      const int64_t count = std::min(kBlock, hidden - start);
      split(values + start, count, block);
      encode_with(largest_finite_exponent(block, count), count, block);
      if (block.escapes > kPool) encode_with(best_base(block, count), count, block);
      if (block.escapes > kPool) {
        round_off(count, misfits, block);
        exact = false;
      }
      std::memcpy(wire + start, block.rest, count);
      uint8_t head[kHead] = {block.base};
      uint8_t* pool = head + 1;
      for (int64_t i = 0; block.escapes > 0 && i < count; ++i)
        if (block.codes[i] == kEscape) *pool++ = block.exponents[i];
      std::memcpy(wire + at.heads + kHead * (start / kBlock), head, kHead);
      const int64_t half = (count + 1) / 2;
      if (count % 2 == 1) block.codes[count] = 0;
      uint8_t* packed = wire + at.codes + start / 2;
      for (int64_t i = 0; i < half; ++i)
        packed[i] = static_cast<uint8_t>(block.codes[i] | (block.codes[half + i] << 4));
    }
  });
  return exact;
}

// False when a block of the wire asks for more escapes than it has, as no encoder does; the values are then of no use.
inline bool decode(const uint8_t* wire, int64_t hidden, float* values, Vectors vectors = widest_vectors()) {
  const Layout at = layout(hidden);
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
      const uint8_t* head = wire + at.heads + kHead * (start / kBlock);
      int32_t escapes = 0;
      for (int64_t i = 0; i < count; ++i) {
        exponents[i] = static_cast<uint8_t>(codes[i] == kZero ? 0 : *head - codes[i]);
        escapes += codes[i] == kEscape ? 1 : 0;
      }
      if (escapes > kPool) {
        valid = false;
        return;
      }
      for (int64_t i = 0; escapes > 0 && i < count; ++i)
        if (codes[i] == kEscape) exponents[i] = *++head;
      const uint8_t* rest = wire + start;
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t sign = rest[i] & 0x80, fraction = rest[i] & 0x7F, exponent = exponents[i];
        values[start + i] = std::bit_cast<float>((sign << 24) | (exponent << 23) | (fraction << 16));
      }
    }
  });
  return valid;
}

}  // namespace planmoe::e4m7
