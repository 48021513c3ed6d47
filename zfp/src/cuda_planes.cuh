// The bits of one block, by one thread: planes in registers, the stream as 32-bit words.
#pragma once

#include "block_codec.h"

namespace planmoe::zfp {
namespace {

template <int kValues, int kDistance>
__device__ void exchange(unsigned* rows, unsigned low_bits) {
#pragma unroll
  for (int a = 0; a < kValues; ++a) {
    if ((a & kDistance) != 0) continue;
    const unsigned difference = ((rows[a] >> kDistance) ^ rows[a + kDistance]) & low_bits;
    rows[a + kDistance] ^= difference;
    rows[a] ^= difference << kDistance;
  }
}

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

// Writes exactly `budget` bits from bit `first_bit` of `stream` on.
class BlockWriter {
 public:
  __device__ BlockWriter(unsigned* stream, std::size_t first_bit, unsigned budget)
      : word_(stream + first_bit / 32), num_pending_(first_bit % 32), budget_(budget), shared_(first_bit % 32 != 0) {}

  __device__ bool full() const { return budget_ == 0; }

  // The low `length` (0..31) bits of `code`, or those that still fit.
  __device__ void append(unsigned code, unsigned length) {
    length = length < budget_ ? length : budget_;
    pending_ |= static_cast<unsigned long long>(code & low_mask(length)) << num_pending_;
    advance(length);
  }

  __device__ void finish() {
    while (budget_ > 0) advance(budget_ < 31 ? budget_ : 31);
    if (num_pending_ > 0) atomicOr(word_, static_cast<unsigned>(pending_));
  }

 private:
  __device__ void advance(unsigned length) {
    budget_ -= length;
    num_pending_ += length;
    if (num_pending_ < 32) return;
    if (shared_) {
      atomicOr(word_, static_cast<unsigned>(pending_));
    } else {
      *word_ = static_cast<unsigned>(pending_);
    }
    shared_ = false;
    ++word_;
    pending_ >>= 32;
    num_pending_ -= 32;
  }

  unsigned* word_;
  unsigned long long pending_ = 0;
  unsigned num_pending_;
  unsigned budget_;
  bool shared_;  // the current word holds bits of the block before
};

template <int kValues>
__device__ void write_plane(unsigned bits, unsigned& significant, BlockWriter& writer) {
  unsigned code = bits & low_mask(significant), length = significant, rest = bits >> significant;
  while (rest != 0) {
    const unsigned run = static_cast<unsigned>(__ffs(static_cast<int>(rest)));  // zeros and the one
    code |= (1u | 1u << run) << length;
    length += run + 1;
    significant += run;
    rest >>= run;
    if (significant == kValues) --length, code &= low_mask(length);  // the last coefficient's 1 is implied
  }
  if (significant < kValues) ++length;  // a 0 test
  writer.append(code, length);
}

// Reads bits in order, through a window of two words; past the end of the stream they are 0.
class BlockReader {
 public:
  __device__ BlockReader(const unsigned* stream, std::size_t num_words, std::size_t first_bit)
      : word_(stream + first_bit / 32), end_(stream + num_words), shift_(first_bit % 32) {
    current_ = word_ < end_ ? *word_ : 0;
    following_ = word_ + 1 < end_ ? word_[1] : 0;
  }
  __device__ unsigned window() const { return __funnelshift_r(current_, following_, shift_); }
  __device__ void skip(unsigned length) {  // 0..32
    shift_ += length;
    if (shift_ < 32) return;
    shift_ -= 32;
    ++word_;
    current_ = following_;
    following_ = word_ + 1 < end_ ? word_[1] : 0;
  }

 private:
  const unsigned* word_;
  const unsigned* end_;
  unsigned shift_;
  unsigned current_;
  unsigned following_;
};

__device__ bool remaining_bits_zero(BlockReader reader, unsigned count) {
  for (; count > 0; reader.skip(count < 32 ? count : 32), count -= count < 32 ? count : 32) {
    if ((reader.window() & low_mask(count)) != 0) return false;
  }
  return true;
}

// Whether the bits of a block after its flag are 0.
__device__ bool rest_is_zero(BlockReader reader, unsigned block_bits) {
  reader.skip(1);
  return remaining_bits_zero(reader, block_bits - 1);
}

// All threads of a warp go through the planes together, those without budget idly: left to themselves they drift apart.
template <int kValues>
__device__ LastPlane read_planes(BlockReader& reader, unsigned budget, unsigned* planes) {
  LastPlane last;
  unsigned significant = 0;
#pragma unroll
  for (int plane = kNumPlanes - 1; plane >= 0; --plane) {
    if (__all_sync(0xFFFFFFFFu, budget == 0)) break;
    const unsigned before = budget;
    if (budget > 0) last.planes = static_cast<unsigned>(kNumPlanes - plane);
    unsigned known;
    const unsigned bits = decode_plane<kValues>(reader.window() & low_mask(budget), budget, significant, known);
    if (before > 0) last.known = known;
    reader.skip(before - budget);
    planes[plane % kValues] |= bits << (plane / kValues * kValues);
  }
  return last;
}

template <int kDimensions>
__device__ void decode_values(BlockReader& reader, unsigned exponent, unsigned budget, Rounding rounding,
                              float* block) {
  constexpr int kValues = kValuesPerBlock<kDimensions>;
  unsigned planes[kValues] = {}, integers[kValues];
  const LastPlane last = read_planes<kValues>(reader, budget, planes);
  transpose_bits<kValues>(planes);
  if (rounding == Rounding::kLast) round_last<kValues>(last, planes);
#pragma unroll
  for (int j = 0; j < kValues; ++j) integers[value_index<kDimensions>(j)] = (planes[j] ^ kNegabinary) - kNegabinary;
  inverse_transform<kDimensions>(integers);
  const unsigned first = (exponent + 97) >> 1;
  const float first_scale = __uint_as_float(first << 23);
  const float second_scale = exponent < kMinDecodedExponent ? 0.0f : __uint_as_float((exponent + 97 - first) << 23);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    block[i] = __fmul_rn(__fmul_rn(__int2float_rn(static_cast<int>(integers[i])), first_scale), second_scale);
  }
}

}  // namespace
}  // namespace planmoe::zfp
