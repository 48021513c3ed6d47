// Which of a rank's experts want which arrived rows: a counting sort that keeps the order of rows and routes.
#include "routing_ids.cuh"

namespace planmoe::cuda {
namespace {

constexpr int kEntriesPerThread = 8;
constexpr int kTileEntries = kThreads * kEntriesPerThread;

__device__ __forceinline__ Route entry_route(const SpreadArguments& a, int64_t entry) {
  if (entry >= a.routes.num_rows * a.routes.top_k) return {-1, 0};
  const int64_t row = entry / a.routes.top_k;
  const auto id = id_at(a.routes, row, entry - row * a.routes.top_k);
  const auto route = route_of(id, a.routes, a.routes.first_expert, a.routes.last_expert);
  return route.rank == a.rank ? route : Route{-1, 0};
}

__global__ void __launch_bounds__(kThreads) count_entries(const __grid_constant__ SpreadArguments a) {
  extern __shared__ int32_t counts[];  // [L + 1]: the last counts all
  const int64_t L = a.routes.experts_per_rank;
  for (int64_t i = threadIdx.x; i <= L; i += kThreads) counts[i] = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileEntries;
  int32_t own = 0;
  for (int i = 0; i < kEntriesPerThread; ++i) {
    const auto route = entry_route(a, first + i * kThreads + threadIdx.x);
    if (route.rank < 0) continue;
    atomicAdd(&counts[route.local], 1);
    ++own;
  }
  if (own > 0) atomicAdd(&counts[L], own);
  __syncthreads();
  for (int64_t i = threadIdx.x; i <= L; i += kThreads) a.histogram[blockIdx.x * (L + 1) + i] = counts[i];
}

// Sums over the tiles before, one thread per column.
__global__ void add_up_tiles(int32_t* histogram, int64_t tiles, int64_t width) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= width) return;
  constexpr int kAtOnce = 8;
  int32_t sum = 0;
  for (int64_t first = 0; first < tiles; first += kAtOnce) {
    int32_t counts[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) counts[j] = first + j < tiles ? histogram[(first + j) * width + column] : 0;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + j < tiles) histogram[(first + j) * width + column] = sum;
      sum += counts[j];
    }
  }
}

