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
  NcclMessenger(void* communicator, int64_t rank) : communicator_(communicator), rank_(rank) {}

  // As messages to itself: beside the others, and for less of the host's time than a copy of each takes.
  bool copies_locally() const override { return true; }

  void send_and_receive(const Leg& leg) override {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    std::exception_ptr failure;
    {
      nccl::AutoNcclGroup group(communicator_,
                                /*comm_nonblocking=*/true);  // its end may throw, but not while unwinding
      try {
        for (const auto& message : leg.receives) receive(message.buffer, message.peer, stream);
        for (const auto& [from, to] : leg.local_copies) receive(to, rank_, stream);
        for (const auto& message : leg.sends) send(message.buffer, message.peer, stream);
        for (const auto& [from, to] : leg.local_copies) send(from, rank_, stream);
      } catch (const std::exception&) {
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
  }

 private:
  void send(const at::Tensor& rows, int64_t peer, const at::cuda::CUDAStream& stream) const {
    nccl::send(rows, communicator_, stream, static_cast<int>(peer));
  }

  void receive(at::Tensor rows, int64_t peer, const at::cuda::CUDAStream& stream) const {
    nccl::recv(rows, communicator_, stream, static_cast<int>(peer));
  }

  nccl::ncclComm_t communicator_;
  int64_t rank_;
};

const bool added = add_messenger(c10::DeviceType::CUDA, [](void* communicator, int64_t rank) {
  return std::make_unique<NcclMessenger>(communicator, rank);
});

}  // namespace
}  // namespace planmoe

#endif
