// One thread per block, whose values and bits stay in registers; the stream is read and written as 32-bit words. Only a
// word that two blocks share is written atomically, into a stream cleared first.
#include <cuda_runtime.h>

#include "cuda_reader.cuh"
#include "cuda_values.cuh"
#include "cuda_writer.cuh"
#include "planmoe_zfp/zfp_cuda.h"
#include "work.h"

namespace planmoe::zfp {
namespace {

constexpr unsigned kThreads = 128;

template <int kDimensions, class Value>
__global__ void __launch_bounds__(kThreads) encode_kernel(Layout layout, const Value* values, unsigned* stream) {
  constexpr int kValues = kValuesPerBlock<kDimensions>;
  PlaneWriter<kDimensions> planes_writer;
  const std::size_t index = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= layout.num_blocks) return;
  const Place place = place_of(layout, index);
  float block[kValues];
  load_block<kDimensions>(layout, extent_of<kDimensions>(layout, place), values, block);
  unsigned* grid_stream = stream + place.grid * layout.words_per_grid;
  BlockWriter writer(grid_stream, place.block * layout.block_bits, layout.block_bits);
  unsigned exponent = 0;
#pragma unroll
  for (int i = 0; i < kValues; ++i) exponent = max(exponent, __float_as_uint(block[i]) & 0x7FFFFFFFu);
  exponent >>= 23;
  const bool coded = exponent >= kMinExponent && exponent < kNonFiniteExponent;
  writer.append(coded ? 2 * exponent + 3 : exponent == kNonFiniteExponent ? kEscapeHeader : 0, kHeaderBits);
  if (coded) {
    const float scale = __uint_as_float((kScaleBias - exponent) << 23);
    unsigned integers[kValues], planes[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) integers[i] = static_cast<unsigned>(__float2int_rz(__fmul_rn(block[i], scale)));
    forward_transform<kDimensions>(integers);
#pragma unroll
    for (int j = 0; j < kValues; ++j) planes[j] = (integers[value_index<kDimensions>(j)] + kNegabinary) ^ kNegabinary;
    transpose_bits<kValues>(planes);
#pragma unroll
    for (int plane = kNumPlanes - 1; plane >= 0; --plane) {
      if (writer.full()) break;
      planes_writer.write((planes[plane % kValues] >> (plane / kValues * kValues)) & low_mask(kValues), writer);
    }
  }
  writer.finish();
}

// The last word of each grid's stream, where no block reaches it.
__global__ void clear_last_words(Layout layout, std::size_t num_grids, unsigned* stream) {
  const std::size_t grid = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (grid < num_grids) stream[(grid + 1) * layout.words_per_grid - 1] = 0;
}

// The bits of a grid's stream after its last block, less than 64.
__device__ bool padding_is_zero(const Layout& layout, const unsigned* grid_stream) {
  const std::size_t end = layout.blocks_per_grid * layout.block_bits;
  return BitQueue<2>(grid_stream, end, static_cast<unsigned>(32 * layout.words_per_grid - end)).empty();
}

// One block, read and decoded.
template <int kDimensions, int kWords>
struct Decoder {
  static constexpr int kValues = kValuesPerBlock<kDimensions>;

  const Layout& layout;
  const unsigned* stream;
  Rounding rounding;
  unsigned* num_corrupt;

  // A block that is not `counted` is not checked.
  __device__ void decode(const Place& place, bool counted, PlaneReader<kDimensions>& planes, float* block) const {
    const unsigned* grid_stream = stream + place.grid * layout.words_per_grid;
    BitQueue<kWords> queue(grid_stream, place.block * layout.block_bits, layout.block_bits);
    const unsigned header = __brev(queue.top()) & low_mask(kHeaderBits);
    const bool coded = (header & 1u) != 0 && header != kEscapeHeader;
    queue.skip(1);
    bool valid = coded || queue.empty();
    planes.begin(queue, coded);
    decode_values(planes, queue, header >> 1, rounding, block);
    if (!coded) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) block[i] = __uint_as_float(header == kEscapeHeader ? kQuietNan : 0);
    }
    if (place.block + 1 == layout.blocks_per_grid) valid &= padding_is_zero(layout, grid_stream);
    if (counted && !valid && num_corrupt != nullptr) atomicAdd(num_corrupt, 1u);
  }
};

// Threads share tables, which pay only over several blocks each.
constexpr unsigned kLinesPerThread = 8;

