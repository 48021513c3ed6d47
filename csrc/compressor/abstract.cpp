#include "abstract.h"

#include <ATen/ATen.h>

namespace planmoe {
namespace {

void check_rows(const char* name, const at::Tensor& rows) {
  TORCH_CHECK_VALUE(rows.dim() == 2, name, " must be 2-d [rows, hidden], got ", rows.dim(), "-d");
  TORCH_CHECK_VALUE(rows.is_contiguous(), name, " must be contiguous, got strides ", rows.strides());
  TORCH_CHECK_VALUE(at::isFloatingType(rows.scalar_type()), name, " must be floating point, got ", rows.scalar_type());
}

void check_index(const std::optional<at::Tensor>& index, const at::Tensor& rows, int64_t expected) {
  TORCH_CHECK_VALUE(index->scalar_type() == at::kLong && index->dim() == 1 && index->is_contiguous(),
                    "index must be a contiguous 1-d int64 tensor");
  TORCH_CHECK_VALUE(index->device() == rows.device(), "index is on ", index->device(), ", rows are on ", rows.device());
  TORCH_CHECK_VALUE(expected < 0 || index->size(0) == expected, "index has ", index->size(0), " entries, expected ",
                    expected);
  if (index->device().is_cpu() && index->numel() > 0) {
    auto [lowest, highest] = at::aminmax(*index);
    TORCH_CHECK_VALUE(lowest.item<int64_t>() >= 0 && highest.item<int64_t>() < rows.size(0), "index values lie in [",
                      lowest.item<int64_t>(), ", ", highest.item<int64_t>(), "], there are ", rows.size(0), " rows");
  }
}

}  // namespace

at::Tensor AbstractCompressor::encode(const at::Tensor& rows, const std::optional<at::Tensor>& index) const {
  check_rows("rows", rows);
  if (index) check_index(index, rows, -1);
  return encode_rows(rows, index);
}

void AbstractCompressor::decode(const at::Tensor& wire, at::Tensor out, const std::optional<at::Tensor>& index) const {
  check_rows("out", out);
  const auto width = row_bytes(out.size(1), out.scalar_type());
  TORCH_CHECK_VALUE(wire.dim() == 2 && wire.scalar_type() == at::kByte && wire.is_contiguous() && wire.size(1) == width,
                    "wire must be contiguous uint8 [rows, ", width, "] for rows of ", out.size(1), " ",
                    out.scalar_type(), " values, got ", wire.scalar_type(), " ", wire.sizes());
  TORCH_CHECK_VALUE(wire.device() == out.device(), "wire is on ", wire.device(), ", out is on ", out.device());
  if (index)
    check_index(index, out, wire.size(0));
  else
    TORCH_CHECK_VALUE(wire.size(0) == out.size(0), "wire has ", wire.size(0), " rows, out has ", out.size(0));
  decode_rows(wire, std::move(out), index);
}

CompressorRegistry& compressor_registry() {
  static CompressorRegistry registry("compressor");
  return registry;
}

}  // namespace planmoe
