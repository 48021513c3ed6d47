#include "gate.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/IListRef_inl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "device.h"
#include "gate_arguments.h"
#include "parallel.h"

namespace planmoe {
namespace {

// ---- on the CPU ----

void place_routes(const PlaceArguments& place) {
  const auto num_tokens = place.shape.num_tokens, num_experts = place.shape.num_experts, top_k = place.shape.top_k;
  std::vector<int64_t> next(num_experts, 0);
  std::fill_n(place.counts, num_experts, 0);
  const auto visit = [&](int64_t route, int64_t token) {
    const auto expert = place.expert[route * place.route_step + token * place.token_step];
    ++place.counts[expert];
    const auto fits = (!place.kept || place.kept[token * num_experts + expert]) && next[expert] < place.capacity;
    place.placed[route * num_tokens + token] = fits ? static_cast<int32_t>(expert) : -1;
    place.slot[route * num_tokens + token] = fits ? static_cast<int32_t>(next[expert]++) : 0;
  };
  for (int64_t outer = 0; outer < (place.by_choice ? top_k : num_tokens); ++outer)
    for (int64_t inner = 0; inner < (place.by_choice ? num_tokens : top_k); ++inner)
      place.by_choice ? visit(outer, inner) : visit(inner, outer);
}

void weigh_token(const WeighArguments& weigh, int64_t token) {
  const auto [num_tokens, num_experts, top_k] = weigh.shape;
  const auto* const probs = weigh.probs + token * num_experts;
  auto* const weights = weigh.weight + token;
  float total = 0;
  for (int64_t route = 0; route < top_k; ++route) {
    const auto expert = weigh.placed[route * num_tokens + token];
    weights[route * num_tokens] = expert < 0 ? probs[0] * 0 : probs[expert];
    total += weights[route * num_tokens];
  }
  if (weigh.finds_total) weigh.total[token] = total;
  if (top_k == 1) return;
  const auto divisor = weigh.total[token] < kLeastTotal ? kLeastTotal : weigh.total[token];
  for (int64_t route = 0; route < top_k; ++route) weights[route * num_tokens] /= divisor;
}

void find_gradient_of_token(const GateGradientArguments& gate, int64_t token) {
  const auto [num_tokens, num_experts, top_k] = gate.shape;
  const auto* const probs = gate.probs + token * num_experts;
  auto* const grad = gate.logits_grad + token * num_experts;
  const auto loss_grad = gate.loss_grad ? *gate.loss_grad * gate.loss_factor : 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) grad[expert] = loss_grad * gate.share[expert];
  const auto total = top_k > 1 ? gate.total[token] : 1;
  const auto divisor = total < kLeastTotal ? kLeastTotal : total;
  const auto each_route = [&](const auto& visit) {
    for (int64_t route = 0; gate.weight_grad && route < top_k; ++route) {
      const auto expert = gate.placed[route * num_tokens + token];
      if (expert >= 0) visit(expert, gate.weight_grad[route * num_tokens + token] / divisor);
    }
  };
  float of_total = 0;
  if (top_k > 1 && !(total < kLeastTotal))
    each_route([&](int32_t expert, float weight_grad) { of_total -= weight_grad * (probs[expert] / divisor); });
  each_route([&](int32_t expert, float weight_grad) { grad[expert] += weight_grad + of_total; });
  float mean = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) mean += probs[expert] * grad[expert];
  for (int64_t expert = 0; expert < num_experts; ++expert) grad[expert] = probs[expert] * (grad[expert] - mean);
}

// ---- with torch's operations ----

// As torch.distributions.gumbel.Gumbel(0, 1).rsample: from the same random numbers the same values.
at::Tensor gumbel_noise(const at::Tensor& like) {
  auto values = at::rand(like.sizes(), like.options());
  values.mul_(1.0 - std::numeric_limits<float>::epsilon()).add_(std::numeric_limits<float>::min());
  return values.log_().neg_().log_().neg_();
}

at::Tensor ones_at(const at::Tensor& index, const at::Tensor& like) {
  return at::zeros_like(like).scatter_(1, index, 1);
}

