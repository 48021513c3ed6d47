#include "routing.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "device.h"

namespace planmoe {
namespace {

using Counts = std::vector<int64_t>;

at::Tensor to_tensor(const Counts& values) {
  return at::tensor(at::IntArrayRef(values), at::TensorOptions().dtype(at::kLong));
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

// Calls function(row, route, expert index on its rank, expert's rank) for every route that counts.
template <class Function>
void for_each_route(const at::Tensor& rows, const RowRoutes& routes, const Function& function) {
  const auto* bytes = rows.const_data_ptr<uint8_t>();
  for (int64_t row = 0; row < rows.size(0); ++row) {
    const uint8_t* ids = bytes + row * rows.stride(0) + routes.offset;
    for (int64_t route = 0; route < routes.top_k; ++route) {
      int32_t id;
      if (routes.id_bytes == 2) {
        int16_t narrow;
        std::memcpy(&narrow, ids + 2 * route, 2);
        id = narrow;
      } else {
        std::memcpy(&id, ids + 4 * route, 4);
      }
      if (id < 0) continue;
      const auto place = id % routes.experts_per_rank;
      if (place >= routes.first_expert && place < routes.last_expert)
        function(row, route, place, id / routes.experts_per_rank);
    }
  }
}

// Columns of every row from byte `offset` on, [n, K]; cloned, because they may lie at any address.
at::Tensor numbers_of(const at::Tensor& rows, int64_t offset, int64_t top_k, at::ScalarType dtype) {
  const auto bytes = top_k * static_cast<int64_t>(c10::elementSize(dtype));
  return rows.narrow(1, offset, bytes).clone(at::MemoryFormat::Contiguous).view(dtype);
}

// int64 [n, K] expert ids, negative for none.
at::Tensor ids_of(const at::Tensor& rows, const RowRoutes& routes) {
  const auto dtype = routes.id_bytes == 2 ? at::kShort : at::kInt;
  auto ids = numbers_of(rows, routes.offset, routes.top_k, dtype).to(at::kLong);
  auto place = ids.remainder(routes.experts_per_rank);
  auto counts = (ids >= 0).logical_and(place >= routes.first_expert).logical_and(place < routes.last_expert);
  return at::where(counts, ids, at::full_like(ids, -1));
}

// Source rank of every row.
Counts sources(const Counts& source_rows) {
  Counts result;
  for (size_t rank = 0; rank < source_rows.size(); ++rank) result.insert(result.end(), source_rows[rank], rank);
  return result;
}

Spread find_experts_cpu(const ArrivedRows& arrived) {
  const auto& rows = arrived.rows;
  const auto experts_per_rank = arrived.routes.experts_per_rank;
  auto start = at::zeros({rows.size(0) + 1}, at::kLong);
  auto target = at::empty({arrived.num_entries}, at::kLong);
  auto route = at::empty_like(target);
  auto source = at::empty_like(target);
  auto* starts = start.mutable_data_ptr<int64_t>();
  auto* targets = target.mutable_data_ptr<int64_t>();
  auto* row_routes = route.mutable_data_ptr<int64_t>();
  auto* row_sources = source.mutable_data_ptr<int64_t>();
  const auto source_of_row = sources(arrived.source_rows);
  auto next = arrived.base;
  const auto rank = arrived.first_id / experts_per_rank;
  int64_t entry = 0;
  for_each_route(rows, arrived.routes, [&](int64_t row, int64_t k, int64_t expert, int64_t at_rank) {
    if (at_rank != rank) return;
    TORCH_CHECK(entry < arrived.num_entries, "planmoe: a peer sent more rows than it had announced");
    auto& place = next[source_of_row[row] * experts_per_rank + expert];
    int64_t after_base = 0;
    if (arrived.place_offset >= 0) {
      int32_t sent;
      std::memcpy(&sent, rows.const_data_ptr<uint8_t>() + row * rows.stride(0) + arrived.place_offset + 4 * k, 4);
      after_base = sent;
    }
    targets[entry] = arrived.place_offset >= 0 ? place + after_base : place++;
    row_routes[entry] = k;
    row_sources[entry++] = row;
    ++starts[row + 1];
  });
  TORCH_CHECK(entry == arrived.num_entries, "planmoe: a peer sent ", entry, " rows, it had announced ",
              arrived.num_entries);
  for (int64_t row = 0; row < rows.size(0); ++row) starts[row + 1] += starts[row];
  return {start, target, at::Tensor(), route, source};
}

// The same with tensor operations; the host knows every size beforehand and waits for nothing.
Spread find_experts_device(const ArrivedRows& arrived) {
  const auto top_k = arrived.routes.top_k;
  const auto experts_per_rank = arrived.routes.experts_per_rank;
  const auto options = arrived.rows.options().dtype(at::kLong);
  auto local = ids_of(arrived.rows, arrived.routes) - arrived.first_id;
  auto here = (local >= 0).logical_and(local < experts_per_rank);
  auto entry = at::nonzero_static(here.view({-1}), arrived.num_entries).view({-1});
  auto source = entry.div(top_k, "floor");
  auto per_row = here.sum(1);
  auto start = at::cat({at::zeros({1}, per_row.options()), per_row.cumsum(0)});
  auto rank_of_row = to_tensor(sources(arrived.source_rows)).to(arrived.rows.device(), /*non_blocking=*/true);
  auto base = to_tensor(arrived.base).to(arrived.rows.device(), /*non_blocking=*/true);
  auto cell = rank_of_row.index_select(0, source) * experts_per_rank + local.view({-1}).index_select(0, entry);
  at::Tensor after_base;
  if (arrived.place_offset >= 0) {
    auto places = numbers_of(arrived.rows, arrived.place_offset, top_k, at::kInt);
    after_base = places.view({-1}).index_select(0, entry).to(at::kLong);
  } else {  // how many entries of the same cell came before
    auto order = at::argsort(cell, /*stable=*/true, /*dim=*/0);
    auto sorted = cell.index_select(0, order);
    auto first = at::searchsorted(sorted, sorted);
    after_base = at::empty_like(order);
    after_base.index_copy_(0, order, at::arange(arrived.num_entries, options) - first);
  }
  return {start, base.index_select(0, cell) + after_base, at::Tensor(), entry - source * top_k, source};
}

}  // namespace

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
  TORCH_CHECK_VALUE(request.num_experts > 0 && request.num_experts % num_ranks == 0, request.num_experts,
                    " experts cannot be divided among ", num_ranks, " ranks");
  if (request.expert.numel() > 0)
    TORCH_CHECK_VALUE(request.expert.max().item<int64_t>() < request.num_experts, "expert index ",
                      request.expert.max().item<int64_t>(), " is too large, there are ", request.num_experts,
                      " experts");
  check_chunks(request);
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

void check_chunks(const OrderRequest& request) {
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

OrderedTokens order_tokens_on_device(const OrderRequest& request, const at::Tensor& tables, const CountLayout& layout,
                                     const at::Tensor& message) {
  const auto* kernels = device_kernels(request.expert);
  TORCH_CHECK_VALUE(kernels != nullptr, "expert is on ", request.expert.device(),
                    ", for which this build has no kernels");
  const auto num_ranks = static_cast<int64_t>(request.node_of_rank.size());
  TORCH_CHECK_VALUE(request.num_experts > 0 && request.num_experts % num_ranks == 0, request.num_experts,
                    " experts cannot be divided among ", num_ranks, " ranks");
  check_chunks(request);
  return kernels->order_tokens(request, tables, layout, message);
}

bool routes_on_device(const at::Tensor& tensor) { return device_kernels(tensor) != nullptr; }

Spread find_experts(const ArrivedRows& arrived) {
  if (const auto* kernels = device_kernels(arrived.rows); kernels && kernels->covers(arrived))
    return kernels->find_experts(arrived);
  auto spread = arrived.rows.device().is_cpu() ? find_experts_cpu(arrived) : find_experts_device(arrived);
  const auto wide = arrived.row_dtype == at::kDouble ? at::kDouble : at::kFloat;
  if (arrived.weight_offset < 0) return spread;
  auto weights = numbers_of(arrived.rows, arrived.weight_offset, arrived.routes.top_k, arrived.weight_dtype);
  spread.weight =
      weights.view({-1}).index_select(0, spread.source * arrived.routes.top_k + spread.route).to(wide).contiguous();
  return spread;
}

std::vector<at::Tensor> find_fan(const at::Tensor& rows, const RowRoutes& routes, const std::vector<int64_t>& ranks,
                                 const std::vector<int64_t>& counts) {
  std::vector<at::Tensor> result(ranks.size());
  const auto num_rows = rows.size(0);
  if (rows.device().is_cpu()) {
    std::vector<Counts> found(ranks.size());
    std::vector<int64_t> place(ranks.empty() ? 0 : *std::max_element(ranks.begin(), ranks.end()) + 1, -1);
    for (size_t g = 0; g < ranks.size(); ++g) place[ranks[g]] = static_cast<int64_t>(g);
    for_each_route(rows, routes, [&](int64_t row, int64_t /*k*/, int64_t /*expert*/, int64_t rank) {
      if (rank >= static_cast<int64_t>(place.size()) || place[rank] < 0) return;
      auto& list = found[place[rank]];
      if (list.empty() || list.back() != row) list.push_back(row);
    });
    for (size_t g = 0; g < ranks.size(); ++g) {
      const auto count = static_cast<int64_t>(found[g].size());
      TORCH_CHECK(count == counts[g], "planmoe: a peer sent ", count, " rows for rank ", ranks[g],
                  ", it had announced ", counts[g]);
      if (count != num_rows) result[g] = to_tensor(found[g]);
    }
    return result;
  }
  if (const auto* kernels = device_kernels(rows)) return kernels->find_fan(rows, routes, ranks, counts);
  auto wanted_by = ids_of(rows, routes).div(routes.experts_per_rank, "floor");  // -1 stays -1
  for (size_t g = 0; g < ranks.size(); ++g)
    if (counts[g] != num_rows) result[g] = at::nonzero_static((wanted_by == ranks[g]).any(1), counts[g]).view({-1});
  return result;
}

}  // namespace planmoe
