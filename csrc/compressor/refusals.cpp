#include "refusals.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace planmoe {

int32_t* Refusals::flag_of_kernels() {
  const std::lock_guard lock(mutex_);
  if (!of_kernels_.defined()) {
    of_kernels_ = at::empty({1}, at::TensorOptions(at::kInt).pinned_memory(true));
    *static_cast<int32_t*>(of_kernels_.data_ptr()) = 0;
  }
  return static_cast<int32_t*>(of_kernels_.data_ptr());
}

void Refusals::note_kernels(c10::Device device) {
  const auto stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  c10::Event event(device.type());
  event.record(stream);
  const std::lock_guard lock(mutex_);
  last_kernels_.insert_or_assign(stream.id(), std::move(event));
}

bool Refusals::take() {
  std::map<c10::StreamId, c10::Event> kernels;
  at::Tensor of_kernels;
  {
    const std::lock_guard lock(mutex_);
    kernels.swap(last_kernels_);
    of_kernels = of_kernels_;
  }
  for (const auto& [stream, event] : kernels) event.synchronize();
  bool refused = on_host_.exchange(0) != 0;
  if (of_kernels.defined()) refused |= std::atomic_ref(*static_cast<int32_t*>(of_kernels.data_ptr())).exchange(0) != 0;
  return refused;
}

}  // namespace planmoe
