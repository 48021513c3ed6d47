// int4: a Hadamard transform over 128 values makes them nearly normal, then the best 16 levels for the normal
// distribution: 4.125 bits per value, error about 9.7 % (20.3 dB) whatever the data.
//
// B = ceil(H / 128) blocks; values beyond H are zeros in the last one, and all its 128 coefficients travel.
// Wire row: 64 B bytes of codes, then B bfloat16 scales (little-endian): 66 B bytes. Byte j of a block holds the codes
// of coefficients j (low four bits) and j + 64 (high four bits).
// With L the largest magnitude of a block:
//   L infinite or NaN anywhere: scale NaN (0x7FC0), codes 0: the whole block comes back as NaN;
//   L < 2^-100: scale 0, codes 0: zeros;
//   else, with e and the coefficients c as in hadamard_int8.cpp:
//     r = sqrt(mean of c^2) rounded to bfloat16, z = c * (1 / r) in float32;
//     code = (z < 0 ? 8 : 0) + number of thresholds below |z|;
//     scale = r / 128 * 2^e (exact).
// x[i] = d[i] * (W level(code))[i] * scale. Levels and thresholds: kLevel, kThreshold in rows/int4.h; code 8 + n is
// -kLevel[n].
#include "rows/int4.h"

#include <ATen/core/Tensor.h>

#include "abstract.h"

namespace planmoe {
namespace {

class Int4Compressor final : public RowCodec {
 public:
  int64_t row_bytes(int64_t hidden, at::ScalarType /*dtype*/) const override { return int4::row_bytes(hidden); }
  bool lossless() const override { return false; }
  std::string device_kernels() const override { return "int4"; }

  void encode_row(const float* values, int64_t hidden, at::ScalarType /*dtype*/, uint8_t* wire) const override {
    int4::encode(values, hidden, wire);
  }
  void decode_row(const uint8_t* wire, int64_t hidden, at::ScalarType /*dtype*/, float* values) const override {
    int4::decode(wire, hidden, values);
  }
};

PLANMOE_REGISTER_COMPRESSOR("int4", Int4Compressor);

}  // namespace
}  // namespace planmoe
