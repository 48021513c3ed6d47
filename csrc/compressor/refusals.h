#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>

namespace planmoe {

// Whether an encoder met a row that it cannot carry: told from any thread, or by a kernel on any stream.
class Refusals {
 public:
  // An encoder that runs on the host met one.
  void add() { on_host_.store(1, std::memory_order_relaxed); }

  // Where kernels write a 1: host memory that accelerators reach, the same for as long as this lives.
  int32_t* flag_of_kernels();

  // Kernels that may write there were started on the current stream.
  void note_kernels(c10::Device device);

  // Whether there was one since the last call. The host waits for the kernels that were noted, and for nothing else.
  bool take();

 private:
  std::atomic<int32_t> on_host_{0};
  std::mutex mutex_;
  at::Tensor of_kernels_;                             // int32 [1], pinned
  std::map<c10::StreamId, c10::Event> last_kernels_;  // of each stream
};

}  // namespace planmoe
