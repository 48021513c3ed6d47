// What a warp works on in the row kernels: its part of a row, unit by unit.
#pragma once

#include "row_kernels.h"
#include "values.cuh"

namespace planmoe::cuda {

struct WireRow {
  uint8_t* bytes;
  int64_t hidden;
  bool aligned;
  bool full;  // every lane has values in every unit
  int lane;
  int32_t* refused;  // becomes 1 where the row cannot be carried

  // What columns are compared with: those of full rows always exist.
  __device__ __forceinline__ int64_t count() const { return full ? kAlways : hidden; }
};

namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kEntriesAtOnce = 4;

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
  return {grid.rows.wire + row * grid.rows.wire_stride,
          grid.rows.hidden,
          kFast || grid.wire_aligned,
          kFast,
          lane,
          grid.rows.refused};
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

}  // namespace
}  // namespace planmoe::cuda
