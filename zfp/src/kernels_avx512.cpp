// Shared headers come first: only what follows the pragma may use the wider instructions.
#include "block_codec.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd")
// GCC before 13 warns of its own header's deliberately undefined operands (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "lane_kernel_set.h"
#include "lanes_avx512.h"

namespace planmoe::zfp {

const KernelSet* avx512_kernels() noexcept { return &kLaneKernels<LanesAvx512>; }

}  // namespace planmoe::zfp

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace planmoe::zfp {

const KernelSet* avx512_kernels() noexcept { return nullptr; }

}  // namespace planmoe::zfp

#endif
