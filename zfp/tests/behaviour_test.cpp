// What the header promises beyond the zfp format: escapes, tiny blocks, 16-bit types, rows, the float environment.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include "check.h"

namespace zfp = planmoe::zfp;

namespace {

template <class Value>
std::vector<unsigned char> encode(const zfp::Field& field, const zfp::Options& options,
                                  const std::vector<Value>& values) {
  std::size_t num_bytes = 0;
  CHECK(zfp::stream_bytes(field, options.rate, num_bytes) == zfp::Status::kOk);
  std::vector<unsigned char> stream(num_bytes);
  CHECK(zfp::encode(field, options, values.data(), stream.data(), num_bytes) == zfp::Status::kOk);
  return stream;
}

template <class Value>
std::vector<Value> round_trip(const zfp::Field& field, const zfp::Options& options, const std::vector<Value>& values) {
  const std::vector<unsigned char> stream = encode(field, options, values);
  std::vector<Value> decoded(values.size());
  CHECK(zfp::decode(field, options, stream.data(), stream.size(), decoded.data()) == zfp::Status::kOk);
  return decoded;
}

zfp::Options options_for(zfp::Kernel kernel, double rate) {
  zfp::Options options;
  options.kernel = kernel;
  options.rate = rate;
  return options;
}

// 40 blocks of one row each; block 7 holds `odd` in one place, the others normal values.
std::vector<float> with_odd_block(float odd, check::Random& random) {
  std::vector<float> values(40 * 16);
  for (float& value : values) value = random.normal();
  values[7 * 16 + random.below(16)] = odd;
  return values;
}

void test_non_finite(zfp::Kernel kernel) {
  check::Random random(3);
  const float infinity = std::numeric_limits<float>::infinity();
  for (float odd : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (double rate : {0.5625, 2.0, 8.0, 32.0}) {
      const auto decoded = round_trip({2, 4, 160}, options_for(kernel, rate), with_odd_block(odd, random));
      for (std::size_t i = 0; i < decoded.size(); ++i) CHECK(std::isnan(decoded[i]) == (i / 16 == 7));
    }
  }
}

void test_tiny(zfp::Kernel kernel) {
  check::Random random(4);
  const float limit = std::ldexp(1.0f, -98);
  for (float magnitude : {std::nextafter(limit, 0.0f), limit, std::numeric_limits<float>::denorm_min(), 0.0f}) {
    std::vector<float> values = with_odd_block(0, random);
    for (int i = 0; i < 16; ++i) values[7 * 16 + i] = random.below(2) == 0 ? magnitude : -magnitude;
    const auto decoded = round_trip({2, 4, 160}, options_for(kernel, 16), values);
    for (int i = 0; i < 16; ++i) {
      const float expected = magnitude < limit ? 0.0f : values[7 * 16 + i];
      CHECK(std::fabs(decoded[7 * 16 + i] - expected) <= magnitude * 0.01f);
      CHECK(magnitude >= limit || !std::signbit(decoded[7 * 16 + i]));
    }
  }
}

// Smallest blocks: no bits for planes; they decode to zeros, whatever the rounding.
void test_exponent_only(zfp::Kernel kernel) {
  check::Random random(5);
  const auto decoded = round_trip({2, 4, 160}, options_for(kernel, 9.0 / 16), with_odd_block(1, random));
  for (float value : decoded) CHECK(value == 0);
}

// A 16-bit stream is that of the widened values, and finite values stay finite at a rate that errs.
void test_halves(zfp::Kernel kernel) {
  check::Random random(6);
  const std::size_t count = 640;
  std::vector<std::uint16_t> brain(count), half(count);
  std::vector<float> brain_wide(count), half_wide(count);
  for (std::size_t i = 0; i < count; ++i) {
    brain[i] = static_cast<std::uint16_t>((random.next() & 0x80FF) | 0x7E00);  // up to the largest finite bfloat16
    const std::uint32_t bits = static_cast<std::uint32_t>(brain[i]) << 16;
    if (bits << 1 >= 0xFF000000u) brain[i] = 0x7F7F;
    const std::uint32_t finite = static_cast<std::uint32_t>(brain[i]) << 16;
    std::memcpy(&brain_wide[i], &finite, 4);
    const std::uint32_t mantissa = random.next() & 0x3FF;
    half[i] = static_cast<std::uint16_t>((random.next() & 0x8000) | 0x7800 | mantissa);  // 32768 .. 65504
    half_wide[i] = static_cast<float>(1024 + mantissa) * ((half[i] & 0x8000) != 0 ? -32.0f : 32.0f);
  }
  for (double rate : {3.0, 8.0}) {
    const zfp::Options options = options_for(kernel, rate);
    const zfp::Field wide{2, 4, count / 4};
    CHECK(encode({2, 4, count / 4, zfp::DataType::kBFloat16}, options, brain) == encode(wide, options, brain_wide));
    CHECK(encode({2, 4, count / 4, zfp::DataType::kFloat16}, options, half) == encode(wide, options, half_wide));
    for (std::uint16_t value : round_trip({2, 4, count / 4, zfp::DataType::kBFloat16}, options, brain)) {
      CHECK((value & 0x7F80) != 0x7F80);
    }
    for (std::uint16_t value : round_trip({2, 4, count / 4, zfp::DataType::kFloat16}, options, half)) {
      CHECK((value & 0x7C00) != 0x7C00);
    }
  }
  // At 32 bits a value nothing disturbs comes back exactly.
  std::vector<std::uint16_t> constant(16, 0x3C01);
  CHECK(round_trip({2, 4, 4, zfp::DataType::kFloat16}, options_for(kernel, 32), constant) == constant);
}

// Each row is the stream of its own (hidden / 4, 4) field, and rows decode alone.
void test_rows(zfp::Kernel kernel) {
  check::Random random(7);
  for (std::size_t hidden : {4, 16, 20, 64, 200, 1024}) {
    for (double rate : {3.0, 8.0, 12.0625}) {
      const zfp::Options options = options_for(kernel, rate);
      const zfp::Rows rows{5, hidden};
      std::vector<float> values(5 * hidden), decoded(5 * hidden), one_row(hidden), alone(hidden);
      for (float& value : values) value = random.normal();
      std::size_t row_bytes = 0;
      CHECK(zfp::row_bytes(hidden, rate, row_bytes) == zfp::Status::kOk);
      std::vector<unsigned char> stream(5 * row_bytes);
      CHECK(zfp::encode_rows(rows, options, values.data(), stream.data(), stream.size()) == zfp::Status::kOk);
      CHECK(zfp::decode_rows(rows, options, stream.data(), stream.size(), decoded.data()) == zfp::Status::kOk);
      for (std::size_t r = 0; r < 5; ++r) {
        std::copy_n(values.begin() + static_cast<std::ptrdiff_t>(r * hidden), hidden, one_row.begin());
        const auto row_stream = encode({2, 4, hidden / 4}, options, one_row);
        CHECK(row_stream.size() == row_bytes);
        CHECK(std::memcmp(row_stream.data(), stream.data() + r * row_bytes, row_bytes) == 0);
        CHECK(zfp::decode_rows({1, hidden}, options, stream.data() + r * row_bytes, row_bytes, alone.data()) ==
              zfp::Status::kOk);
        CHECK(std::memcmp(alone.data(), decoded.data() + r * hidden, 4 * hidden) == 0);
      }
    }
  }
}

// The caller's rounding mode and flushing of subnormals neither change the result nor are changed.
void test_float_environment(zfp::Kernel kernel) {
  check::Random random(8);
  std::vector<float> values(640);
  for (float& value : values) value = std::ldexp(random.normal(), -97) + std::ldexp(random.normal(), -127);
  values[0] = std::ldexp(1.0f, -127);  // subnormal beside larger ones
  const zfp::Options options = options_for(kernel, 28);
  const auto stream = encode({2, 4, 160}, options, values);
  const auto decoded = round_trip({2, 4, 160}, options, values);
  std::fesetround(FE_UPWARD);
#ifdef __SSE__
  _mm_setcsr(_mm_getcsr() | 0x8040);
  const unsigned control = _mm_getcsr();
#endif
  CHECK(encode({2, 4, 160}, options, values) == stream);
  CHECK(round_trip({2, 4, 160}, options, values) == decoded);
  CHECK(std::fegetround() == FE_UPWARD);
#ifdef __SSE__
  CHECK(_mm_getcsr() == control);
  _mm_setcsr(control & ~0x8040u);
#endif
  std::fesetround(FE_TONEAREST);
}

void test_empty() {
  std::size_t num_bytes = 1;
  CHECK(zfp::stream_bytes({2, 0, 7}, 8, num_bytes) == zfp::Status::kOk && num_bytes == 0);
  CHECK(zfp::encode({1, 0}, {}, nullptr, nullptr, 0) == zfp::Status::kOk);
  CHECK(zfp::decode({2, 5, 0}, {}, nullptr, 0, nullptr) == zfp::Status::kOk);
  CHECK(zfp::encode_rows({0, 64}, {}, nullptr, nullptr, 0) == zfp::Status::kOk);
  CHECK(zfp::decode_rows({0, 20}, {}, nullptr, 0, nullptr) == zfp::Status::kOk);
}

}  // namespace

int main() {
  test_empty();
  for (zfp::Kernel kernel : check::kernels()) {
    test_non_finite(kernel);
    test_tiny(kernel);
    test_exponent_only(kernel);
    test_halves(kernel);
    test_rows(kernel);
    test_float_environment(kernel);
  }
  return check::exit_code();
}
