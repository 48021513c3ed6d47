// The bit planes of a block of 4 values as tables: a reader takes up to six bits at a time, a writer a plane.
//
// Between two bits the reader is in one of 17 states: it knows how many coefficients are significant, and stands before
// the plane's next verbatim bit, before a test, or within a run of zeros.
#pragma once

#include "block_codec.h"

namespace planmoe::zfp::quad {

constexpr unsigned kBitsPerStep = 6;
constexpr unsigned kNumStates = 17;

// A reader's entry: the bits found for coefficient j in the plane at hand (the upper one) and the next five, field j of
// six bits from the top; how many planes are complete; then the state, or known() of the block's last entry.
PLANMOE_ZFP_SHARED constexpr std::uint32_t found(std::uint32_t entry, unsigned j) {
  return entry << (kBitsPerStep * j) & 0xFC000000u;
}
PLANMOE_ZFP_SHARED constexpr unsigned num_planes(std::uint32_t entry) { return entry >> 5 & 7u; }
PLANMOE_ZFP_SHARED constexpr unsigned state(std::uint32_t entry) { return entry & 31u; }
// Leading coefficients whose bit of the last plane is known; a plane at hand counts as complete here.
PLANMOE_ZFP_SHARED constexpr unsigned known(std::uint32_t entry) { return entry & 31u; }

// A writer's entry: the bits of a plane, how many they are, and 16 times the number of significant coefficients then.
PLANMOE_ZFP_SHARED constexpr unsigned code(std::uint32_t entry) { return entry & 0xFFu; }
PLANMOE_ZFP_SHARED constexpr unsigned code_length(std::uint32_t entry) { return entry >> 8 & 0xFFu; }
PLANMOE_ZFP_SHARED constexpr unsigned next_row(std::uint32_t entry) { return entry >> 16; }

class Reader {
 public:
  constexpr explicit Reader(unsigned state) {
    while (significant_ < 4 && state >= kFirstState[significant_ + 1]) ++significant_;
    read_ = state - kFirstState[significant_];
    in_run_ = read_ > significant_;
  }

  constexpr void take(bool bit) {
    if (in_run_) {
      if (!bit) ++significant_;
      if (bit || significant_ == 3) end_run();  // the last coefficient's 1 is implied
    } else if (read_ < significant_) {
      if (bit) set(read_);
      if (++read_ == 4) next_plane();
    } else if (!bit) {
      next_plane();
    } else if (significant_ == 3) {
      end_run();
    } else {
      in_run_ = true;
    }
  }

  constexpr std::uint32_t entry() const {
    return fields_ | plane_ << 5 | (kFirstState[significant_] + (in_run_ ? significant_ + 1 : read_));
  }

  // The block ends here: a run's 1 is taken for granted.
  constexpr std::uint32_t last_entry() {
    if (in_run_) end_run();
    return read_ > 0 ? fields_ | (plane_ + 1) << 5 | read_ : fields_ | plane_ << 5 | 4u;
  }

 private:
  static constexpr unsigned kFirstState[] = {0, 2, 5, 9, 13};  // by the number of significant coefficients

  constexpr void set(unsigned j) { fields_ |= 1u << (31 - kBitsPerStep * j - plane_); }
  constexpr void next_plane() { ++plane_, read_ = 0; }
  constexpr void end_run() {
    set(significant_);
    in_run_ = false;
    read_ = ++significant_;
    if (read_ == 4) next_plane();
  }

  std::uint32_t fields_ = 0;
  unsigned plane_ = 0;
  unsigned significant_ = 0;
  unsigned read_ = 0;  // bits of the plane at hand
  bool in_run_ = false;
};

// Entry state << kBitsPerStep | bits of `step`, the first bit on top; state << n | bits of last + last_offset(n) for
// the block's last n bits, 0 to 6.
struct ReaderTables {
  PLANMOE_ZFP_SHARED static constexpr unsigned last_offset(unsigned num_bits) {
    return kNumStates * ((1u << num_bits) - 1);
  }

  std::uint32_t step[kNumStates << kBitsPerStep] = {};
  std::uint32_t last[kNumStates * ((2u << kBitsPerStep) - 1)] = {};

  constexpr ReaderTables() {
    for (unsigned num_bits = 0; num_bits <= kBitsPerStep; ++num_bits) {
      for (unsigned i = 0; i < kNumStates << num_bits; ++i) {
        Reader reader(i >> num_bits);
        for (unsigned bit = num_bits; bit > 0; --bit) reader.take((i >> (bit - 1) & 1u) != 0);
        if (num_bits == kBitsPerStep) step[i] = reader.entry();
        last[last_offset(num_bits) + i] = reader.last_entry();
      }
    }
  }
};

// How a block's bits after its header are read: whole steps, then the last bits, at most as many.
PLANMOE_ZFP_SHARED constexpr unsigned num_steps(unsigned budget) {
  return budget > 0 ? (budget - 1) / kBitsPerStep : 0;
}
PLANMOE_ZFP_SHARED constexpr unsigned num_last_bits(unsigned budget) {
  return budget - kBitsPerStep * num_steps(budget);
}

PLANMOE_ZFP_SHARED inline std::uint32_t shift_right(std::uint32_t bits, unsigned distance) {  // 0 from 32 on
#ifdef __CUDA_ARCH__
  return __funnelshift_rc(bits, 0, distance);
#else
  return distance < 32 ? bits >> distance : 0;
#endif
}

// `last`: the table for num_last_bits(budget). `queue`: top() holds the next bits, the first one uppermost.
template <class Queue>
PLANMOE_ZFP_SHARED LastPlane read_planes(Queue& queue, unsigned budget, const std::uint32_t* step,
                                         const std::uint32_t* last, std::uint32_t* coefficients) {
  unsigned plane = 0;
  std::uint32_t entry = 0;
  const auto take = [&](const std::uint32_t* table, unsigned num_bits) {
    entry = table[state(entry) << num_bits | shift_right(queue.top(), 32 - num_bits)];
    for (unsigned j = 0; j < 4; ++j) coefficients[j] |= shift_right(found(entry, j), plane);
    plane += num_planes(entry);
  };
  for (unsigned i = 0; i < 4; ++i) coefficients[i] = 0;
  for (unsigned i = num_steps(budget); i > 0; --i) {
    take(step, kBitsPerStep);
    queue.skip(kBitsPerStep);
  }
  take(last, num_last_bits(budget));
  LastPlane last_plane;
  if (budget == 0) return last_plane;
  last_plane.planes = plane;
  last_plane.known = known(entry);
  return last_plane;
}

// Entry 16 * (number of significant coefficients) + plane.
struct WriterTable {
  std::uint32_t plane[5 * 16] = {};

  constexpr WriterTable() {
    for (unsigned i = 0; i < 5 * 16; ++i) {
      unsigned significant = i / 16, length = significant, bits = i & ((1u << significant) - 1);
      for (unsigned rest = i % 16 >> significant; rest != 0;) {
        unsigned run = 1;  // zeros and the one
        while ((rest >> (run - 1) & 1u) == 0) ++run;
        const bool implied = significant + run == 4;
        bits |= (1u | (implied ? 0 : 1u << run)) << length;
        length += run + (implied ? 0 : 1);
        significant += run;
        rest >>= run;
      }
      if (significant < 4) ++length;  // a 0 test
      plane[i] = bits | length << 8 | significant << 20;
    }
  }
};

}  // namespace planmoe::zfp::quad
