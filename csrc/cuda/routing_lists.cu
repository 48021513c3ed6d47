// Which rows go into which ranks' lists: a counting sort that keeps their order. Count per tile, add up the tiles before,
// then write each row's place.
#include <algorithm>

#include "routing_ids.cuh"

namespace planmoe::cuda {
namespace {

constexpr int kScanThreads = 1024;
constexpr int64_t kMostSharedCounts = 8192;

// The rows and experts of one chunk.
struct Chunk {
  int64_t x, first_row, last_row, first_expert, last_expert;

  __device__ Chunk(const ListArguments& a, int64_t chunk) : x(chunk) {
    const auto X = a.num_chunks, T = a.routes.num_rows, L = a.routes.experts_per_rank;
    first_row = a.divides_rows() ? (x * T + X - 1) / X : 0;
    last_row = a.divides_rows() ? ((x + 1) * T + X - 1) / X : T;
    first_expert = a.chunk_by_expert ? (x * L + X - 1) / X : a.routes.first_expert;
    last_expert = a.chunk_by_expert ? ((x + 1) * L + X - 1) / X : a.routes.last_expert;
  }

  __device__ bool has(const ListArguments& a, int64_t rank) const {
    return a.chunk_of_rank == nullptr || a.chunk_of_rank[rank] == x;
  }
};

// Which of 64 lists from `first` on want a row: one bit each.
__device__ unsigned long long lists_of(const ListArguments& a, const Chunk& chunk, int64_t row, int64_t first) {
  unsigned long long wanted = 0;
  if (row >= chunk.last_row) return wanted;
  for (int64_t k = 0; k < a.routes.top_k; ++k) {
    const auto route = route_of(id_at(a.routes, row, k), a.routes, chunk.first_expert, chunk.last_expert);
    if (route.rank < 0 || route.rank >= a.num_ranks || !chunk.has(a, route.rank)) continue;
    const int64_t list = a.list_of_rank[route.rank];
    if (list >= first && list < first + 64) wanted |= 1ull << (list - first);
  }
  return wanted;
}

// function(list, lanes that want it) by all lanes of the warp.
template <class Function>
__device__ void each_list(const ListArguments& a, const Chunk& chunk, int64_t row, const Function& function) {
  for (int64_t first = 0; first < a.num_lists; first += 64) {
    const auto wanted = lists_of(a, chunk, row, first);
    const int64_t end = min(first + 64, a.num_lists);
    for (int64_t list = first; list < end; ++list) {
      const unsigned lanes = __ballot_sync(kAllLanes, (wanted >> (list - first)) & 1);
      if (lanes != 0) function(list, lanes);
    }
  }
}

__global__ void __launch_bounds__(kThreads) count_lists(const __grid_constant__ ListArguments a, int64_t tiles) {
  extern __shared__ int32_t counts[];  // [S]
  const Chunk chunk(a, blockIdx.y);
  for (int64_t list = threadIdx.x; list < a.num_lists; list += kThreads) counts[list] = 0;
  __syncthreads();
  const int64_t row = chunk.first_row + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  each_list(a, chunk, row, [&](int64_t list, unsigned lanes) {
    if (threadIdx.x % kWarp == 0) atomicAdd(&counts[list], __popc(lanes));
  });
  __syncthreads();
  for (int64_t list = threadIdx.x; list < a.num_lists; list += kThreads)
    a.first[(blockIdx.y * a.num_lists + list) * tiles + blockIdx.x] = counts[list];
}

// Exclusive sums of `count` numbers, in place, and the total after them; by one block.
__global__ void __launch_bounds__(kScanThreads) add_up(int32_t* numbers, int64_t count) {
  __shared__ int32_t warp_totals[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t before = 0;
  for (int64_t first = 0; first < count; first += kScanThreads) {
    const int64_t at = first + threadIdx.x;
    const int32_t own = at < count ? numbers[at] : 0;
    int32_t sum = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == kWarp - 1) warp_totals[warp] = sum;
    __syncthreads();
    int32_t total = 0, earlier = 0;
    for (int w = 0; w < kScanThreads / kWarp; ++w) {
      earlier += w < warp ? warp_totals[w] : 0;
      total += warp_totals[w];
    }
    if (at < count) numbers[at] = before + earlier + sum - own;
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) numbers[count] = before;
}

// A block's counts: in shared memory where they fit, else where they belong.
class Counts {
 public:
  __device__ Counts(const ListArguments& a, int32_t* shared) : a_(a), shared_(shared) {
    if (shared_ == nullptr) return;
    for (int64_t i = threadIdx.x; i < size(); i += kThreads) shared_[i] = 0;
  }

  // E | P, B | P, B | P, B, G
  __host__ __device__ static int64_t size(const ListArguments& a) {
    const int64_t cells = a.num_ranks * a.num_pieces;
    return a.num_ranks * a.routes.experts_per_rank + cells + (a.counts.passed < 0 ? 0 : cells * (1 + a.group));
  }

