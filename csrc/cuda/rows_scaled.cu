// Codecs with a scale per 128 values, four of them per lane: fp8, int8, hadamard_int8, int4. Wire formats: the files of
// these names in csrc/compressor; bytes are the same as there.
#include <cuda_fp8.h>

#include "row_launch.cuh"

namespace planmoe::cuda {
namespace {

constexpr int64_t kBlock = 128;
constexpr unsigned kInfinity = 0x7F800000u;
constexpr unsigned kTiny = (127u - 100u) << 23;  // blocks below 2^-100 are zeros
constexpr float kMostFloat = 3.402823466e+38f;

__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7FC00000u); }
__device__ __forceinline__ int64_t num_blocks(int64_t hidden) { return (hidden + kBlock - 1) / kBlock; }

// Bits of the block's largest magnitude.
__device__ __forceinline__ unsigned largest_of(const float (&values)[4]) {
  unsigned largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7FFFFFFFu);
  return warp_max(largest);
}

struct Scale {
  float scale;
  float inverse;
};

// 1 / value rounded to nearest without a branch, for normal results: Newton's iteration ends there from either neighbour
// of the result for all 2^23 fractions but the one of ones only (tried on every one).
__device__ __forceinline__ float exact_inverse(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
#pragma unroll
  for (int i = 0; i < 2; ++i) result = __fmaf_rn(__fmaf_rn(-value, result, 1.0f), result, result);
  const unsigned bits = __float_as_uint(value);
  const float of_ones = __uint_as_float(((253u - (bits >> 23)) << 23) | 1u);
  return (bits & 0x7FFFFFu) == 0x7FFFFFu ? of_ones : result;
}

// largest / kMost rounded to nearest, and its inverse. One correction of the product is enough for 127 and 448 (tried on
// every fraction).
template <int kMost>
__device__ __forceinline__ Scale scale_to(unsigned largest) {
  static_assert(kMost == 127 || kMost == 448);
  constexpr float kInverse = 1.0f / kMost;
  const float value = __uint_as_float(largest), guess = __fmul_rn(value, kInverse);
  const float scale = __fmaf_rn(__fmaf_rn(-guess, static_cast<float>(kMost), value), kInverse, guess);
  const float inverse = exact_inverse(scale);
  return {largest < kTiny ? 0.0f : scale, largest < kTiny ? 0.0f : inverse};
}

__device__ __forceinline__ char4 int8_codes(const float (&values)[4], float inverse) {
  signed char codes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    codes[i] = static_cast<signed char>(max(-127, min(127, __float2int_rn(__fmul_rn(values[i], inverse)))));
  return {codes[0], codes[1], codes[2], codes[3]};
}

__device__ __forceinline__ void from_int8(char4 codes, float (&values)[4]) {
  values[0] = static_cast<float>(codes.x);
  values[1] = static_cast<float>(codes.y);
  values[2] = static_cast<float>(codes.z);
  values[3] = static_cast<float>(codes.w);
}

// ---- the Hadamard transform ----

// The sign of value 4 * lane + i before and after it.
__device__ __forceinline__ float sign_of(int lane, int i) {
  const int place = 4 * lane + i;
  return __popc(place & (place >> 1) & 0x15) % 2 == 1 ? -1.0f : 1.0f;
}

// Sums over 128 values of a warp, in the order of rows/blocks.h.
__device__ __forceinline__ void hadamard(float (&values)[4], int lane) {
  const float a = values[0] + values[1], b = values[0] - values[1];
  const float c = values[2] + values[3], d = values[2] - values[3];
  values[0] = a + c;
  values[1] = b + d;
  values[2] = a - c;
  values[3] = b - d;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const float sign = (lane & step) != 0 ? -1.0f : 1.0f;  // a product with it is exact
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = __fmaf_rn(values[i], sign, __shfl_xor_sync(kAllLanes, values[i], step));
  }
}