// Of the `capacity` largest of every expert, bool [T, E].
at::Tensor largest(const at::Tensor& values, int64_t capacity, bool sorted) {
  const auto found = std::get<1>(values.topk(std::min(capacity, values.size(0)), 0, true, sorted));
  return at::zeros(values.sizes(), values.options().dtype(at::kBool)).scatter_(0, found, true);
}

GateShape shape_of(const at::Tensor& probs, int64_t top_k) { return {probs.size(0), probs.size(1), top_k}; }

void check(const at::Tensor& logits, const GateOptions& options) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.scalar_type() == at::kFloat && logits.is_contiguous(),
                    "logits must be contiguous float32 [T, E], got ", logits.scalar_type(), " ", logits.sizes());
  TORCH_CHECK_VALUE(options.top_k >= 1 && options.top_k <= std::max<int64_t>(2, logits.size(1)), "top-", options.top_k,
                    " of ", logits.size(1), " experts");
  TORCH_CHECK_VALUE(options.capacity >= -1, "the capacity is ", options.capacity);
  TORCH_CHECK_VALUE(gate_runs_on(logits), "there are no kernels of the router for tensors on ", logits.device());
}

// Experts [T, K] that the tokens choose; for the balance loss float [T, E], ones at the choices that count.
struct Choice {
  at::Tensor index;
  at::Tensor counted;
  at::Tensor kept;   // bool [T, E], which may have a place; not defined: all, in their order
  at::Tensor total;  // float [T], not defined: of two or less
};

Choice choose_one(const at::Tensor& logits, const at::Tensor& probs, const GateOptions& options) {
  Choice choice;
  choice.index = (options.samples ? logits + gumbel_noise(logits) : probs).argmax(1, true);
  choice.counted = ones_at(choice.index, probs);
  const auto drawn = options.drops_at_random ? at::rand(probs.sizes(), probs.options()) : at::Tensor();
  if (options.capacity >= 0)
    choice.kept = largest(drawn.defined() ? choice.counted * drawn : choice.counted.to(at::kLong), options.capacity,
                          /*sorted=*/true);
  return choice;
}

Choice choose_two(const at::Tensor& logits, const at::Tensor& probs, const GateOptions& options) {
  Choice choice;
  const auto first = probs.argmax(1, true);
  choice.counted = ones_at(first, probs);
  auto others = options.samples ? logits + gumbel_noise(logits) : logits.clone();
  others.scatter_(1, first, -std::numeric_limits<float>::infinity());
  choice.index = at::cat({first, others.argmax(1, true)}, 1);
  return choice;
}

Choice choose_more(const at::Tensor& probs, const GateOptions& options) {
  Choice choice;
  at::Tensor prob;
  std::tie(prob, choice.index) = probs.topk(options.top_k, 1);
  choice.counted = ones_at(choice.index, probs);
  auto chosen = at::zeros_like(probs).scatter_(1, choice.index, prob);
  if (options.capacity >= 0) {
    choice.kept = largest(chosen, options.capacity, /*sorted=*/false);
    chosen.mul_(choice.kept);
  }
  choice.total = chosen.sum(1);
  return choice;
}

at::Tensor balance_loss(const at::Tensor& probs, const at::Tensor& share, int64_t top_k) {
  const auto products = probs.mean(0).mul_(share);
  const auto num_experts = probs.size(1);
  if (top_k == 1) return products.sum().mul_(num_experts);
  auto loss = products.mean().mul_(num_experts).mul_(num_experts);
  return top_k == 2 ? loss : loss.div_(top_k);
}

void place(const Choice& choice, const GateOptions& options, GateDecision& decision) {
  const auto& probs = decision.probs;
  const auto shape = shape_of(probs, options.top_k);
  decision.expert = at::empty({shape.top_k, shape.num_tokens}, probs.options().dtype(at::kInt));
  decision.slot = at::empty_like(decision.expert);
  decision.counts = at::empty({shape.num_experts}, probs.options().dtype(at::kLong));
  PlaceArguments place;
  place.shape = shape;
  place.expert = choice.index.const_data_ptr<int64_t>();
  place.route_step = choice.index.stride(1);
  place.token_step = choice.index.stride(0);
  if (choice.kept.defined()) place.kept = choice.kept.const_data_ptr<bool>();
  place.capacity = options.capacity >= 0 ? options.capacity : shape.top_k * shape.num_tokens;
  place.by_choice = options.top_k == 2;
  place.placed = decision.expert.mutable_data_ptr<int32_t>();
  place.slot = decision.slot.mutable_data_ptr<int32_t>();
  place.counts = decision.counts.mutable_data_ptr<int64_t>();
  if (const auto* kernels = device_kernels(probs))
    kernels->place_routes(place, probs.device());
  else
    place_routes(place);
}

