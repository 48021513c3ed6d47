// fp8: one e4m3 byte per value, one float32 scale per 128 values: 8.25 bits per value, error about 2.6 % (31.8 dB) on
// normal data, much the same relative to each value within 2^-14 of its block's largest.
//
// Wire row: H bytes of codes padded with zeros to a multiple of 4, then ceil(H / 128) float32 scales (little-endian).
// Block b is the values [128 b, min(H, 128 b + 128)). With L the largest magnitude of the block:
//   L infinite or NaN anywhere: scale NaN, codes 0: the whole block comes back as NaN;
//   L < 2^-100: scale 0, codes 0 (with the values' signs): zeros;
//   else scale = L / 448, inverse = 1 / scale, both rounded to float32, code = e4m3(value * inverse): e4m3 is the
//   OCP format (bias 7, no infinities, 0x7F and 0xFF NaN, largest 448 = 0x7E), rounded to nearest even with subnormals,
//   saturating at 448.
// value = e4m3 number * scale.
#include "rows/fp8.h"

#include <ATen/core/Tensor.h>

#include "abstract.h"

namespace planmoe {
namespace {

class Fp8Compressor final : public RowCodec {
 public:
  int64_t row_bytes(int64_t hidden, at::ScalarType /*dtype*/) const override { return fp8::row_bytes(hidden); }
  bool lossless() const override { return false; }
  std::string device_kernels() const override { return "fp8"; }

  void encode_row(const float* values, int64_t hidden, at::ScalarType /*dtype*/, uint8_t* wire) const override {
    fp8::encode(values, hidden, wire);
  }
  void decode_row(const uint8_t* wire, int64_t hidden, at::ScalarType /*dtype*/, float* values) const override {
    fp8::decode(wire, hidden, values);
  }
};

PLANMOE_REGISTER_COMPRESSOR("fp8", Fp8Compressor);

}  // namespace
}  // namespace planmoe
