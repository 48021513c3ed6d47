// zfp: fixed-rate zfp, 8 bits per value unless told otherwise (`zfp:4`, `zfp:16`, `zfp:10.5`): error about 1.6 % (36 dB)
// at rate 8 on normal data, 4 dB better or worse per half bit.
//
// Wire row: the stream of libzfp for the row as a 2-d array (width 4, height H / 4), as zfp/ writes it: ceil(H / 16)
// blocks of floor(16 rate + 0.5) bits, the whole rounded up to 8 bytes. Where H is no multiple of 4, the last value is
// repeated up to the next one; partial blocks are padded by zfp's own rule. A block of 16 with a NaN or an infinity
// comes back as NaN, one below 2^-98 as zeros. float32 values near the type's largest may come back infinite.
#include "planmoe_zfp/zfp.h"

#include <ATen/core/IListRef_inl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <charconv>
#include <string>
#include <vector>

#include "../kernels/device.h"
#include "abstract.h"

namespace planmoe {
namespace {

constexpr double kLeastRate = 1.0;

double parse_rate(const std::string& text) {
  if (text.empty()) return 8.0;
  double rate = 0.0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), rate);
  TORCH_CHECK_VALUE(
      error == std::errc() && end == text.data() + text.size() && rate >= kLeastRate && rate <= zfp::kMaxRate,
      "the rate of zfp is '", text, "', expected a number from ", kLeastRate, " to ", zfp::kMaxRate,
      " (bits per value), as in 'zfp:8'");
  return rate;
}

class ZfpCompressor final : public RowCodec {
 public:
  explicit ZfpCompressor(const std::string& rate) { options_.rate = parse_rate(rate); }

  int64_t row_bytes(int64_t hidden, at::ScalarType /*dtype*/) const override {
    size_t bytes = 0;
    check(zfp::row_bytes(padded(hidden), options_.rate, bytes));
    return static_cast<int64_t>(bytes);
  }
  bool lossless() const override { return false; }

  void encode_row(const float* values, int64_t hidden, at::ScalarType dtype, uint8_t* wire) const override {
    const int64_t width = padded(hidden);
    if (width != hidden) {
      auto* row = scratch(width);
      std::copy(values, values + hidden, row);
      std::fill(row + hidden, row + width, values[hidden - 1]);
      values = row;
    }
    check(zfp::encode_rows(one_row(width), options_, values, wire, row_bytes(hidden, dtype)));
  }

  void decode_row(const uint8_t* wire, int64_t hidden, at::ScalarType dtype, float* values) const override {
    const int64_t width = padded(hidden);
    float* row = width == hidden ? values : scratch(width);
    check(zfp::decode_rows(one_row(width), options_, wire, row_bytes(hidden, dtype), row));
    if (row != values) std::copy(row, row + hidden, values);
  }

  void encode_tensor_into(const at::Tensor& rows, at::ScalarType dtype, const at::Tensor& wire) const override {
    const auto* kernels = planmoe::device_kernels(rows);
    if (kernels == nullptr || !wire.is_contiguous()) return RowCodec::encode_tensor_into(rows, dtype, wire);
    kernels->encode_zfp(with_padding(rows), options_.rate, wire);
  }

  void decode_tensor_into(const at::Tensor& wire, const at::Tensor& out) const override {
    const auto* kernels = planmoe::device_kernels(wire);
    if (kernels == nullptr || !out.is_contiguous() || padded(out.size(1)) != out.size(1))
      return RowCodec::decode_tensor_into(wire, out);
    kernels->decode_zfp(wire, options_.rate, out);
  }

 protected:
  at::Tensor encode_on_device(const at::Tensor& rows, at::ScalarType dtype) const override {
    const auto* kernels = planmoe::device_kernels(rows);
    if (kernels == nullptr) return RowCodec::encode_on_device(rows, dtype);
    auto wire = at::empty({rows.size(0), row_bytes(rows.size(1), dtype)}, rows.options().dtype(at::kByte));
    kernels->encode_zfp(with_padding(rows), options_.rate, wire);
    return wire;
  }

  at::Tensor decode_on_device(const at::Tensor& wire, int64_t hidden, at::ScalarType dtype) const override {
    const auto* kernels = planmoe::device_kernels(wire);
    if (kernels == nullptr) return RowCodec::decode_on_device(wire, hidden, dtype);
    auto rows = at::empty({wire.size(0), padded(hidden)}, wire.options().dtype(dtype));
    kernels->decode_zfp(wire, options_.rate, rows);
    return padded(hidden) == hidden ? rows : rows.narrow(1, 0, hidden).contiguous();
  }

 private:
  static int64_t padded(int64_t hidden) { return (hidden + 3) / 4 * 4; }
  // The last value repeated up to a multiple of four.
  static at::Tensor with_padding(const at::Tensor& rows) {
    const int64_t hidden = rows.size(1), missing = padded(hidden) - hidden;
    if (missing == 0) return rows;
    return at::cat({rows, rows.narrow(1, hidden - 1, 1).expand({rows.size(0), missing})}, 1);
  }
  static zfp::Rows one_row(int64_t width) { return {1, static_cast<size_t>(width), zfp::DataType::kFloat32}; }

  static float* scratch(int64_t width) {
    thread_local std::vector<float> row;
    row.resize(width);
    return row.data();
  }

  static void check(zfp::Status status) {
    TORCH_CHECK_VALUE(status == zfp::Status::kOk, "zfp: ", zfp::describe(status));
  }

  zfp::Options options_;
};

PLANMOE_REGISTER_COMPRESSOR_WITH_SETTING("zfp", ZfpCompressor);

}  // namespace
}  // namespace planmoe