void weigh(const Choice& choice, GateDecision& decision) {
  const auto& probs = decision.probs;
  const auto shape = shape_of(probs, decision.expert.size(0));
  decision.weight = at::empty(decision.expert.sizes(), probs.options());
  decision.total = choice.total.defined() ? choice.total : at::empty({shape.num_tokens}, probs.options());
  WeighArguments weigh;
  weigh.shape = shape;
  weigh.probs = probs.const_data_ptr<float>();
  weigh.placed = decision.expert.const_data_ptr<int32_t>();
  weigh.total = decision.total.mutable_data_ptr<float>();
  weigh.finds_total = !choice.total.defined();
  weigh.weight = decision.weight.mutable_data_ptr<float>();
  if (const auto* kernels = device_kernels(probs))
    kernels->weigh_routes(weigh, probs.device());
  else
    for_each_row(shape.num_tokens, shape.num_experts, [&](int64_t token) { weigh_token(weigh, token); });
}

void check_gradient(const char* whose, const std::optional<at::Tensor>& grad, at::IntArrayRef sizes,
                    const at::Tensor& probs) {
  if (!grad) return;
  TORCH_CHECK_VALUE(grad->sizes() == sizes && grad->scalar_type() == at::kFloat && grad->device() == probs.device(),
                    "the ", whose, " gradient must be float32 ", sizes, " on ", probs.device(), ", got ",
                    grad->scalar_type(), " ", grad->sizes(), " on ", grad->device());
}

}  // namespace

bool gate_runs_on(const at::Tensor& tensor) { return tensor.device().is_cpu() || device_kernels(tensor) != nullptr; }

GateDecision decide_gate(const at::Tensor& logits, const GateOptions& options) {
  check(logits, options);
  const at::AutoDispatchBelowADInplaceOrView guard;
  GateDecision decision;
  auto& probs = decision.probs = at::softmax(logits, 1);
  const auto choice = options.top_k == 1   ? choose_one(logits, probs, options)
                      : options.top_k == 2 ? choose_two(logits, probs, options)
                                           : choose_more(probs, options);
  decision.share = choice.counted.mean(0);
  decision.balance_loss = balance_loss(probs, decision.share, options.top_k);
  place(choice, options, decision);
  weigh(choice, decision);
  return decision;
}

at::Tensor gate_gradient(const GateDecision& decision, const std::optional<at::Tensor>& weight_grad,
                         const std::optional<at::Tensor>& loss_grad) {
  const auto& probs = decision.probs;
  check_gradient("weights'", weight_grad, decision.expert.sizes(), probs);
  check_gradient("balance loss's", loss_grad, {}, probs);
  const auto grads = weight_grad ? weight_grad->contiguous() : at::Tensor();
  auto result = at::empty_like(probs);
  GateGradientArguments gate;
  gate.shape = shape_of(probs, decision.expert.size(0));
  gate.probs = probs.const_data_ptr<float>();
  gate.placed = decision.expert.const_data_ptr<int32_t>();
  gate.total = decision.total.const_data_ptr<float>();
  gate.share = decision.share.const_data_ptr<float>();
  if (weight_grad) gate.weight_grad = grads.const_data_ptr<float>();
  if (loss_grad) gate.loss_grad = loss_grad->const_data_ptr<float>();
  gate.loss_factor = static_cast<float>(gate.shape.num_experts) / static_cast<float>(gate.shape.num_tokens);
  if (gate.shape.top_k > 2) gate.loss_factor /= static_cast<float>(gate.shape.top_k);
  gate.logits_grad = result.mutable_data_ptr<float>();
  if (const auto* kernels = device_kernels(probs))
    kernels->find_gate_gradient(gate, probs.device());
  else
    for_each_row(gate.shape.num_tokens, gate.shape.num_experts,
                 [&](int64_t token) { find_gradient_of_token(gate, token); });
  return result;
}

}  // namespace planmoe
