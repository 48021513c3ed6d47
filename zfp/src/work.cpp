#include "work.h"

#include <limits>

namespace planmoe::zfp {
namespace {

Status check_options(const Options& options) noexcept {
  if (options.rounding != Rounding::kNone && options.rounding != Rounding::kLast) return Status::kBadOption;
  if (options.kernel < Kernel::kAutomatic || options.kernel > Kernel::kAvx512) return Status::kBadOption;
  return kernel_available(options.kernel) ? Status::kOk : Status::kKernelUnavailable;
}

Status plan_row(std::size_t hidden, DataType data_type, double rate, BlockGrid& grid) noexcept {
  if (hidden == 0 || hidden % 4 != 0) return Status::kBadShape;
  return make_grid(Field{2, 4, hidden / 4, data_type}, rate, grid);
}

Status check_pointers(const Work& work, const void* values, const void* stream) noexcept {
  return work.num_bytes > 0 && (values == nullptr || stream == nullptr) ? Status::kNullPointer : Status::kOk;
}

}  // namespace

Status plan(const Field& field, const Options& options, Work& work) noexcept {
  Status status = make_grid(field, options.rate, work.grid);
  if (status != Status::kOk) return status;
  work.num_bytes = work.grid.num_bytes;
  return check_options(options);
}

Status plan(const Rows& rows, const Options& options, Work& work) noexcept {
  Status status = plan_row(rows.hidden, rows.data_type, options.rate, work.grid);
  if (status != Status::kOk) return status;
  constexpr std::size_t kLargest = std::numeric_limits<std::size_t>::max();
  if (rows.num_rows > kLargest / work.grid.num_bytes || rows.num_rows > kLargest / (4 * rows.hidden)) {
    return Status::kTooLarge;
  }
  work.num_grids = rows.num_rows;
  work.num_bytes = rows.num_rows * work.grid.num_bytes;
  const bool rows_join = rows.hidden % 16 == 0 && work.grid.num_blocks * work.grid.block_bits % 64 == 0;
  if (rows_join) {
    status = make_grid(Field{2, 4, rows.num_rows * (rows.hidden / 4), rows.data_type}, options.rate, work.grid);
    if (status != Status::kOk) return status;
    work.num_grids = 1;
  }
  return check_options(options);
}

Status check_encode(const Work& work, const void* values, const void* stream, std::size_t stream_capacity) noexcept {
  if (work.num_bytes > stream_capacity) return Status::kCapacityTooSmall;
  return check_pointers(work, values, stream);
}

Status check_decode(const Work& work, const void* values, const void* stream, std::size_t stream_size) noexcept {
  if (work.num_bytes != stream_size) return Status::kStreamSizeMismatch;
  return check_pointers(work, values, stream);
}

Status stream_bytes(const Field& field, double rate, std::size_t& bytes) noexcept {
  BlockGrid grid;
  Status status = make_grid(field, rate, grid);
  bytes = status == Status::kOk ? grid.num_bytes : 0;
  return status;
}

Status row_bytes(std::size_t hidden, double rate, std::size_t& bytes) noexcept {
  BlockGrid grid;
  Status status = plan_row(hidden, DataType::kFloat32, rate, grid);
  bytes = status == Status::kOk ? grid.num_bytes : 0;
  return status;
}

}  // namespace planmoe::zfp
