#pragma once

#include <c10/core/Device.h>
#include <c10/core/Event.h>

#include <cstdint>
#include <memory>
#include <optional>

namespace planmoe {

// Nanoseconds of the host's monotonic clock (the one behind Python's time.perf_counter_ns on Linux).
int64_t host_now_ns();

class Clock;

// A moment on a device's current stream (or on the host): recorded now, read later.
class Stamp {
 public:
  // Nanoseconds on the host's monotonic clock; on an accelerator this blocks until the stream has passed the stamp.
  int64_t ns() const;
  // On an accelerator: `stream` goes on once this moment has passed, and whether it has.
  void block(const c10::Stream& stream) const { event_->block(stream); }
  bool passed() const { return event_->query(); }

 private:
  friend class Clock;
  std::shared_ptr<const Clock> clock_;
  std::shared_ptr<c10::Event> event_;
  int64_t host_ns_ = 0;
};

// Puts host and accelerator moments on one axis: accelerator events are read relative to a base event whose host
// time is known.
class Clock : public std::enable_shared_from_this<Clock> {
 public:
  explicit Clock(c10::Device device);
  Stamp stamp() const;

 private:
  friend class Stamp;
  c10::Device device_;
  std::shared_ptr<c10::Event> base_;
  int64_t base_ns_ = 0;
};

}  // namespace planmoe
