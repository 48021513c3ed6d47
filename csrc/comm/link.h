#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace c10d {
class ProcessGroup;  // its header takes longer to compile than most files here
}

namespace planmoe {

struct Message {
  int64_t peer;  // group rank
  at::Tensor buffer;
};

class Transfer;

// The part of an exchange that one link carries.
struct Leg {
  std::vector<Message> receives;
  std::vector<Message> sends;
  std::vector<std::pair<at::Tensor, at::Tensor>> local_copies;  // (from, to) on this rank
  int tag = 0;
  // What this leg passes on arrives with `after`, on another link; then `prepare` fills what is sent and copied. Both
  // run on the link (its thread or stream) once the receives are posted and the legs before have finished. `prepare`
  // may append messages and copies whose sizes were not known earlier.
  std::shared_ptr<Transfer> after;
  std::function<void(Leg&)> prepare;
  bool timed_from_arrival = false;  // its span begins when `after` has arrived, not when the link turns to it

  bool empty() const { return receives.empty() && sends.empty() && local_copies.empty(); }
  int64_t bytes_sent() const;
};

// A leg in flight.
class Transfer {
 public:
  virtual ~Transfer() = default;
  virtual bool wait_for(int64_t milliseconds) = 0;
  // Accelerators: makes the current stream wait for it. Elsewhere wait_for() does.
  virtual void order_current_stream() {}
  // Accelerators: whether the device has got past it, which wait_for() does not tell. From any thread.
  virtual bool passed() const { return true; }
  // When it left and arrived, nanoseconds of the host's monotonic clock; valid once waited for.
  virtual std::pair<int64_t, int64_t> span_ns() const = 0;

  std::string lane;
  int64_t bytes_sent = 0;  // final once waited for
};

// A FIFO of legs over one process group: one leg in flight at a time, receives posted before sends. Legs must be posted
// in an order that is the same on all ranks and in which every leg comes later than its `after`: nothing can hang then.
// CPU groups: a worker thread carries legs to completion, so that they progress while the caller computes.
// Accelerators: a side stream ordered after the caller's current stream.
class Link {
 public:
  virtual ~Link() = default;
  virtual std::shared_ptr<Transfer> post(Leg leg) = 0;

  // Ends what is in flight: its waits, and all later ones, throw `reason`. Accelerators: the device's waits end, with
  // whatever the buffers hold then; only legs posted later throw. From any thread.
  virtual void abort(const std::string& reason) = 0;
};

std::unique_ptr<Link> make_thread_link(c10::intrusive_ptr<c10d::ProcessGroup> group, std::string lane,
                                       int64_t timeout_ms);
// communicator: see make_messenger.
std::unique_ptr<Link> make_stream_link(c10::intrusive_ptr<c10d::ProcessGroup> group, void* communicator,
                                       std::string lane, c10::Device device);

}  // namespace planmoe
