// The CUDA codec against the scalar kernel: streams, decoded values and corruption found, over shapes, types and rates.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "check.h"
#include "planmoe_zfp/zfp_cuda.h"

namespace zfp = planmoe::zfp;
using zfp::Status;

namespace {

constexpr int kSkip = 77;  // ctest counts the test as skipped
constexpr std::size_t kGuard = 64;

using Bytes = std::vector<unsigned char>;

void must(cudaError_t error) { CHECK(error == cudaSuccess); }

// Device memory of `size` bytes between two guards of 0xAA, `offset` bytes past an aligned address.
class DeviceBuffer {
 public:
  DeviceBuffer(std::size_t size, std::size_t offset = 0) : size_(size), offset_(kGuard + offset) {
    must(cudaMalloc(&memory_, size_ + offset_ + kGuard));
    must(cudaMemset(memory_, 0xAA, size_ + offset_ + kGuard));
  }
  DeviceBuffer(const Bytes& bytes, std::size_t offset) : DeviceBuffer(bytes.size(), offset) {
    must(cudaMemcpy(data(), bytes.data(), size_, cudaMemcpyHostToDevice));
  }
  ~DeviceBuffer() { cudaFree(memory_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  unsigned char* data() { return memory_ + offset_; }
  Bytes read() {
    Bytes all(size_ + offset_ + kGuard);
    must(cudaMemcpy(all.data(), memory_, all.size(), cudaMemcpyDeviceToHost));
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(offset_);
    const auto end = begin + static_cast<std::ptrdiff_t>(size_);
    const auto intact = [](unsigned char byte) { return byte == 0xAA; };
    CHECK(std::all_of(all.begin(), begin, intact) && std::all_of(end, all.end(), intact));
    return Bytes(begin, end);
  }

 private:
  std::size_t size_;
  std::size_t offset_;
  unsigned char* memory_ = nullptr;
};

struct Case {
  bool is_rows;
  zfp::Field field;
  zfp::Rows rows;
  zfp::Options options;
};

Status encode_host(const Case& subject, const Bytes& values, Bytes& stream) {
  return subject.is_rows ? zfp::encode_rows(subject.rows, subject.options, values.data(), stream.data(), stream.size())
                         : zfp::encode(subject.field, subject.options, values.data(), stream.data(), stream.size());
}

Status decode_host(const Case& subject, const Bytes& stream, Bytes& values) {
  return subject.is_rows ? zfp::decode_rows(subject.rows, subject.options, stream.data(), stream.size(), values.data())
                         : zfp::decode(subject.field, subject.options, stream.data(), stream.size(), values.data());
}

Status encode_device(const Case& subject, const void* values, void* stream, std::size_t size) {
  return subject.is_rows ? zfp::encode_rows_cuda(subject.rows, subject.options, values, stream, size, nullptr)
                         : zfp::encode_cuda(subject.field, subject.options, values, stream, size, nullptr);
}

Status decode_device(const Case& subject, const void* stream, std::size_t size, void* values, unsigned* num_corrupt) {
  return subject.is_rows
             ? zfp::decode_rows_cuda(subject.rows, subject.options, stream, size, values, num_corrupt, nullptr)
             : zfp::decode_cuda(subject.field, subject.options, stream, size, values, num_corrupt, nullptr);
}

void compare_decoding(const Case& subject, const Bytes& stream, std::size_t num_value_bytes, std::size_t offset) {
  Bytes expected(num_value_bytes);
  const Status status = decode_host(subject, stream, expected);
  DeviceBuffer device_stream(stream, 0), device_values(num_value_bytes, offset), counter(Bytes(4), 0);
  auto* num_corrupt = reinterpret_cast<unsigned*>(counter.data());
  CHECK(decode_device(subject, device_stream.data(), stream.size(), device_values.data(), num_corrupt) == Status::kOk);
  const Bytes count = counter.read();
  const bool corrupt = std::any_of(count.begin(), count.end(), [](unsigned char byte) { return byte != 0; });
  CHECK(corrupt == (status == Status::kStreamCorrupt));
  const Bytes decoded = device_values.read();
  CHECK(status != Status::kOk || decoded == expected);
}

void compare(const Case& subject, const Bytes& values, check::Random& random) {
  std::size_t num_bytes = 0;
  const Status status = subject.is_rows ? zfp::row_bytes(subject.rows.hidden, subject.options.rate, num_bytes)
                                        : zfp::stream_bytes(subject.field, subject.options.rate, num_bytes);
  CHECK(status == Status::kOk);
  if (subject.is_rows) num_bytes *= subject.rows.num_rows;
  Bytes stream(num_bytes);
  CHECK(encode_host(subject, values, stream) == Status::kOk);
  const std::size_t value_size = subject.field.data_type == zfp::DataType::kFloat32 ? 4 : 2;
  const std::size_t offset = random.below(2) * value_size;  // 0: aligned to four values
  DeviceBuffer device_values(values, offset), device_stream(num_bytes);
  CHECK(encode_device(subject, device_values.data(), device_stream.data(), num_bytes) == Status::kOk);
  CHECK(device_stream.read() == stream);
  compare_decoding(subject, stream, values.size(), offset);
  for (std::size_t i = random.below(4); i > 0 && num_bytes > 0; --i) {
    stream[random.below(num_bytes)] ^= static_cast<unsigned char>(1u << random.below(8));
  }
  compare_decoding(subject, stream, values.size(), offset);
  for (unsigned char& byte : stream) byte = static_cast<unsigned char>(random.next());
  compare_decoding(subject, stream, values.size(), offset);
}

// Similar values, any bit patterns, or mostly zero bytes.
Bytes random_values(std::size_t count, zfp::DataType type, check::Random& random) {
  const std::size_t kind = random.below(3);
  Bytes bytes(count * (type == zfp::DataType::kFloat32 ? 4 : 2));
  if (kind == 0 && type == zfp::DataType::kFloat32) {
    for (std::size_t i = 0; i < count; ++i) {
      const float value = random.normal();
      std::memcpy(bytes.data() + 4 * i, &value, 4);
    }
    return bytes;
  }
  for (unsigned char& byte : bytes) {
    const bool is_random = kind != 2 || random.below(6) == 0;
    byte = static_cast<unsigned char>(!is_random ? 0 : kind == 0 ? 0x30 | random.below(16) : random.next());
  }
  return bytes;
}

void test_random_cases(int iterations) {
  check::Random random(11);
  for (int i = 0; i < iterations; ++i) {
    Case subject{};
    const auto type = static_cast<zfp::DataType>(random.below(3));
    const int dimensions = 1 + static_cast<int>(random.below(2));
    subject.is_rows = random.below(3) == 0;
    const std::size_t width = random.below(2) == 0 ? 4 * random.below(40) : random.below(150);
    subject.field = {dimensions, width, dimensions == 1 ? 1 : random.below(60), type};
    subject.rows = {random.below(9), 4 * (1 + random.below(80)), type};
    const bool is_line = dimensions == 1 && !subject.is_rows;
    const std::size_t most = is_line ? 128 : 512;
    const std::size_t block_bits = random.below(3) == 0 ? most / 4 : 9 + random.below(most - 8);
    subject.options.rate = static_cast<double>(block_bits) / (is_line ? 4 : 16);
    subject.options.rounding = static_cast<zfp::Rounding>(random.below(2));
    const std::size_t count =
        subject.is_rows ? subject.rows.num_rows * subject.rows.hidden : subject.field.width * subject.field.height;
    compare(subject, random_values(count, type, random), random);
  }
}

void test_large_rows() {
  check::Random random(12);
  for (double rate : {4.0, 8.0, 12.0625}) {
    Case subject{true, {}, {512, 2048, zfp::DataType::kFloat32}, {}};
    subject.options.rate = rate;
    compare(subject, random_values(512 * 2048, zfp::DataType::kFloat32, random), random);
  }
}

void test_bad_input() {
  DeviceBuffer values(256), stream(64);
  const zfp::Field field{2, 8, 8};
  zfp::Options scalar;
  scalar.kernel = zfp::Kernel::kScalar;
  CHECK(zfp::encode_cuda(field, {}, values.data(), stream.data(), 63, nullptr) == Status::kCapacityTooSmall);
  CHECK(zfp::encode_cuda(field, {}, nullptr, stream.data(), 64, nullptr) == Status::kNullPointer);
  CHECK(zfp::encode_cuda(field, {}, values.data() + 1, stream.data(), 64, nullptr) == Status::kMisaligned);
  CHECK(zfp::encode_cuda(field, {}, values.data(), stream.data() + 4, 64, nullptr) == Status::kMisaligned);
  CHECK(zfp::encode_cuda(field, scalar, values.data(), stream.data(), 64, nullptr) == Status::kKernelUnavailable);
  CHECK(zfp::encode_cuda({3, 8, 8}, {}, values.data(), stream.data(), 64, nullptr) == Status::kBadShape);
  CHECK(zfp::encode_cuda({2, 0, 8}, {}, nullptr, nullptr, 0, nullptr) == Status::kOk);
  CHECK(zfp::decode_cuda(field, {}, stream.data(), 65, values.data(), nullptr, nullptr) == Status::kStreamSizeMismatch);
  CHECK(zfp::decode_rows_cuda({2, 30}, {}, stream.data(), 64, values.data(), nullptr, nullptr) == Status::kBadShape);
  CHECK(values.read() == Bytes(256, 0xAA) && stream.read() == Bytes(64, 0xAA));
}

}  // namespace

int main(int count, char** arguments) {
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error != cudaSuccess || num_devices == 0) {
    std::printf("skipped: %s\n", error == cudaSuccess ? "no CUDA device" : cudaGetErrorString(error));
    return kSkip;
  }
  test_bad_input();
  test_random_cases(count > 1 ? std::stoi(arguments[1]) : 500);
  test_large_rows();
  must(cudaDeviceSynchronize());
  return check::exit_code();
}
