#pragma once
// Launchers of the routing kernels, free of torch: who gets which rows, in a fixed order, without the host.

#include <cuda_runtime_api.h>

#include <cstdint>

namespace planmoe::cuda {

// Expert numbers of rows: K of `id_bytes` (2, 4 or 8) bytes each, at any address; negative for none. Only those count
// whose index on their rank is in [first_expert, last_expert).
struct RouteIds {
  const uint8_t* ids = nullptr;
  int64_t row_stride = 0;    // bytes
  int64_t route_stride = 0;  // bytes
  int id_bytes = 4;
  int64_t top_k = 0;
  int64_t num_rows = 0;
  int64_t experts_per_rank = 1;
  int64_t first_expert = 0;
  int64_t last_expert = 1;
};

// Where the counts of an ordering go: numbers of 8 bytes for each of P ranks, `width` apart, from these columns on.
struct CountColumns {
  unsigned long long* message = nullptr;  // nullptr: no counts
  int64_t width = 0;
  int64_t expert_rows = 0;  // [X, L]
  int64_t near = 0;         // [X]
  int64_t far = 0;          // [X, B] rows that end there
  int64_t passed = -1;      // [X, B] rows that it passes on; -1: none does
  int64_t fan = -1;         // [X, B, G]
  int64_t invalid = 0;      // routes to experts that do not exist
};

// Rows for S lists, by chunk, then list, then row. A row is in the list of every rank that one of its routes leads to.
struct ListArguments {
  RouteIds routes;
  int64_t num_chunks = 1;
  bool chunk_by_expert = false;
  const int32_t* chunk_of_rank = nullptr;  // [P], or nullptr; of neither: chunk x has the rows t * X / T == x
  int64_t num_ranks = 1;
  int64_t num_lists = 1;
  int64_t num_near = 1;                   // of the lists; they come first
  const int32_t* list_of_rank = nullptr;  // [P], negative: none
  const int32_t* rank_of_list = nullptr;  // [S]; where rows of the list go first
  const int32_t* local_rank = nullptr;    // [P] its place on its node
  int64_t group = 1;                      // G, most ranks on a node
  int64_t num_pieces = 1;                 // B
  int64_t rows_per_piece = 1;
  int32_t* first = nullptr;  // [X * S * tiles + 1] scratch: first row of a list's tile
  int64_t* rows = nullptr;   // [most entries] result
  int32_t* near_return =
      nullptr;  // [X, or 1 where chunks divide rows, T, num_slots] places in the chunk's near lists, -1 after the last
  int32_t* far_return = nullptr;  // nullptr: not wanted
  int64_t num_slots = 0;
  CountColumns counts;

  __host__ __device__ bool divides_rows() const { return !chunk_by_expert && chunk_of_rank == nullptr; }
};

constexpr int64_t kMostLists = 1024;
constexpr int64_t kMostLocalExperts = 1024;

int64_t list_tiles(int64_t num_rows, int64_t num_chunks, bool divides_rows);
cudaError_t launch_lists(const ListArguments& arguments, cudaStream_t stream);

enum class WeightType { kFloat, kHalf, kBFloat16 };

// Entries of arrived rows for this rank's experts, in the order of rows and routes.
struct SpreadArguments {
  RouteIds routes;
  int64_t rank = 0;
  int64_t num_sources = 1;
  const int64_t* table = nullptr;   // [P * L] place of source p's first row for l, less its entries of sources before,
                                    // then [P] the sources' first rows
  const uint8_t* places = nullptr;  // int32 [K] per row (strides of `routes` rows): place after `table`; nullptr: count
  const uint8_t* weights = nullptr;  // [K] per row
  WeightType weight_type = WeightType::kFloat;
  int64_t num_entries = 0;
  int64_t num_places = -1;       // no target beyond; -1: not known
  int32_t* histogram = nullptr;  // [tiles, L + 1] scratch
  int64_t* start = nullptr;      // results, see Spread
  int64_t* target = nullptr;
  int64_t* route = nullptr;
  int64_t* source = nullptr;
  float* weight = nullptr;
};

int64_t spread_tiles(int64_t num_rows, int64_t top_k);
cudaError_t launch_spread_plan(const SpreadArguments& arguments, cudaStream_t stream);

}  // namespace planmoe::cuda
