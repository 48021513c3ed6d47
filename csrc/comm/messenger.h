#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <memory>
#include <vector>

#include "link.h"

namespace planmoe {

// Carries the messages of legs on an accelerator: on the current stream, which the host does not wait for.
class Messenger {
 public:
  virtual ~Messenger() = default;
  virtual void send_and_receive(const Leg& leg) = 0;
  // Whether send_and_receive makes the leg's local copies, too.
  virtual bool copies_locally() const { return false; }
};

// By the calls of the library that is behind a process group, where the extension was built for it and `communicator`
// (its handle there) is not null. Otherwise by the group's own, which take the host about twice as long.
std::unique_ptr<Messenger> make_messenger(c10::intrusive_ptr<c10d::ProcessGroup> group, void* communicator,
                                          c10::Device device);

// Makes the messenger of a communicator in which this rank is `rank`. Called once, as the module loads.
using MessengerMaker = std::function<std::unique_ptr<Messenger>(void* communicator, int64_t rank)>;
bool add_messenger(c10::DeviceType type, MessengerMaker maker);

}  // namespace planmoe
