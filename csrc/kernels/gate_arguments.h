#pragma once
// What the loops of the router take, on the CPU and on accelerators; free of torch.

#include <cstdint>
#include <limits>

namespace planmoe {

constexpr float kLeastTotal = std::numeric_limits<float>::epsilon();  // what DeepSpeed divides by at least

struct GateShape {
  int64_t num_tokens = 0;
  int64_t num_experts = 1;
  int64_t top_k = 1;  // with more than one a token's weights are divided by their total
};

// Every route's place among its expert's rows, in the order of the tokens; by_choice: all first routes before all second
// ones. `kept` [T, E] or nullptr: the routes that may have a place; `capacity`: places of an expert.
struct PlaceArguments {
  GateShape shape;
  const int64_t* expert = nullptr;  // [K, T], distinct ones for a token unless by_choice
  int64_t route_step = 0;
  int64_t token_step = 0;
  const bool* kept = nullptr;
  int64_t capacity = 1;
  bool by_choice = false;
  int32_t* placed = nullptr;  // [K, T] the expert, -1 for routes without a place
  int32_t* slot = nullptr;    // [K, T] the place, 0 for routes without one
  int64_t* counts = nullptr;  // [E] routes, with a place or without
};

// The weights of routes: their probs, 0 without a place, NaN where the token's probs are; divided by total, what a
// token's probs add up to, given or (finds_total) found, route after route.
struct WeighArguments {
  GateShape shape;
  const float* probs = nullptr;     // [T, E]
  const int32_t* placed = nullptr;  // [K, T]
  float* total = nullptr;           // [T]
  bool finds_total = false;
  float* weight = nullptr;  // [K, T]
};

struct GateGradientArguments {
  GateShape shape;
  const float* probs = nullptr;        // [T, E]
  const int32_t* placed = nullptr;     // [K, T]
  const float* total = nullptr;        // [T]
  const float* share = nullptr;        // [E]
  const float* weight_grad = nullptr;  // [K, T], nullptr: zeros
  const float* loss_grad = nullptr;    // [1], nullptr: zero
  float loss_factor = 1;
  float* logits_grad = nullptr;  // [T, E]
};

}  // namespace planmoe
