#include "abstract.h"

#include <ATen/core/Tensor.h>

#include "../kernels/wire_rows.h"

namespace planmoe {
namespace {

void check_rows(const char* name, const at::Tensor& rows) {
  TORCH_CHECK_VALUE(rows.dim() == 2, name, " must be 2-d [rows, hidden], got ", rows.dim(), "-d");
  TORCH_CHECK_VALUE(rows.is_contiguous(), name, " must be contiguous, got strides ", rows.strides());
  TORCH_CHECK_VALUE(at::isFloatingType(rows.scalar_type()), name, " must be floating point, got ", rows.scalar_type());
}

void check_index(const at::Tensor& index, const at::Tensor& rows) {
  TORCH_CHECK_VALUE(index.scalar_type() == at::kLong && index.dim() == 1 && index.is_contiguous(),
                    "index must be a contiguous 1-d int64 tensor");
  TORCH_CHECK_VALUE(index.device() == rows.device(), "index is on ", index.device(), ", rows are on ", rows.device());
  if (index.device().is_cpu() && index.numel() > 0) {
    auto [lowest, highest] = index.aminmax();
    TORCH_CHECK_VALUE(lowest.item<int64_t>() >= 0 && highest.item<int64_t>() < rows.size(0), "index values lie in [",
                      lowest.item<int64_t>(), ", ", highest.item<int64_t>(), "], there are ", rows.size(0), " rows");
  }
}

void check_wire(const at::Tensor& wire, int64_t num_rows, int64_t width, const at::Tensor& rows) {
  TORCH_CHECK_VALUE(wire.dim() == 2 && wire.scalar_type() == at::kByte && wire.stride(1) == 1 && wire.size(1) >= width,
                    "wire must be uint8 [rows, ", width, " or more], each row contiguous, for rows of ", rows.size(1),
                    " ", rows.scalar_type(), " values, got ", wire.scalar_type(), " ", wire.sizes(), " with strides ",
                    wire.strides());
  TORCH_CHECK_VALUE(wire.device() == rows.device(), "wire is on ", wire.device(), ", rows are on ", rows.device());
  TORCH_CHECK_VALUE(wire.size(0) == num_rows, "wire has ", wire.size(0), " rows, expected ", num_rows);
}

}  // namespace

void AbstractCompressor::check_dtype(at::ScalarType dtype) const {
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                    "this compressor takes float32, float16 or bfloat16 rows, got ", dtype);
}

at::Tensor AbstractCompressor::misfits(const at::Tensor& rows) const { return rows.new_zeros({1}, at::kInt); }

at::Tensor AbstractCompressor::encode(const at::Tensor& rows, const std::optional<at::Tensor>& index) const {
  check_rows("rows", rows);
  const auto num_rows = index ? index->numel() : rows.size(0);
  auto wire = rows.new_empty({num_rows, row_bytes(rows.size(1), rows.scalar_type())}, at::kByte);
  encode_into(rows, index, wire);
  return wire;
}

void AbstractCompressor::encode_into(const at::Tensor& rows, const std::optional<at::Tensor>& index,
                                     at::Tensor wire) const {
  check_rows("rows", rows);
  check_dtype(rows.scalar_type());
  if (index) check_index(*index, rows);
  check_wire(wire, index ? index->size(0) : rows.size(0), row_bytes(rows.size(1), rows.scalar_type()), rows);
  pack(*this, rows, index, rows.scalar_type(), std::move(wire));
}

void AbstractCompressor::decode(const at::Tensor& wire, at::Tensor out, const std::optional<at::Tensor>& index) const {
  check_rows("out", out);
  check_dtype(out.scalar_type());
  if (index) check_index(*index, out);
  check_wire(wire, index ? index->size(0) : out.size(0), row_bytes(out.size(1), out.scalar_type()), out);
  unpack(*this, wire, out, index);
}

void AbstractCompressor::encode_tensor_into(const at::Tensor& rows, at::ScalarType dtype,
                                            const at::Tensor& wire) const {
  wire.copy_(encode_tensor(rows, dtype));
}

void AbstractCompressor::decode_tensor_into(const at::Tensor& wire, const at::Tensor& out) const {
  out.copy_(decode_tensor(wire, out.size(1), out.scalar_type()));
}

at::Tensor RowCodec::encode_tensor(const at::Tensor& rows, at::ScalarType dtype) const {
  if (!rows.device().is_cpu()) return encode_on_device(rows, dtype);
  auto wire = rows.new_empty({rows.size(0), row_bytes(rows.size(1), dtype)}, at::kByte);
  pack(*this, rows, std::nullopt, dtype, wire);
  return wire;
}

at::Tensor RowCodec::decode_tensor(const at::Tensor& wire, int64_t hidden, at::ScalarType dtype) const {
  if (!wire.device().is_cpu()) return decode_on_device(wire, hidden, dtype);
  auto rows = wire.new_empty({wire.size(0), hidden}, dtype);
  unpack(*this, wire, rows, std::nullopt);
  return rows;
}

at::Tensor RowCodec::encode_on_device(const at::Tensor& rows, at::ScalarType dtype) const {
  return encode_tensor(rows.cpu(), dtype).to(rows.device());
}

at::Tensor RowCodec::decode_on_device(const at::Tensor& wire, int64_t hidden, at::ScalarType dtype) const {
  return decode_tensor(wire.cpu(), hidden, dtype).to(wire.device());
}

CompressorRegistry& compressor_registry() {
  static CompressorRegistry registry("compressor");
  return registry;
}

std::shared_ptr<AbstractCompressor> make_compressor(const std::string& name) {
  const auto colon = name.find(':');
  if (colon == std::string::npos) return compressor_registry().create(name, "");
  const auto setting = name.substr(colon + 1);
  TORCH_CHECK_VALUE(!setting.empty(), "compressor '", name, "' lacks a setting behind the colon");
  return compressor_registry().create(name.substr(0, colon), setting);
}

void check_no_setting(const char* name, const std::string& setting) {
  TORCH_CHECK_VALUE(setting.empty(), "compressor '", name, "' takes no setting, got '", name, ":", setting, "'");
}

}  // namespace planmoe
