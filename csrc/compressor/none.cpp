// none: the rows' own bytes.
#include <ATen/ATen.h>

#include "abstract.h"

namespace planmoe {
namespace {

class NoneCompressor final : public AbstractCompressor {
 public:
  int64_t row_bytes(int64_t hidden, at::ScalarType dtype) const override {
    return hidden * static_cast<int64_t>(c10::elementSize(dtype));
  }

  bool lossless() const override { return true; }

 protected:
  at::Tensor encode_rows(const at::Tensor& rows, const std::optional<at::Tensor>& index) const override {
    return (index ? rows.index_select(0, *index) : rows).view(at::kByte);
  }

  void decode_rows(const at::Tensor& wire, at::Tensor out, const std::optional<at::Tensor>& index) const override {
    if (wire.size(0) == 0) return;
    auto rows = wire.view(out.scalar_type());
    if (index)
      out.index_copy_(0, *index, rows);
    else
      out.copy_(rows);
  }
};

PLANMOE_REGISTER_COMPRESSOR("none", NoneCompressor);

}  // namespace
}  // namespace planmoe
