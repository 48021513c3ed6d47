#include "field.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "format.h"

namespace planmoe::zfp {
namespace {

constexpr std::size_t kBatch = 64;  // blocks staged at a time
constexpr std::size_t kMaxValues = 16;
constexpr std::size_t kMaxBlocks = std::numeric_limits<std::size_t>::max() / 1024;  // block bits and values fit size_t

// Which of the n valid values stands at each of the 4 positions of an axis: the format's padding rule.
constexpr std::size_t kPadding[5][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}, {0, 1, 1, 0}, {0, 1, 2, 0}, {0, 1, 2, 3}};

std::size_t blocks_along(std::size_t length) { return length / 4 + (length % 4 != 0); }

std::size_t values_per_block(const BlockGrid& grid) { return grid.num_dimensions == 2 ? 16 : 4; }

// One block's place in the field.
struct Window {
  std::size_t offset;  // of its first value
  std::size_t num_x;   // valid values along x, 1..4
  std::size_t num_y;
};

Window window_of(const BlockGrid& grid, std::size_t block) {
  std::size_t x = 4 * (block % grid.num_blocks_x), y = 4 * (block / grid.num_blocks_x);
  std::size_t num_y = grid.num_dimensions == 2 ? std::min<std::size_t>(4, grid.height - y) : 1;
  return {y * grid.width + x, std::min<std::size_t>(4, grid.width - x), num_y};
}

template <class Value>
void gather_block(const BlockGrid& grid, const Value* values, const Window& window, Value* block) {
  const std::size_t num_rows = grid.num_dimensions == 2 ? 4 : 1;
  for (std::size_t y = 0; y < num_rows; ++y) {
    const Value* row = values + window.offset + kPadding[window.num_y][y] * grid.width;
    if (window.num_x == 4) {
      std::memcpy(block + 4 * y, row, 4 * sizeof(Value));
      continue;
    }
    for (std::size_t x = 0; x < 4; ++x) block[4 * y + x] = row[kPadding[window.num_x][x]];
  }
}

template <class Value>
void scatter_block(const BlockGrid& grid, const Value* block, const Window& window, Value* values) {
  for (std::size_t y = 0; y < window.num_y; ++y) {
    Value* row = values + window.offset + y * grid.width;
    if (window.num_x == 4) {
      std::memcpy(row, block + 4 * y, 4 * sizeof(Value));
      continue;
    }
    for (std::size_t x = 0; x < window.num_x; ++x) row[x] = block[4 * y + x];
  }
}

// Some consecutive blocks of a grid.
struct Batch {
  std::size_t first;
  std::size_t count;
  bool contiguous;
};

Batch next_batch(const BlockGrid& grid, std::size_t first) {
  bool contiguous = first < grid.num_contiguous_blocks;
  std::size_t end = contiguous ? grid.num_contiguous_blocks : grid.num_blocks;
  return {first, std::min(kBatch, end - first), contiguous};
}

// The values of a batch as contiguous blocks: in place where they are so already, else gathered into `staging`.
template <class Value>
const Value* gather_batch(const BlockGrid& grid, const Value* values, const Batch& batch, Value* staging) {
  const std::size_t block_size = values_per_block(grid);
  if (batch.contiguous) return values + batch.first * block_size;
  for (std::size_t b = 0; b < batch.count; ++b) {
    gather_block(grid, values, window_of(grid, batch.first + b), staging + b * block_size);
  }
  return staging;
}

template <class Value>
void scatter_batch(const BlockGrid& grid, const Value* staging, const Batch& batch, Value* values) {
  const std::size_t block_size = values_per_block(grid);
  for (std::size_t b = 0; b < batch.count; ++b) {
    scatter_block(grid, staging + b * block_size, window_of(grid, batch.first + b), values);
  }
}

// Index of a 16-bit type in the kernel tables.
std::size_t half_index(DataType data_type) { return data_type == DataType::kFloat16 ? 0 : 1; }

struct Staging {
  alignas(64) float floats[kBatch * kMaxValues];
  alignas(64) std::uint16_t halves[kBatch * kMaxValues];
};

}  // namespace

