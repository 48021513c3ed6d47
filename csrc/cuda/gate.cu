// One block per expert gives its routes their places; one thread weighs a token's, one warp finds its gradient.
#include "gate_kernels.h"

namespace planmoe::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kPlaceThreads = 1024;
constexpr int kPlaceWarps = kPlaceThreads / kWarp;
constexpr int kTokenThreads = 128;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
static_assert(kPlaceWarps == kWarp);  // each lane holds the number of one warp

// ---- places ----

// How many threads of the block before this one, and how many in all, say `counts`.
struct Rank {
  int before;
  int total;
};

__device__ Rank rank_in_block(bool counts, int* warp_totals) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned votes = __ballot_sync(kAllLanes, counts);
  if (lane == 0) warp_totals[warp] = __popc(votes);
  __syncthreads();
  const int own = warp_totals[lane];
  int upto = own;
  for (int step = 1; step < kPlaceWarps; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += other;
  }
  const int before_warp = __shfl_sync(kAllLanes, upto - own, warp);
  const int total = __shfl_sync(kAllLanes, upto, kPlaceWarps - 1);
  __syncthreads();
  return {before_warp + __popc(votes & ((1u << lane) - 1)), total};
}

__global__ void __launch_bounds__(kPlaceThreads) place_kernel(PlaceArguments place) {
  __shared__ int warp_totals[kPlaceWarps];
  const auto [num_tokens, num_experts, top_k] = place.shape;
  const int64_t expert = blockIdx.x;
  int64_t next = 0, count = 0;
  for (int64_t pass = 0; pass < (place.by_choice ? top_k : 1); ++pass)
    for (int64_t first = 0; first < num_tokens; first += kPlaceThreads) {
      const int64_t token = first + threadIdx.x;
      int64_t route = -1;
      if (token < num_tokens) {
        const int64_t* ids = place.expert + token * place.token_step;
        for (int64_t k = place.by_choice ? pass : 0; k < (place.by_choice ? pass + 1 : top_k); ++k)
          if (ids[k * place.route_step] == expert) route = k;
      }
      const bool wants = route >= 0 && (!place.kept || place.kept[token * num_experts + expert]);
      const auto rank = rank_in_block(wants, warp_totals);
      count += place.kept ? __syncthreads_count(route >= 0) : rank.total;
      if (route >= 0) {
        const bool fits = wants && next + rank.before < place.capacity;
        place.placed[route * num_tokens + token] = fits ? static_cast<int32_t>(expert) : -1;
        place.slot[route * num_tokens + token] = fits ? static_cast<int32_t>(next + rank.before) : 0;
      }
      next += rank.total;
    }
  if (threadIdx.x == 0) place.counts[expert] = count;
}

// ---- weights ----

__global__ void __launch_bounds__(kTokenThreads) weigh_kernel(WeighArguments weigh) {
  const auto [num_tokens, num_experts, top_k] = weigh.shape;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x;
  if (token >= num_tokens) return;
  const float* const probs = weigh.probs + token * num_experts;
  float* const weights = weigh.weight + token;
  float total = 0;
  for (int64_t route = 0; route < top_k; ++route) {
    const int32_t expert = weigh.placed[route * num_tokens + token];
    const float prob = expert < 0 ? probs[0] * 0.0f : probs[expert];
    weights[route * num_tokens] = prob;
    total += prob;
  }
  if (weigh.finds_total)
    weigh.total[token] = total;
  else
    total = weigh.total[token];
  if (top_k == 1) return;
  const float divisor = total < kLeastTotal ? kLeastTotal : total;
  for (int64_t route = 0; route < top_k; ++route) weights[route * num_tokens] /= divisor;
}

// ---- gradient ----

// visit(expert, the weight's gradient over `divisor`) for every route of the token that has a place.
template <class Visit>
__device__ void each_route(const GateGradientArguments& gate, int64_t token, float divisor, const Visit& visit) {
  for (int64_t route = 0; gate.weight_grad && route < gate.shape.top_k; ++route) {
    const int64_t place = route * gate.shape.num_tokens + token;
    if (gate.placed[place] >= 0) visit(gate.placed[place], gate.weight_grad[place] / divisor);
  }
}

__global__ void __launch_bounds__(kTokenThreads) gradient_kernel(GateGradientArguments gate) {
  const int64_t num_experts = gate.shape.num_experts;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kTokenThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (token >= gate.shape.num_tokens) return;
  const float* const probs = gate.probs + token * num_experts;
  const bool divides = gate.shape.top_k > 1;
  const float total = divides ? gate.total[token] : 1.0f;
  const float divisor = total < kLeastTotal ? kLeastTotal : total;
  float of_total = 0;
  if (divides && !(total < kLeastTotal))
    each_route(gate, token, divisor,
               [&](int32_t expert, float weight_grad) { of_total -= weight_grad * (probs[expert] / divisor); });
  const float loss_grad = gate.loss_grad ? *gate.loss_grad * gate.loss_factor : 0.0f;
  const auto prob_grad = [&](int64_t expert) {
    float grad = loss_grad * gate.share[expert];
    each_route(gate, token, divisor, [&](int32_t routed, float weight_grad) {
      if (routed == expert) grad += weight_grad + of_total;
    });
    return grad;
  };
  float mean = 0;
  for (int64_t expert = lane; expert < num_experts; expert += kWarp) mean += probs[expert] * prob_grad(expert);
  for (int step = kWarp / 2; step > 0; step /= 2) mean += __shfl_xor_sync(kAllLanes, mean, step);
  for (int64_t expert = lane; expert < num_experts; expert += kWarp)
    gate.logits_grad[token * num_experts + expert] = probs[expert] * (prob_grad(expert) - mean);
}

template <class Kernel, class Arguments>
cudaError_t launch(Kernel kernel, const Arguments& arguments, int64_t blocks, int threads, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_place_routes(const PlaceArguments& place, cudaStream_t stream) {
  return launch(place_kernel, place, place.shape.num_experts, kPlaceThreads, stream);
}

cudaError_t launch_weigh_routes(const WeighArguments& weigh, cudaStream_t stream) {
  return launch(weigh_kernel, weigh, (weigh.shape.num_tokens + kTokenThreads - 1) / kTokenThreads, kTokenThreads,
                stream);
}

cudaError_t launch_gate_gradient(const GateGradientArguments& gate, cudaStream_t stream) {
  constexpr int kTokens = kTokenThreads / kWarp;
  return launch(gradient_kernel, gate, (gate.shape.num_tokens + kTokens - 1) / kTokens, kTokenThreads, stream);
}

}  // namespace planmoe::cuda
