// none: the rows' own bytes.
#include <ATen/core/Tensor.h>

#include "abstract.h"

namespace planmoe {
namespace {

class NoneCompressor final : public AbstractCompressor {
 public:
  int64_t row_bytes(int64_t hidden, at::ScalarType dtype) const override {
    return hidden * static_cast<int64_t>(c10::elementSize(dtype));
  }

  bool lossless() const override { return true; }
  bool is_identity() const override { return true; }
  void check_dtype(at::ScalarType /*dtype*/) const override {}

  at::Tensor encode_tensor(const at::Tensor& rows, at::ScalarType dtype) const override {
    return rows.to(dtype).view(at::kByte);
  }

  at::Tensor decode_tensor(const at::Tensor& wire, int64_t /*hidden*/, at::ScalarType dtype) const override {
    return wire.view(dtype);
  }
};

PLANMOE_REGISTER_COMPRESSOR("none", NoneCompressor);

}  // namespace
}  // namespace planmoe
