// The routing kernels for tensors.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>

#include "device_rows.h"
#include "routing_kernels.h"

namespace planmoe::cuda {
namespace {

cudaStream_t current_stream(const at::Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}

// The experts' numbers in columns of wire rows.
RouteIds ids_in(const at::Tensor& rows, const RowRoutes& routes) {
  RouteIds ids;
  ids.ids = rows.const_data_ptr<uint8_t>() + routes.offset;
  ids.row_stride = rows.stride(0);
  ids.route_stride = ids.id_bytes = static_cast<int>(routes.id_bytes);
  ids.top_k = routes.top_k;
  ids.num_rows = rows.size(0);
  ids.experts_per_rank = routes.experts_per_rank;
  ids.first_expert = routes.first_expert;
  ids.last_expert = routes.last_expert;
  return ids;
}

// Those of expert [K, T], int32 or int64 with any strides.
RouteIds ids_in(const at::Tensor& expert, int64_t experts_per_rank) {
  RouteIds ids;
  ids.ids = static_cast<const uint8_t*>(expert.const_data_ptr());
  ids.id_bytes = static_cast<int>(expert.element_size());
  ids.row_stride = expert.stride(1) * ids.id_bytes;
  ids.route_stride = expert.stride(0) * ids.id_bytes;
  ids.top_k = expert.size(0);
  ids.num_rows = expert.size(1);
  ids.experts_per_rank = experts_per_rank;
  ids.last_expert = experts_per_rank;
  return ids;
}

std::optional<WeightType> weight_type_of(at::ScalarType dtype) {
  if (dtype == at::kFloat) return WeightType::kFloat;
  if (dtype == at::kHalf) return WeightType::kHalf;
  if (dtype == at::kBFloat16) return WeightType::kBFloat16;
  return std::nullopt;
}

class CudaKernels final : public DeviceRows {
 public:
  using DeviceRows::covers;

  OrderedTokens order_tokens(const OrderRequest& request, const at::Tensor& tables, const CountLayout& layout,
                             const at::Tensor& message) const override {
    const auto& expert = request.expert;
    TORCH_CHECK_VALUE(expert.dim() == 2 && (expert.scalar_type() == at::kLong || expert.scalar_type() == at::kInt),
                      "expert must be int32 or int64 [K, T], got ", expert.scalar_type(), " ", expert.sizes());
    check_same_device("tables", tables, expert);
    check_same_device("message", message, expert);
    const auto num_ranks = static_cast<int64_t>(request.node_of_rank.size());
    TORCH_CHECK_VALUE(num_ranks <= kMostLists, "the CUDA routing kernels take up to ", kMostLists, " ranks, got ",
                      num_ranks);
    ListArguments lists;
    lists.routes = ids_in(expert, request.num_experts / num_ranks);
    lists.num_chunks = request.num_chunks;
    lists.chunk_by_expert = request.chunk_by_expert;
    lists.num_ranks = num_ranks;
    fill_lists(lists, request, tables);
    if (!request.chunk_of_rank.empty()) lists.chunk_of_rank = lists.local_rank + num_ranks;
    lists.num_pieces = std::max<int64_t>(1, request.num_pieces);
    lists.rows_per_piece = std::max<int64_t>(1, request.rows_per_piece);
    fill_columns(lists, layout, message, request.num_pieces > 0);
    return run_order(lists, expert);
  }

  bool covers(const ArrivedRows& arrived) const override {
    return arrived.table.defined() && arrived.row_dtype != at::kDouble &&
           arrived.routes.experts_per_rank <= kMostLocalExperts &&
           arrived.rows.size(0) * arrived.routes.top_k < 0x7FFFFFFF &&
           (arrived.weight_offset < 0 || weight_type_of(arrived.weight_dtype));
  }

