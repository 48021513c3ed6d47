#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <mutex>
#include <vector>

namespace planmoe {

// Byte buffers that are used again once nobody holds them: steady state allocates nothing. CPU only; accelerators
// have a caching allocator. A buffer is free when no tensor but the pool's own refers to its storage.
class Workspace {
 public:
  // uint8 [rows, width], contiguous, not initialised.
  at::Tensor take(int64_t rows, int64_t width, c10::Device device);

  // Most bytes in use at once since the last call.
  int64_t take_peak();

 private:
  void drop_one_too_small(int64_t bytes);

  std::mutex mutex_;
  std::vector<at::Tensor> buffers_;
  int64_t peak_ = 0;
};

}  // namespace planmoe