  __device__ void add_expert(int64_t rank, int64_t local) { add(rank * a_.routes.experts_per_rank + local); }
  __device__ void add_far(int64_t rank, int64_t piece) { add(num_experts() + rank * a_.num_pieces + piece); }
  __device__ void add_passed(int64_t hop, int64_t piece) { add(num_experts() + cells() + hop * a_.num_pieces + piece); }
  __device__ void add_fan(int64_t hop, int64_t piece, int64_t member) {
    add(num_experts() + 2 * cells() + (hop * a_.num_pieces + piece) * a_.group + member);
  }

  __device__ void flush() const {
    if (shared_ == nullptr) return;
    for (int64_t i = threadIdx.x; i < size(); i += kThreads)
      if (shared_[i] != 0) atomicAdd(place(i), static_cast<unsigned long long>(shared_[i]));
  }

 private:
  __device__ int64_t num_experts() const { return a_.num_ranks * a_.routes.experts_per_rank; }
  __device__ int64_t cells() const { return a_.num_ranks * a_.num_pieces; }
  __device__ int64_t size() const { return size(a_); }

  __device__ void add(int64_t i) {
    if (shared_ != nullptr)
      atomicAdd(&shared_[i], 1);
    else
      atomicAdd(place(i), 1ull);
  }

  __device__ unsigned long long* place(int64_t i) const {
    const int64_t x = blockIdx.y;
    const auto& columns = a_.counts;
    const auto at = [&](int64_t rank, int64_t column) { return columns.message + rank * columns.width + column; };
    const int64_t L = a_.routes.experts_per_rank, B = a_.num_pieces, G = a_.group;
    if (i < num_experts()) return at(i / L, columns.expert_rows + x * L + i % L);
    i -= num_experts();
    if (i < cells()) return at(i / B, columns.far + x * B + i % B);
    i -= cells();
    if (i < cells()) return at(i / B, columns.passed + x * B + i % B);
    i -= cells();
    return at(i / G / B, columns.fan + (x * B + i / G % B) * G + i % G);
  }

  const ListArguments& a_;
  int32_t* shared_;
};

// One row's counts and its places in the lists.
class RowWriter {
 public:
  __device__ RowWriter(const ListArguments& a, const Chunk& chunk, int64_t tiles, int64_t row)
      : a_(a), chunk_(chunk), tiles_(tiles), row_(row) {}

  __device__ void write(int64_t list, int64_t place) {
    a_.rows[place] = row_;
    const bool near = list < a_.num_near;
    int32_t* table = near ? a_.near_return : a_.far_return;
    if (table == nullptr) return;
    const int64_t chunk_rows = a_.divides_rows() ? 0 : blockIdx.y * a_.routes.num_rows;
    int& slot = near ? near_slots_ : far_slots_;
    table[(chunk_rows + row_) * a_.num_slots + slot++] = static_cast<int32_t>(place - first_of(near ? 0 : a_.num_near));
  }

  __device__ void end_returns() const {
    const int64_t at = ((a_.divides_rows() ? 0 : blockIdx.y * a_.routes.num_rows) + row_) * a_.num_slots;
    for (int64_t slot = near_slots_; a_.near_return != nullptr && slot < a_.num_slots; ++slot)
      a_.near_return[at + slot] = -1;
    for (int64_t slot = far_slots_; a_.far_return != nullptr && slot < a_.num_slots; ++slot)
      a_.far_return[at + slot] = -1;
  }

  // Of the far message to list's hop: the piece in which the row at `place` travels.
  __device__ int64_t piece_of(int64_t list, int64_t place) const {
    const int64_t rows = first_of(list + 1) - first_of(list);
    const int64_t wanted = rows / a_.rows_per_piece;
    const int64_t pieces = wanted < 1 ? 1 : min(wanted, a_.num_pieces);
    return (place - first_of(list)) * pieces / rows;
  }

 private:
  __device__ int64_t first_of(int64_t list) const {
    return a_.first[(static_cast<int64_t>(blockIdx.y) * a_.num_lists + list) * tiles_];
  }