  Spread find_experts(const ArrivedRows& arrived) const override {
    const auto& rows = arrived.rows;
    check_same_device("table", arrived.table, rows);
    const c10::cuda::CUDAGuard guard(rows.device());
    const auto options = rows.options().dtype(at::kLong);
    const auto results = at::empty({3, arrived.num_entries}, options);
    Spread spread{at::empty({rows.size(0) + 1}, options), results.select(0, 0), at::Tensor(), results.select(0, 1),
                  results.select(0, 2)};
    SpreadArguments arguments;
    arguments.routes = ids_in(rows, arrived.routes);
    arguments.rank = arrived.first_id / arrived.routes.experts_per_rank;
    arguments.num_sources = static_cast<int64_t>(arrived.source_rows.size());
    arguments.table = arrived.table.const_data_ptr<int64_t>();
    const auto* bytes = rows.const_data_ptr<uint8_t>();
    if (arrived.place_offset >= 0) arguments.places = bytes + arrived.place_offset;
    if (arrived.weight_offset >= 0) {
      spread.weight = at::empty({arrived.num_entries}, options.dtype(at::kFloat));
      arguments.weights = bytes + arrived.weight_offset;
      arguments.weight_type = *weight_type_of(arrived.weight_dtype);
      arguments.weight = spread.weight.mutable_data_ptr<float>();
    }
    arguments.num_entries = arrived.num_entries;
    arguments.num_places = arrived.num_places;
    const auto tiles = spread_tiles(rows.size(0), arrived.routes.top_k);
    const auto histogram = at::empty({tiles * (arrived.routes.experts_per_rank + 1)}, options.dtype(at::kInt));
    arguments.histogram = histogram.mutable_data_ptr<int32_t>();
    arguments.start = spread.start.mutable_data_ptr<int64_t>();
    arguments.target = spread.target.mutable_data_ptr<int64_t>();
    arguments.route = spread.route.mutable_data_ptr<int64_t>();
    arguments.source = spread.source.mutable_data_ptr<int64_t>();
    check_launch(launch_spread_plan(arguments, current_stream(rows)));
    return spread;
  }

  std::vector<at::Tensor> find_fan(const at::Tensor& rows, const RowRoutes& routes, const std::vector<int64_t>& ranks,
                                   const std::vector<int64_t>& counts) const override {
    const c10::cuda::CUDAGuard guard(rows.device());
    const auto total = std::accumulate(counts.begin(), counts.begin() + ranks.size(), int64_t{0});
    const auto options = rows.options();
    const auto table = list_of_ranks(ranks, rows.device());
    ListArguments lists;
    lists.routes = ids_in(rows, routes);
    lists.num_ranks = table.size(0);
    lists.num_lists = lists.num_near = static_cast<int64_t>(ranks.size());
    lists.list_of_rank = table.const_data_ptr<int32_t>();
    const auto first = at::empty({lists.num_lists * list_tiles(rows.size(0), 1, true) + 1}, options.dtype(at::kInt));
    const auto most = lists.num_lists * rows.size(0);
    const auto found =
        at::zeros({std::max<int64_t>(most, total)}, options.dtype(at::kLong));  // a peer may have sent less
    lists.first = first.mutable_data_ptr<int32_t>();
    lists.rows = found.mutable_data_ptr<int64_t>();
    check_launch(launch_lists(lists, current_stream(rows)));
    std::vector<at::Tensor> result(ranks.size());
    int64_t at = 0;
    for (size_t g = 0; g < ranks.size(); ++g) {
      if (counts[g] != rows.size(0)) result[g] = found.narrow(0, at, counts[g]);
      at += counts[g];
    }
    return result;
  }

 private:
  // int32 on the device: the place of each rank in `ranks`, -1 for others. Made once, on a stream of its own that the host
  // waits for; never freed, since the device may be gone when the program ends.
  static at::Tensor list_of_ranks(const std::vector<int64_t>& ranks, c10::Device device) {
    static std::mutex mutex;
    static auto& tables = *new std::map<std::pair<c10::DeviceIndex, std::vector<int64_t>>, at::Tensor>;
    std::lock_guard<std::mutex> lock(mutex);
    auto& table = tables[{device.index(), ranks}];
    if (!table.defined()) {
      std::vector<int32_t> places(*std::max_element(ranks.begin(), ranks.end()) + 1, -1);
      for (size_t g = 0; g < ranks.size(); ++g) places[ranks[g]] = static_cast<int32_t>(g);
      const c10::cuda::CUDAStreamGuard stream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index()));
      table = at::tensor(at::ArrayRef<int32_t>(places), at::kInt).to(device);
    }
    return table;
  }

