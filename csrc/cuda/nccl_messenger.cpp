// NCCL's own calls, on the current stream: a process group keeps a record, events and a stream of its own per message.
#include <torch/version.h>

// Earlier releases of torch tell nobody their communicators.
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 8)

#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/cuda/nccl.h>

#include <exception>

#include "../comm/messenger.h"

namespace planmoe {
namespace {

namespace nccl = torch::cuda::nccl;

class NcclMessenger final : public Messenger {
 public:
  explicit NcclMessenger(void* communicator) : communicator_(communicator) {}

  void send_and_receive(const Leg& leg) override {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    std::exception_ptr failure;
    {
      nccl::AutoNcclGroup group(communicator_,
                                /*comm_nonblocking=*/true);  // its end may throw, but not while unwinding
      try {
        for (const auto& message : leg.receives) {
          auto buffer = message.buffer;
          nccl::recv(buffer, communicator_, stream, static_cast<int>(message.peer));
        }
        for (const auto& message : leg.sends)
          nccl::send(message.buffer, communicator_, stream, static_cast<int>(message.peer));
      } catch (const std::exception&) {
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
  }

 private:
  nccl::ncclComm_t communicator_;
};

const bool added = add_messenger(c10::DeviceType::CUDA,
                                 [](void* communicator) { return std::make_unique<NcclMessenger>(communicator); });

}  // namespace
}  // namespace planmoe

#endif
