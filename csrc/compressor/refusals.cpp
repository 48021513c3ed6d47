#include "refusals.h"

#include <ATen/ATen.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace planmoe {

int32_t* Refusals::flag(c10::Device device) {
  const std::lock_guard lock(mutex_);
  return of(device).value.mutable_data_ptr<int32_t>();
}

void Refusals::note_kernels(c10::Device device) {
  const auto stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  c10::Event event(device.type());
  event.record(stream);
  const std::lock_guard lock(mutex_);
  of(device).kernels.insert_or_assign(stream.id(), std::move(event));
}

bool Refusals::take(c10::Device device) {
  std::map<c10::StreamId, c10::Event> kernels;
  at::Tensor value;
  std::optional<c10::Stream> stream;
  {
    const std::lock_guard lock(mutex_);
    auto& flag = of(device);
    kernels.swap(flag.kernels);
    value = flag.value;
    if (!device.is_cpu() && !flag.stream)
      flag.stream = c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device);
    stream = flag.stream;
  }
  const c10::OptionalStreamGuard guard(stream);
  for (const auto& [id, kernel] : kernels) kernel.block(*stream);
  if (value.item<int32_t>() == 0) return false;
  value.zero_();
  if (stream) stream->synchronize();  // before anything sets it anew
  return true;
}

Refusals::Flag& Refusals::of(c10::Device device) {
  TORCH_CHECK_VALUE(device.is_cpu() || device.has_index(), "expected a device with its number, got ", device);
  auto& flag = flags_[{device.type(), device.index()}];
  // Copied from the host, which waits: it is zero for every stream that will write to it.
  if (!flag.value.defined()) flag.value = at::zeros({1}, at::kInt).to(device);
  return flag;
}

}  // namespace planmoe
