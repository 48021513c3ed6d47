#include "row_kernels.h"

#include <map>
#include <utility>

namespace planmoe::cuda {
namespace {

using Table = std::map<std::pair<std::string, Scalar>, RowKernels>;

// Filled while the module loads, read-only after.
Table& table() {
  static Table kernels;
  return kernels;
}

}  // namespace

const RowKernels* find_row_kernels(const std::string& codec, Scalar dtype) {
  const auto found = table().find({codec, dtype});
  return found == table().end() ? nullptr : &found->second;
}

bool add_row_kernels(const std::string& codec, Scalar dtype, const RowKernels& kernels) {
  return table().emplace(std::make_pair(codec, dtype), kernels).second;
}

}  // namespace planmoe::cuda
