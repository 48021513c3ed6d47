#pragma once
// Launchers of the CUDA row kernels, free of torch. All are asynchronous on `stream`, allocate nothing, take sizes of
// any magnitude (64-bit places) and sum in a fixed order.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace planmoe::cuda {

enum class Scalar { kFloat, kHalf, kBFloat16 };
constexpr int kNumScalars = 3;

// What one launch works on; each kernel reads the members that its comment names. H values per row.
struct RowArguments {
  uint8_t* wire = nullptr;  // wire row i starts at wire + i * wire_stride
  int64_t wire_stride = 0;
  int64_t num_rows = 0;  // of the wire; of `rows` for `sum`
  void* rows = nullptr;  // [*, H] contiguous
  int64_t hidden = 0;
  const int64_t* index = nullptr;  // [num_rows]; nullptr: i
  const int64_t* start = nullptr;  // entries start[i] .. start[i + 1] - 1 of wire row i
  const int64_t* target = nullptr;
  const int64_t* route = nullptr;
  const float* weight = nullptr;  // nullptr: 1
  float* dots = nullptr;          // [num_rows, top_k]
  int64_t top_k = 0;
  const int32_t* returns = nullptr;  // [num_rows, num_slots] wire rows; a negative one ends the row
  int64_t num_slots = 0;
  const float* base = nullptr;  // [num_rows, H] that sums start from; nullptr: 0
  int32_t* refused = nullptr;   // becomes 1 where a row cannot be carried
};

using RowLaunch = cudaError_t (*)(const RowArguments&, cudaStream_t stream);

// The kernels of one codec for wires of one dtype, by the scalar of `rows`; nullptr where there is none.
struct RowKernels {
  RowLaunch pack[kNumScalars] = {};    // wire[i] = encode(rows[index[i]])
  RowLaunch unpack[kNumScalars] = {};  // rows[index[i]] = decode(wire[i])
  RowLaunch add[kNumScalars] = {};     // rows[index[i]] += decode(wire[i]), an index at most once
  RowLaunch spread[kNumScalars] = {};  // rows[target[e]] = decode(wire[i]) * weight[e]
  RowLaunch fold[kNumScalars] = {};    // wire[i] = encode(sum of rows[target[e]] * weight[e])
  RowLaunch dot[kNumScalars] = {};     // dots[i, route[e]] = decode(wire[i]) . rows[target[e]], other places 0
  RowLaunch sum[kNumScalars] = {};     // rows[t] = base[t] + sum of decode(wire[returns[t, s]]) over s
};

// Whether `lossless` can carry bfloat16 rows: sets rows.refused; reads num_rows, rows and hidden.
cudaError_t check_lossless(const RowArguments& rows, cudaStream_t stream);

// nullptr where a codec has no kernels for wires of this dtype.
const RowKernels* find_row_kernels(const std::string& codec, Scalar dtype);

// Adds a codec's kernels as the module loads.
bool add_row_kernels(const std::string& codec, Scalar dtype, const RowKernels& kernels);

// to[i] = from[index[i]], rows of `width` bytes of any alignment.
cudaError_t gather_rows(const uint8_t* from, int64_t from_stride, const int64_t* index, uint8_t* to, int64_t to_stride,
                        int64_t num_rows, int64_t width, cudaStream_t stream);

// See pack_columns in csrc/kernels/columns.h; steps and bytes in bytes.
constexpr int kMostColumns = 4;
struct ColumnArguments {
  struct Column {
    const uint8_t* values;
    int64_t route_step, row_step, num_routes, bytes;
  };
  Column columns[kMostColumns];
  int num_columns = 0;
  int64_t numbers_per_row = 0;  // of all columns
  uint8_t* rows = nullptr;
  int64_t num_rows = 0;
  int64_t width = 0;
};
cudaError_t pack_columns(const ColumnArguments& arguments, cudaStream_t stream);

}  // namespace planmoe::cuda
