// The router's kernels for tensors.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "device_rows.h"
#include "gate_kernels.h"

namespace planmoe::cuda {
namespace {

template <class Arguments>
void start(cudaError_t (*launch)(const Arguments&, cudaStream_t), const Arguments& arguments, c10::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  check_launch(launch(arguments, c10::cuda::getCurrentCUDAStream(device.index()).stream()));
}

}  // namespace

void DeviceRows::place_routes(const PlaceArguments& place, c10::Device device) const {
  start(launch_place_routes, place, device);
}

void DeviceRows::weigh_routes(const WeighArguments& weigh, c10::Device device) const {
  start(launch_weigh_routes, weigh, device);
}

void DeviceRows::find_gate_gradient(const GateGradientArguments& gate, c10::Device device) const {
  start(launch_gate_gradient, gate, device);
}

}  // namespace planmoe::cuda
