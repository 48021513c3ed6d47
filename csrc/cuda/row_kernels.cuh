// The row kernels, for any codec. A warp works on kUnroll units of a row at a time; a unit is 32 * kLaneValues values.
//
// A codec is a class with
//   using Value (float, or unsigned integers that are only moved), kLaneValues, kUnroll, kWireBytes (what the address
//   and the stride of wire rows must be multiples of for its wide accesses; others take a slower path), and
//   static void decode(const WireRow&, int64_t unit, Value (&values)[kLaneValues])
//   static void encode(const WireRow&, int64_t unit, const Value (&values)[kLaneValues])
// called by whole warps: lane l has the values from unit * 32 * kLaneValues + l * kLaneValues on, 0 beyond the row.
//
// Kernels with kFast work on rows that are aligned and full. There, what the units of a group do has no branches, so that
// the compiler can interleave it.
#pragma once

#include "row_units.cuh"

namespace planmoe::cuda {
namespace {

constexpr int kFoldUnits = 2;

template <class Codec, class Row, bool kFast>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) pack_kernel(const __grid_constant__ Grid grid) {
  const Part part(grid);
  if (part.row >= grid.rows.num_rows) return;
  const auto* from = value_row<const Row>(grid, grid.rows.index ? grid.rows.index[part.row] : part.row);
  const auto wire = wire_row<kFast>(grid, part.row, part.lane);
  for (int64_t first = part.first_unit; first < part.last_unit; first += Codec::kUnroll) {
    typename Codec::Value values[Codec::kUnroll][Codec::kLaneValues];
    each_unit<Codec::kUnroll>(first, part.last_unit, [&](int j, int64_t unit) {
      load<kFast>(grid, from, column_of<Codec>(unit, part.lane), values[j]);
    });
    each_unit<Codec::kUnroll>(first, part.last_unit,
                              [&](int j, int64_t unit) { Codec::encode(wire, unit, values[j]); });
  }
}

template <class Codec, class Row, bool kAdd, bool kFast>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) unpack_kernel(const __grid_constant__ Grid grid) {
  const Part part(grid);
  if (part.row >= grid.rows.num_rows) return;
  auto* to = value_row<Row>(grid, grid.rows.index ? grid.rows.index[part.row] : part.row);
  const auto wire = wire_row<kFast>(grid, part.row, part.lane);
  for (int64_t first = part.first_unit; first < part.last_unit; first += Codec::kUnroll) {
    typename Codec::Value values[Codec::kUnroll][Codec::kLaneValues];
    each_unit<Codec::kUnroll>(first, part.last_unit,
                              [&](int j, int64_t unit) { Codec::decode(wire, unit, values[j]); });
    each_unit<Codec::kUnroll>(first, part.last_unit, [&](int j, int64_t unit) {
      const auto column = column_of<Codec>(unit, part.lane);
      if constexpr (kAdd) {
        typename Codec::Value before[Codec::kLaneValues];
        load<kFast>(grid, to, column, before);
#pragma unroll
        for (int i = 0; i < Codec::kLaneValues; ++i) values[j][i] += before[i];
      }
      store<kFast>(grid, to, column, values[j]);
    });
  }
}

template <class Codec, class Row, bool kWeighted, bool kFast>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) spread_kernel(const __grid_constant__ Grid grid) {
  const Part part(grid);
  if (part.row >= grid.rows.num_rows) return;
  const auto begin = grid.rows.start[part.row], end = grid.rows.start[part.row + 1];
  if (begin == end) return;
  const auto wire = wire_row<kFast>(grid, part.row, part.lane);
  for (int64_t first = part.first_unit; first < part.last_unit; first += Codec::kUnroll) {
    typename Codec::Value values[Codec::kUnroll][Codec::kLaneValues];
    each_unit<Codec::kUnroll>(first, part.last_unit,
                              [&](int j, int64_t unit) { Codec::decode(wire, unit, values[j]); });
    for (int64_t entry = begin; entry < end; ++entry) {
      auto* to = value_row<Row>(grid, grid.rows.target[entry]);
      const float weight = kWeighted ? grid.rows.weight[entry] : 1.0f;
      each_unit<Codec::kUnroll>(first, part.last_unit, [&](int j, int64_t unit) {
        const auto column = column_of<Codec>(unit, part.lane);
        if constexpr (kWeighted) {
          typename Codec::Value scaled[Codec::kLaneValues];
#pragma unroll
          for (int i = 0; i < Codec::kLaneValues; ++i) scaled[i] = values[j][i] * weight;
          store<kFast>(grid, to, column, scaled);
        } else {
          store<kFast>(grid, to, column, values[j]);
        }
      });
    }
  }
}

