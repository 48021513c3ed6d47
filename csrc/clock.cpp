#include "clock.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <chrono>

namespace planmoe {

int64_t host_now_ns() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

Clock::Clock(c10::Device device) : device_(device) {
  if (device.is_cpu()) return;
  c10::impl::VirtualGuardImpl guard(device.type());
  base_ = std::make_shared<c10::Event>(device.type(), c10::EventFlag::BACKEND_DEFAULT);
  base_->record(guard.getStream(device));
  base_->synchronize();
  base_ns_ = host_now_ns();
}

Stamp Clock::stamp() const {
  Stamp stamp;
  stamp.host_ns_ = host_now_ns();
  if (base_) {
    c10::impl::VirtualGuardImpl guard(device_.type());
    stamp.clock_ = shared_from_this();
    stamp.event_ = std::make_shared<c10::Event>(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
    stamp.event_->record(guard.getStream(device_));
  }
  return stamp;
}

int64_t Stamp::ns() const {
  if (!event_) return host_ns_;
  event_->synchronize();
  return clock_->base_ns_ + static_cast<int64_t>(clock_->base_->elapsedTime(*event_) * 1e6);
}

}  // namespace planmoe
