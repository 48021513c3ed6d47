// Blocks of values in device memory, one per thread: where they lie, loading and storing them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>

namespace planmoe::zfp {
namespace {

// Equal grids one after another; counts of values, blocks and 32-bit words.
struct Layout {
  std::size_t num_blocks;  // of all grids
  std::size_t blocks_per_grid;
  std::size_t values_per_grid;
  std::size_t words_per_grid;
  std::size_t num_blocks_x;
  std::size_t width;
  std::size_t height;
  unsigned block_bits;
  bool contiguous;  // block after block is value after value
  bool aligned;     // every 4 values along x lie on a multiple of their size
};

// One block: its grid, and its place there.
struct Place {
  std::size_t grid;
  std::size_t block;
};

// Its values.
struct Extent {
  std::size_t offset;  // of the first
  unsigned num_x;      // valid ones along each axis
  unsigned num_y;
};

__device__ std::size_t divide(std::size_t value, std::size_t divisor) {
  if (divisor == 1) return value;
  if ((value | divisor) >> 32 == 0) return static_cast<unsigned>(value) / static_cast<unsigned>(divisor);
  return value / divisor;
}

__device__ Place place_of(const Layout& layout, std::size_t index) {
  Place place;
  place.grid = layout.num_blocks == layout.blocks_per_grid ? 0 : divide(index, layout.blocks_per_grid);
  place.block = index - place.grid * layout.blocks_per_grid;
  return place;
}

template <int kDimensions>
__device__ Extent extent_of(const Layout& layout, const Place& place) {
  Extent extent;
  const std::size_t block_y = kDimensions == 1 ? 0 : divide(place.block, layout.num_blocks_x);
  const std::size_t x = 4 * (place.block - block_y * layout.num_blocks_x), y = 4 * block_y;
  extent.offset = place.grid * layout.values_per_grid + y * layout.width + x;
  extent.num_x = static_cast<unsigned>(layout.width - x < 4 ? layout.width - x : 4);
  extent.num_y = static_cast<unsigned>(layout.height - y < 4 ? layout.height - y : 4);
  return extent;
}

__device__ float widen(float value) { return value; }
__device__ float widen(__half value) { return __half2float(value); }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Nearest even, finite values clamped to the finite range; NaN stays NaN.
__device__ float clamp(float value, float limit) {
  value = value > limit ? limit : value;
  return value < -limit ? -limit : value;
}
__device__ void narrow(float value, float& target) { target = value; }
__device__ void narrow(float value, __half& target) {
  target = __ushort_as_half(isnan(value) ? 0x7E00 : __half_as_ushort(__float2half_rn(clamp(value, 65504.0f))));
}
__device__ void narrow(float value, __nv_bfloat16& target) {
  const unsigned bits = __float_as_uint(clamp(value, 0x1.FEp127f));
  const unsigned rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  target = __ushort_as_bfloat16(static_cast<unsigned short>(isnan(value) ? 0x7FC0u : rounded));
}

template <class Value>
struct alignas(4 * sizeof(Value)) Quad {
  Value value[4];
};

// Which valid value stands at position `at` of an axis of `count` valid ones.
__device__ unsigned padded_position(unsigned at, unsigned count) {
  return at < count ? at : at == 2 && count == 2 ? 1 : 0;
}

template <int kDimensions, class Value>
__device__ void load_block(const Layout& layout, const Extent& extent, const Value* values, float* block) {
  constexpr unsigned kRows = kDimensions == 2 ? 4 : 1;
#pragma unroll
  for (unsigned y = 0; y < kRows; ++y) {
    const Value* row = values + extent.offset + (kRows == 1 ? 0 : padded_position(y, extent.num_y)) * layout.width;
    if (layout.aligned && extent.num_x == 4) {
      const auto quad = *reinterpret_cast<const Quad<Value>*>(row);
      for (unsigned x = 0; x < 4; ++x) block[4 * y + x] = widen(quad.value[x]);
    } else {
      for (unsigned x = 0; x < 4; ++x) block[4 * y + x] = widen(row[padded_position(x, extent.num_x)]);
    }
  }
}

template <int kDimensions, class Value>
__device__ void store_block(const Layout& layout, const Extent& extent, const float* block, Value* values) {
  constexpr unsigned kRows = kDimensions == 2 ? 4 : 1;
#pragma unroll
  for (unsigned y = 0; y < kRows; ++y) {
    if (y >= extent.num_y) break;
    Value* row = values + extent.offset + y * layout.width;
    if (layout.aligned && extent.num_x == 4) {
      Quad<Value> quad;
      for (unsigned x = 0; x < 4; ++x) narrow(block[4 * y + x], quad.value[x]);
      *reinterpret_cast<Quad<Value>*>(row) = quad;
    } else {
      for (unsigned x = 0; x < extent.num_x; ++x) narrow(block[4 * y + x], row[x]);
    }
  }
}

// Stores a warp's 2-d blocks, which lie one after another, through `tile`, kTileQuads of shared memory: each store
// instruction then writes neighbouring values. All threads of the warp take part.
constexpr unsigned kTileQuads = 4 * 32;

template <class Value>
__device__ void store_warp(const float* block, float4* tile, unsigned num_blocks, Value* values) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned y = 0; y < 4; ++y) {  // the rows' order within a block keeps threads off each other's banks
    tile[4 * lane + (y ^ (lane / 2 % 4))] = {block[4 * y], block[4 * y + 1], block[4 * y + 2], block[4 * y + 3]};
  }
  __syncwarp();
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned at = 32 * i + lane;
    if (at >= 4 * num_blocks) continue;
    const float4 row = tile[at / 4 * 4 + (at % 4 ^ (at / 8 % 4))];
    Quad<Value> quad;
    narrow(row.x, quad.value[0]);
    narrow(row.y, quad.value[1]);
    narrow(row.z, quad.value[2]);
    narrow(row.w, quad.value[3]);
    reinterpret_cast<Quad<Value>*>(values)[at] = quad;
  }
}

}  // namespace
}  // namespace planmoe::zfp