  // tables: int32 [3 or 4, P], see routing.h.
  static void fill_lists(ListArguments& lists, const OrderRequest& request, const at::Tensor& tables) {
    const auto num_ranks = lists.num_ranks;
    const int64_t rows = request.chunk_of_rank.empty() ? 3 : 4;
    TORCH_CHECK_VALUE(tables.scalar_type() == at::kInt && tables.is_contiguous() && tables.numel() == rows * num_ranks,
                      "tables must be contiguous int32 [", rows, ", ", num_ranks, "], got ", tables.scalar_type(), " ",
                      tables.sizes());
    std::vector<bool> is_hop(num_ranks, false);
    for (const auto hop : request.first_hop) is_hop[hop] = true;
    lists.num_lists = std::count(is_hop.begin(), is_hop.end(), true);
    const auto near = request.node_of_rank[request.rank];
    lists.num_near = 0;
    for (int64_t rank = 0; rank < num_ranks; ++rank)
      lists.num_near += is_hop[rank] && request.node_of_rank[rank] == near;
    const auto local = local_ranks(request.node_of_rank);
    lists.group = *std::max_element(local.begin(), local.end()) + 1;
    lists.list_of_rank = tables.const_data_ptr<int32_t>();
    lists.rank_of_list = lists.list_of_rank + num_ranks;
    lists.local_rank = lists.rank_of_list + num_ranks;
  }

  static void fill_columns(ListArguments& lists, const CountLayout& layout, const at::Tensor& message, bool passes_on) {
    TORCH_CHECK_VALUE(message.scalar_type() == at::kLong && message.is_contiguous() && message.dim() == 2 &&
                          message.size(0) == lists.num_ranks,
                      "message must be contiguous int64 [", lists.num_ranks, ", width], got ", message.sizes());
    const auto chunks = lists.num_chunks;
    const auto cells = chunks * lists.num_pieces;
    auto& columns = lists.counts;
    columns.message = reinterpret_cast<unsigned long long*>(message.mutable_data_ptr<int64_t>());
    columns.width = message.size(1);
    columns.expert_rows = layout.first_column;
    columns.near = columns.expert_rows + chunks * lists.routes.experts_per_rank;
    columns.far = columns.near + chunks;
    auto next = columns.far + cells;
    if (passes_on) {
      columns.passed = next;
      columns.fan = columns.passed + cells;
      next = columns.fan + cells * lists.group;
    }
    columns.invalid = next;
    TORCH_CHECK_VALUE(next < columns.width, "message has ", columns.width, " columns, the counts need ", next + 1);
  }

  static OrderedTokens run_order(ListArguments& lists, const at::Tensor& expert) {
    const c10::cuda::CUDAGuard guard(expert.device());
    const auto options = expert.options().dtype(at::kInt);
    const auto num_tokens = lists.routes.num_rows;
    lists.num_slots = std::min(lists.routes.top_k, lists.num_lists);
    const auto tiles = list_tiles(num_tokens, lists.num_chunks, lists.divides_rows());
    const auto first = at::empty({lists.num_chunks * lists.num_lists * tiles + 1}, options);
    const auto most = lists.routes.top_k * num_tokens;  // every route is in one chunk
    const auto copies = lists.divides_rows() ? 1 : lists.num_chunks;
    OrderedTokens ordered;
    ordered.tokens = at::empty({most}, options.dtype(at::kLong));
    ordered.near_return = at::empty({copies, num_tokens, lists.num_slots}, options);
    if (lists.num_near < lists.num_lists)
      ordered.far_return = at::empty({copies, num_tokens, lists.num_slots}, options);
    lists.first = first.mutable_data_ptr<int32_t>();
    lists.rows = ordered.tokens.mutable_data_ptr<int64_t>();
    lists.near_return = ordered.near_return.mutable_data_ptr<int32_t>();
    if (ordered.far_return) lists.far_return = ordered.far_return->mutable_data_ptr<int32_t>();
    check_launch(launch_lists(lists, current_stream(expert)));
    return ordered;
  }
};

const bool added = add_device_kernels(c10::DeviceType::CUDA, std::make_unique<CudaKernels>());

}  // namespace
}  // namespace planmoe::cuda
