// What arrived rows are for: which experts of this rank, and which ranks of its node.
#include <ATen/TensorOperators.h>
#include <ATen/core/IListRef_inl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/nonzero_static.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "device.h"
#include "routing.h"

namespace planmoe {
namespace {

using Counts = std::vector<int64_t>;

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
  // What peers sent may be less or more than they had announced, see num_places.
  auto entry = at::nonzero_static(here.view({-1}), arrived.num_entries).view({-1}).clamp_min(0);
  auto source = entry.div(top_k, "floor");
  auto per_row = here.sum(1);
  auto start = at::cat({at::zeros({1}, per_row.options()), per_row.cumsum(0)}).clamp_max(arrived.num_entries);
  auto rank_of_row = to_tensor(sources(arrived.source_rows)).to(arrived.rows.device(), /*non_blocking=*/true);
  auto base = to_tensor(arrived.base).to(arrived.rows.device(), /*non_blocking=*/true);
  auto expert = local.view({-1}).index_select(0, entry).clamp(0, experts_per_rank - 1);
  auto cell = rank_of_row.index_select(0, source) * experts_per_rank + expert;
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
  auto target = base.index_select(0, cell) + after_base;
  if (arrived.num_places >= 0) target = target.clamp(0, std::max<int64_t>(0, arrived.num_places - 1));
  return {start, target, at::Tensor(), entry - source * top_k, source};
}

}  // namespace

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
