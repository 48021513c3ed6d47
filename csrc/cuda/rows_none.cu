// none: rows as they are; bf16: rounded to bfloat16. Packing and unpacking move bits; the rest goes through float32.
#include "row_launch.cuh"

namespace planmoe::cuda {
namespace {

// Sixteen bytes per lane.
template <class Stored, class ValueType>
struct Plain {
  using Value = ValueType;
  static constexpr int kLaneValues = 16 / sizeof(Stored);
  static constexpr int kUnroll = 4;
  static constexpr int kWireBytes = 16;

  static __device__ __forceinline__ void decode(const WireRow& wire, int64_t unit, Value (&values)[kLaneValues]) {
    load_values(reinterpret_cast<const Stored*>(wire.bytes), (unit * kWarp + wire.lane) * kLaneValues, wire.count(),
                wire.aligned, values);
  }

  static __device__ __forceinline__ void encode(const WireRow& wire, int64_t unit, const Value (&values)[kLaneValues]) {
    store_values(reinterpret_cast<Stored*>(wire.bytes), (unit * kWarp + wire.lane) * kLaneValues, wire.count(),
                 wire.aligned, values);
  }
};

template <class Stored>
using Moved = Plain<Stored, Stored>;

// Rows of `Bits` that are only moved: as words of four bytes where they consist of such.
template <class Bits, class Launch>
cudaError_t move(const RowArguments& rows, const Launch& launch) {
  const auto places = reinterpret_cast<uintptr_t>(rows.wire) | reinterpret_cast<uintptr_t>(rows.rows) |
                      static_cast<uintptr_t>(rows.wire_stride) | static_cast<uintptr_t>(rows.hidden * sizeof(Bits));
  if (places % sizeof(uint32_t) != 0) return launch(rows, Bits{});
  RowArguments words = rows;
  words.hidden = rows.hidden * sizeof(Bits) / sizeof(uint32_t);
  return launch(words, uint32_t{});
}

template <class Bits>
cudaError_t launch_pack_bits(const RowArguments& rows, cudaStream_t stream) {
  return move<Bits>(rows, [&](const RowArguments& words, auto bits) {
    return launch_pack<Moved<decltype(bits)>, decltype(bits)>(words, stream);
  });
}

template <class Bits>
cudaError_t launch_unpack_bits(const RowArguments& rows, cudaStream_t stream) {
  return move<Bits>(rows, [&](const RowArguments& words, auto bits) {
    return launch_unpack<Moved<decltype(bits)>, decltype(bits)>(words, stream);
  });
}

// Rows of two bytes from and to float32: what codecs of whole tensors decode to and encode.
template <class Row>
void add_wide(RowKernels& kernels) {
  using Codec = Plain<float, float>;
  kernels.spread[kScalarOf<Row>] = launch_spread<Codec, Row>;
  kernels.fold[kScalarOf<Row>] = launch_fold<Codec, Row>;
  kernels.dot[kScalarOf<Row>] = launch_dot<Codec, Row>;
}

template <class Stored, class Bits>
bool add_plain(Scalar dtype) {
  using Codec = Plain<Stored, float>;
  constexpr int kOwn = kScalarOf<Stored>;
  RowKernels kernels;
  kernels.pack[0] = launch_pack<Codec, float>;
  kernels.unpack[0] = launch_unpack<Codec, float>;
  kernels.add[0] = launch_add<Codec, float>;
  kernels.sum[0] = launch_sum<Codec, float>;
  kernels.pack[kOwn] = launch_pack_bits<Bits>;
  kernels.unpack[kOwn] = launch_unpack_bits<Bits>;
  kernels.spread[kOwn] = launch_spread<Codec, Stored>;
  kernels.fold[kOwn] = launch_fold<Codec, Stored>;
  kernels.dot[kOwn] = launch_dot<Codec, Stored>;
  kernels.sum[kOwn] = launch_sum<Codec, Stored>;
  if constexpr (kOwn == 0) {
    add_wide<__half>(kernels);
    add_wide<__nv_bfloat16>(kernels);
  }
  return add_row_kernels("none", dtype, kernels);
}

// ---- rows of bytes ----

template <class Stored>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    gather_kernel(const uint8_t* from, int64_t from_stride, const int64_t* index, uint8_t* to, int64_t to_stride,
                  int64_t num_rows, int64_t width) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= num_rows) return;
  const auto* source = reinterpret_cast<const Stored*>(from + (index ? index[row] : row) * from_stride);
  auto* target = reinterpret_cast<Stored*>(to + row * to_stride);
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < width; i += kWarp) target[i] = source[i];
}

bool add_all() {
  return add_plain<float, uint32_t>(Scalar::kFloat) && add_plain<__half, uint16_t>(Scalar::kHalf) &&
         add_plain<__nv_bfloat16, uint16_t>(Scalar::kBFloat16) &&
         add_for_all_dtypes<Plain<__nv_bfloat16, float>>("bf16");
}

const bool added = add_all();

}  // namespace

cudaError_t gather_rows(const uint8_t* from, int64_t from_stride, const int64_t* index, uint8_t* to, int64_t to_stride,
                        int64_t num_rows, int64_t width, cudaStream_t stream) {
  if (num_rows == 0 || width == 0) return cudaSuccess;
  const int64_t blocks = (num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidConfiguration;
  const auto places = static_cast<int64_t>(reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) |
                      from_stride | to_stride | width;
  const auto start = [&](auto* kernel, int64_t size) {
    kernel<<<static_cast<unsigned>(blocks), kWarpsPerBlock * kWarp, 0, stream>>>(from, from_stride, index, to,
                                                                                 to_stride, num_rows, width / size);
  };
  if (places % 16 == 0)
    start(gather_kernel<uint4>, 16);
  else if (places % 4 == 0)
    start(gather_kernel<uint32_t>, 4);
  else
    start(gather_kernel<uint8_t>, 1);
  return cudaGetLastError();
}

}  // namespace planmoe::cuda
