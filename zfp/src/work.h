// A checked call: what zfp.cpp and zfp_cuda.cu do with their arguments first.
#pragma once

#include <cstddef>

#include "field.h"

namespace planmoe::zfp {

// Consecutive equal grids: one for a field, one per row for rows, or one for all rows where their streams join exactly.
struct Work {
  BlockGrid grid;
  std::size_t num_grids = 1;
  std::size_t num_bytes = 0;
};

Status plan(const Field& field, const Options& options, Work& work) noexcept;
Status plan(const Rows& rows, const Options& options, Work& work) noexcept;

// Both also find what must not be null to be so. kOk with num_bytes = 0: there is nothing to do.
Status check_encode(const Work& work, const void* values, const void* stream, std::size_t stream_capacity) noexcept;
Status check_decode(const Work& work, const void* values, const void* stream, std::size_t stream_size) noexcept;

}  // namespace planmoe::zfp
