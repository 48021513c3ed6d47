#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <map>
#include <mutex>
#include <optional>

namespace planmoe {

// A flag per device that encoders set, from any thread or stream, where a row cannot be carried.
class Refusals {
 public:
  // Where they write; the same for as long as this lives.
  int32_t* flag(c10::Device device);

  // Kernels that write to it were started on the current stream of an accelerator.
  void note_kernels(c10::Device device);

  // Whether the flag is set, which starts anew. The host waits for the kernels that were noted, and for nothing else.
  bool take(c10::Device device);

 private:
  struct Flag {
    at::Tensor value;                             // int32 [1]
    std::map<c10::StreamId, c10::Event> kernels;  // the last ones of each stream
    std::optional<c10::Stream> stream;
  };
  Flag& of(c10::Device device);

  std::mutex mutex_;
  std::map<std::pair<c10::DeviceType, c10::DeviceIndex>, Flag> flags_;
};

}  // namespace planmoe
