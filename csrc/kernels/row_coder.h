#pragma once
// One row on the CPU: through a codec, and between the dtypes of tensors and the float32 (float64) that it is worked on in.

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../compressor/abstract.h"

namespace planmoe {

template <class scalar>
using Wide = std::conditional_t<std::is_same_v<scalar, double>, double, float>;

template <class scalar>
Wide<scalar> widen(scalar value) {
  if constexpr (std::is_same_v<scalar, c10::BFloat16>) {
    const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
  } else {
    return static_cast<Wide<scalar>>(value);
  }
}

// To nearest, ties to even, any NaN to c10's; without a branch, so that loops over a row become vector instructions.
template <class scalar, class wide_t>
scalar narrow(wide_t value) {
  if constexpr (std::is_same_v<scalar, c10::BFloat16>) {
    const auto single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t result = (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded;
    return c10::BFloat16(static_cast<uint16_t>(result), c10::BFloat16::from_bits());
  } else {
    return static_cast<scalar>(value);
  }
}

// A row of values as the CPU kernels see it: `Wide` numbers in a scratch row of their own thread.
template <class wide_t>
wide_t* scratch(int64_t hidden) {
  thread_local std::vector<wide_t> row;
  if (static_cast<int64_t>(row.size()) < hidden) row.resize(hidden);
  return row.data();
}

// The CPU's codec of one row: values of `scalar` on the wire's side of a RowCodec, or as they are.
template <class scalar>
class RowCoder {
 public:
  // ValueError for a codec that cannot carry `scalar`.
  RowCoder(const AbstractCompressor& codec, int64_t hidden)
      : identity_(codec.is_identity()), codec_(dynamic_cast<const RowCodec*>(&codec)), hidden_(hidden) {
    codec.check_dtype(c10::CppTypeToScalarType<scalar>::value);
  }

  void encode(const Wide<scalar>* values, uint8_t* wire) const {
    if (identity_) {
      for (int64_t i = 0; i < hidden_; ++i) {
        const auto value = narrow<scalar>(values[i]);
        std::memcpy(wire + i * sizeof(scalar), &value, sizeof(scalar));
      }
    } else if constexpr (!std::is_same_v<scalar, double>) {
      codec_->encode_row(values, hidden_, c10::CppTypeToScalarType<scalar>::value, wire);
    }
  }

  void decode(const uint8_t* wire, Wide<scalar>* values) const {
    if (identity_) {
      for (int64_t i = 0; i < hidden_; ++i) {
        scalar value;
        std::memcpy(&value, wire + i * sizeof(scalar), sizeof(scalar));
        values[i] = widen(value);
      }
    } else if constexpr (!std::is_same_v<scalar, double>) {
      codec_->decode_row(wire, hidden_, c10::CppTypeToScalarType<scalar>::value, values);
    }
  }

  // The same from and to rows of another dtype.
  template <class other>
  void encode_from(const other* values, uint8_t* wire) const {
    if constexpr (std::is_same_v<other, Wide<scalar>>) {
      encode(values, wire);
    } else {
      auto* row = scratch<Wide<scalar>>(hidden_);
      for (int64_t h = 0; h < hidden_; ++h) row[h] = static_cast<Wide<scalar>>(widen(values[h]));
      encode(row, wire);
    }
  }

  template <class other>
  void decode_to(const uint8_t* wire, other* values) const {
    if constexpr (std::is_same_v<other, Wide<scalar>>) {
      decode(wire, values);
    } else {
      auto* row = scratch<Wide<scalar>>(hidden_);
      decode(wire, row);
      for (int64_t h = 0; h < hidden_; ++h) values[h] = narrow<other>(row[h]);
    }
  }

 private:
  bool identity_;
  const RowCodec* codec_;
  int64_t hidden_;
};

// Sixteen sums at a time, so that the compiler may use vectors; the order is fixed.
template <class wide_t, class scalar>
wide_t dot(const wide_t* left, const scalar* right, int64_t count) {
  constexpr int64_t kLanes = 16;
  wide_t sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += left[i + lane] * widen(right[i + lane]);
  wide_t total = 0;
  for (; i < count; ++i) total += left[i] * widen(right[i]);
  for (const wide_t sum : sums) total += sum;
  return total;
}

}  // namespace planmoe