  const ListArguments& a_;
  const Chunk& chunk_;
  int64_t tiles_;
  int64_t row_;
  int near_slots_ = 0;
  int far_slots_ = 0;
};

// One row's routes: to experts, and to none that exists.
__device__ void count_experts(const ListArguments& a, const Chunk& chunk, int64_t row, Counts& counts) {
  for (int64_t k = 0; k < a.routes.top_k; ++k) {
    const auto route = route_of(id_at(a.routes, row, k), a.routes, chunk.first_expert, chunk.last_expert);
    if (route.rank < 0) continue;
    if (route.rank < a.num_ranks) {
      if (chunk.has(a, route.rank)) counts.add_expert(route.rank, route.local);
    } else if (a.chunk_of_rank == nullptr || chunk.x == 0) {
      atomicAdd(a.counts.message + a.counts.invalid, 1ull);
    }
  }
}

// The ranks that a row in `piece` of the message of a far list goes to.
__device__ void count_far(const ListArguments& a, const Chunk& chunk, int64_t row, int64_t list, int64_t piece,
                          Counts& counts) {
  const int64_t hop = a.rank_of_list[list];
  if (a.counts.passed >= 0) counts.add_passed(hop, piece);
  for (int64_t k = 0; k < a.routes.top_k; ++k) {
    const auto rank = route_of(id_at(a.routes, row, k), a.routes, chunk.first_expert, chunk.last_expert).rank;
    if (rank < 0 || rank >= a.num_ranks || a.list_of_rank[rank] != list || !chunk.has(a, rank)) continue;
    bool is_new = true;
    for (int64_t earlier = 0; earlier < k; ++earlier)
      is_new &= route_of(id_at(a.routes, row, earlier), a.routes, chunk.first_expert, chunk.last_expert).rank != rank;
    if (!is_new) continue;
    counts.add_far(rank, piece);
    if (a.counts.passed >= 0) counts.add_fan(hop, piece, a.local_rank[rank]);
  }
}

__global__ void __launch_bounds__(kThreads)
    place_lists(const __grid_constant__ ListArguments a, int64_t tiles, bool shared_counts) {
  extern __shared__ int32_t shared[];  // [warps, S], then counts
  const Chunk chunk(a, blockIdx.y);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t row = chunk.first_row + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = threadIdx.x; i < kWarps * a.num_lists; i += kThreads) shared[i] = 0;
  Counts counts(a, shared_counts ? shared + kWarps * a.num_lists : nullptr);
  __syncthreads();
  int32_t* own = shared + warp * a.num_lists;
  each_list(a, chunk, row, [&](int64_t list, unsigned lanes) {
    if (lane == 0) own[list] = __popc(lanes);
  });
  __syncthreads();
  for (int64_t list = threadIdx.x; list < a.num_lists; list += kThreads) {
    int32_t next = a.first[(blockIdx.y * a.num_lists + list) * tiles + blockIdx.x];
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = shared[w * a.num_lists + list];
      shared[w * a.num_lists + list] = next;
      next += count;
    }
  }
  __syncthreads();
  const bool exists = row < chunk.last_row;
  RowWriter writer(a, chunk, tiles, row);
  each_list(a, chunk, row, [&](int64_t list, unsigned lanes) {
    if (((lanes >> lane) & 1) == 0) return;
    const int64_t place = own[list] + __popc(lanes & ((1u << lane) - 1));
    writer.write(list, place);
    if (a.counts.message != nullptr && list >= a.num_near)
      count_far(a, chunk, row, list, writer.piece_of(list, place), counts);
  });
  if (exists) writer.end_returns();
  if (a.counts.message == nullptr) return;
  if (exists) count_experts(a, chunk, row, counts);
  __syncthreads();
  counts.flush();
  if (blockIdx.x != 0) return;
  for (int64_t list = threadIdx.x; list < a.num_near; list += kThreads) {
    const int32_t* first = a.first + (blockIdx.y * a.num_lists + list) * tiles;
    a.counts.message[a.rank_of_list[list] * a.counts.width + a.counts.near + blockIdx.y] =
        static_cast<unsigned long long>(first[tiles] - first[0]);
  }
}

}  // namespace

int64_t list_tiles(int64_t num_rows, int64_t num_chunks, bool divides_rows) {
  const int64_t rows = divides_rows ? (num_rows + num_chunks - 1) / num_chunks : num_rows;
  return std::max<int64_t>(1, (rows + kThreads - 1) / kThreads);
}

cudaError_t launch_lists(const ListArguments& a, cudaStream_t stream) {
  const int64_t tiles = list_tiles(a.routes.num_rows, a.num_chunks, a.divides_rows());
  const int64_t cells = a.num_chunks * a.num_lists * tiles;
  if (a.num_lists > kMostLists || a.num_chunks > 65535 || cells > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(a.num_chunks));
  const auto lists = static_cast<size_t>(a.num_lists) * sizeof(int32_t);
  const int64_t num_counts = a.counts.message == nullptr ? 0 : Counts::size(a);
  const bool shared_counts = num_counts > 0 && num_counts <= kMostSharedCounts - kWarps * a.num_lists;
  count_lists<<<grid, kThreads, lists, stream>>>(a, tiles);
  add_up<<<1, kScanThreads, 0, stream>>>(a.first, cells);
  place_lists<<<grid, kThreads, kWarps * lists + (shared_counts ? num_counts : 0) * sizeof(int32_t), stream>>>(
      a, tiles, shared_counts);
  return cudaGetLastError();
}

}  // namespace planmoe::cuda
