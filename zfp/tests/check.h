// The smallest test harness: CHECK counts and prints failures, exit_code() says whether there were any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "planmoe_zfp/zfp.h"

namespace check {

inline int& num_failures() {
  static int count = 0;
  return count;
}

inline int exit_code() {
  std::printf("%s (%d failures)\n", num_failures() == 0 ? "passed" : "FAILED", num_failures());
  return num_failures() == 0 ? 0 : 1;
}

// 64-bit linear congruential generator: the same numbers everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) { next(); }
  std::uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 32);
  }
  std::size_t below(std::size_t limit) { return next() % limit; }
  // Roughly normal, mean 0, variance 1.
  float normal() {
    float sum = 0;
    for (int i = 0; i < 12; ++i) sum += static_cast<float>(next() >> 8) * 0x1p-24f;
    return sum - 6;
  }

 private:
  std::uint64_t state_;
};

inline std::vector<planmoe::zfp::Kernel> kernels() {
  using planmoe::zfp::Kernel;
  std::vector<Kernel> found;
  for (Kernel kernel : {Kernel::kScalar, Kernel::kAvx2, Kernel::kAvx512}) {
    if (planmoe::zfp::kernel_available(kernel)) found.push_back(kernel);
  }
  return found;
}

}  // namespace check

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition) && ++check::num_failures() <= 20) {                        \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
    }                                                                           \
  } while (false)
