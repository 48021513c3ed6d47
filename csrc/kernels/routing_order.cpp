// The rows that a rank sends: which token's, in which order, for whom.
#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "device.h"
#include "routing.h"

namespace planmoe {
namespace {

using Counts = std::vector<int64_t>;

// Experts divide among ranks; chunks by rank are as many as ranks, and one for ranks with one first hop, whose rows travel
// there together.
void check_request(const OrderRequest& request) {
  const auto num_ranks = static_cast<int64_t>(request.node_of_rank.size());
  TORCH_CHECK_VALUE(request.num_experts > 0 && request.num_experts % num_ranks == 0, request.num_experts,
                    " experts cannot be divided among ", num_ranks, " ranks");
  const auto& chunks = request.chunk_of_rank;
  if (chunks.empty()) return;
  TORCH_CHECK_VALUE(!request.chunk_by_expert, "chunks go by expert or by rank, not both");
  TORCH_CHECK_VALUE(chunks.size() == request.node_of_rank.size(), "chunk_of_rank has ", chunks.size(),
                    " numbers, there are ", request.node_of_rank.size(), " ranks");
  for (size_t rank = 0; rank < chunks.size(); ++rank) {
    TORCH_CHECK_VALUE(chunks[rank] >= 0 && chunks[rank] < request.num_chunks, "rank ", rank, " has chunk ",
                      chunks[rank], ", there are ", request.num_chunks);
    const auto hop = request.first_hop[rank];
    TORCH_CHECK_VALUE(chunks[hop] == chunks[rank], "rank ", rank, " has chunk ", chunks[rank], ", rank ", hop,
                      ", to which its rows go first, has ", chunks[hop]);
  }
}

// The chunk's share of `request`, token by token.
class ChunkOrder {
 public:
  ChunkOrder(const OrderRequest& request, int64_t chunk, const Counts& local, int64_t group)
      : request_(request),
        chunk_(chunk),
        local_(local),
        group_(group),
        num_ranks_(static_cast<int64_t>(request.node_of_rank.size())),
        num_tokens_(request.expert.size(1)),
        experts_per_rank_(request.num_experts / num_ranks_),
        pieces_(std::max<int64_t>(1, request.num_pieces)),
        wants_(num_ranks_, -1),
        hops_(num_ranks_, -1) {
    const auto x = chunk;
    const auto X = request.num_chunks;
    last_token_ = num_tokens_;
    last_expert_ = experts_per_rank_;
    if (request.chunk_by_expert) {
      first_expert_ = (x * experts_per_rank_ + X - 1) / X;
      last_expert_ = ((x + 1) * experts_per_rank_ + X - 1) / X;
    } else if (request.divides_tokens()) {
      first_token_ = (x * num_tokens_ + X - 1) / X;
      last_token_ = ((x + 1) * num_tokens_ + X - 1) / X;
    }
  }

  void run(int64_t* near_sent, int64_t* far_sent, int64_t* far_final, int64_t* fan, int64_t* expert_rows) {
    Counts hop_rows(num_ranks_, 0);
    for (int64_t token = first_token_; token < last_token_; ++token)
      visit(token, expert_rows, [&](int64_t hop) { ++hop_rows[hop]; });
    Counts next(num_ranks_, 0);
    Counts pieces(num_ranks_, 1);
    int64_t num_near = 0;
    int64_t num_far = 0;
    for (int64_t hop = 0; hop < num_ranks_; ++hop) {
      next[hop] = is_near(hop) ? num_near : num_far;
      (is_near(hop) ? num_near : num_far) += hop_rows[hop];
      pieces[hop] = std::clamp<int64_t>(hop_rows[hop] / std::max<int64_t>(1, request_.rows_per_piece), 1, pieces_);
    }
    near_token.resize(num_near);
    far_token.resize(num_far);
    Counts seen(num_ranks_, 0);
    std::fill(hops_.begin(), hops_.end(), -1);
    Counts piece_of_hop(num_ranks_, 0);
    for (int64_t token = first_token_; token < last_token_; ++token) {
      visit(token, nullptr, [&](int64_t hop) {
        if (is_near(hop)) {
          near_token[next[hop]++] = token;
          ++near_sent[hop];
          return;
        }
        far_token[next[hop]++] = token;
        const auto piece = seen[hop]++ * pieces[hop] / hop_rows[hop];
        piece_of_hop[hop] = piece;
        ++far_sent[hop * pieces_ + piece];
      });
      for (const auto rank : ranks_) {
        if (is_near(rank)) continue;
        const auto place = request_.first_hop[rank] * pieces_ + piece_of_hop[request_.first_hop[rank]];
        ++far_final[rank * pieces_ + piece_of_hop[request_.first_hop[rank]]];
        ++fan[place * group_ + local_[rank]];
      }
    }
  }

  Counts near_token;
  Counts far_token;