Status make_grid(const Field& field, double rate, BlockGrid& grid) noexcept {
  if (field.num_dimensions != 1 && field.num_dimensions != 2) return Status::kBadShape;
  if (field.num_dimensions == 1 && field.height != 1) return Status::kBadShape;
  if (field.data_type < DataType::kFloat32 || field.data_type > DataType::kBFloat16) return Status::kBadOption;
  if (!(rate > 0 && rate <= kMaxRate)) return Status::kBadRate;
  grid.num_dimensions = field.num_dimensions;
  grid.data_type = field.data_type;
  grid.width = field.width;
  grid.height = field.height;
  grid.block_bits = static_cast<unsigned>(std::floor(static_cast<double>(values_per_block(grid)) * rate + 0.5));
  if (grid.block_bits < kMinBlockBits) return Status::kBadRate;
  grid.num_blocks_x = blocks_along(field.width);
  std::size_t num_blocks_y = field.num_dimensions == 2 ? blocks_along(field.height) : 1;
  if (num_blocks_y > 0 && grid.num_blocks_x > kMaxBlocks / num_blocks_y) return Status::kTooLarge;
  grid.num_blocks = grid.num_blocks_x * num_blocks_y;
  if (grid.num_dimensions == 1) grid.num_contiguous_blocks = field.width / 4;
  if (grid.num_dimensions == 2 && field.width == 4) grid.num_contiguous_blocks = field.height / 4;
  grid.num_bytes = (grid.num_blocks * grid.block_bits + 63) / 64 * 8;
  return Status::kOk;
}

void encode_grid(const BlockGrid& grid, const KernelSet& kernels, const void* values, unsigned char* stream) noexcept {
  Staging staging;
  const EncodeBlocks encode = kernels.encode[grid.num_dimensions - 1];
  BitWriter writer{stream};
  Batch batch{};
  for (std::size_t first = 0; first < grid.num_blocks; first += batch.count) {
    batch = next_batch(grid, first);
    const float* blocks = staging.floats;
    if (grid.data_type == DataType::kFloat32) {
      blocks = gather_batch(grid, static_cast<const float*>(values), batch, staging.floats);
    } else {
      auto* halves = gather_batch(grid, static_cast<const std::uint16_t*>(values), batch, staging.halves);
      kernels.widen[half_index(grid.data_type)](halves, batch.count * values_per_block(grid), staging.floats);
    }
    encode(blocks, batch.count, grid.block_bits, writer);
  }
  finish_bits(writer);
}

bool decode_grid(const BlockGrid& grid, const KernelSet& kernels, Rounding rounding, const unsigned char* stream,
                 void* values) noexcept {
  Staging staging;
  const DecodeBlocks decode = kernels.decode[grid.num_dimensions - 1];
  const std::size_t block_size = values_per_block(grid);
  const bool is_float = grid.data_type == DataType::kFloat32;
  auto* floats = static_cast<float*>(values);
  auto* halves = static_cast<std::uint16_t*>(values);
  BitReader reader{stream, grid.num_bytes};
  bool valid = all_bits_zero(reader, grid.num_blocks * grid.block_bits, 8 * grid.num_bytes);
  Batch batch{};
  for (std::size_t first = 0; first < grid.num_blocks; first += batch.count) {
    batch = next_batch(grid, first);
    float* blocks = is_float && batch.contiguous ? floats + first * block_size : staging.floats;
    valid &= decode(reader, first * grid.block_bits, batch.count, grid.block_bits, rounding, blocks);
    if (is_float) {
      if (!batch.contiguous) scatter_batch(grid, staging.floats, batch, floats);
      continue;
    }
    std::uint16_t* narrowed = batch.contiguous ? halves + first * block_size : staging.halves;
    kernels.narrow[half_index(grid.data_type)](staging.floats, batch.count * block_size, narrowed);
    if (!batch.contiguous) scatter_batch(grid, staging.halves, batch, halves);
  }
  return valid;
}

}  // namespace planmoe::zfp