// kWords: 32-bit words that hold a block's bits.
template <int kWords, class Value>
__global__ void __launch_bounds__(kThreads)
    decode_lines(Layout layout, const unsigned* stream, Rounding rounding, Value* values, unsigned* num_corrupt) {
  __shared__ unsigned tables[PlaneReader<1>::kSharedWords];
  PlaneReader<1> planes(tables, layout.block_bits - kHeaderBits);
  const Decoder<1, kWords> decoder{layout, stream, rounding, num_corrupt};
  std::size_t index = static_cast<std::size_t>(blockIdx.x) * (kThreads * kLinesPerThread) + threadIdx.x;
  for (unsigned i = 0; i < kLinesPerThread && index < layout.num_blocks; ++i, index += kThreads) {
    const Place place = place_of(layout, index);
    float block[4];
    decoder.decode(place, true, planes, block);
    store_block<1>(layout, extent_of<1>(layout, place), block, values);
  }
}

template <int kWords, class Value>
__global__ void __launch_bounds__(kThreads)
    decode_squares(Layout layout, const unsigned* stream, Rounding rounding, Value* values, unsigned* num_corrupt) {
  constexpr unsigned kOwnWords = PlaneReader<2>::kSharedWords;
  union Shared {  // of a warp; the planes are read before the values are stored
    unsigned planes[32 * kOwnWords + 1];
    float4 tile[kTileQuads];
  };
  __shared__ Shared shared[kThreads / 32];
  Shared& own = shared[threadIdx.x / 32];
  PlaneReader<2> planes(own.planes + threadIdx.x % 32 * kOwnWords, layout.block_bits - kHeaderBits);
  const std::size_t index = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool idle = index >= layout.num_blocks;  // decodes the last block as well, for its warp's sake
  const Place place = place_of(layout, idle ? layout.num_blocks - 1 : index);
  float block[16];
  Decoder<2, kWords>{layout, stream, rounding, num_corrupt}.decode(place, !idle, planes, block);
  if (layout.contiguous && layout.aligned) {
    const std::size_t first = index - threadIdx.x % 32;
    const std::size_t left = first < layout.num_blocks ? layout.num_blocks - first : 0;
    __syncwarp();
    store_warp(block, own.tile, static_cast<unsigned>(left < 32 ? left : 32), values + first * 16);
  } else if (!idle) {
    store_block<2>(layout, extent_of<2>(layout, place), block, values);
  }
}

// ---- host ----

Status make_layout(const Work& work, const void* values, const void* stream, Layout& layout) {
  const BlockGrid& grid = work.grid;
  const std::size_t value_size = grid.data_type == DataType::kFloat32 ? 4 : 2;
  const auto address = reinterpret_cast<std::uintptr_t>(values);
  if (address % value_size != 0 || reinterpret_cast<std::uintptr_t>(stream) % 8 != 0) return Status::kMisaligned;
  layout.blocks_per_grid = grid.num_blocks;
  layout.num_blocks = work.num_grids * grid.num_blocks;
  if (layout.num_blocks / kThreads >= 0x7FFFFFFF) return Status::kTooLarge;
  layout.values_per_grid = grid.width * grid.height;
  layout.words_per_grid = grid.num_bytes / 4;
  layout.num_blocks_x = grid.num_blocks_x;
  layout.width = grid.width;
  layout.height = grid.height;
  layout.block_bits = grid.block_bits;
  layout.contiguous = grid.num_contiguous_blocks == grid.num_blocks;
  const bool rows_aligned = grid.num_dimensions == 1 || grid.width % 4 == 0;
  layout.aligned = rows_aligned && address % (4 * value_size) == 0;
  return Status::kOk;
}

unsigned num_thread_blocks(std::size_t num_threads) {
  return static_cast<unsigned>((num_threads + kThreads - 1) / kThreads);
}

template <class Value>
void launch_encode(const Work& work, const Layout& layout, const void* values, unsigned* stream, cudaStream_t queue) {
  const unsigned blocks = num_thread_blocks(layout.num_blocks);
  const auto* typed = static_cast<const Value*>(values);
  if (work.grid.num_dimensions == 1) {
    encode_kernel<1><<<blocks, kThreads, 0, queue>>>(layout, typed, stream);
  } else {
    encode_kernel<2><<<blocks, kThreads, 0, queue>>>(layout, typed, stream);
  }
}

template <class Value>
void launch_decode(const Work& work, const Layout& layout, const unsigned* stream, Rounding rounding, void* values,
                   unsigned* num_corrupt, cudaStream_t queue) {
  auto* typed = static_cast<Value*>(values);
  const auto launch = [&](auto* kernel, unsigned per_thread) {
    const unsigned blocks = num_thread_blocks((layout.num_blocks + per_thread - 1) / per_thread);
    kernel<<<blocks, kThreads, 0, queue>>>(layout, stream, rounding, typed, num_corrupt);
  };
  const unsigned words = (layout.block_bits + 31) / 32;
  if (work.grid.num_dimensions == 1) {
    launch(words <= 1   ? decode_lines<1, Value>
           : words <= 2 ? decode_lines<2, Value>
                        : decode_lines<4, Value>,
           kLinesPerThread);
  } else if (words <= 4) {
    launch(words <= 2 ? decode_squares<2, Value> : decode_squares<4, Value>, 1);
  } else {
    launch(words <= 8 ? decode_squares<8, Value> : decode_squares<16, Value>, 1);
  }
}

