// Streams and decoded values against those of libzfp, from golden.bin (its format: make_golden.py).
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "check.h"

namespace zfp = planmoe::zfp;

namespace {

class File {
 public:
  explicit File(const char* path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  template <class Value>
  Value read() {
    Value value;
    std::memcpy(&value, take(sizeof(Value)), sizeof(Value));
    return value;
  }
  const char* take(std::size_t count) {
    if (bytes_.size() - position_ < count) throw std::runtime_error("golden.bin is missing or too short");
    position_ += count;
    return bytes_.data() + position_ - count;
  }

 private:
  std::vector<char> bytes_;
  std::size_t position_ = 0;
};

std::uint64_t hash_values(const std::vector<float>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  std::uint64_t hash = 0xCBF29CE484222325u;
  for (std::size_t i = 0; i < 4 * values.size(); ++i) hash = (hash ^ bytes[i]) * 0x100000001B3u;
  return hash;
}

struct Case {
  zfp::Field field;
  zfp::Options options;
  const float* values;
  std::uint64_t plain_hash, rounded_hash;
  std::vector<unsigned char> stream;
};

Case read_case(File& file, const std::vector<float>& pools, std::size_t pool_size) {
  Case golden{};
  golden.field.num_dimensions = file.read<std::int32_t>();
  golden.field.width = file.read<std::uint32_t>();
  golden.field.height = file.read<std::uint32_t>();
  golden.values = pools.data() + file.read<std::uint32_t>() * pool_size;
  golden.options.rate = file.read<double>();
  golden.plain_hash = file.read<std::uint64_t>();
  golden.rounded_hash = file.read<std::uint64_t>();
  const std::size_t num_bytes = file.read<std::uint32_t>();
  const char* stream = file.take(num_bytes);
  golden.stream.assign(stream, stream + num_bytes);
  return golden;
}

void check_case(Case& golden) {
  std::size_t num_bytes = 0;
  CHECK(zfp::stream_bytes(golden.field, golden.options.rate, num_bytes) == zfp::Status::kOk);
  CHECK(num_bytes == golden.stream.size());
  std::vector<unsigned char> stream(num_bytes, 0xAA);
  CHECK(zfp::encode(golden.field, golden.options, golden.values, stream.data(), num_bytes) == zfp::Status::kOk);
  CHECK(stream == golden.stream);
  std::vector<float> decoded(golden.field.width * golden.field.height);
  for (zfp::Rounding rounding : {zfp::Rounding::kNone, zfp::Rounding::kLast}) {
    golden.options.rounding = rounding;
    CHECK(zfp::decode(golden.field, golden.options, golden.stream.data(), num_bytes, decoded.data()) ==
          zfp::Status::kOk);
    CHECK(hash_values(decoded) == (rounding == zfp::Rounding::kNone ? golden.plain_hash : golden.rounded_hash));
  }
}

}  // namespace

int main() {
  File file(PLANMOE_ZFP_GOLDEN);
  const std::size_t num_pools = file.read<std::uint32_t>(), pool_size = file.read<std::uint32_t>();
  std::vector<float> pools(num_pools * pool_size);
  for (float& value : pools) value = file.read<float>();
  const std::size_t num_cases = file.read<std::uint32_t>();
  for (std::size_t i = 0; i < num_cases; ++i) {
    Case golden = read_case(file, pools, pool_size);
    for (zfp::Kernel kernel : check::kernels()) {
      golden.options.kernel = kernel;
      check_case(golden);
    }
  }
  std::printf("%zu cases, %zu kernels\n", num_cases, check::kernels().size());
  return check::exit_code();
}
