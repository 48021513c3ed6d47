// The bit planes of one block, by one thread.
#pragma once

#include "cuda_bits.cuh"

namespace planmoe::zfp {
namespace {

// Bits of `a` where `mask` has ones, of `b` elsewhere, in one instruction.
__device__ unsigned select_bits(unsigned mask, unsigned a, unsigned b) {
  unsigned selected;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(selected) : "r"(mask), "r"(a), "r"(b));
  return selected;
}

// Zeros above the highest one; 2^32 - 1 for 0.
__device__ unsigned leading_zeros(unsigned bits) {
  unsigned zeros;
  asm("bfind.shiftamt.u32 %0, %1;" : "=r"(zeros) : "r"(bits));
  return zeros;
}

template <int kRows, int kDistance>
__device__ void exchange(unsigned* rows, unsigned low_bits) {
#pragma unroll
  for (int a = 0; a < kRows; ++a) {
    if ((a & kDistance) != 0) continue;
    const unsigned low = rows[a], high = rows[a + kDistance];
    rows[a] = select_bits(low_bits, low, high << kDistance);
    rows[a + kDistance] = select_bits(low_bits, low >> kDistance, high);
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

// The planes of one block as they come, coefficient 0 on top, and the coefficients they make.
template <int kValues>
class PlaneStack;

// Four coefficients grow by a bit per plane.
template <>
class PlaneStack<4> {
 public:
  static constexpr int kSharedWords = 0;

  __device__ explicit PlaneStack(unsigned*) {}
  __device__ bool full() const { return num_planes_ == kNumPlanes; }
  __device__ unsigned num_planes() const { return num_planes_; }

  __device__ void push(unsigned plane) {
#pragma unroll
    for (int j = 0; j < 4; ++j) coefficients_[j] = __funnelshift_l(plane << j, coefficients_[j], 1);
    ++num_planes_;
  }

  __device__ void coefficients(unsigned* all) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) all[j] = __funnelshift_lc(0, coefficients_[j], kNumPlanes - num_planes_);
  }

 private:
  unsigned coefficients_[4] = {};
  unsigned num_planes_ = 0;
};

// Sixteen: the planes lie as 16 bits each in shared memory, as the place of the next one is known to each thread alone.
template <>
class PlaneStack<16> {
 public:
  static constexpr int kSharedWords = kNumPlanes / 2 + 1;  // odd: the threads of a warp reach different banks

  __device__ explicit PlaneStack(unsigned* words) : words_(words), next_(kNumPlanes) {
#pragma unroll
    for (int i = 0; i < kNumPlanes / 2; ++i) words[i] = 0;
  }
  __device__ bool full() const { return next_ == 0; }
  __device__ unsigned num_planes() const { return kNumPlanes - next_; }
  __device__ void push(unsigned plane) {
    reinterpret_cast<unsigned short*>(words_)[--next_] = static_cast<unsigned short>(plane >> 16);
  }

  // All threads of the warp take part: the lower half is often empty for all.
  __device__ void coefficients(unsigned* all) const {
    unsigned low[8] = {}, high[8];
    transpose(words_ + 8, high);
    if (__any_sync(0xFFFFFFFFu, next_ < kNumPlanes / 2)) transpose(words_, low);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      all[15 - k] = __byte_perm(low[k], high[k], 0x5410);
      all[7 - k] = __byte_perm(low[k], high[k], 0x7632);
    }
  }

 private:
  // 16 planes of 16 bits: bits k and k + 8 of each become the lower and upper half of row k.
  static __device__ void transpose(const unsigned* planes, unsigned* rows) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[2 * i] = __byte_perm(planes[i], planes[i + 4], 0x5140);
      rows[2 * i + 1] = __byte_perm(planes[i], planes[i + 4], 0x7362);
    }
    exchange<8, 4>(rows, 0x0F0F0F0Fu);
    exchange<8, 2>(rows, 0x33333333u);
    exchange<8, 1>(rows, 0x55555555u);
  }

  unsigned* words_;
  unsigned next_;
};

// Reads planes until `budget` bits are spent. A step takes a plane's bits of the significant coefficients and its first
// run of zeros, or a further run: every thread goes at its own pace, and no step branches.
template <int kValues, int kWords>
__device__ LastPlane read_planes(BitQueue<kWords>& queue, int budget, PlaneStack<kValues>& planes) {
  unsigned significant = 0, verbatim = 0, plane = 0;
  while (budget > 0 && !planes.full()) {
    const unsigned tests = queue.top() << verbatim;
    plane |= queue.top() & ~(~0u >> verbatim);
    budget -= static_cast<int>(verbatim);
    const bool run = significant < kValues && static_cast<int>(tests) < 0;
    // It ends at a 1, at the last coefficient, or with the budget.
    const unsigned limit = smaller(static_cast<unsigned>(budget - 1), kValues - 1 - significant);
    const unsigned zeros = smaller(leading_zeros(tests << 1), limit);
    unsigned length = run ? 1 + smaller(zeros + 1, limit) : 0;
    plane |= run ? 0x80000000u >> (significant + zeros) : 0;
    significant += run ? zeros + 1 : 0;
    const bool open = significant < kValues;
    const bool more = open && static_cast<int>(tests << length) < 0;
    if (open && !more) ++length;  // a 0 test
    queue.skip(verbatim + length);
    budget -= static_cast<int>(length);
    verbatim = more ? 0 : significant;
    if (!more) planes.push(plane);
    if (!more) plane = 0;
  }
  LastPlane last;
  if (planes.num_planes() == 0) return last;
  last.planes = planes.num_planes();
  last.known = kValues;
  // Bits past the end were taken for zeros: a last 0 test's, or some of a plane's verbatim ones as well.
  if (budget < 0) last.known = significant + static_cast<unsigned>(budget) + (significant < kValues);
  return last;
}

// `shared`: the thread's own PlaneStack<>::kSharedWords words.
template <int kDimensions, int kWords>
__device__ void decode_values(BitQueue<kWords>& queue, unsigned exponent, int budget, Rounding rounding,
                              unsigned* shared, float* block) {
  constexpr int kValues = kValuesPerBlock<kDimensions>;
  unsigned coefficients[kValues], integers[kValues];
  PlaneStack<kValues> planes(shared);
  const LastPlane last = read_planes<kValues>(queue, budget, planes);
  planes.coefficients(coefficients);
  if (rounding == Rounding::kLast) round_last<kValues>(last, coefficients);
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    integers[value_index<kDimensions>(j)] = (coefficients[j] ^ kNegabinary) - kNegabinary;
  }
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
