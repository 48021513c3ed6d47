// Cutting a field into batches of contiguous blocks, and back.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "planmoe_zfp/zfp.h"

namespace planmoe::zfp {

// A checked field at a rate: sizes that are known not to overflow.
struct BlockGrid {
  int num_dimensions = 1;
  DataType data_type = DataType::kFloat32;
  std::size_t width = 0;
  std::size_t height = 1;
  std::size_t num_blocks_x = 0;
  std::size_t num_blocks = 0;
  std::size_t num_contiguous_blocks = 0;  // leading blocks whose values lie one after another in the field
  unsigned block_bits = 0;
  std::size_t num_bytes = 0;
};

Status make_grid(const Field& field, double rate, BlockGrid& grid) noexcept;

// `stream` holds grid.num_bytes bytes.
void encode_grid(const BlockGrid& grid, const KernelSet& kernels, const void* values, unsigned char* stream) noexcept;

// False when the stream is corrupt.
bool decode_grid(const BlockGrid& grid, const KernelSet& kernels, Rounding rounding, const unsigned char* stream,
                 void* values) noexcept;

}  // namespace planmoe::zfp
