// hadamard_int8: a Hadamard transform over 128 values spreads outliers, then int8: 8.25 bits per value, error about 0.65 %
// (43.8 dB) on normal data and no more where single channels are 100 times larger.
//
// B = ceil(H / 128) blocks; values beyond H are zeros in the last one, and all its 128 coefficients travel.
// Wire row: 128 B bytes of int8 codes, then B float32 scales (little-endian): 132 B bytes.
// With L the largest magnitude of a block:
//   L infinite or NaN anywhere: scale NaN, codes 0: the whole block comes back as NaN;
//   L < 2^-100: scale 0, codes 0: zeros;
//   else, with e = min(floor(log2 L), 126):
//     c = W (d * x * 2^-e): W[k][i] = (-1)^popcount(k & i), the Sylvester-Hadamard matrix of order 128, and
//     d[i] = (-1)^popcount(i & (i >> 1) & 0x15), signs that keep the transform of a constant block flat;
//     t = max |c| / 127, code[k] = c[k] * (1 / t), rounded to nearest even, in [-127, 127];
//     scale = t / 128 * 2^e. All in float32.
// x[i] = d[i] * (W code)[i] * scale: W W = 128, so this is the orthonormal transform and back; W code is exact.
#include "rows/hadamard_int8.h"

#include <ATen/core/Tensor.h>

#include "abstract.h"

namespace planmoe {
namespace {

class HadamardInt8Compressor final : public RowCodec {
 public:
  int64_t row_bytes(int64_t hidden, at::ScalarType /*dtype*/) const override {
    return hadamard_int8::row_bytes(hidden);
  }
  bool lossless() const override { return false; }
  std::string device_kernels() const override { return "hadamard_int8"; }

  void encode_row(const float* values, int64_t hidden, at::ScalarType /*dtype*/, uint8_t* wire) const override {
    hadamard_int8::encode(values, hidden, wire);
  }
  void decode_row(const uint8_t* wire, int64_t hidden, at::ScalarType /*dtype*/, float* values) const override {
    hadamard_int8::decode(wire, hidden, values);
  }
};

PLANMOE_REGISTER_COMPRESSOR("hadamard_int8", HadamardInt8Compressor);

}  // namespace
}  // namespace planmoe
