// The bits of one block in a stream of 32-bit words, written or read by one thread.
#pragma once

#include "block_codec.h"

namespace planmoe::zfp {
namespace {

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

// Bits [first_bit, first_bit + count) of a stream in registers, the next one on top; zeros follow the last.
template <int kWords>
class BitQueue {
 public:
  __device__ BitQueue(const unsigned* stream, std::size_t first_bit, unsigned count) {
    const unsigned* word = stream + first_bit / 32;
    const unsigned shift = first_bit % 32;
    unsigned current = count > 0 ? word[0] : 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const unsigned following = 32u * (i + 1) < shift + count ? word[i + 1] : 0;
      const unsigned known = count > 32u * i ? count - 32u * i : 0;
      words_[i] = __brev(__funnelshift_r(current, following, shift) & low_mask(known));
      current = following;
    }
  }

  __device__ unsigned top() const { return words_[0]; }

  __device__ void skip(unsigned length) {  // 0..31
#pragma unroll
    for (int i = 0; i < kWords - 1; ++i) words_[i] = __funnelshift_l(words_[i + 1], words_[i], length);
    words_[kWords - 1] <<= length;
  }

  __device__ bool empty() const {
    unsigned all = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) all |= words_[i];
    return all == 0;
  }

 private:
  unsigned words_[kWords];
};

}  // namespace
}  // namespace planmoe::zfp
