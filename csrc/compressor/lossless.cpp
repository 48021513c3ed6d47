// lossless: bfloat16 rows bit for bit (a NaN as some NaN), with four bits for most exponents: about 12.27 bits per value, 1.30 times smaller.
//
// No fixed size below 16 bits holds every row, so `fits` says beforehand whether all of a tensor's rows can be carried;
// a row that does not fit is refused, never changed. The engine asks for tokens on their way to the experts, tells the
// group with the counts, and all of it sends raw rows in that layer call if any rank must (see planmoe_ds/layer.py).
//
// Wire row, B = ceil(H / 128) blocks, block b the values [128 b, min(H, 128 b + 128)):
//   H bytes: sign (bit 7) and the seven fraction bits of each value;
//   ceil(H / 2) bytes: codes; those of block b, of n values, begin at byte 64 b; with h = ceil(n / 2) byte j holds the
//     codes of values j (low four bits) and j + h (high four bits; 0 where there is no such value);
//   B bytes: the block's base exponent;
//   3 B + 2 bytes: the pool, the exponent fields of all values with code 15, in order, then zeros.
// Codes 0 to 13: exponent field = base - code; 14: exponent field 0 (zeros, subnormals); 15: the next of the pool.
// A row fits when it needs no more than 3 B + 2 of the pool. Encoders may choose any base; this one takes the largest
// finite exponent, or the one with the fewest escapes where that leaves more than one.
#include "rows/lossless.h"

#include <ATen/ATen.h>

#include <atomic>
#include <vector>

#include "../kernels/device.h"
#include "../kernels/parallel.h"
#include "abstract.h"

namespace planmoe {
namespace {

class LosslessCompressor final : public RowCodec {
 public:
  int64_t row_bytes(int64_t hidden, at::ScalarType /*dtype*/) const override { return lossless::row_bytes(hidden); }
  bool lossless() const override { return true; }
  bool may_refuse() const override { return true; }
  std::string device_kernels() const override { return "lossless"; }

  void check_dtype(at::ScalarType dtype) const override {
    TORCH_CHECK_VALUE(dtype == at::kBFloat16, "lossless takes bfloat16 rows, got ", dtype,
                      ": train in bfloat16 or use another codec");
  }

  bool fits(const at::Tensor& rows) const override {
    check_dtype(rows.scalar_type());
    if (const auto* kernels = planmoe::device_kernels(rows)) return kernels->fits_lossless(rows.contiguous());
    const auto on_host = rows.cpu().contiguous();
    const auto hidden = rows.size(1);
    const auto* values = on_host.const_data_ptr<at::BFloat16>();
    std::atomic<bool> all{true};
    for_each_row(rows.size(0), hidden, [&](int64_t row) {
      thread_local std::vector<float> wide;
      thread_local std::vector<uint8_t> wire;
      wide.resize(hidden);
      wire.resize(lossless::row_bytes(hidden));
      for (int64_t h = 0; h < hidden; ++h) wide[h] = values[row * hidden + h];
      if (!lossless::encode(wide.data(), hidden, wire.data())) all = false;
    });
    return all;
  }

  void encode_row(const float* values, int64_t hidden, at::ScalarType /*dtype*/, uint8_t* wire) const override {
    TORCH_CHECK_VALUE(lossless::encode(values, hidden, wire),
                      "lossless: the exponents of a row are too far apart for its fixed size; ask fits() before and "
                      "send such rows with 'none'");
  }
  void decode_row(const uint8_t* wire, int64_t hidden, at::ScalarType /*dtype*/, float* values) const override {
    TORCH_CHECK_VALUE(lossless::decode(wire, hidden, values),
                      "lossless: the wire is corrupt, it asks for more exponents than it carries");
  }
};

PLANMOE_REGISTER_COMPRESSOR("lossless", LosslessCompressor);

}  // namespace
}  // namespace planmoe
