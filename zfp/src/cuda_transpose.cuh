// Transposing bits within a thread.
#pragma once

#include "format.h"

namespace planmoe::zfp {
namespace {

// Bits of `a` where `mask` has ones, of `b` elsewhere, in one instruction.
__device__ unsigned select_bits(unsigned mask, unsigned a, unsigned b) {
  unsigned selected;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(selected) : "r"(mask), "r"(a), "r"(b));
  return selected;
}

template <int kRows, int kDistance>
__device__ void exchange(unsigned* rows, unsigned low_bits) {
#pragma unroll
  for (int a = 0; a < kRows; ++a) {
    if ((a & kDistance) != 0) continue;
    const unsigned low = rows[a], high = rows[a + kDistance];
    rows[a] = select_bits(low_bits, low, high << kDistance);
    rows[a + kDistance] = select_bits(low_bits, low >> kDistance, high);
  }
}

}  // namespace
}  // namespace planmoe::zfp
