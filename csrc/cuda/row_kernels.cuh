// The row kernels, for any codec. A warp works on kUnroll units of a row at a time; a unit is 32 * kLaneValues values.
//
// A codec is a class with
//   using Value (float, or unsigned integers that are only moved), kLaneValues, kUnroll, kWireBytes (what the address
//   and the stride of wire rows must be multiples of for its wide accesses; others take a slower path), kWholeRows
//   (whether one warp must work through a row's units from the first on), and
//   static void decode(const WireRow&, int64_t unit, Value (&values)[kLaneValues])
//   static void encode(const WireRow&, int64_t unit, const Value (&values)[kLaneValues])
// called by whole warps: lane l has the values from unit * 32 * kLaneValues + l * kLaneValues on, 0 beyond the row.
//
// Kernels with kFast work on rows that are aligned and full. There, what the units of a group do has no branches, so that
// the compiler can interleave it.
#pragma once

#include <algorithm>

#include "row_kernels.h"
#include "values.cuh"

namespace planmoe::cuda {

struct WireRow {
  uint8_t* bytes;
  int64_t hidden;
  bool aligned;
  bool full;  // every lane has values in every unit
  int lane;
  mutable int cursor = 0;  // of codecs that work through a row from its beginning

  // What columns are compared with: those of full rows always exist.
  __device__ __forceinline__ int64_t count() const { return full ? kAlways : hidden; }
};

namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int64_t kEnoughWarps = 1 << 14;  // rows are cut into parts where there are fewer
constexpr int kEntriesAtOnce = 4;
constexpr int kFoldUnits = 2;

struct Grid {
  RowArguments rows;
  int64_t parts;       // of a row
  int64_t part_units;  // a multiple of kUnroll
  int64_t num_units;
  bool wire_aligned;
  bool rows_aligned;
  bool fast;
};

// One warp's part of one row.
struct Part {
  int64_t row;
  int64_t first_unit;
  int64_t last_unit;
  int lane;

  __device__ explicit Part(const Grid& grid) {
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
    lane = static_cast<int>(threadIdx.x % kWarp);
    row = grid.parts == 1 ? warp : warp / grid.parts;
    first_unit = grid.parts == 1 ? 0 : (warp - row * grid.parts) * grid.part_units;
    last_unit = min(first_unit + grid.part_units, grid.num_units);
  }
};

template <bool kFast>
__device__ __forceinline__ WireRow wire_row(const Grid& grid, int64_t row, int lane) {
  WireRow wire{grid.rows.wire + row * grid.rows.wire_stride, grid.rows.hidden, kFast || grid.wire_aligned, kFast, lane};
  return wire;
}

template <class Row>
__device__ __forceinline__ Row* value_row(const Grid& grid, int64_t row) {
  return static_cast<Row*>(grid.rows.rows) + row * grid.rows.hidden;
}

template <class Codec>
__device__ __forceinline__ int64_t column_of(int64_t unit, int lane) {
  return (unit * kWarp + lane) * Codec::kLaneValues;
}

template <bool kFast, class Row, class Value, int kCount>
__device__ __forceinline__ void load(const Grid& grid, const Row* row, int64_t column, Value (&values)[kCount]) {
  load_values(row, column, kFast ? kAlways : grid.rows.hidden, kFast || grid.rows_aligned, values);
}

template <bool kFast, class Row, class Value, int kCount>
__device__ __forceinline__ void store(const Grid& grid, Row* row, int64_t column, const Value (&values)[kCount]) {
  store_values(row, column, kFast ? kAlways : grid.rows.hidden, kFast || grid.rows_aligned, values);
}

// function(j, unit) for the units of a group that exist; j is known to the compiler.
template <int kUnroll, class Function>
__device__ __forceinline__ void each_unit(int64_t first, int64_t last, const Function& function) {
  if (first + kUnroll <= last) {
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) function(j, first + j);
    return;
  }
#pragma unroll
  for (int j = 0; j < kUnroll; ++j)
    if (first + j < last) function(j, first + j);
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// function(Count<n>{}, entry) for runs of n entries, n at most kEntriesAtOnce.
template <class Function>
__device__ __forceinline__ void each_run(int64_t begin, int64_t end, const Function& function) {
  for (int64_t entry = begin; entry < end; entry += kEntriesAtOnce) {
    const int64_t left = end - entry;
    if (left >= 4) {
      function(Count<4>{}, entry);
    } else if (left == 3) {
      function(Count<3>{}, entry);
    } else if (left == 2) {
      function(Count<2>{}, entry);
    } else {
      function(Count<1>{}, entry);
    }
  }
}

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

template <class Codec, class Row>
Grid make_grid(const RowArguments& rows, bool whole_rows) {
  Grid grid{rows, 1, 0, 0, false, false, false};
  const auto address = [](const void* at) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(at)); };
  constexpr int64_t kRowBytes = kVectorBytes<Row, Codec::kLaneValues>;
  constexpr int64_t kBaseBytes = kVectorBytes<float, Codec::kLaneValues>;
  grid.wire_aligned = (address(rows.wire) | rows.wire_stride) % Codec::kWireBytes == 0;
  grid.rows_aligned = (address(rows.rows) | (rows.hidden * static_cast<int64_t>(sizeof(Row)))) % kRowBytes == 0 &&
                      (!rows.base || (address(rows.base) | (rows.hidden * 4)) % kBaseBytes == 0);
  constexpr int64_t kUnit = kWarp * Codec::kLaneValues;
  grid.fast = grid.wire_aligned && grid.rows_aligned && rows.hidden % kUnit == 0;
  grid.num_units = (rows.hidden + kUnit - 1) / kUnit;
  const int64_t groups = (grid.num_units + Codec::kUnroll - 1) / Codec::kUnroll;
  if (!whole_rows)
    grid.parts = std::max<int64_t>(1, std::min(groups, (kEnoughWarps + rows.num_rows - 1) / rows.num_rows));
  const int64_t part_groups = (groups + grid.parts - 1) / grid.parts;
  grid.part_units = part_groups * Codec::kUnroll;
  grid.parts = std::max<int64_t>(1, (groups + part_groups - 1) / std::max<int64_t>(1, part_groups));
  return grid;
}

