#pragma once
// Launchers of the router's kernels; every result is in an order that is always the same.

#include <cuda_runtime_api.h>

#include "../kernels/gate_arguments.h"

namespace planmoe::cuda {

cudaError_t launch_place_routes(const PlaceArguments& place, cudaStream_t stream);
cudaError_t launch_weigh_routes(const WeighArguments& weigh, cudaStream_t stream);
cudaError_t launch_gate_gradient(const GateGradientArguments& gate, cudaStream_t stream);

}  // namespace planmoe::cuda
