// Every kind of bad input gives its own status, and no bytes are written.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "check.h"
#include "planmoe_zfp/zfp_c.h"

namespace zfp = planmoe::zfp;
using zfp::Status;

namespace {

constexpr std::size_t kHuge = std::numeric_limits<std::size_t>::max();

Status size_status(const zfp::Field& field, double rate) {
  std::size_t num_bytes = 1;
  const Status status = zfp::stream_bytes(field, rate, num_bytes);
  CHECK((status == Status::kOk) == (num_bytes != 0));
  return status;
}

Status row_status(std::size_t hidden, double rate) {
  std::size_t num_bytes = 1;
  const Status status = zfp::row_bytes(hidden, rate, num_bytes);
  CHECK((status == Status::kOk) == (num_bytes != 0));
  return status;
}

void test_rate() {
  for (double rate : {0.0, -1.0, 0.53, 32.01, 1e300, std::nan(""), std::numeric_limits<double>::infinity()}) {
    CHECK(size_status({2, 8, 8}, rate) == Status::kBadRate);
    CHECK(row_status(64, rate) == Status::kBadRate);
  }
  CHECK(size_status({1, 8}, 2.12) == Status::kBadRate);
  CHECK(size_status({1, 8}, 2.125) == Status::kOk);
  CHECK(size_status({2, 8, 8}, 0.53125) == Status::kOk);
  CHECK(size_status({2, 8, 8}, 32.0) == Status::kOk);
}

void test_shape() {
  CHECK(size_status({0, 8}, 8) == Status::kBadShape);
  CHECK(size_status({3, 8, 8}, 8) == Status::kBadShape);
  CHECK(size_status({1, 8, 2}, 8) == Status::kBadShape);
  CHECK(size_status({2, kHuge, kHuge}, 8) == Status::kTooLarge);
  CHECK(size_status({2, kHuge / 2, 3}, 8) == Status::kTooLarge);
  CHECK(size_status({1, kHuge}, 8) == Status::kTooLarge);
  CHECK(row_status(0, 8) == Status::kBadShape);
  CHECK(row_status(18, 8) == Status::kBadShape);
  CHECK(row_status(kHuge / 8 * 4, 8) == Status::kTooLarge);
  float value = 0;
  CHECK(zfp::encode_rows({kHuge / 64, 128}, {}, &value, &value, 4) == Status::kTooLarge);
  CHECK(zfp::encode_rows({kHuge / 64, 100}, {}, &value, &value, 4) == Status::kTooLarge);
}

void test_options() {
  CHECK(size_status({2, 8, 8, static_cast<zfp::DataType>(3)}, 8) == Status::kBadOption);
  CHECK(size_status({2, 8, 8, static_cast<zfp::DataType>(-1)}, 8) == Status::kBadOption);
  std::vector<float> values(64);
  std::vector<unsigned char> stream(64);
  for (int number : {-1, 2, 99}) {
    zfp::Options options;
    options.rounding = static_cast<zfp::Rounding>(number);
    CHECK(zfp::decode({2, 8, 8}, options, stream.data(), 64, values.data()) == Status::kBadOption);
  }
  for (int number : {-1, 4, 99}) {
    zfp::Options options;
    options.kernel = static_cast<zfp::Kernel>(number);
    CHECK(zfp::encode({2, 8, 8}, options, values.data(), stream.data(), 64) == Status::kBadOption);
  }
  for (zfp::Kernel kernel : {zfp::Kernel::kAvx2, zfp::Kernel::kAvx512}) {
    zfp::Options options;
    options.kernel = kernel;
    const Status expected = zfp::kernel_available(kernel) ? Status::kOk : Status::kKernelUnavailable;
    CHECK(zfp::encode({2, 8, 8}, options, values.data(), stream.data(), 64) == expected);
  }
}

void test_buffers() {
  std::vector<float> values(64, 1.0f);
  std::vector<unsigned char> stream(64, 0xAA), untouched = stream;
  CHECK(zfp::encode({2, 8, 8}, {}, values.data(), stream.data(), 63) == Status::kCapacityTooSmall);
  CHECK(zfp::encode_rows({2, 32}, {}, values.data(), stream.data(), 63) == Status::kCapacityTooSmall);
  CHECK(zfp::encode({2, 8, 8}, {}, nullptr, stream.data(), 64) == Status::kNullPointer);
  CHECK(zfp::encode({2, 8, 8}, {}, values.data(), nullptr, 64) == Status::kNullPointer);
  CHECK(stream == untouched);
  CHECK(zfp::decode({2, 8, 8}, {}, nullptr, 64, values.data()) == Status::kNullPointer);
  CHECK(zfp::decode({2, 8, 8}, {}, stream.data(), 64, nullptr) == Status::kNullPointer);
  for (std::size_t size : {std::size_t{0}, std::size_t{63}, std::size_t{65}, kHuge}) {
    CHECK(zfp::decode({2, 8, 8}, {}, stream.data(), size, values.data()) == Status::kStreamSizeMismatch);
    CHECK(zfp::decode_rows({2, 32}, {}, stream.data(), size, values.data()) == Status::kStreamSizeMismatch);
  }
  for (float value : values) CHECK(value == 1.0f);
}

// 40 blocks of 9 bytes (72 bits) and, as 5 blocks fill no whole word, unused bits at the end of some streams.
void test_corrupt(zfp::Kernel kernel) {
  zfp::Options options;
  options.rate = 4.5;
  options.kernel = kernel;
  for (std::size_t num_blocks : {1, 5, 16, 37, 40}) {
    const zfp::Field field{2, 4, 4 * num_blocks};
    std::vector<float> values(16 * num_blocks, 1.0f), decoded(16 * num_blocks);
    for (std::size_t i = 0; i < 16; ++i) values[values.size() - 1 - i] = 0;  // the last block is zero
    std::size_t num_bytes = 0;
    CHECK(zfp::stream_bytes(field, options.rate, num_bytes) == Status::kOk);
    std::vector<unsigned char> stream(num_bytes);
    CHECK(zfp::encode(field, options, values.data(), stream.data(), num_bytes) == Status::kOk);
    const auto decode = [&] { return zfp::decode(field, options, stream.data(), num_bytes, decoded.data()); };
    CHECK(decode() == Status::kOk);
    for (std::size_t bit = 72 * (num_blocks - 1) + 1; bit < 8 * num_bytes; ++bit) {
      stream[bit / 8] = static_cast<unsigned char>(stream[bit / 8] ^ (1u << bit % 8));
      CHECK(decode() == Status::kStreamCorrupt);  // a zero block, or the padding after it, with a bit set
      stream[bit / 8] = static_cast<unsigned char>(stream[bit / 8] ^ (1u << bit % 8));
    }
    stream[9 * (num_blocks - 1)] = 1;  // the escape: well formed
    CHECK(decode() == Status::kOk && std::isnan(decoded.back()));
    stream[9 * (num_blocks - 1) + 8] = 0x80;  // an escape with a bit set after it
    CHECK(decode() == Status::kStreamCorrupt);
  }
}

void test_c_interface() {
  const planmoe_zfp_field field{2, 0, 8, 8};
  const planmoe_zfp_options options{8.0, 1, 0};
  std::vector<float> values(64, 1.0f);
  std::vector<unsigned char> stream(64);
  CHECK(planmoe_zfp_encode(nullptr, &options, values.data(), stream.data(), 64) == 6);
  CHECK(planmoe_zfp_decode(&field, nullptr, stream.data(), 64, values.data()) == 6);
  CHECK(planmoe_zfp_encode_rows(nullptr, &options, values.data(), stream.data(), 64) == 6);
  CHECK(planmoe_zfp_decode_rows(nullptr, &options, stream.data(), 64, values.data()) == 6);
  CHECK(planmoe_zfp_stream_bytes(&field, 8.0, nullptr) == 6);
  CHECK(planmoe_zfp_row_bytes(64, 8.0, nullptr) == 6);
  CHECK(planmoe_zfp_kernel_available(-1) == 0 && planmoe_zfp_kernel_available(4) == 0);
  CHECK(planmoe_zfp_encode(&field, &options, values.data(), stream.data(), 64) == 0);
  CHECK(planmoe_zfp_decode(&field, &options, stream.data(), 64, values.data()) == 0);
}

void test_sentences() {
  std::vector<std::string> seen;
  for (int status = 0; status <= 11; ++status) {
    const std::string sentence = planmoe_zfp_describe(status);
    CHECK(sentence.size() > 5 && sentence != planmoe_zfp_describe(12));
    for (const std::string& other : seen) CHECK(sentence != other);
    seen.push_back(sentence);
  }
}

}  // namespace

int main() {
  test_rate();
  test_shape();
  test_options();
  test_buffers();
  for (zfp::Kernel kernel : check::kernels()) test_corrupt(kernel);
  test_c_interface();
  test_sentences();
  return check::exit_code();
}
