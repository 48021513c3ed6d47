// bf16: two bytes per value, for float32 and bfloat16 rows: 16 bits per value, relative error 2^-9 at most per value.
//
// Wire row: H bfloat16 numbers (little-endian), rounded to nearest even. NaN stay NaN (the quiet bit is set), infinities
// stay infinite, float32 values beyond bfloat16's largest become infinite. float16 rows are refused: they would lose
// precision and save nothing.
#include "rows/bf16.h"

#include <ATen/core/Tensor.h>

#include "abstract.h"

namespace planmoe {
namespace {

class Bf16Compressor final : public RowCodec {
 public:
  int64_t row_bytes(int64_t hidden, at::ScalarType /*dtype*/) const override { return bf16::row_bytes(hidden); }
  bool lossless() const override { return false; }
  std::string device_kernels() const override { return "bf16"; }

  void check_dtype(at::ScalarType dtype) const override {
    TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16, "bf16 takes float32 or bfloat16 rows, got ", dtype,
                      ": use 'none', which is as small for 16-bit rows");
  }

  void encode_row(const float* values, int64_t hidden, at::ScalarType /*dtype*/, uint8_t* wire) const override {
    bf16::encode(values, hidden, wire);
  }
  void decode_row(const uint8_t* wire, int64_t hidden, at::ScalarType /*dtype*/, float* values) const override {
    bf16::decode(wire, hidden, values);
  }

 protected:
  at::Tensor encode_on_device(const at::Tensor& rows, at::ScalarType /*dtype*/) const override {
    return rows.to(at::kBFloat16).view(at::kByte);
  }
  at::Tensor decode_on_device(const at::Tensor& wire, int64_t /*hidden*/, at::ScalarType /*dtype*/) const override {
    return wire.view(at::kBFloat16).to(at::kFloat);
  }
};

PLANMOE_REGISTER_COMPRESSOR("bf16", Bf16Compressor);

}  // namespace
}  // namespace planmoe
