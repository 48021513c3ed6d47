#pragma once

#include <map>
#include <string>

namespace planmoe {

// What this module was compiled with: torch, compiler, cuda ("off" or its version), cxx11_abi, cpu_kernels.
std::map<std::string, std::string> build_info();

}  // namespace planmoe
