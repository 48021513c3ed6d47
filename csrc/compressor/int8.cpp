// int8: one byte per value, one float32 scale (largest magnitude / 127) per 128 values: 8.25 bits per value.
// Wire row: H bytes of codes padded to a multiple of 4, then ceil(H / 128) scales.
// A block with a NaN or an infinity has scale NaN, so all of it comes back as NaN.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "abstract.h"

namespace planmoe {
namespace {

constexpr int64_t kBlock = 128;  // values per scale

int64_t num_blocks(int64_t hidden) { return (hidden + kBlock - 1) / kBlock; }
int64_t code_bytes(int64_t hidden) { return (hidden + 3) / 4 * 4; }

// Returns the scale.
float encode_block(const float* values, int64_t count, int8_t* codes) {
  float largest = 0.0f;
  float poison = 0.0f;  // 0 for finite values, NaN as soon as one is not
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::abs(values[i]));
    poison += values[i] * 0.0f;
  }
  if (poison != 0.0f) {  // true for NaN
    std::memset(codes, 0, count);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = largest / 127.0f;
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float code = std::min(127.0f, std::max(-127.0f, std::nearbyint(values[i] * inverse)));
    codes[i] = static_cast<int8_t>(code);
  }
  return scale;
}

class Int8Compressor final : public RowCodec {
 public:
  int64_t row_bytes(int64_t hidden, at::ScalarType /*dtype*/) const override {
    return code_bytes(hidden) + 4 * num_blocks(hidden);
  }

  bool lossless() const override { return false; }
  std::string device_kernels() const override { return "int8"; }

  void encode_row(const float* values, int64_t hidden, at::ScalarType /*dtype*/, uint8_t* wire) const override {
    std::memset(wire + hidden, 0, code_bytes(hidden) - hidden);
    uint8_t* scales = wire + code_bytes(hidden);
    for (int64_t start = 0; start < hidden; start += kBlock, scales += 4) {
      auto* codes = reinterpret_cast<int8_t*>(wire + start);
      const float scale = encode_block(values + start, std::min(kBlock, hidden - start), codes);
      std::memcpy(scales, &scale, 4);
    }
  }

  void decode_row(const uint8_t* wire, int64_t hidden, at::ScalarType /*dtype*/, float* values) const override {
    const uint8_t* scales = wire + code_bytes(hidden);
    const auto* codes = reinterpret_cast<const int8_t*>(wire);
    for (int64_t start = 0; start < hidden; start += kBlock, scales += 4) {
      float scale;
      std::memcpy(&scale, scales, 4);
      const int64_t end = std::min(start + kBlock, hidden);
      for (int64_t i = start; i < end; ++i) values[i] = static_cast<float>(codes[i]) * scale;
    }
  }

 protected:
  at::Tensor encode_on_device(const at::Tensor& rows, at::ScalarType dtype) const override {
    const auto hidden = rows.size(1);
    const auto blocks = num_blocks(hidden);
    auto padded = at::constant_pad_nd(rows.to(at::kFloat), {0, blocks * kBlock - hidden});
    padded = padded.view({rows.size(0), blocks, kBlock});
    auto finite = at::isfinite(padded).all(-1, /*keepdim=*/true);
    auto scale = padded.abs().amax(-1, /*keepdim=*/true) / 127.0f;
    auto inverse = at::where(scale > 0, scale.reciprocal(), at::zeros_like(scale));
    auto codes = at::round(at::nan_to_num(padded * inverse)).clamp(-127, 127).to(at::kChar);
    scale = at::where(finite, scale, at::full_like(scale, std::numeric_limits<float>::quiet_NaN()));
    auto wire = at::zeros({rows.size(0), row_bytes(hidden, dtype)}, rows.options().dtype(at::kByte));
    wire.narrow(1, 0, hidden).copy_(codes.view({rows.size(0), blocks * kBlock}).narrow(1, 0, hidden).view(at::kByte));
    wire.narrow(1, code_bytes(hidden), 4 * blocks).copy_(scale.view({rows.size(0), blocks}).view(at::kByte));
    return wire;
  }

  at::Tensor decode_on_device(const at::Tensor& wire, int64_t hidden, at::ScalarType /*dtype*/) const override {
    const auto blocks = num_blocks(hidden);
    auto codes = wire.narrow(1, 0, hidden).contiguous().view(at::kChar).to(at::kFloat);
    auto scale = wire.narrow(1, code_bytes(hidden), 4 * blocks).contiguous().view(at::kFloat);
    return codes * scale.repeat_interleave(kBlock, 1).narrow(1, 0, hidden);
  }
};

PLANMOE_REGISTER_COMPRESSOR("int8", Int8Compressor);

}  // namespace
}  // namespace planmoe
