// Two vectors handled as one: twice the blocks, and each half hides the other's latency. See lane_kernel.h for what
// each operation means.
#pragma once

#include <cstddef>
#include <cstdint>

namespace planmoe::zfp {
namespace {

template <class Lanes>
struct LanesTwice {
  struct Vector {
    typename Lanes::Vector low, high;
  };
  struct Mask {
    typename Lanes::Mask low, high;
  };
  static constexpr std::size_t kHalf = Lanes::kLanes;
  static constexpr std::size_t kLanes = 2 * kHalf;

  static Vector splat(std::uint32_t value) { return {Lanes::splat(value), Lanes::splat(value)}; }
  static Vector load(const std::uint32_t* source) { return {Lanes::load(source), Lanes::load(source + kHalf)}; }
  static void store(std::uint32_t* target, Vector a) {
    Lanes::store(target, a.low);
    Lanes::store(target + kHalf, a.high);
  }
  static void store_where(Mask mask, std::uint32_t* target, Vector a) {
    Lanes::store_where(mask.low, target, a.low);
    Lanes::store_where(mask.high, target + kHalf, a.high);
  }

  static Vector add(Vector a, Vector b) { return each<Lanes::add>(a, b); }
  static Vector subtract(Vector a, Vector b) { return each<Lanes::subtract>(a, b); }
  static Vector smaller(Vector a, Vector b) { return each<Lanes::smaller>(a, b); }
  static Vector larger(Vector a, Vector b) { return each<Lanes::larger>(a, b); }
  static Vector bit_and(Vector a, Vector b) { return each<Lanes::bit_and>(a, b); }
  static Vector bit_or(Vector a, Vector b) { return each<Lanes::bit_or>(a, b); }
  static Vector bit_xor(Vector a, Vector b) { return each<Lanes::bit_xor>(a, b); }
  static Vector first_bits_only(Vector a, Vector b) { return each<Lanes::first_bits_only>(a, b); }
  static Vector half(Vector a) { return each<Lanes::half>(a); }
  template <int kCount>
  static Vector shift_left(Vector a) {
    return each<Lanes::template shift_left<kCount>>(a);
  }
  template <int kCount>
  static Vector shift_right(Vector a) {
    return each<Lanes::template shift_right<kCount>>(a);
  }
  static Vector shift_left_uniform(Vector a, int count) {
    return {Lanes::shift_left_uniform(a.low, count), Lanes::shift_left_uniform(a.high, count)};
  }
  static Vector shift_right_uniform(Vector a, int count) {
    return {Lanes::shift_right_uniform(a.low, count), Lanes::shift_right_uniform(a.high, count)};
  }
  static Vector shift_left_by(Vector a, Vector count) { return each<Lanes::shift_left_by>(a, count); }
  static Vector shift_right_by(Vector a, Vector count) { return each<Lanes::shift_right_by>(a, count); }
  static Vector bit_length(Vector a) { return each<Lanes::bit_length>(a); }

  static Mask equal(Vector a, Vector b) { return {Lanes::equal(a.low, b.low), Lanes::equal(a.high, b.high)}; }
  static Mask greater(Vector a, Vector b) { return {Lanes::greater(a.low, b.low), Lanes::greater(a.high, b.high)}; }
  static Mask both(Mask a, Mask b) { return {Lanes::both(a.low, b.low), Lanes::both(a.high, b.high)}; }
  static Mask first_only(Mask a, Mask b) {
    return {Lanes::first_only(a.low, b.low), Lanes::first_only(a.high, b.high)};
  }
  static Vector select(Mask mask, Vector yes, Vector no) {
    return {Lanes::select(mask.low, yes.low, no.low), Lanes::select(mask.high, yes.high, no.high)};
  }
  static bool any(Mask mask) { return Lanes::any(Lanes::either(mask.low, mask.high)); }
  static bool all(Mask mask) { return Lanes::all(Lanes::both(mask.low, mask.high)); }
  static bool any_bit(Vector a) { return Lanes::any_bit(Lanes::bit_or(a.low, a.high)); }

  static Vector multiply_floats(Vector a, Vector b) { return each<Lanes::multiply_floats>(a, b); }
  static Vector truncate(Vector a) { return each<Lanes::truncate>(a); }
  static Vector to_float(Vector a) { return each<Lanes::to_float>(a); }

  template <int kValues>
  static void load_blocks(const float* blocks, Vector* values) {
    typename Lanes::Vector low[kValues], high[kValues];
    Lanes::template load_blocks<kValues>(blocks, low);
    Lanes::template load_blocks<kValues>(blocks + kHalf * kValues, high);
    for (int i = 0; i < kValues; ++i) values[i] = {low[i], high[i]};
  }
  template <int kValues>
  static void store_blocks(const Vector* values, float* blocks) {
    typename Lanes::Vector low[kValues], high[kValues];
    for (int i = 0; i < kValues; ++i) low[i] = values[i].low, high[i] = values[i].high;
    Lanes::template store_blocks<kValues>(low, blocks);
    Lanes::template store_blocks<kValues>(high, blocks + kHalf * kValues);
  }

 private:
  using One = typename Lanes::Vector;

  template <One (*operation)(One)>
  static Vector each(Vector a) {
    return {operation(a.low), operation(a.high)};
  }
  template <One (*operation)(One, One)>
  static Vector each(Vector a, Vector b) {
    return {operation(a.low, b.low), operation(a.high, b.high)};
  }
};

}  // namespace
}  // namespace planmoe::zfp
