// What an implementation for one instruction set provides.
//
// Blocks are contiguous: block b of a batch is values[b * N, (b + 1) * N), N = 4 (1-d) or 16 (2-d, x fastest).
#pragma once

#include <cstddef>
#include <cstdint>

#include "bit_stream.h"
#include "planmoe_zfp/zfp.h"

namespace planmoe::zfp {

using EncodeBlocks = void (*)(const float* blocks, std::size_t num_blocks, unsigned block_bits, BitWriter& writer);

// Decodes blocks whose bits begin at `first_bit`; false when a block is corrupt.
using DecodeBlocks = bool (*)(const BitReader& reader, std::size_t first_bit, std::size_t num_blocks,
                              unsigned block_bits, Rounding rounding, float* blocks);

using Widen = void (*)(const std::uint16_t* source, std::size_t count, float* target);
using Narrow = void (*)(const float* source, std::size_t count, std::uint16_t* target);

struct KernelSet {
  EncodeBlocks encode[2];  // by dimensions - 1
  DecodeBlocks decode[2];
  Widen widen[2];    // from float16, from bfloat16
  Narrow narrow[2];  // to float16, to bfloat16: nearest even, finite values clamped to the finite range
};

// Null when the processor or the build lacks it.
const KernelSet* find_kernels(Kernel kernel) noexcept;

const KernelSet* scalar_kernels() noexcept;
const KernelSet* avx2_kernels() noexcept;    // null when not compiled in
const KernelSet* avx512_kernels() noexcept;  // null when not compiled in

}  // namespace planmoe::zfp
