// Starting the row kernels, and the table of them that a codec registers.
#pragma once

#include <algorithm>

#include "row_kernels.cuh"

namespace planmoe::cuda {
namespace {

constexpr int64_t kEnoughWarps = 1 << 14;  // rows are cut into parts where there are fewer

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
cudaError_t launch(void (*fast)(Grid), void (*any)(Grid), const RowArguments& rows, cudaStream_t stream,
                   bool whole_rows = false) {
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
  return launch<Codec, Row>(pack_kernel<Codec, Row, true>, pack_kernel<Codec, Row, false>, rows, stream);
}

template <class Codec, class Row>
cudaError_t launch_unpack(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(unpack_kernel<Codec, Row, false, true>, unpack_kernel<Codec, Row, false, false>, rows,
                            stream);
}

template <class Codec, class Row>
cudaError_t launch_add(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(unpack_kernel<Codec, Row, true, true>, unpack_kernel<Codec, Row, true, false>, rows,
                            stream);
}

template <class Codec, class Row>
cudaError_t launch_spread(const RowArguments& rows, cudaStream_t stream) {
  return rows.weight ? launch<Codec, Row>(spread_kernel<Codec, Row, true, true>, spread_kernel<Codec, Row, true, false>,
                                          rows, stream)
                     : launch<Codec, Row>(spread_kernel<Codec, Row, false, true>,
                                          spread_kernel<Codec, Row, false, false>, rows, stream);
}

template <class Codec, class Row>
cudaError_t launch_fold(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(fold_kernel<Codec, Row, true>, fold_kernel<Codec, Row, false>, rows, stream);
}

template <class Codec, class Row>
cudaError_t launch_dot(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(dot_kernel<Codec, Row, true>, dot_kernel<Codec, Row, false>, rows, stream,
                            /*whole_rows=*/true);
}

template <class Codec, class Row>
cudaError_t launch_sum(const RowArguments& rows, cudaStream_t stream) {
  return launch<Codec, Row>(sum_kernel<Codec, Row, true>, sum_kernel<Codec, Row, false>, rows, stream);
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