Status launched() { return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kCudaError; }

// Words that blocks share are or-ed into zeros; a last half of a 64-bit word that none reaches must be zero as well.
Status clear_stream(const Work& work, const Layout& layout, unsigned* stream, cudaStream_t queue) {
  if (layout.block_bits % 32 != 0) {
    return cudaMemsetAsync(stream, 0, work.num_bytes, queue) == cudaSuccess ? Status::kOk : Status::kCudaError;
  }
  if (layout.blocks_per_grid * layout.block_bits % 64 != 0) {
    clear_last_words<<<num_thread_blocks(work.num_grids), kThreads, 0, queue>>>(layout, work.num_grids, stream);
  }
  return launched();
}

template <class Shape>
Status encode_shape(const Shape& shape, const Options& options, const void* values, void* stream,
                    std::size_t stream_capacity, cudaStream_t queue) {
  Work work;
  Layout layout;
  if (options.kernel != Kernel::kAutomatic) return Status::kKernelUnavailable;
  Status status = plan(shape, options, work);
  if (status == Status::kOk) status = check_encode(work, values, stream, stream_capacity);
  if (status != Status::kOk || work.num_bytes == 0) return status;
  status = make_layout(work, values, stream, layout);
  auto* words = static_cast<unsigned*>(stream);
  if (status == Status::kOk) status = clear_stream(work, layout, words, queue);
  if (status != Status::kOk) return status;
  if (work.grid.data_type == DataType::kFloat32) launch_encode<float>(work, layout, values, words, queue);
  if (work.grid.data_type == DataType::kFloat16) launch_encode<__half>(work, layout, values, words, queue);
  if (work.grid.data_type == DataType::kBFloat16) launch_encode<__nv_bfloat16>(work, layout, values, words, queue);
  return launched();
}

template <class Shape>
Status decode_shape(const Shape& shape, const Options& options, const void* stream, std::size_t stream_size,
                    void* values, unsigned* num_corrupt, cudaStream_t queue) {
  Work work;
  Layout layout;
  if (options.kernel != Kernel::kAutomatic) return Status::kKernelUnavailable;
  Status status = plan(shape, options, work);
  if (status == Status::kOk) status = check_decode(work, values, stream, stream_size);
  if (status != Status::kOk || work.num_bytes == 0) return status;
  status = make_layout(work, values, stream, layout);
  if (status != Status::kOk) return status;
  const auto* words = static_cast<const unsigned*>(stream);
  const DataType type = work.grid.data_type;
  const Rounding rounding = options.rounding;
  if (type == DataType::kFloat32) launch_decode<float>(work, layout, words, rounding, values, num_corrupt, queue);
  if (type == DataType::kFloat16) launch_decode<__half>(work, layout, words, rounding, values, num_corrupt, queue);
  if (type == DataType::kBFloat16) {
    launch_decode<__nv_bfloat16>(work, layout, words, rounding, values, num_corrupt, queue);
  }
  return launched();
}

}  // namespace

Status encode_cuda(const Field& field, const Options& options, const void* values, void* stream,
                   std::size_t stream_capacity, CUstream_st* cuda_stream) noexcept {
  return encode_shape(field, options, values, stream, stream_capacity, cuda_stream);
}

Status decode_cuda(const Field& field, const Options& options, const void* stream, std::size_t stream_size,
                   void* values, unsigned* num_corrupt, CUstream_st* cuda_stream) noexcept {
  return decode_shape(field, options, stream, stream_size, values, num_corrupt, cuda_stream);
}

Status encode_rows_cuda(const Rows& rows, const Options& options, const void* values, void* stream,
                        std::size_t stream_capacity, CUstream_st* cuda_stream) noexcept {
  return encode_shape(rows, options, values, stream, stream_capacity, cuda_stream);
}

Status decode_rows_cuda(const Rows& rows, const Options& options, const void* stream, std::size_t stream_size,
                        void* values, unsigned* num_corrupt, CUstream_st* cuda_stream) noexcept {
  return decode_shape(rows, options, stream, stream_size, values, num_corrupt, cuda_stream);
}

}  // namespace planmoe::zfp
