// One thread per number.
#include "row_kernels.h"

namespace planmoe::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) pack_columns_kernel(ColumnArguments arguments) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = place / arguments.numbers_per_row;
  if (row >= arguments.num_rows) return;
  int64_t number = place % arguments.numbers_per_row;
  uint8_t* target = arguments.rows + row * arguments.width;
  for (int i = 0; i < arguments.num_columns; ++i) {
    const auto& column = arguments.columns[i];
    if (number >= column.num_routes) {
      number -= column.num_routes;
      target += column.num_routes * column.bytes;
      continue;
    }
    const uint8_t* source = column.values + number * column.route_step + row * column.row_step;
    for (int64_t byte = 0; byte < column.bytes; ++byte) target[number * column.bytes + byte] = source[byte];
    return;
  }
}

}  // namespace

cudaError_t pack_columns(const ColumnArguments& arguments, cudaStream_t stream) {
  const int64_t numbers = arguments.num_rows * arguments.numbers_per_row;
  if (numbers == 0) return cudaSuccess;
  const int64_t blocks = (numbers + kThreads - 1) / kThreads;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  pack_columns_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace planmoe::cuda