// sums[j] += the entries' rows times their weights, units `unit` to unit + kUnits - 1, entry after entry.
template <class Codec, class Row, bool kFast, int kEntries, int kUnits>
__device__ __forceinline__ void add_entries(const Grid& grid, int64_t entry, int64_t unit, int lane,
                                            float (&sums)[kUnits][Codec::kLaneValues]) {
  float values[kEntries][kUnits][Codec::kLaneValues], weights[kEntries];
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const auto* row = value_row<const Row>(grid, grid.rows.target[entry + e]);
    weights[e] = grid.rows.weight ? grid.rows.weight[entry + e] : 1.0f;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) load<kFast>(grid, row, column_of<Codec>(unit + j, lane), values[e][j]);
  }
#pragma unroll
  for (int e = 0; e < kEntries; ++e)
#pragma unroll
    for (int j = 0; j < kUnits; ++j)
#pragma unroll
      for (int i = 0; i < Codec::kLaneValues; ++i) sums[j][i] += values[e][j][i] * weights[e];
}

template <class Codec, class Row, bool kFast, int kUnits>
__device__ __forceinline__ void fold_units(const Grid& grid, const WireRow& wire, int64_t begin, int64_t end,
                                           int64_t unit) {
  float sums[kUnits][Codec::kLaneValues] = {};
  each_run(begin, end, [&](auto count, int64_t entry) {
    add_entries<Codec, Row, kFast, decltype(count)::value>(grid, entry, unit, wire.lane, sums);
  });
#pragma unroll
  for (int j = 0; j < kUnits; ++j) Codec::encode(wire, unit + j, sums[j]);
}

template <class Codec, class Row, bool kFast>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) fold_kernel(const __grid_constant__ Grid grid) {
  const Part part(grid);
  if (part.row >= grid.rows.num_rows) return;
  const auto begin = grid.rows.start[part.row], end = grid.rows.start[part.row + 1];
  const auto wire = wire_row<kFast>(grid, part.row, part.lane);
  int64_t unit = part.first_unit;
  for (; unit + kFoldUnits <= part.last_unit; unit += kFoldUnits)
    fold_units<Codec, Row, kFast, kFoldUnits>(grid, wire, begin, end, unit);
  for (; unit < part.last_unit; ++unit) fold_units<Codec, Row, kFast, 1>(grid, wire, begin, end, unit);
}

template <class Codec, class Row, bool kFast>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp, 4) dot_kernel(const __grid_constant__ Grid grid) {
  const Part part(grid);  // the whole row
  if (part.row >= grid.rows.num_rows) return;
  float* dots = grid.rows.dots + part.row * grid.rows.top_k;
  for (int64_t k = part.lane; k < grid.rows.top_k; k += kWarp) dots[k] = 0.0f;
  __syncwarp();
  const auto begin = grid.rows.start[part.row], end = grid.rows.start[part.row + 1];
  const auto wire = wire_row<kFast>(grid, part.row, part.lane);
  each_run(begin, end, [&](auto count, int64_t first) {
    constexpr int kEntries = decltype(count)::value;
    const Row* rows[kEntries];
    float sums[kEntries] = {};
#pragma unroll
    for (int e = 0; e < kEntries; ++e) rows[e] = value_row<const Row>(grid, grid.rows.target[first + e]);
    for (int64_t unit = 0; unit < grid.num_units; ++unit) {
      const auto column = column_of<Codec>(unit, part.lane);
      float left[Codec::kLaneValues], right[kEntries][Codec::kLaneValues];
#pragma unroll
      for (int e = 0; e < kEntries; ++e) load<kFast>(grid, rows[e], column, right[e]);
      Codec::decode(wire, unit, left);
#pragma unroll
      for (int e = 0; e < kEntries; ++e)
#pragma unroll
        for (int i = 0; i < Codec::kLaneValues; ++i)
          if (kFast || column + i < grid.rows.hidden) sums[e] += left[i] * right[e][i];
    }
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const float total = warp_sum(sums[e]);
      if (part.lane == 0) dots[grid.rows.route[first + e]] = total;
    }
  });
}

template <class Codec, class Row, bool kFast>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) sum_kernel(const __grid_constant__ Grid grid) {
  const Part part(grid);
  if (part.row >= grid.rows.num_rows) return;
  const auto* returns = grid.rows.returns + part.row * grid.rows.num_slots;
  auto* to = value_row<Row>(grid, part.row);
  int64_t num_returned = 0;
  while (num_returned < grid.rows.num_slots && returns[num_returned] >= 0) ++num_returned;
  for (int64_t unit = part.first_unit; unit < part.last_unit; ++unit) {
    const auto column = column_of<Codec>(unit, part.lane);
    float sums[Codec::kLaneValues] = {};
    if (grid.rows.base) load<kFast>(grid, grid.rows.base + part.row * grid.rows.hidden, column, sums);
    each_run(0, num_returned, [&](auto count, int64_t slot) {
      constexpr int kRows = decltype(count)::value;
      float values[kRows][Codec::kLaneValues];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        Codec::decode(wire_row<kFast>(grid, returns[slot + r], part.lane), unit, values[r]);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < Codec::kLaneValues; ++i) sums[i] += values[r][i];
    });
    store<kFast>(grid, to, column, sums);
  }
}

}  // namespace
}  // namespace planmoe::cuda
