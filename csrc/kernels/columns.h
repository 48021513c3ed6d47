#pragma once
// The numbers that a row carries behind its values, written row by row from the router's tensors.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace planmoe {

// One tensor of numbers, [K, T] of any strides: K per row, each cut to its first `bytes` bytes (of a two's complement
// integer in memory the low ones).
struct Column {
  at::Tensor values;
  int64_t bytes;
};

// uint8 [T, width]: row t holds the numbers [:, t] of all columns one after the other; bytes behind them have any value.
// ValueError for columns of different T or devices, of fewer bytes than asked for, or too many for `width`.
at::Tensor pack_columns(const std::vector<Column>& columns, int64_t width);

}  // namespace planmoe