template <class Codec, class Row>
cudaError_t launch(void (*fast)(Grid), void (*any)(Grid), const RowArguments& rows, bool whole_rows,
                   cudaStream_t stream) {
  if (rows.num_rows == 0 || rows.hidden == 0) return cudaSuccess;
  const auto grid = make_grid<Codec, Row>(rows, whole_rows);
  const int64_t blocks = (rows.num_rows * grid.parts + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  (grid.fast ? fast : any)<<<static_cast<unsigned>(blocks), kWarpsPerBlock * kWarp, 0, stream>>>(grid);
  return cudaGetLastError();
}

// ---- one launcher per operation ----

template <class Codec, class Row>
cudaError_t launch_pack(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(pack_kernel<Codec, Row, true>, pack_kernel<Codec, Row, false>, rows, Codec::kWholeRows,
                            stream);
}

template <class Codec, class Row>
cudaError_t launch_unpack(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(unpack_kernel<Codec, Row, false, true>, unpack_kernel<Codec, Row, false, false>, rows,
                            Codec::kWholeRows, stream);
}

template <class Codec, class Row>
cudaError_t launch_add(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(unpack_kernel<Codec, Row, true, true>, unpack_kernel<Codec, Row, true, false>, rows,
                            Codec::kWholeRows, stream);
}

template <class Codec, class Row>
cudaError_t launch_spread(const RowArguments& rows, cudaStream_t stream) {
  return rows.weight ? launch<Codec, Row>(spread_kernel<Codec, Row, true, true>, spread_kernel<Codec, Row, true, false>,
                                          rows, Codec::kWholeRows, stream)
                     : launch<Codec, Row>(spread_kernel<Codec, Row, false, true>,
                                          spread_kernel<Codec, Row, false, false>, rows, Codec::kWholeRows, stream);
}

template <class Codec, class Row>
cudaError_t launch_fold(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(fold_kernel<Codec, Row, true>, fold_kernel<Codec, Row, false>, rows, false, stream);
}

template <class Codec, class Row>
cudaError_t launch_dot(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(dot_kernel<Codec, Row, true>, dot_kernel<Codec, Row, false>, rows, true, stream);
}

template <class Codec, class Row>
cudaError_t launch_sum(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(sum_kernel<Codec, Row, true>, sum_kernel<Codec, Row, false>, rows, false, stream);
}

template <class Row>
constexpr int kScalarOf = 0;
template <>
constexpr int kScalarOf<__half> = 1;
template <>
constexpr int kScalarOf<__nv_bfloat16> = 2;

template <class Codec, class Row>
void add_kernels_for(RowKernels& kernels) {
  kernels.pack[kScalarOf<Row>] = launch_pack<Codec, Row>;
  kernels.unpack[kScalarOf<Row>] = launch_unpack<Codec, Row>;
  kernels.spread[kScalarOf<Row>] = launch_spread<Codec, Row>;
  kernels.fold[kScalarOf<Row>] = launch_fold<Codec, Row>;
  kernels.dot[kScalarOf<Row>] = launch_dot<Codec, Row>;
  kernels.sum[kScalarOf<Row>] = launch_sum<Codec, Row>;
}

template <class Codec>
RowKernels kernels_of() {
  RowKernels kernels;
  add_kernels_for<Codec, float>(kernels);
  add_kernels_for<Codec, __half>(kernels);
  add_kernels_for<Codec, __nv_bfloat16>(kernels);
  kernels.add[0] = launch_add<Codec, float>;
  return kernels;
}

// A codec whose wire does not depend on the rows' dtype.
template <class Codec>
bool add_for_all_dtypes(const char* name) {
  const auto kernels = kernels_of<Codec>();
  return add_row_kernels(name, Scalar::kFloat, kernels) && add_row_kernels(name, Scalar::kHalf, kernels) &&
         add_row_kernels(name, Scalar::kBFloat16, kernels);
}

}  // namespace
}  // namespace planmoe::cuda
