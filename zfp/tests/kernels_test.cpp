// Every kernel gives the scalar kernel's bytes: all data types, shapes around the vector lengths, all block sizes.
#include <cstring>

#include "check.h"

namespace zfp = planmoe::zfp;

namespace {

constexpr zfp::DataType kTypes[] = {zfp::DataType::kFloat32, zfp::DataType::kFloat16, zfp::DataType::kBFloat16};

std::size_t value_size(zfp::DataType type) { return type == zfp::DataType::kFloat32 ? 4 : 2; }

// Values of any bit pattern, of similar size, or mostly zero.
std::vector<unsigned char> make_values(std::size_t count, zfp::DataType type, int kind, check::Random& random) {
  std::vector<unsigned char> bytes(count * value_size(type));
  for (std::size_t i = 0; i < count; ++i) {
    float value = kind == 2 && random.below(8) != 0 ? 0 : random.normal();
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == zfp::DataType::kBFloat16) bits >>= 16;
    if (type == zfp::DataType::kFloat16 && bits != 0) bits = (random.next() & 0x83FF) | 0x3800;
    if (kind == 0) bits = random.next();
    std::memcpy(bytes.data() + i * value_size(type), &bits, value_size(type));
  }
  return bytes;
}

struct Result {
  std::vector<unsigned char> stream;
  std::vector<unsigned char> decoded[2];  // by rounding
};

bool operator==(const Result& a, const Result& b) {
  return a.stream == b.stream && a.decoded[0] == b.decoded[0] && a.decoded[1] == b.decoded[1];
}

Result code(const zfp::Field& field, zfp::Options options, const std::vector<unsigned char>& values) {
  Result result;
  std::size_t num_bytes = 0;
  CHECK(zfp::stream_bytes(field, options.rate, num_bytes) == zfp::Status::kOk);
  result.stream.resize(num_bytes);
  CHECK(zfp::encode(field, options, values.data(), result.stream.data(), num_bytes) == zfp::Status::kOk);
  for (zfp::Rounding rounding : {zfp::Rounding::kNone, zfp::Rounding::kLast}) {
    options.rounding = rounding;
    auto& decoded = result.decoded[static_cast<int>(rounding)];
    decoded.resize(values.size());
    CHECK(zfp::decode(field, options, result.stream.data(), num_bytes, decoded.data()) == zfp::Status::kOk);
  }
  return result;
}

void compare_kernels(const zfp::Field& field, zfp::Options options, const std::vector<unsigned char>& values) {
  options.kernel = zfp::Kernel::kScalar;
  const Result expected = code(field, options, values);
  for (zfp::Kernel kernel : check::kernels()) {
    options.kernel = kernel;
    CHECK(code(field, options, values) == expected);
  }
}

void test_shapes() {
  check::Random random(1);
  const zfp::Field fields[] = {{1, 1},     {1, 37},     {1, 128},    {1, 131},   {1, 777},    {2, 3, 2},   {2, 4, 4},
                               {2, 4, 64}, {2, 4, 129}, {2, 4, 260}, {2, 64, 4}, {2, 131, 9}, {2, 20, 36}, {2, 1, 100}};
  for (zfp::Field field : fields) {
    for (zfp::DataType type : kTypes) {
      field.data_type = type;
      for (double rate : {2.25, 4.0, 8.0, 11.5, 24.0, 32.0}) {
        zfp::Options options;
        options.rate = rate;
        for (int kind = 0; kind < 3; ++kind) {
          compare_kernels(field, options, make_values(field.width * field.height, type, kind, random));
        }
      }
    }
  }
}

void test_block_sizes() {
  check::Random random(2);
  for (int dimensions : {1, 2}) {
    const int values_per_block = dimensions == 1 ? 4 : 16;
    const zfp::Field field{dimensions, 52, dimensions == 1 ? std::size_t{1} : 12};
    const auto values = make_values(field.width * field.height, field.data_type, 1, random);
    for (int block_bits = 9; block_bits <= 32 * values_per_block; ++block_bits) {
      zfp::Options options;
      options.rate = static_cast<double>(block_bits) / values_per_block;
      compare_kernels(field, options, values);
    }
  }
}

// All 65536 values of both 16-bit types, in blocks of one value each, at a rate that keeps them exactly.
void test_every_half() {
  for (zfp::DataType type : {zfp::DataType::kFloat16, zfp::DataType::kBFloat16}) {
    std::vector<unsigned char> values(4 * 65536 * 2);
    for (std::uint32_t i = 0; i < 4 * 65536; ++i) {
      const std::uint16_t half = static_cast<std::uint16_t>(i / 4);
      std::memcpy(values.data() + 2 * i, &half, 2);
    }
    zfp::Options options;
    options.rate = 32;
    compare_kernels({1, 4 * 65536, 1, type}, options, values);
  }
}

}  // namespace

int main() {
  test_shapes();
  test_block_sizes();
  test_every_half();
  std::printf("%zu kernels\n", check::kernels().size());
  return check::exit_code();
}
