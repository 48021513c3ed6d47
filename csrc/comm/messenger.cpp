#include "messenger.h"

#include <exception>
#include <map>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace planmoe {
namespace {

// Filled while the module loads, read-only after.
std::map<c10::DeviceType, MessengerMaker>& makers() {
  static std::map<c10::DeviceType, MessengerMaker> table;
  return table;
}

class GroupMessenger final : public Messenger {
 public:
  GroupMessenger(c10::intrusive_ptr<c10d::ProcessGroup> group, c10::Device device)
      : group_(std::move(group)), device_(device) {}

  // Not alltoall: with NCCL and torch 2.11 it hung where ranks of a card had legs of one message each.
  void send_and_receive(const Leg& leg) override {
    group_->startCoalescing(device_.type());
    std::exception_ptr failure;
    try {
      for (const auto& message : leg.receives) {
        std::vector<at::Tensor> buffers{message.buffer};
        group_->recv(buffers, static_cast<int>(message.peer), leg.tag);
      }
      for (const auto& message : leg.sends) {
        std::vector<at::Tensor> buffers{message.buffer};
        group_->send(buffers, static_cast<int>(message.peer), leg.tag);
      }
    } catch (const std::exception&) {
      failure = std::current_exception();
    }
    const auto work = group_->endCoalescing(device_.type());
    if (failure) std::rethrow_exception(failure);
    if (work) work->wait();  // orders the current stream, not the host
  }

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  c10::Device device_;
};

}  // namespace

std::unique_ptr<Messenger> make_messenger(c10::intrusive_ptr<c10d::ProcessGroup> group, void* communicator,
                                          c10::Device device) {
  const auto maker = makers().find(device.type());
  if (communicator != nullptr && maker != makers().end()) return maker->second(communicator, group->getRank());
  return std::make_unique<GroupMessenger>(std::move(group), device);
}

bool add_messenger(c10::DeviceType type, MessengerMaker maker) {
  return makers().emplace(type, std::move(maker)).second;
}

}  // namespace planmoe
