// Legs over an accelerator's process group (NCCL): issued at once by the calling thread on a side stream.
#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "../clock.h"
#include "link.h"
#include "messenger.h"

namespace planmoe {
namespace {

constexpr auto kStartTime = std::chrono::seconds(1);  // a leg takes less to start, unless the host has to wait there

class StreamTransfer final : public Transfer {
 public:
  StreamTransfer(Leg leg, c10::Device device) : leg_(std::move(leg)), device_(device) {}

  // Tensors must outlive the side stream's use of them: the current stream is ordered after it first.
  ~StreamTransfer() override {
    try {
      if (!waited_) order_current_stream();
    } catch (const std::exception&) {  // the device has failed: nothing runs there any more
    }
  }

  bool wait_for(int64_t /*milliseconds*/) override {
    if (!failure_.empty()) throw std::runtime_error(failure_);
    order_current_stream();
    waited_ = true;
    leg_ = Leg();
    return true;
  }

  void order_current_stream() override {
    if (posted_) finished_.block(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  }

  bool passed() const override { return !posted_ || finished_.passed(); }

  std::pair<int64_t, int64_t> span_ns() const override { return {started_.ns(), finished_.ns()}; }

  Leg& leg() { return leg_; }
  void mark_started(const Clock& clock) { started_ = clock.stamp(); }
  void mark_finished(const Clock& clock) {
    bytes_sent = leg_.bytes_sent();
    finished_ = clock.stamp();
    posted_ = true;
  }
  // What was started of it may still run; the current stream is ordered after that, too.
  void mark_broken_off(const Clock& clock) noexcept {
    try {
      mark_finished(clock);
    } catch (const std::exception&) {
    }
  }
  void fail(const std::string& reason) { failure_ = reason; }
  const std::string& failure() const { return failure_; }

 private:
  Leg leg_;
  c10::Device device_;
  std::string failure_;
  std::atomic<bool> posted_ = false;
  bool waited_ = false;
  Stamp started_;
  Stamp finished_;
};

class StreamLink final : public Link {
 public:
  StreamLink(c10::intrusive_ptr<c10d::ProcessGroup> group, void* communicator, std::string lane, c10::Device device)
      : group_(std::move(group)),
        messenger_(make_messenger(group_, communicator, device)),
        lane_(std::move(lane)),
        device_(device),
        side_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device)),
        clock_(std::make_shared<Clock>(device)) {}

  std::shared_ptr<Transfer> post(Leg leg) override {
    auto transfer = std::make_shared<StreamTransfer>(std::move(leg), device_);
    transfer->lane = lane_;
    std::lock_guard<std::timed_mutex> starting(starting_);
    if (const auto reason = why_not(transfer->leg()); !reason.empty()) {
      transfer->fail(reason);
      return transfer;
    }
    c10::Event inputs_ready(device_.type());
    inputs_ready.record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
    inputs_ready.block(side_);
    c10::StreamGuard guard(side_);
    transfer->mark_started(*clock_);
    try {
      carry(*transfer);
      transfer->mark_finished(*clock_);
    } catch (const std::exception&) {
      transfer->mark_broken_off(*clock_);
      const auto reason = abort_reason();
      if (reason.empty()) throw;
      transfer->fail(reason);
    }
    return transfer;
  }

  void abort(const std::string& reason) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!abort_reason_.empty()) return;
      abort_reason_ = reason;
    }
    // Aborting frees what a leg that is being started still uses, and ends its wait if the host has to wait there. No leg
    // starts after it, and none waits for the abort.
    if (starting_.try_lock_for(kStartTime)) starting_.unlock();
    group_->getBackend(device_.type())->abort();
  }

 private:
  std::string abort_reason() {
    std::lock_guard<std::mutex> lock(mutex_);
    return abort_reason_;
  }

  // Empty if the leg may start. What another link failed to bring cannot be passed on; a group's links are of one kind.
  std::string why_not(const Leg& leg) {
    auto reason = abort_reason();
    if (reason.empty() && leg.after) reason = static_cast<const StreamTransfer&>(*leg.after).failure();
    return reason;
  }

  void carry(StreamTransfer& transfer) {
    auto& leg = transfer.leg();
    if (leg.after) leg.after->order_current_stream();
    if (leg.timed_from_arrival) transfer.mark_started(*clock_);
    if (leg.prepare) leg.prepare(leg);
    // While the host waited in there, an abort may have freed the communicator.
    TORCH_CHECK(abort_reason().empty(), "planmoe: the exchange was aborted while it was started");
    if (!leg.receives.empty() || !leg.sends.empty()) {
      messenger_->send_and_receive(leg);
      if (messenger_->copies_locally()) return;
    }
    for (const auto& [from, to] : leg.local_copies) to.copy_(from, /*non_blocking=*/true);
  }

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::unique_ptr<Messenger> messenger_;
  std::string lane_;
  c10::Device device_;
  c10::Stream side_;
  std::shared_ptr<Clock> clock_;
  std::timed_mutex starting_;  // held while a leg is started
  std::mutex mutex_;
  std::string abort_reason_;  // empty: not aborted
};

}  // namespace

std::unique_ptr<Link> make_stream_link(c10::intrusive_ptr<c10d::ProcessGroup> group, void* communicator,
                                       std::string lane, c10::Device device) {
  return std::make_unique<StreamLink>(std::move(group), communicator, std::move(lane), device);
}

}  // namespace planmoe
