#include "build_info.h"

#include <torch/version.h>

namespace planmoe {

std::map<std::string, std::string> build_info() {
  return {
      {"torch", PLANMOE_TORCH_VERSION}, {"compiler", __VERSION__},
      {"cuda", PLANMOE_CUDA_VERSION},   {"cxx11_abi", std::to_string(_GLIBCXX_USE_CXX11_ABI)},
      {"cpu_kernels", "portable"},
  };
}

}  // namespace planmoe
