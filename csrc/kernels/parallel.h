#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

namespace planmoe {

// Set on the threads of links: they must not start a pool of threads of their own beside the caller's.
inline thread_local bool is_link_thread = false;

// function(row) for every row, by several threads where rows of `hidden` values are work enough.
template <class Function>
void for_each_row(int64_t num_rows, int64_t hidden, const Function& function) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) function(row);
  };
  if (is_link_thread) return range(0, num_rows);
  at::parallel_for(0, num_rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(hidden, 1)), range);
}

}  // namespace planmoe
