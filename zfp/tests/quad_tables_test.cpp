// The tables of the CUDA codec for blocks of 4 values against the bit by bit codec.
#include "quad_tables.h"

#include <cstring>

#include "check.h"

namespace zfp = planmoe::zfp;

namespace {

constexpr unsigned kMaxBudget = 4 * 32 - zfp::kHeaderBits;

constexpr zfp::quad::ReaderTables kReaderTables;
constexpr zfp::quad::WriterTable kWriterTable;

// Bits of a stream, the next one on top; zeros after them.
struct Queue {
  const std::uint64_t* bits;  // two words
  unsigned position = 0;

  std::uint32_t top() const {
    std::uint32_t word = 0;
    for (unsigned i = 0; i < 32; ++i) {
      const unsigned at = position + i;
      if (at < 128 && (bits[at / 64] >> (at % 64) & 1) != 0) word |= 0x80000000u >> i;
    }
    return word;
  }
  void skip(unsigned length) { position += length; }
};

void compare_readers(const std::uint64_t (&bits)[2], unsigned budget) {
  unsigned char bytes[16];
  std::memcpy(bytes, bits, 16);
  std::uint32_t expected[4] = {}, found[4];
  const zfp::LastPlane last = zfp::decode_planes<4>({bytes, 16}, 0, budget, expected);
  Queue queue{bits};
  const std::uint32_t* last_table =
      kReaderTables.last + zfp::quad::ReaderTables::last_offset(zfp::quad::num_last_bits(budget));
  const zfp::LastPlane last_found = zfp::quad::read_planes(queue, budget, kReaderTables.step, last_table, found);
  CHECK(std::memcmp(found, expected, sizeof found) == 0);
  zfp::round_last<4>(last, expected);
  zfp::round_last<4>(last_found, found);
  CHECK(std::memcmp(found, expected, sizeof found) == 0);
}

void test_every_short_block() {
  for (unsigned budget = 0; budget <= 15; ++budget) {
    for (std::uint64_t code = 0; code < std::uint64_t{1} << budget; ++code) compare_readers({code, 0}, budget);
  }
}

void test_random_blocks() {
  check::Random random(3);
  for (int i = 0; i < 100000; ++i) {
    const unsigned budget = static_cast<unsigned>(random.below(kMaxBudget + 1));
    std::uint64_t bits[2];
    for (std::uint64_t& word : bits) {
      word = random.next() | static_cast<std::uint64_t>(random.next()) << 32;
      for (std::size_t rest = random.below(4); rest > 0; --rest) word &= word >> 1;  // rarer ones: longer runs
    }
    for (unsigned at = budget; at < 128; ++at) bits[at / 64] &= ~(std::uint64_t{1} << (at % 64));
    compare_readers(bits, budget);
  }
}

void test_writer() {
  check::Random random(4);
  for (int i = 0; i < 20000; ++i) {
    std::uint32_t coefficients[4];
    for (std::uint32_t& value : coefficients) value = static_cast<std::uint32_t>(random.next()) >> random.below(32);
    unsigned char expected[32] = {}, written[32] = {};
    zfp::BitWriter reference{expected}, writer{written};
    zfp::encode_planes<4>(coefficients, 8 * sizeof expected, reference);
    zfp::finish_bits(reference);
    unsigned row = 0;
    for (int plane = zfp::kNumPlanes - 1; plane >= 0; --plane) {
      unsigned bits = 0;
      for (unsigned j = 0; j < 4; ++j) bits |= (coefficients[j] >> plane & 1u) << j;
      const std::uint32_t entry = kWriterTable.plane[row | bits];
      zfp::append_bits(writer, zfp::quad::code(entry), zfp::quad::code_length(entry));
      row = zfp::quad::next_row(entry);
    }
    zfp::finish_bits(writer);
    CHECK(std::memcmp(written, expected, sizeof written) == 0);
  }
}

}  // namespace

int main() {
  test_every_short_block();
  test_random_blocks();
  test_writer();
  return check::exit_code();
}
