// Constants of the zfp block format shared by every kernel.
#pragma once

#include <cstdint>

// Functions that the CUDA code shares.
#ifdef __CUDACC__
#define PLANMOE_ZFP_SHARED __host__ __device__
#else
#define PLANMOE_ZFP_SHARED
#endif

namespace planmoe::zfp {

constexpr unsigned kHeaderBits = 9;         // flag, then the 8-bit biased exponent
constexpr std::uint32_t kEscapeHeader = 1;  // flag set, exponent 0: no zfp encoder writes it; marks a non-finite block
constexpr int kNumPlanes = 32;
constexpr unsigned kMaxBlockBits = 512;  // 16 values at 32 bits

// Field of the IEEE exponent (0..254 for finite values) of a block's largest magnitude. A block below kMinExponent is
// flushed to zeros: its scale 2^(30 - e) is not a float.
constexpr std::uint32_t kMinExponent = 29;
constexpr std::uint32_t kNonFiniteExponent = 255;
constexpr std::uint32_t kScaleBias = 283;  // exponent field of the scale = kScaleBias - exponent field of the magnitude
constexpr std::uint32_t kMinDecodedExponent = 8;  // libzfp's decoding scale underflows to 0 below this header exponent

constexpr std::uint32_t kNegabinary = 0xAAAAAAAAu;
constexpr std::uint32_t kRoundKnown = 0x2AAAAAAAu;    // half a unit of the last known plane, in negabinary
constexpr std::uint32_t kRoundUnknown = 0x55555555u;  // of the plane above it
constexpr std::uint32_t kQuietNan = 0x7FC00000u;

template <int kDimensions>
constexpr int kValuesPerBlock = kDimensions == 2 ? 16 : 4;

// Coefficient j of the stream is value value_index(j) of the block: by total frequency, in 2-d
// 0 1 4 5 2 8 6 9 3 12 10 7 13 11 14 15, here one hexadecimal digit each from the right.
template <int kDimensions>
PLANMOE_ZFP_SHARED constexpr int value_index(int j) {
  return kDimensions == 1 ? j : static_cast<int>(0xFEBD7AC396825410u >> (4 * j) & 15u);
}

}  // namespace planmoe::zfp