 private:
  bool is_near(int64_t rank) const { return request_.node_of_rank[rank] == request_.node_of_rank[request_.rank]; }

  // Calls on_hop once for every first hop of the token; leaves the ranks that want it in ranks_.
  template <class OnHop>
  void visit(int64_t token, int64_t* expert_rows, const OnHop& on_hop) {
    const auto* experts = request_.expert.const_data_ptr<int64_t>();
    ranks_.clear();
    ++stamp_;
    for (int64_t route = 0; route < request_.expert.size(0); ++route) {
      const auto expert = experts[route * num_tokens_ + token];
      if (expert < 0) continue;
      const auto place = expert % experts_per_rank_;
      if (place < first_expert_ || place >= last_expert_) continue;
      const auto rank = expert / experts_per_rank_;
      if (!request_.chunk_of_rank.empty() && request_.chunk_of_rank[rank] != chunk_) continue;
      if (expert_rows) ++expert_rows[expert];
      if (wants_[rank] == stamp_) continue;
      wants_[rank] = stamp_;
      ranks_.push_back(rank);
      const auto hop = request_.first_hop[rank];
      if (hops_[hop] == stamp_) continue;
      hops_[hop] = stamp_;
      on_hop(hop);
    }
  }

  const OrderRequest& request_;
  int64_t chunk_;
  const Counts& local_;
  int64_t group_;
  int64_t num_ranks_;
  int64_t num_tokens_;
  int64_t experts_per_rank_;
  int64_t pieces_;
  int64_t first_token_ = 0;
  int64_t last_token_ = 0;
  int64_t first_expert_ = 0;
  int64_t last_expert_ = 0;
  int64_t stamp_ = 0;
  Counts wants_;  // stamp of the last token that a rank wanted
  Counts hops_;
  Counts ranks_;
};

}  // namespace

at::Tensor to_tensor(const std::vector<int64_t>& values) {
  return at::tensor(at::IntArrayRef(values), at::TensorOptions().dtype(at::kLong));
}

std::vector<int64_t> local_ranks(const std::vector<int64_t>& node_of_rank) {
  std::vector<int64_t> result;
  for (size_t rank = 0; rank < node_of_rank.size(); ++rank)
    result.push_back(std::count(node_of_rank.begin(), node_of_rank.begin() + rank, node_of_rank[rank]));
  return result;
}

TokenOrder order_tokens(const OrderRequest& request) {
  const auto num_ranks = static_cast<int64_t>(request.node_of_rank.size());
  TORCH_CHECK_VALUE(request.expert.device().is_cpu() && request.expert.scalar_type() == at::kLong &&
                        request.expert.dim() == 2 && request.expert.is_contiguous(),
                    "expert must be a contiguous int64 [K, T] on the CPU");
  check_request(request);
  if (request.expert.numel() > 0)
    TORCH_CHECK_VALUE(request.expert.max().item<int64_t>() < request.num_experts, "expert index ",
                      request.expert.max().item<int64_t>(), " is too large, there are ", request.num_experts,
                      " experts");
  const auto local = local_ranks(request.node_of_rank);
  const auto group = *std::max_element(local.begin(), local.end()) + 1;
  const auto pieces = std::max<int64_t>(1, request.num_pieces);
  const auto chunks = request.num_chunks;
  TokenOrder order;
  order.near_sent = at::zeros({chunks, num_ranks}, at::kLong);
  order.far_sent = at::zeros({chunks, num_ranks, pieces}, at::kLong);
  order.far_final = at::zeros_like(order.far_sent);
  order.fan = at::zeros({chunks, num_ranks, pieces, group}, at::kLong);
  order.expert_rows = at::zeros({chunks, request.num_experts}, at::kLong);
  const auto part = [&](const at::Tensor& counts, int64_t chunk) {
    return counts.mutable_data_ptr<int64_t>() + chunk * counts.stride(0);
  };
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    ChunkOrder tokens(request, chunk, local, group);
    tokens.run(part(order.near_sent, chunk), part(order.far_sent, chunk), part(order.far_final, chunk),
               part(order.fan, chunk), part(order.expert_rows, chunk));
    order.near_token.push_back(to_tensor(tokens.near_token));
    order.far_token.push_back(to_tensor(tokens.far_token));
  }
  return order;
}

OrderedTokens order_tokens_on_device(const OrderRequest& request, const at::Tensor& tables, const CountLayout& layout,
                                     const at::Tensor& message) {
  const auto* kernels = device_kernels(request.expert);
  TORCH_CHECK_VALUE(kernels != nullptr, "expert is on ", request.expert.device(),
                    ", for which this build has no kernels");
  check_request(request);
  return kernels->order_tokens(request, tables, layout, message);
}

bool routes_on_device(const at::Tensor& tensor) { return device_kernels(tensor) != nullptr; }

}  // namespace planmoe
