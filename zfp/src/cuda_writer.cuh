// Writing the bit planes of one block, by one thread.
#pragma once

#include "cuda_bits.cuh"
#include "cuda_transpose.cuh"
#include "quad_tables.h"

namespace planmoe::zfp {
namespace {

// Coefficients <-> planes: plane k is bits [k / N * N, + N) of row k % N.
template <int kValues>
__device__ void transpose_bits(unsigned* rows) {
  if constexpr (kValues == 16) {
    exchange<kValues, 8>(rows, 0x00FF00FFu);
    exchange<kValues, 4>(rows, 0x0F0F0F0Fu);
  }
  exchange<kValues, 2>(rows, 0x33333333u);
  exchange<kValues, 1>(rows, 0x55555555u);
}

// Writes the planes of a block.
template <int kDimensions>
class PlaneWriter;

template <>
class PlaneWriter<2> {
 public:
  __device__ void write(unsigned bits, BlockWriter& writer) {
    unsigned code = bits & low_mask(significant_), length = significant_, rest = bits >> significant_;
    while (rest != 0) {
      const unsigned run = static_cast<unsigned>(__ffs(static_cast<int>(rest)));  // zeros and the one
      code |= (1u | 1u << run) << length;
      length += run + 1;
      significant_ += run;
      rest >>= run;
      if (significant_ == 16) --length, code &= low_mask(length);  // the last coefficient's 1 is implied
    }
    if (significant_ < 16) ++length;  // a 0 test
    writer.append(code, length);
  }

 private:
  unsigned significant_ = 0;
};

__device__ const quad::WriterTable kWriterTable;

template <>
class PlaneWriter<1> {
 public:
  // All threads of the block take part.
  __device__ PlaneWriter() {
    __shared__ unsigned table[5 * 16];
    if (threadIdx.x < 5 * 16) table[threadIdx.x] = kWriterTable.plane[threadIdx.x];
    __syncthreads();
    table_ = table;
  }

  __device__ void write(unsigned bits, BlockWriter& writer) {
    const unsigned entry = table_[row_ | bits];
    row_ = quad::next_row(entry);
    writer.append(quad::code(entry), quad::code_length(entry));
  }

 private:
  const unsigned* table_;
  unsigned row_ = 0;
};

}  // namespace
}  // namespace planmoe::zfp
