// Reading the bit planes of one block, by one thread.
#pragma once

#include "cuda_bits.cuh"
#include "cuda_transpose.cuh"
#include "quad_tables.h"

namespace planmoe::zfp {
namespace {

// Zeros above the highest one; 2^32 - 1 for 0.
__device__ unsigned leading_zeros(unsigned bits) {
  unsigned zeros;
  asm("bfind.shiftamt.u32 %0, %1;" : "=r"(zeros) : "r"(bits));
  return zeros;
}

__device__ const quad::ReaderTables kReaderTables;

// The planes of a block of 16 as they come, coefficient 0 on top, and the coefficients they make. They lie as 16 bits each
// in shared memory, as the place of the next one is known to each thread alone.
class PlaneStack {
 public:
  static constexpr int kSharedWords = kNumPlanes / 2 + 1;  // odd: the threads of a warp reach different banks

  __device__ explicit PlaneStack(unsigned* words) : words_(words), next_(kNumPlanes) {
#pragma unroll
    for (int i = 0; i < kNumPlanes / 2; ++i) words[i] = 0;
  }
  __device__ bool full() const { return next_ == 0; }
  __device__ unsigned num_planes() const { return kNumPlanes - next_; }
  __device__ void skip(unsigned num_empty) { next_ -= num_empty; }
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

// Reads a block's coefficients from its bits: begin() from the one after the flag on, then read(). Where `coded` is false,
// the block has none, and they are arbitrary.
template <int kDimensions>
class PlaneReader;

template <>
class PlaneReader<1> {
 public:
  static constexpr unsigned kSharedWords = quad::kNumStates * 2 << quad::kBitsPerStep;

  // All threads of the block take part. `shared`: kSharedWords words for all.
  __device__ PlaneReader(unsigned* shared, unsigned budget) : step_(shared), budget_(budget) {
    constexpr unsigned kStepWords = quad::kNumStates << quad::kBitsPerStep;
    const unsigned num_last = quad::num_last_bits(budget), offset = quad::ReaderTables::last_offset(num_last);
    for (unsigned i = threadIdx.x; i < kStepWords; i += blockDim.x) shared[i] = kReaderTables.step[i];
    for (unsigned i = threadIdx.x; i < quad::kNumStates << num_last; i += blockDim.x) {
      shared[kStepWords + i] = kReaderTables.last[offset + i];
    }
    __syncthreads();
    last_ = shared + kStepWords;
  }

  template <int kWords>
  __device__ void begin(BitQueue<kWords>& queue, bool) const {
    queue.skip(kHeaderBits - 1);
  }

  template <int kWords>
  __device__ LastPlane read(BitQueue<kWords>& queue, unsigned* coefficients) const {
    return quad::read_planes(queue, budget_, step_, last_, coefficients);
  }

 private:
  const unsigned* step_;
  const unsigned* last_;
  unsigned budget_;
};

// A step takes a plane's bits of the significant coefficients and its first run of zeros, or a further run: every thread
// goes at its own pace, and no step branches.
template <>
class PlaneReader<2> {
 public:
  static constexpr unsigned kSharedWords = PlaneStack::kSharedWords;

  // `shared`: kSharedWords words of the thread's own.
  __device__ PlaneReader(unsigned* shared, unsigned budget) : planes_(shared), budget_(static_cast<int>(budget)) {}

  // The header's last bits go, and the 0 tests of the planes before the first 1.
  template <int kWords>
  __device__ void begin(BitQueue<kWords>& queue, bool coded) {
    if (!coded) budget_ = 0;
    constexpr unsigned kLeft = kHeaderBits - 1;
    const unsigned most = smaller(static_cast<unsigned>(budget_), 31 - kLeft);
    const unsigned empty = smaller(leading_zeros(queue.top() << kLeft), most);
    queue.skip(kLeft + empty);
    budget_ -= static_cast<int>(empty);
    planes_.skip(empty);
  }

  // All threads of the warp take part.
  template <int kWords>
  __device__ LastPlane read(BitQueue<kWords>& queue, unsigned* coefficients) {
    unsigned significant = 0, verbatim = 0, plane = 0;
    while (budget_ > 0 && !planes_.full()) {
      const unsigned tests = queue.top() << verbatim;
      plane |= queue.top() & ~(~0u >> verbatim);
      budget_ -= static_cast<int>(verbatim);
      const bool run = significant < 16 && static_cast<int>(tests) < 0;
      // It ends at a 1, at the last coefficient, or with the budget.
      const unsigned limit = smaller(static_cast<unsigned>(budget_ - 1), 15 - significant);
      const unsigned zeros = smaller(leading_zeros(tests << 1), limit);
      unsigned length = run ? 1 + smaller(zeros + 1, limit) : 0;
      plane |= run ? 0x80000000u >> (significant + zeros) : 0;
      significant += run ? zeros + 1 : 0;
      const bool open = significant < 16;
      const bool more = open && static_cast<int>(tests << length) < 0;
      if (open && !more) ++length;  // a 0 test
      queue.skip(verbatim + length);
      budget_ -= static_cast<int>(length);
      verbatim = more ? 0 : significant;
      if (!more) planes_.push(plane);
      if (!more) plane = 0;
    }
    planes_.coefficients(coefficients);
    LastPlane last;
    if (planes_.num_planes() == 0) return last;
    last.planes = planes_.num_planes();
    last.known = 16;
    // Bits past the end were taken for zeros: a last 0 test's, or some of a plane's verbatim ones as well.
    if (budget_ < 0) last.known = significant + static_cast<unsigned>(budget_) + (significant < 16);
    return last;
  }

 private:
  PlaneStack planes_;
  int budget_;
};

// The values of a block from the planes on.
template <int kDimensions, int kWords>
__device__ void decode_values(PlaneReader<kDimensions>& planes, BitQueue<kWords>& queue, unsigned exponent,
                              Rounding rounding, float* block) {
  constexpr int kValues = kValuesPerBlock<kDimensions>;
  unsigned coefficients[kValues], integers[kValues];
  const LastPlane last = planes.read(queue, coefficients);
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
