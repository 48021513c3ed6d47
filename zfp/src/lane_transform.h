// Values <-> bit planes on vectors of 32-bit lanes, one block per lane. See lane_kernel.h.
#pragma once

#include "block_codec.h"

#if defined(__clang__)
#define PLANMOE_ZFP_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define PLANMOE_ZFP_UNROLL _Pragma("GCC unroll 16")
#else
#define PLANMOE_ZFP_UNROLL
#endif

namespace planmoe::zfp {
namespace {

template <class Lanes, int kDimensions>
struct LaneTransform {
  using Vector = typename Lanes::Vector;
  using Mask = typename Lanes::Mask;
  static constexpr int kValues = kValuesPerBlock<kDimensions>;

  // `planes` from the kLanes * kValues floats of `blocks`, as plane_bits reads them; returns the blocks' headers.
  static Vector forward(const float* blocks, Vector* planes) {
    Vector values[kValues];
    Lanes::template load_blocks<kValues>(blocks, values);
    const Vector header = to_integers(values);
    if (kDimensions == 1) forward_lift(values, 1);
    PLANMOE_ZFP_UNROLL
    for (int y = 0; y < 4 && kDimensions == 2; ++y) forward_lift(values + 4 * y, 1);
    PLANMOE_ZFP_UNROLL
    for (int x = 0; x < 4 && kDimensions == 2; ++x) forward_lift(values + x, 4);
    const Vector negabinary = Lanes::splat(kNegabinary);
    PLANMOE_ZFP_UNROLL
    for (int j = 0; j < kValues; ++j) {
      Vector value = values[value_index<kDimensions>(j)];
      planes[j] = Lanes::bit_xor(Lanes::add(value, negabinary), negabinary);
    }
    transpose_bits(planes);
    return header;
  }

  // The reverse, with the coefficients (planes after transpose_bits) in place of the planes.
  static void inverse(const Vector* coefficients, Vector header, float* blocks) {
    const Vector negabinary = Lanes::splat(kNegabinary);
    Vector values[kValues];
    PLANMOE_ZFP_UNROLL
    for (int j = 0; j < kValues; ++j) {
      Vector value = Lanes::subtract(Lanes::bit_xor(coefficients[j], negabinary), negabinary);
      values[value_index<kDimensions>(j)] = value;
    }
    PLANMOE_ZFP_UNROLL
    for (int x = 0; x < 4 && kDimensions == 2; ++x) inverse_lift(values + x, 4);
    PLANMOE_ZFP_UNROLL
    for (int y = 0; y < 4 && kDimensions == 2; ++y) inverse_lift(values + 4 * y, 1);
    if (kDimensions == 1) inverse_lift(values, 1);
    to_floats(values, header);
    Lanes::template store_blocks<kValues>(values, blocks);
  }

  // Bit j of the result is bit `plane` of coefficient j.
  static Vector plane_bits(const Vector* planes, int plane) {
    Vector group = Lanes::shift_right_uniform(planes[plane % kValues], plane / kValues * kValues);
    return Lanes::bit_and(group, Lanes::splat((1u << kValues) - 1));
  }

  static void deposit_plane(Vector bits, int plane, Vector* planes) {
    Vector group = Lanes::shift_left_uniform(bits, plane / kValues * kValues);
    planes[plane % kValues] = Lanes::bit_or(planes[plane % kValues], group);
  }

  // Transposes each kValues x kValues square of bits of every lane: coefficients <-> planes.
  static void transpose_bits(Vector* rows) {
    if constexpr (kDimensions == 2) {
      exchange<8>(rows, 0x00FF00FFu);
      exchange<4>(rows, 0x0F0F0F0Fu);
    }
    exchange<2>(rows, 0x33333333u);
    exchange<1>(rows, 0x55555555u);
  }

  // True for blocks that carry planes: neither zero nor escaped.
  static Mask is_coded(Vector header) {
    const Vector one = Lanes::splat(1);
    Mask flagged = Lanes::equal(Lanes::bit_and(header, one), one);
    return Lanes::both(flagged, Lanes::greater(header, one));
  }

 private:
  template <int kDistance>
  static void exchange(Vector* rows, std::uint32_t low_bits) {
    const Vector mask = Lanes::splat(low_bits);
    PLANMOE_ZFP_UNROLL
    for (int a = 0; a < kValues; ++a) {
      if ((a & kDistance) != 0) continue;
      Vector& upper = rows[a];
      Vector& lower = rows[a + kDistance];
      Vector difference = Lanes::bit_xor(Lanes::template shift_right<kDistance>(upper), lower);
      difference = Lanes::bit_and(difference, mask);
      lower = Lanes::bit_xor(lower, difference);
      upper = Lanes::bit_xor(upper, Lanes::template shift_left<kDistance>(difference));
    }
  }

