// Legs over an accelerator's process group (NCCL): issued at once by the calling thread on a side stream.
#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "../clock.h"
#include "link.h"

namespace planmoe {
namespace {

class StreamTransfer final : public Transfer {
 public:
  StreamTransfer(Leg leg, c10::Device device) : leg_(std::move(leg)), device_(device), finished_event_(device.type()) {}

  // Tensors must outlive the side stream's use of them: the current stream is ordered after it first.
  ~StreamTransfer() override {
    if (!waited_) order_current_stream();
  }

  bool wait_for(int64_t /*milliseconds*/) override {
    order_current_stream();
    waited_ = true;
    leg_ = Leg();
    return true;
  }

  void order_current_stream() override {
    if (posted_) finished_event_.block(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  }

  std::pair<int64_t, int64_t> span_ns() const override { return {started_.ns(), finished_.ns()}; }

  Leg& leg() { return leg_; }
  void mark_started(const Clock& clock) { started_ = clock.stamp(); }
  void mark_finished(const Clock& clock, const c10::Stream& side) {
    bytes_sent = leg_.bytes_sent();
    finished_ = clock.stamp();
    finished_event_.record(side);
    posted_ = true;
  }

 private:
  Leg leg_;
  c10::Device device_;
  c10::Event finished_event_;
  bool posted_ = false;
  bool waited_ = false;
  Stamp started_;
  Stamp finished_;
};

class StreamLink final : public Link {
 public:
  StreamLink(c10::intrusive_ptr<c10d::ProcessGroup> group, std::string lane, c10::Device device)
      : group_(std::move(group)),
        lane_(std::move(lane)),
        device_(device),
        side_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device)),
        clock_(std::make_shared<Clock>(device)),
        nothing_(at::empty({0}, at::TensorOptions(device).dtype(at::kByte))) {}

  std::shared_ptr<Transfer> post(Leg leg) override {
    auto transfer = std::make_shared<StreamTransfer>(std::move(leg), device_);
    transfer->lane = lane_;
    c10::Event inputs_ready(device_.type());
    inputs_ready.record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
    inputs_ready.block(side_);
    c10::StreamGuard guard(side_);
    transfer->mark_started(*clock_);
    carry(transfer->leg());
    transfer->mark_finished(*clock_, side_);
    return transfer;
  }

  // The device's waits end, with whatever the buffers hold then: callers must look at why before they use them.
  void abort(const std::string& /*reason*/) override { group_->getBackend(device_.type())->abort(); }

 private:
  void carry(Leg& leg) {
    if (leg.after) leg.after->order_current_stream();
    if (leg.prepare) leg.prepare(leg);
    c10::intrusive_ptr<c10d::Work> work;
    if (!leg.receives.empty() || !leg.sends.empty()) {
      auto received = by_peer(leg.receives), sent = by_peer(leg.sends);
      work = received.empty() || sent.empty() ? send_and_receive(leg) : group_->alltoall(received, sent);
    }
    for (const auto& [from, to] : leg.local_copies) to.copy_(from, /*non_blocking=*/true);
    if (work) work->wait();  // orders the side stream, not the host
  }

  // A buffer for every rank of the group, as alltoall takes them; none at all where a rank has several.
  std::vector<at::Tensor> by_peer(const std::vector<Message>& messages) const {
    std::vector<at::Tensor> buffers(group_->getSize(), nothing_);
    for (const auto& message : messages) {
      auto& buffer = buffers.at(message.peer);
      if (buffer.numel() > 0) return {};
      buffer = message.buffer;
    }
    return buffers;
  }

  // Pairs with the alltoall of other ranks: both are NCCL's sends and receives in one group call, but this one costs the
  // host a step for each.
  c10::intrusive_ptr<c10d::Work> send_and_receive(const Leg& leg) {
    group_->startCoalescing(device_.type());
    for (const auto& message : leg.receives) {
      std::vector<at::Tensor> buffers{message.buffer};
      group_->recv(buffers, static_cast<int>(message.peer), leg.tag);
    }
    for (const auto& message : leg.sends) {
      std::vector<at::Tensor> buffers{message.buffer};
      group_->send(buffers, static_cast<int>(message.peer), leg.tag);
    }
    return group_->endCoalescing(device_.type());
  }

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::string lane_;
  c10::Device device_;
  c10::Stream side_;
  std::shared_ptr<Clock> clock_;
  at::Tensor nothing_;
};

}  // namespace

std::unique_ptr<Link> make_stream_link(c10::intrusive_ptr<c10d::ProcessGroup> group, std::string lane,
                                       c10::Device device) {
  return std::make_unique<StreamLink>(std::move(group), std::move(lane), device);
}

}  // namespace planmoe
