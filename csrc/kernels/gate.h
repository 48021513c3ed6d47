#pragma once
// DeepSpeed's router (deepspeed.moe.sharded_moe: top1gating, top2gating, topkgating), after GShard,
// https://arxiv.org/abs/2006.16668: the same random numbers and the same operations of torch where these round, and
// kernels for what takes DeepSpeed dozens of operations.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace planmoe {

// T tokens, K routes each, E experts.
struct GateOptions {
  int64_t top_k = 1;
  int64_t capacity = -1;         // rows that an expert takes from this rank; -1: all
  bool samples = false;          // Gumbel noise on the logits from which the last of one or two routes is chosen
  bool drops_at_random = false;  // top-1: which tokens a full expert takes; else torch.topk says among equals
};

struct GateDecision {
  at::Tensor balance_loss;  // float, one number
  at::Tensor expert;        // int32 [K, T], -1: dropped
  at::Tensor slot;          // int32 [K, T], place among the expert's rows of this rank, 0 where dropped
  at::Tensor weight;        // float [K, T]
  at::Tensor counts;        // int64 [E], routes before any were dropped
  at::Tensor probs;         // float [T, E], this and the rest for the backward pass
  at::Tensor total;         // float [T], of a token's probs before they were divided by it; top-1 divides by nothing
  at::Tensor share;         // float [E], of the tokens that count for the balance loss
};

// logits: float [T, E], contiguous, on a device for which gate_runs_on holds. ValueError for others.
GateDecision decide_gate(const at::Tensor& logits, const GateOptions& options);

// float [T, E]: the logits' gradient from that of the weights [K, T] and that of the balance loss, one number; either
// may be missing. Of the decision it takes expert, probs, total and share.
at::Tensor gate_gradient(const GateDecision& decision, const std::optional<at::Tensor>& weight_grad,
                         const std::optional<at::Tensor>& loss_grad);

bool gate_runs_on(const at::Tensor& tensor);

}  // namespace planmoe