  // Floats to integers of the blocks' common exponents, zeros in blocks that carry no planes.
  static Vector to_integers(Vector* values) {
    const Vector magnitude_mask = Lanes::splat(0x7FFFFFFFu);
    Vector largest = Lanes::splat(0);
    PLANMOE_ZFP_UNROLL
    for (int i = 0; i < kValues; ++i) largest = Lanes::larger(largest, Lanes::bit_and(values[i], magnitude_mask));
    const Vector exponent = Lanes::template shift_right<23>(largest);
    const Mask finite = Lanes::greater(Lanes::splat(kNonFiniteExponent), exponent);
    const Mask coded = Lanes::both(finite, Lanes::greater(exponent, Lanes::splat(kMinExponent - 1)));
    const Vector scale = Lanes::template shift_left<23>(Lanes::subtract(Lanes::splat(kScaleBias), exponent));
    const Vector zero = Lanes::splat(0);
    PLANMOE_ZFP_UNROLL
    for (int i = 0; i < kValues; ++i) {
      values[i] = Lanes::select(coded, Lanes::truncate(Lanes::multiply_floats(values[i], scale)), zero);
    }
    const Vector header = Lanes::add(Lanes::add(exponent, exponent), Lanes::splat(3));
    return Lanes::select(coded, header, Lanes::select(finite, zero, Lanes::splat(kEscapeHeader)));
  }

  // As decode_block does it; escaped blocks become NaN, zero blocks have zero integers.
  static void to_floats(Vector* values, Vector header) {
    const Vector exponent = Lanes::template shift_right<1>(header);
    const Vector sum = Lanes::add(exponent, Lanes::splat(97));
    const Vector first = Lanes::template shift_right<1>(sum);
    const Vector first_scale = Lanes::template shift_left<23>(first);
    const Mask in_range = Lanes::greater(exponent, Lanes::splat(kMinDecodedExponent - 1));
    Vector second_scale = Lanes::template shift_left<23>(Lanes::subtract(sum, first));
    second_scale = Lanes::select(in_range, second_scale, Lanes::splat(0));
    const Mask escaped = Lanes::equal(header, Lanes::splat(kEscapeHeader));
    const Mask zero_block = Lanes::equal(Lanes::bit_and(header, Lanes::splat(1)), Lanes::splat(0));
    const Vector nan = Lanes::splat(kQuietNan), zero = Lanes::splat(0);
    PLANMOE_ZFP_UNROLL
    for (int i = 0; i < kValues; ++i) {
      Vector value = Lanes::multiply_floats(Lanes::to_float(values[i]), first_scale);
      value = Lanes::multiply_floats(value, second_scale);
      values[i] = Lanes::select(zero_block, zero, Lanes::select(escaped, nan, value));
    }
  }

  static void forward_lift(Vector* values, int stride) {
    Vector x = values[0], y = values[stride], z = values[2 * stride], w = values[3 * stride];
    x = Lanes::half(Lanes::add(x, w)), w = Lanes::subtract(w, x);
    z = Lanes::half(Lanes::add(z, y)), y = Lanes::subtract(y, z);
    x = Lanes::half(Lanes::add(x, z)), z = Lanes::subtract(z, x);
    w = Lanes::half(Lanes::add(w, y)), y = Lanes::subtract(y, w);
    w = Lanes::add(w, Lanes::half(y)), y = Lanes::subtract(y, Lanes::half(w));
    values[0] = x, values[stride] = y, values[2 * stride] = z, values[3 * stride] = w;
  }

  static void inverse_lift(Vector* values, int stride) {
    Vector x = values[0], y = values[stride], z = values[2 * stride], w = values[3 * stride];
    y = Lanes::add(y, Lanes::half(w)), w = Lanes::subtract(w, Lanes::half(y));
    y = Lanes::add(y, w), w = Lanes::subtract(Lanes::add(w, w), y);
    z = Lanes::add(z, x), x = Lanes::subtract(Lanes::add(x, x), z);
    y = Lanes::add(y, z), z = Lanes::subtract(Lanes::add(z, z), y);
    w = Lanes::add(w, x), x = Lanes::subtract(Lanes::add(x, x), w);
    values[0] = x, values[stride] = y, values[2 * stride] = z, values[3 * stride] = w;
  }
};

}  // namespace
}  // namespace planmoe::zfp
