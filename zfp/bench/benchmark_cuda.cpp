// Speed of the CUDA codec in GB/s of input values: 256 MiB of normal float32 (or half as many bytes of bfloat16).
#include <cuda_runtime.h>
#include <planmoe_zfp/zfp_cuda.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace zfp = planmoe::zfp;

namespace {

constexpr std::size_t kNumValues = std::size_t{1} << 26;
constexpr int kRepeats = 15;

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

void must(zfp::Status status) {
  if (status == zfp::Status::kOk) return;
  std::fprintf(stderr, "zfp: %s\n", zfp::describe(status));
  std::exit(1);
}

// Median seconds of one call.
template <class Call>
double seconds(Call call) {
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin));
  must(cudaEventCreate(&end));
  must(call());
  std::vector<float> times(kRepeats);
  for (float& milliseconds : times) {
    must(cudaEventRecord(begin));
    must(call());
    must(cudaEventRecord(end));
    must(cudaEventSynchronize(end));
    must(cudaEventElapsedTime(&milliseconds, begin, end));
  }
  must(cudaEventDestroy(begin));
  must(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[kRepeats / 2] / 1e3;
}

void measure(const zfp::Field& field, double rate, void* values, void* decoded) {
  zfp::Options options;
  options.rate = rate;
  std::size_t num_bytes = 0;
  must(zfp::stream_bytes(field, rate, num_bytes));
  void* stream = nullptr;
  must(cudaMalloc(&stream, num_bytes));
  const double encode = seconds([&] { return zfp::encode_cuda(field, options, values, stream, num_bytes, nullptr); });
  const double decode =
      seconds([&] { return zfp::decode_cuda(field, options, stream, num_bytes, decoded, nullptr, nullptr); });
  must(cudaFree(stream));
  const bool is_float = field.data_type == zfp::DataType::kFloat32;
  const double gigabytes = static_cast<double>(kNumValues) * (is_float ? 4 : 2) / 1e9;
  std::printf("%d-d %-8s rate %4.1f  encode %7.0f GB/s  decode %7.0f GB/s\n", field.num_dimensions,
              is_float ? "float32" : "bfloat16", rate, gigabytes / encode, gigabytes / decode);
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  must(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, %zu values, median of %d\n", properties.name, kNumValues, kRepeats);
  std::vector<float> normal(kNumValues);
  std::mt19937 random(1);
  std::normal_distribution<float> distribution;
  for (std::size_t i = 0; i < kNumValues; ++i) {
    normal[i] = i < (1u << 22) ? distribution(random) : normal[i - (1u << 22)];
  }
  std::vector<std::uint16_t> brain(kNumValues);
  for (std::size_t i = 0; i < kNumValues; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, &normal[i], 4);
    brain[i] = static_cast<std::uint16_t>(bits >> 16);
  }
  void *floats = nullptr, *halves = nullptr, *decoded = nullptr;
  must(cudaMalloc(&floats, 4 * kNumValues));
  must(cudaMalloc(&halves, 2 * kNumValues));
  must(cudaMalloc(&decoded, 4 * kNumValues));
  must(cudaMemcpy(floats, normal.data(), 4 * kNumValues, cudaMemcpyHostToDevice));
  must(cudaMemcpy(halves, brain.data(), 2 * kNumValues, cudaMemcpyHostToDevice));
  for (double rate : {4.0, 8.0, 8.0625, 16.0}) {
    measure({2, 4, kNumValues / 4}, rate, floats, decoded);
    measure({2, 4, kNumValues / 4, zfp::DataType::kBFloat16}, rate, halves, decoded);
  }
  measure({1, kNumValues}, 8, floats, decoded);
  return 0;
}