__device__ __forceinline__ int64_t source_of(const SpreadArguments& a, int64_t row) {
  const int64_t* first_row = a.table + a.num_sources * a.routes.experts_per_rank;
  int64_t low = 0, high = a.num_sources - 1;  // the last source whose first row is not after `row`
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first_row[middle] <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

__device__ __forceinline__ float weight_of(const SpreadArguments& a, int64_t row, int64_t k) {
  const int64_t bytes = a.weight_type == WeightType::kFloat ? 4 : 2;
  const uint8_t* at = a.weights + row * a.routes.row_stride + k * bytes;
  const auto place = reinterpret_cast<uintptr_t>(at);
  if (a.weight_type == WeightType::kFloat) return load_bytes<float>(at, place % 4 == 0);
  const auto bits = load_bytes<uint16_t>(at, place % 2 == 0);
  return a.weight_type == WeightType::kHalf ? __half2float(__ushort_as_half(bits))
                                            : __bfloat162float(__ushort_as_bfloat16(bits));
}

__device__ __forceinline__ void write_entry(const SpreadArguments& a, int64_t entry, int64_t row, int64_t k,
                                            int64_t local, int64_t rank_in_expert) {
  if (entry >= a.num_entries) return;  // a peer that sent more than it had announced
  int64_t target = a.table[source_of(a, row) * a.routes.experts_per_rank + local];
  if (a.places == nullptr) {
    target += rank_in_expert;
  } else {
    const uint8_t* at = a.places + row * a.routes.row_stride + 4 * k;
    target += load_bytes<int32_t>(at, reinterpret_cast<uintptr_t>(at) % 4 == 0);
  }
  a.target[entry] = a.num_places < 0 ? target : max(int64_t{0}, min(target, a.num_places - 1));
  a.route[entry] = k;
  a.source[entry] = row;
  if (a.weight != nullptr) a.weight[entry] = weight_of(a, row, k);
}

// Of a peer that sent less than it had announced.
__device__ void clear_entry(const SpreadArguments& a, int64_t entry) {
  a.target[entry] = a.route[entry] = a.source[entry] = 0;
  if (a.weight != nullptr) a.weight[entry] = 0;
}

__global__ void __launch_bounds__(kThreads) place_entries(const __grid_constant__ SpreadArguments a) {
  extern __shared__ int32_t next[];  // [warps, L + 1]
  const int64_t L = a.routes.experts_per_rank, K = a.routes.top_k, total = a.routes.num_rows * K;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileEntries + warp * kWarp * kEntriesPerThread + lane;
  for (int64_t i = threadIdx.x; i < kWarps * (L + 1); i += kThreads) next[i] = 0;
  __syncthreads();
  int32_t* own = next + warp * (L + 1);
  for (int i = 0; i < kEntriesPerThread; ++i) {
    const auto route = entry_route(a, first + i * kWarp);
    if (route.rank < 0) continue;
    atomicAdd(&own[route.local], 1);
    atomicAdd(&own[L], 1);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i <= L; i += kThreads) {
    int32_t sum = a.histogram[blockIdx.x * (L + 1) + i];
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = next[w * (L + 1) + i];
      next[w * (L + 1) + i] = sum;
      sum += count;
    }
  }
  __syncthreads();
  const unsigned before = (1u << lane) - 1;
  for (int i = 0; i < kEntriesPerThread; ++i) {
    const int64_t at = first + i * kWarp;
    const auto route = entry_route(a, at);
    const bool kept = route.rank >= 0;
    const unsigned all = __ballot_sync(kAllLanes, kept);
    const unsigned same = __match_any_sync(kAllLanes, kept ? static_cast<int>(route.local) : -1);
    const int64_t entry = own[L] + __popc(all & before);
    const int64_t rank_in_expert = kept ? own[route.local] + __popc(same & before) : 0;
    __syncwarp();
    if (kept && (same & before) == 0) own[route.local] += __popc(same);
    if (lane == 0) own[L] += __popc(all);
    __syncwarp();
    if (at >= total) continue;
    const int64_t row = at / K, k = at - row * K;
    if (k == 0) a.start[row] = min(entry, a.num_entries);
    if (at == total - 1) {
      const int64_t end = min(entry + kept, a.num_entries);
      a.start[a.routes.num_rows] = end;
      for (int64_t missing = end; missing < a.num_entries; ++missing) clear_entry(a, missing);
    }
    if (kept) write_entry(a, entry, row, k, route.local, rank_in_expert);
  }
}

}  // namespace

int64_t spread_tiles(int64_t num_rows, int64_t top_k) { return (num_rows * top_k + kTileEntries - 1) / kTileEntries; }

cudaError_t launch_spread_plan(const SpreadArguments& a, cudaStream_t stream) {
  const int64_t width = a.routes.experts_per_rank + 1;
  const int64_t tiles = spread_tiles(a.routes.num_rows, a.routes.top_k);
  if (tiles == 0) return cudaMemsetAsync(a.start, 0, (a.routes.num_rows + 1) * sizeof(int64_t), stream);
  if (width > kMostLocalExperts + 1 || tiles > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  const auto blocks = static_cast<unsigned>(tiles);
  const auto row = static_cast<size_t>(width) * sizeof(int32_t);
  count_entries<<<blocks, kThreads, row, stream>>>(a);
  add_up_tiles<<<static_cast<unsigned>((width + kWarp - 1) / kWarp), kWarp, 0, stream>>>(a.histogram, tiles, width);
  place_entries<<<blocks, kThreads, kWarps * row, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace planmoe::cuda
