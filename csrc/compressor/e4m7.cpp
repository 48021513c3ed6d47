// e4m7 and lossless: bfloat16 numbers with four bits for most exponents, 12.5 bits per value where rows are filled up to
// blocks of 128, 1.28 times smaller than bfloat16.
//
// Wire row, B = ceil(H / 128) blocks, block b the values [128 b, min(H, 128 b + 128)):
//   H bytes: sign (bit 7) and the seven fraction bits of each value;
//   ceil(H / 2) bytes: codes; those of block b, of n values, begin at byte 64 b; with h = ceil(n / 2) byte j holds the
//     codes of values j (low four bits) and j + h (high four bits; 0 where there is no such value);
//   8 B bytes, eight for each block: its base exponent, and a pool of seven: the exponent fields of the block's values
//     with code 15, in order, then zeros.
// Codes 0 to 13: exponent field = base - code; 14: exponent field 0 (zeros, subnormals); 15: the next of the pool.
// A block fits when a base leaves no more than seven values with code 15. Encoders may choose any base; this one takes
// the largest finite exponent, or the one with the fewest escapes where that leaves more than seven.
//
// Blocks that fit come back bit for bit (a NaN as some NaN). In one that does not,
//   e4m7 takes the largest exponent for base and turns what lies below the codes' reach into the nearest of 0 and
//     2^-13 times the base's power of two: an error of 2^-14 of the block's largest value at most. A block that holds
//     something that is not finite comes back as NaN.
//   lossless refuses: no fixed size below 16 bits holds every row. The block comes back as NaN, and the codec notes it
//     (see AbstractCompressor::take_refused): ranks that hear of it send raw rows.
// Sums in float32 are rounded to bfloat16 first, as they are without a codec.
#include "rows/e4m7.h"

#include <ATen/core/Tensor.h>

#include <atomic>
#include <vector>

#include "../kernels/device.h"
#include "../kernels/parallel.h"
#include "abstract.h"

namespace planmoe {
namespace {

class E4M7Compressor : public RowCodec {
 public:
  int64_t row_bytes(int64_t hidden, at::ScalarType /*dtype*/) const final { return e4m7::row_bytes(hidden); }
  bool lossless() const override { return false; }
  std::string device_kernels() const override { return "e4m7"; }

  void check_dtype(at::ScalarType dtype) const final {
    TORCH_CHECK_VALUE(dtype == at::kBFloat16, name(), " takes bfloat16 rows, got ", dtype,
                      ": train in bfloat16 or use another codec");
  }

  void encode_row(const float* values, int64_t hidden, at::ScalarType /*dtype*/, uint8_t* wire) const override {
    e4m7::encode(values, hidden, wire);
  }
  void decode_row(const uint8_t* wire, int64_t hidden, at::ScalarType /*dtype*/, float* values) const final {
    TORCH_CHECK_VALUE(e4m7::decode(wire, hidden, values), name(),
                      ": the wire is corrupt, it asks for more exponents than it carries");
  }

 protected:
  virtual const char* name() const { return "e4m7"; }
};

class LosslessCompressor final : public E4M7Compressor {
 public:
  bool lossless() const override { return true; }
  std::string device_kernels() const override { return "lossless"; }

  at::Tensor misfits(const at::Tensor& rows) const override {
    check_dtype(rows.scalar_type());
    auto found = rows.new_zeros({1}, at::kInt);
    if (const auto* kernels = planmoe::device_kernels(rows)) {
      kernels->find_misfits(rows.contiguous(), found);
      return found;
    }
    const auto on_host = rows.cpu().contiguous();
    const auto hidden = rows.size(1);
    const auto* values = on_host.const_data_ptr<at::BFloat16>();
    std::atomic<int32_t> any{0};
    for_each_row(rows.size(0), hidden, [&](int64_t row) {
      thread_local std::vector<float> wide;
      thread_local std::vector<uint8_t> wire;
      wide.resize(hidden);
      wire.resize(e4m7::row_bytes(hidden));
      for (int64_t h = 0; h < hidden; ++h) wide[h] = values[row * hidden + h];
      if (!e4m7::encode(wide.data(), hidden, wire.data())) any = 1;
    });
    return found.fill_(any.load());
  }

  Refusals* refusals() const override { return &refusals_; }

  void encode_row(const float* values, int64_t hidden, at::ScalarType /*dtype*/, uint8_t* wire) const override {
    if (!e4m7::encode(values, hidden, wire, widest_vectors(), e4m7::Misfits::kNaN)) refusals_.add();
  }

 protected:
  const char* name() const override { return "lossless"; }

 private:
  mutable Refusals refusals_;
};

PLANMOE_REGISTER_COMPRESSOR("e4m7", E4M7Compressor);
PLANMOE_REGISTER_COMPRESSOR("lossless", LosslessCompressor);

}  // namespace
}  // namespace planmoe
