// Bits are written least significant first into little-endian 64-bit words.
// Everything is static: these functions are compiled into files with different instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace planmoe::zfp {

struct BitWriter {
  unsigned char* next;        // where the pending word will go
  std::uint64_t pending = 0;  // bits not yet stored
  unsigned num_pending = 0;   // 0..63
};

struct BitReader {
  const unsigned char* data;
  std::size_t size;  // bytes
};

// Appends the `count` (0..32) low bits of `value`, whose other bits must be 0.
static inline void append_bits(BitWriter& writer, std::uint64_t value, unsigned count) {
  writer.pending |= value << writer.num_pending;
  unsigned total = writer.num_pending + count;
  if (total >= 64) {
    std::memcpy(writer.next, &writer.pending, 8);
    writer.next += 8;
    writer.pending = value >> (64 - writer.num_pending);  // num_pending >= 32 here
    total -= 64;
  }
  writer.num_pending = total;
}

static inline void append_zeros(BitWriter& writer, unsigned count) {
  for (; count > 32; count -= 32) append_bits(writer, 0, 32);
  append_bits(writer, 0, count);
}

// Stores the last, partly filled word.
static inline void finish_bits(BitWriter& writer) {
  if (writer.num_pending > 0) std::memcpy(writer.next, &writer.pending, 8);
}

// The 32 bits from bit `position` on; those past the end of the stream read as 0.
static inline std::uint32_t read_bits32(const BitReader& reader, std::size_t position) {
  std::size_t byte = position >> 3;
  std::uint64_t word = 0;
  if (byte + 8 <= reader.size) {
    std::memcpy(&word, reader.data + byte, 8);
  } else if (byte < reader.size) {
    std::memcpy(&word, reader.data + byte, reader.size - byte);
  }
  return static_cast<std::uint32_t>(word >> (position & 7));
}

static inline bool all_bits_zero(const BitReader& reader, std::size_t position, std::size_t end) {
  for (; position < end; position += 32) {
    std::uint32_t bits = read_bits32(reader, position);
    if (end - position < 32) bits &= (1u << (end - position)) - 1;
    if (bits != 0) return false;
  }
  return true;
}

}  // namespace planmoe::zfp
