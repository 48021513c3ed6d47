#include "workspace.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <utility>

namespace planmoe {
namespace {

constexpr int64_t kSmall = 1 << 12;

}  // namespace

at::Tensor Workspace::take(int64_t rows, int64_t width, c10::Device device) {
  const c10::InferenceMode off(false);  // what is made in it can never be written to outside it
  const auto options = at::TensorOptions().dtype(at::kByte).device(device);
  const int64_t bytes = rows * width;
  if (!device.is_cpu() || bytes == 0) return at::empty({rows, width}, options);
  std::lock_guard<std::mutex> lock(mutex_);
  at::Tensor* best = nullptr;
  for (auto& buffer : buffers_)
    if (buffer.storage().use_count() == 1 && buffer.numel() >= bytes && (!best || buffer.numel() < best->numel()))
      best = &buffer;
  if (!best || best->numel() > bytes + bytes / 2 + kSmall) {
    drop_one_too_small(bytes);
    buffers_.push_back(at::empty({bytes + bytes / 8}, options));  // room for a little more next time
    best = &buffers_.back();
  }
  auto taken = best->narrow(0, 0, bytes).view({rows, width});
  int64_t in_use = 0;
  for (const auto& buffer : buffers_)
    if (buffer.storage().use_count() > 1) in_use += buffer.numel();
  peak_ = std::max(peak_, in_use);
  return taken;
}

int64_t Workspace::take_peak() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(peak_, 0);
}

// A request that outgrew the pool takes the place of the largest free buffer below it.
void Workspace::drop_one_too_small(int64_t bytes) {
  auto victim = buffers_.end();
  for (auto buffer = buffers_.begin(); buffer != buffers_.end(); ++buffer)
    if (buffer->storage().use_count() == 1 && buffer->numel() < bytes &&
        (victim == buffers_.end() || victim->numel() < buffer->numel()))
      victim = buffer;
  if (victim != buffers_.end()) buffers_.erase(victim);
}

}  // namespace planmoe
