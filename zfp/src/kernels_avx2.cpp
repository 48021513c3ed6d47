// Shared headers come first: only what follows the pragma may use the wider instructions.
#include "block_codec.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

#include "lane_kernel_set.h"
#include "lanes_avx2.h"

namespace planmoe::zfp {

const KernelSet* avx2_kernels() noexcept { return &kLaneKernels<LanesAvx2>; }

}  // namespace planmoe::zfp

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace planmoe::zfp {

const KernelSet* avx2_kernels() noexcept { return nullptr; }

}  // namespace planmoe::zfp

#endif
