// int8: one byte per value, one float32 scale (largest magnitude / 127) per 128 values: 8.25 bits per value.
// Wire row: H bytes of codes padded to a multiple of 4, then ceil(H / 128) scales.
// A block with a NaN or an infinity has scale NaN, so all of it comes back as NaN.
#include <ATen/ATen.h>

#include "../kernels/int8_cpu.h"
#include "abstract.h"

namespace planmoe {
namespace {

constexpr int64_t kBlock = kInt8Block;

int64_t num_blocks(int64_t hidden) { return (hidden + kBlock - 1) / kBlock; }
int64_t code_bytes(int64_t hidden) { return (hidden + 3) / 4 * 4; }

// Any device, with tensor operations; the CPU has a fused kernel.
at::Tensor encode_on_device(const at::Tensor& rows, int64_t width) {
  const auto hidden = rows.size(1);
  const auto blocks = num_blocks(hidden);
  auto padded = at::constant_pad_nd(rows.to(at::kFloat), {0, blocks * kBlock - hidden});
  padded = padded.view({rows.size(0), blocks, kBlock});
  auto finite = at::isfinite(padded).all(-1, /*keepdim=*/true);
  auto scale = padded.abs().amax(-1, /*keepdim=*/true) / 127.0f;
  auto inverse = at::where(scale > 0, scale.reciprocal(), at::zeros_like(scale));
  auto codes = at::round(at::nan_to_num(padded * inverse)).clamp(-127, 127).to(at::kChar);
  scale = at::where(finite, scale, at::full_like(scale, std::numeric_limits<float>::quiet_NaN()));
  auto wire = at::zeros({rows.size(0), width}, rows.options().dtype(at::kByte));
  wire.narrow(1, 0, hidden).copy_(codes.view({rows.size(0), blocks * kBlock}).narrow(1, 0, hidden).view(at::kByte));
  wire.narrow(1, code_bytes(hidden), 4 * blocks).copy_(scale.view({rows.size(0), blocks}).view(at::kByte));
  return wire;
}

at::Tensor decode_on_device(const at::Tensor& wire, int64_t hidden) {
  const auto blocks = num_blocks(hidden);
  auto codes = wire.narrow(1, 0, hidden).contiguous().view(at::kChar).to(at::kFloat);
  auto scale = wire.narrow(1, code_bytes(hidden), 4 * blocks).contiguous().view(at::kFloat);
  return codes * scale.repeat_interleave(kBlock, 1).narrow(1, 0, hidden);
}

class Int8Compressor final : public AbstractCompressor {
 public:
  int64_t row_bytes(int64_t hidden, at::ScalarType /*dtype*/) const override {
    return code_bytes(hidden) + 4 * num_blocks(hidden);
  }

  bool lossless() const override { return false; }

 protected:
  at::Tensor encode_rows(const at::Tensor& rows, const std::optional<at::Tensor>& index) const override {
    check_dtype(rows);
    const auto width = row_bytes(rows.size(1), rows.scalar_type());
    if (!rows.device().is_cpu()) return encode_on_device(index ? rows.index_select(0, *index) : rows, width);
    auto wire = at::empty({index ? index->size(0) : rows.size(0), width}, rows.options().dtype(at::kByte));
    int8_encode_cpu(rows, index, code_bytes(rows.size(1)), wire);
    return wire;
  }

  void decode_rows(const at::Tensor& wire, at::Tensor out, const std::optional<at::Tensor>& index) const override {
    check_dtype(out);
    if (wire.size(0) == 0) return;
    if (out.device().is_cpu()) return int8_decode_cpu(wire, code_bytes(out.size(1)), index, out);
    auto rows = decode_on_device(wire, out.size(1)).to(out.scalar_type());
    if (index)
      out.index_copy_(0, *index, rows);
    else
      out.copy_(rows);
  }

 private:
  static void check_dtype(const at::Tensor& rows) {
    const auto dtype = rows.scalar_type();
    TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
                      "compressor 'int8' takes float32, float16 or bfloat16 rows, got ", dtype);
  }
};

PLANMOE_REGISTER_COMPRESSOR("int8", Int8Compressor);

}  // namespace
}  // namespace planmoe