// Returns the power of two that the coefficients have been divided by. The block has `count` values; more are zeros, not
// negative ones, whose signs would show in codes of zero.
__device__ __forceinline__ float to_coefficients(const float (&values)[4], int64_t count, unsigned largest, int lane,
                                                 float (&coefficients)[4]) {
  const unsigned exponent = min(largest >> 23, 253u);
  const float factor = __uint_as_float((254u - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    coefficients[i] = count == kAlways || 4 * lane + i < count ? values[i] * factor * sign_of(lane, i) : 0.0f;
  hadamard(coefficients, lane);
  return __uint_as_float(exponent << 23);
}

__device__ __forceinline__ void from_coefficients(float (&values)[4], float scale, int lane) {
  hadamard(values, lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float value = __fmul_rn(values[i] * sign_of(lane, i), scale);  // never part of an fma: sums are the CPU's
    value = value < -kMostFloat ? -kMostFloat : value;             // not fminf: a NaN stays one
    values[i] = value > kMostFloat ? kMostFloat : value;
  }
}

// ---- the codecs ----

struct Scaled {
  using Value = float;
  static constexpr int kLaneValues = 4;
  static constexpr int kUnroll = 4;
  static constexpr int kWireBytes = 4;

  static __device__ __forceinline__ int64_t column(const WireRow& wire, int64_t unit) {
    return unit * kBlock + 4 * wire.lane;
  }
  static __device__ __forceinline__ int64_t left_of(const WireRow& wire, int64_t unit) {
    return wire.full ? kAlways : wire.hidden - unit * kBlock;
  }
  // Codes of a byte per value, padded to four, then scales.
  static __device__ __forceinline__ uint8_t* scale_at(const WireRow& wire, int64_t unit) {
    return wire.bytes + (wire.hidden + 3) / 4 * 4 + 4 * unit;
  }
};

struct Int8 : Scaled {
  static __device__ __forceinline__ void decode(const WireRow& wire, int64_t unit, float (&values)[4]) {
    const float scale = load_bytes<float>(scale_at(wire, unit), wire.aligned);
    char4 codes{0, 0, 0, 0};
    if (column(wire, unit) < wire.count()) codes = load_bytes<char4>(wire.bytes + column(wire, unit), wire.aligned);
    from_int8(codes, values);
#pragma unroll
    for (float& value : values) value = __fmul_rn(value, scale);
  }

  static __device__ __forceinline__ void encode(const WireRow& wire, int64_t unit, const float (&values)[4]) {
    const unsigned largest = largest_of(values);
    const bool finite = largest < kInfinity;
    const Scale scale = scale_to<127>(finite ? largest : 0);
    if (wire.lane == 0) store_bytes(scale_at(wire, unit), wire.aligned, finite ? scale.scale : quiet_nan());
    const char4 codes = int8_codes(values, scale.inverse);
    if (column(wire, unit) < wire.count())
      store_bytes(wire.bytes + column(wire, unit), wire.aligned, finite ? codes : char4{0, 0, 0, 0});
  }
};

struct Fp8 : Scaled {
  static __device__ __forceinline__ void decode(const WireRow& wire, int64_t unit, float (&values)[4]) {
    const float scale = load_bytes<float>(scale_at(wire, unit), wire.aligned);
    unsigned codes = 0;
    if (column(wire, unit) < wire.count()) codes = load_bytes<unsigned>(wire.bytes + column(wire, unit), wire.aligned);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const auto half = static_cast<__nv_fp8x2_storage_t>(codes >> (16 * pair));
      const __half2 both(__nv_cvt_fp8x2_to_halfraw2(half, __NV_E4M3));
      values[2 * pair] = __fmul_rn(__low2float(both), scale);
      values[2 * pair + 1] = __fmul_rn(__high2float(both), scale);
    }
  }

  static __device__ __forceinline__ void encode(const WireRow& wire, int64_t unit, const float (&values)[4]) {
    const unsigned largest = largest_of(values);
    const bool finite = largest < kInfinity;
    const Scale scale = scale_to<448>(finite ? largest : 0);
    if (wire.lane == 0) store_bytes(scale_at(wire, unit), wire.aligned, finite ? scale.scale : quiet_nan());
    unsigned codes = 0;
#pragma unroll
    for (int pair = 1; pair >= 0; --pair) {
      const float2 both{values[2 * pair] * scale.inverse, values[2 * pair + 1] * scale.inverse};
      codes = codes << 16 | __nv_cvt_float2_to_fp8x2(both, __NV_SATFINITE, __NV_E4M3);
    }
    if (column(wire, unit) < wire.count())
      store_bytes(wire.bytes + column(wire, unit), wire.aligned, finite ? codes : 0u);
  }
};

struct HadamardInt8 : Scaled {
  static __device__ __forceinline__ uint8_t* scale_at(const WireRow& wire, int64_t unit) {
    return wire.bytes + kBlock * num_blocks(wire.hidden) + 4 * unit;
  }

  static __device__ __forceinline__ void decode(const WireRow& wire, int64_t unit, float (&values)[4]) {
    const float scale = load_bytes<float>(scale_at(wire, unit), wire.aligned);
    from_int8(load_bytes<char4>(wire.bytes + column(wire, unit), wire.aligned), values);
    from_coefficients(values, scale, wire.lane);
  }

  static __device__ __forceinline__ void encode(const WireRow& wire, int64_t unit, const float (&values)[4]) {
    const unsigned largest = largest_of(values);
    const bool coded = largest >= kTiny && largest < kInfinity;  // the same for all lanes; others are coded for nothing
    float coefficients[4];
    const float unit_scale = to_coefficients(values, left_of(wire, unit), largest, wire.lane, coefficients);
    const Scale found = scale_to<127>(largest_of(coefficients));
    const char4 codes = int8_codes(coefficients, found.inverse);
    const float scale = found.scale * (1.0f / kBlock) * unit_scale;
    const float other = largest < kTiny ? 0.0f : quiet_nan();
    if (wire.lane == 0) store_bytes(scale_at(wire, unit), wire.aligned, coded ? scale : other);
    store_bytes(wire.bytes + column(wire, unit), wire.aligned, coded ? codes : char4{0, 0, 0, 0});
  }
};

struct Int4 : Scaled {
  static __device__ __forceinline__ uint8_t* scale_at(const WireRow& wire, int64_t unit) {
    return wire.bytes + kBlock / 2 * num_blocks(wire.hidden) + 2 * unit;
  }

  static __device__ __forceinline__ float level(int lane) {
    constexpr float kLevel[8] = {0.12839503f, 0.388048299f, 0.656759119f, 0.942340456f,
                                 1.2562312f,  1.61804639f,  2.06901723f,  2.73258957f};
    float own = kLevel[0];
#pragma unroll
    for (int i = 1; i < 8; ++i) own = lane % 8 == i ? kLevel[i] : own;
    return own;
  }

  static __device__ __forceinline__ unsigned code_of(float value) {
    constexpr float kThreshold[7] = {0.258221665f, 0.522403709f, 0.799549788f, 1.09928583f,
                                     1.43713879f,  1.84353181f,  2.4008034f};
    unsigned code = __float_as_uint(value) >> 28 & 8;
#pragma unroll
    for (const float threshold : kThreshold) code += fabsf(value) > threshold;
    return code;
  }

  // In sixteen parts and in the order of rows/int4.h.
  static __device__ __forceinline__ float root_mean_square(const float (&values)[4], int lane) {
    float sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float square = __fmul_rn(values[i], values[i]);
      sums[i] = __shfl_sync(kAllLanes, square, lane % 4);
#pragma unroll
      for (int start = 1; start < 8; ++start)
        sums[i] = __fadd_rn(sums[i], __shfl_sync(kAllLanes, square, 4 * start + lane % 4));
      sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(kAllLanes, sums[i], 2));
      sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(kAllLanes, sums[i], 1));
    }
    const float total = __fadd_rn(__fadd_rn(sums[0], sums[2]), __fadd_rn(sums[1], sums[3]));
    return __fsqrt_rn(total * (1.0f / kBlock));
  }

  static __device__ __forceinline__ void decode(const WireRow& wire, int64_t unit, float (&values)[4]) {
    const auto scale = load_bytes<uint16_t>(scale_at(wire, unit), wire.aligned);
    const uint8_t* packed = wire.bytes + kBlock / 2 * unit + 4 * (wire.lane % 16);
    const unsigned codes = load_bytes<unsigned>(packed, wire.aligned) >> (wire.lane < 16 ? 0 : 4);
    const float own = level(wire.lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned code = codes >> (8 * i);
      const float magnitude = __shfl_sync(kAllLanes, own, static_cast<int>(code & 7));
      values[i] = code & 8 ? -magnitude : magnitude;
    }
    from_coefficients(values, __bfloat162float(__ushort_as_bfloat16(scale)), wire.lane);
  }

  static __device__ __forceinline__ void encode(const WireRow& wire, int64_t unit, const float (&values)[4]) {
    const unsigned largest = largest_of(values);
    const bool coded = largest >= kTiny && largest < kInfinity;  // the same for all lanes; others are coded for nothing
    float coefficients[4];
    const float unit_scale = to_coefficients(values, left_of(wire, unit), largest, wire.lane, coefficients);
    const float rms = __bfloat162float(__float2bfloat16_rn(root_mean_square(coefficients, wire.lane)));
    const float inverse = exact_inverse(rms);
    unsigned codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes |= code_of(__fmul_rn(coefficients[i], inverse)) << (8 * i);
    codes = coded ? codes : 0u;
    const uint16_t scale = __bfloat16_as_ushort(__float2bfloat16_rn(rms * (1.0f / kBlock) * unit_scale));
    const uint16_t other = largest < kTiny ? 0 : 0x7FC0;
    codes |= __shfl_down_sync(kAllLanes, codes, 16) << 4;
    if (wire.lane == 0) store_bytes(scale_at(wire, unit), wire.aligned, coded ? scale : other);
    if (wire.lane < 16) store_bytes(wire.bytes + kBlock / 2 * unit + 4 * wire.lane, wire.aligned, codes);
  }
};

const bool added = add_for_all_dtypes<Int8>("int8") && add_for_all_dtypes<Fp8>("fp8") &&
                   add_for_all_dtypes<HadamardInt8>("hadamard_int8") && add_for_all_dtypes<Int4>("int4");

}  // namespace
}  // namespace planmoe::cuda
