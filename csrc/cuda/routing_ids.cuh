#pragma once
// How kernels read the experts' numbers of rows.

#include "routing_kernels.h"
#include "values.cuh"

namespace planmoe::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Route {
  int64_t rank;   // negative: none
  int64_t local;  // the expert's index on it
};

__device__ __forceinline__ int64_t id_at(const RouteIds& routes, int64_t row, int64_t k) {
  const uint8_t* at = routes.ids + row * routes.row_stride + k * routes.route_stride;
  const auto place = reinterpret_cast<uintptr_t>(at);
  if (routes.id_bytes == 2) return load_bytes<int16_t>(at, place % 2 == 0);
  if (routes.id_bytes == 4) return load_bytes<int32_t>(at, place % 4 == 0);
  return load_bytes<int64_t>(at, place % 8 == 0);
}

__device__ __forceinline__ Route route_of(int64_t id, const RouteIds& routes, int64_t first, int64_t last) {
  if (id < 0) return {-1, 0};
  const auto wide = static_cast<uint64_t>(id);
  const auto per_rank = static_cast<uint64_t>(routes.experts_per_rank);
  const int64_t rank =
      (wide | per_rank) >> 32 ? wide / per_rank : static_cast<uint32_t>(wide) / static_cast<uint32_t>(per_rank);
  const int64_t local = id - rank * routes.experts_per_rank;
  return local < first || local >= last ? Route{-1, 0} : Route{rank, local};
}

}  // namespace planmoe::cuda
