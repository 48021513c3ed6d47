#include "planmoe_zfp/zfp.h"

#include <cfenv>

#include "work.h"

namespace planmoe::zfp {
namespace {

// Default rounding and no flushing of subnormals while it lives, whatever the caller has set.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() noexcept {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

std::size_t values_bytes(const BlockGrid& grid) {
  return grid.width * grid.height * (grid.data_type == DataType::kFloat32 ? 4 : 2);
}

Status encode_work(const Work& work, const Options& options, const void* values, void* stream,
                   std::size_t stream_capacity) noexcept {
  Status status = check_encode(work, values, stream, stream_capacity);
  if (status != Status::kOk || work.num_bytes == 0) return status;
  const KernelSet& kernels = *find_kernels(options.kernel);
  DefaultFloatEnvironment environment;
  for (std::size_t i = 0; i < work.num_grids; ++i) {
    encode_grid(work.grid, kernels, static_cast<const unsigned char*>(values) + i * values_bytes(work.grid),
                static_cast<unsigned char*>(stream) + i * work.grid.num_bytes);
  }
  return Status::kOk;
}

Status decode_work(const Work& work, const Options& options, const void* stream, std::size_t stream_size,
                   void* values) noexcept {
  Status status = check_decode(work, values, stream, stream_size);
  if (status != Status::kOk || work.num_bytes == 0) return status;
  const KernelSet& kernels = *find_kernels(options.kernel);
  DefaultFloatEnvironment environment;
  bool valid = true;
  for (std::size_t i = 0; i < work.num_grids; ++i) {
    valid &= decode_grid(work.grid, kernels, options.rounding,
                         static_cast<const unsigned char*>(stream) + i * work.grid.num_bytes,
                         static_cast<unsigned char*>(values) + i * values_bytes(work.grid));
  }
  return valid ? Status::kOk : Status::kStreamCorrupt;
}

}  // namespace

const char* describe(Status status) noexcept {
  switch (status) {
    case Status::kOk:
      return "no error";
    case Status::kBadRate:
      return "rate is out of range; give at least 0.53125 (2-d) or 2.125 (1-d) and at most 32 bits per value";
    case Status::kBadShape:
      return "shape is not supported; give 1 dimension with height 1, or 2 dimensions, or rows of a positive multiple "
             "of 4 values";
    case Status::kTooLarge:
      return "shape is too large: its byte count overflows; split the array";
    case Status::kBadOption:
      return "data type, rounding or kernel is not one of the listed values";
    case Status::kKernelUnavailable:
      return "this processor or build lacks the kernel asked for; use the automatic one";
    case Status::kNullPointer:
      return "a buffer is null although the shape is not empty";
    case Status::kCapacityTooSmall:
      return "the stream buffer is too small; ask stream_bytes or row_bytes for the size";
    case Status::kStreamSizeMismatch:
      return "the stream is not as long as shape and rate say: it is truncated, or was made with other settings";
    case Status::kStreamCorrupt:
      return "the stream is corrupt: it holds bits that no encoder writes; check shape, rate and transport";
    case Status::kMisaligned:
      return "a device pointer is not aligned: the stream needs 8 bytes, the values the size of one";
    case Status::kCudaError:
      return "a CUDA call failed; run with CUDA_LAUNCH_BLOCKING=1 and look at the first error";
  }
  return "unknown status";
}

Status encode(const Field& field, const Options& options, const void* values, void* stream,
              std::size_t stream_capacity) noexcept {
  Work work;
  Status status = plan(field, options, work);
  return status == Status::kOk ? encode_work(work, options, values, stream, stream_capacity) : status;
}

Status decode(const Field& field, const Options& options, const void* stream, std::size_t stream_size,
              void* values) noexcept {
  Work work;
  Status status = plan(field, options, work);
  return status == Status::kOk ? decode_work(work, options, stream, stream_size, values) : status;
}

Status encode_rows(const Rows& rows, const Options& options, const void* values, void* stream,
                   std::size_t stream_capacity) noexcept {
  Work work;
  Status status = plan(rows, options, work);
  return status == Status::kOk ? encode_work(work, options, values, stream, stream_capacity) : status;
}

Status decode_rows(const Rows& rows, const Options& options, const void* stream, std::size_t stream_size,
                   void* values) noexcept {
  Work work;
  Status status = plan(rows, options, work);
  return status == Status::kOk ? decode_work(work, options, stream, stream_size, values) : status;
}

}  // namespace planmoe::zfp
