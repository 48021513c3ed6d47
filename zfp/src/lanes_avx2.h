// 8 lanes of 32 bits: AVX2 and F16C. See lane_kernel.h for what each operation means.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace planmoe::zfp {
namespace {

struct LanesAvx2 {
  using Vector = __m256i;
  using Mask = __m256i;  // all ones or all zeros in each lane
  static constexpr std::size_t kLanes = 8;

  static Vector splat(std::uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
  static Vector load(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }
  static void store(void* target, Vector value) { _mm256_storeu_si256(static_cast<__m256i*>(target), value); }
  static void store_where(Mask mask, void* target, Vector value) { store(target, select(mask, value, load(target))); }

  static Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm256_sub_epi32(a, b); }
  static Vector smaller(Vector a, Vector b) { return _mm256_min_epu32(a, b); }
  static Vector larger(Vector a, Vector b) { return _mm256_max_epu32(a, b); }
  static Vector bit_and(Vector a, Vector b) { return _mm256_and_si256(a, b); }
  static Vector bit_or(Vector a, Vector b) { return _mm256_or_si256(a, b); }
  static Vector bit_xor(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
  static Vector first_bits_only(Vector a, Vector b) { return _mm256_andnot_si256(b, a); }
  static Vector half(Vector a) { return _mm256_srai_epi32(a, 1); }
  template <int kCount>
  static Vector shift_left(Vector a) {
    return _mm256_slli_epi32(a, kCount);
  }
  template <int kCount>
  static Vector shift_right(Vector a) {
    return _mm256_srli_epi32(a, kCount);
  }
  static Vector shift_left_uniform(Vector a, int count) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(count)); }
  static Vector shift_right_uniform(Vector a, int count) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(count)); }
  static Vector shift_left_by(Vector a, Vector count) { return _mm256_sllv_epi32(a, count); }
  static Vector shift_right_by(Vector a, Vector count) { return _mm256_srlv_epi32(a, count); }

  // One more than the position of the highest set bit, 0 for 0; for values below 2^24, which are exact as floats.
  static Vector bit_length(Vector a) {
    Vector exponent = shift_right<23>(_mm256_castps_si256(_mm256_cvtepi32_ps(a)));
    return _mm256_max_epi32(subtract(exponent, splat(126)), _mm256_setzero_si256());
  }

  static Mask equal(Vector a, Vector b) { return _mm256_cmpeq_epi32(a, b); }
  static Mask greater(Vector a, Vector b) { return _mm256_cmpgt_epi32(a, b); }  // signed
  static Mask both(Mask a, Mask b) { return _mm256_and_si256(a, b); }
  static Mask either(Mask a, Mask b) { return _mm256_or_si256(a, b); }
  static Mask first_only(Mask a, Mask b) { return _mm256_andnot_si256(b, a); }
  static Vector select(Mask mask, Vector yes, Vector no) { return _mm256_blendv_epi8(no, yes, mask); }
  static bool any(Mask mask) { return any_bit(mask); }
  static bool all(Mask mask) { return _mm256_movemask_epi8(mask) == -1; }
  static bool any_bit(Vector a) { return _mm256_testz_si256(a, a) == 0; }

  static Vector multiply_floats(Vector a, Vector b) {
    return _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
  }
  static Vector truncate(Vector a) { return _mm256_cvttps_epi32(_mm256_castsi256_ps(a)); }
  static Vector to_float(Vector a) { return _mm256_castps_si256(_mm256_cvtepi32_ps(a)); }

  // values[i], lane b <-> blocks[b * kValues + i].
  template <int kValues>
  static void load_blocks(const float* blocks, Vector* values) {
    if constexpr (kValues == 16) {
      for (int b = 0; b < 8; ++b) values[b] = load(blocks + 16 * b);
      for (int b = 0; b < 8; ++b) values[b + 8] = load(blocks + 16 * b + 8);
      transpose8(values);
      transpose8(values + 8);
    } else {
      for (int i = 0; i < 4; ++i) values[i] = load(blocks + 8 * i);
      Vector t[4];  // by 128-bit halves: blocks 0 and 4, 1 and 5, 2 and 6, 3 and 7
      for (int i = 0; i < 2; ++i) {
        t[2 * i] = _mm256_permute2x128_si256(values[i], values[i + 2], 0x20);
        t[2 * i + 1] = _mm256_permute2x128_si256(values[i], values[i + 2], 0x31);
      }
      transpose4(t, values);
    }
  }
  template <int kValues>
  static void store_blocks(Vector* values, float* blocks) {
    if constexpr (kValues == 16) {
      transpose8(values);
      transpose8(values + 8);
      for (int b = 0; b < 8; ++b) store(blocks + 16 * b, values[b]);
      for (int b = 0; b < 8; ++b) store(blocks + 16 * b + 8, values[b + 8]);
    } else {
      Vector t[4];
      transpose4(values, t);
      for (int i = 0; i < 2; ++i) {
        store(blocks + 8 * i, _mm256_permute2x128_si256(t[2 * i], t[2 * i + 1], 0x20));
        store(blocks + 8 * i + 16, _mm256_permute2x128_si256(t[2 * i], t[2 * i + 1], 0x31));
      }
    }
  }

  static void widen_float16(const std::uint16_t* source, float* target) {
    _mm256_storeu_ps(target, _mm256_cvtph_ps(load_half(source)));
  }
  static void widen_bfloat16(const std::uint16_t* source, float* target) {
    store(target, shift_left<16>(_mm256_cvtepu16_epi32(load_half(source))));
  }
  static void narrow_float16(const float* source, std::uint16_t* target) {
    store_half(target, _mm256_cvtps_ph(clamp(_mm256_loadu_ps(source), 65504.0f), _MM_FROUND_TO_NEAREST_INT));
  }
  static void narrow_bfloat16(const float* source, std::uint16_t* target) {
    Vector bits = _mm256_castps_si256(clamp(_mm256_loadu_ps(source), 0x1.FEp127f));
    Vector odd = bit_and(shift_right<16>(bits), splat(1));
    bits = shift_right<16>(add(bits, add(odd, splat(0x7FFF))));
    Vector packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    store_half(target, _mm256_castsi256_si128(packed));
  }

 private:
  static __m128i load_half(const void* source) { return _mm_loadu_si128(static_cast<const __m128i*>(source)); }
  static void store_half(void* target, __m128i value) { _mm_storeu_si128(static_cast<__m128i*>(target), value); }

  // NaN passes through: min and max return their second operand then.
  static __m256 clamp(__m256 value, float limit) {
    value = _mm256_min_ps(_mm256_set1_ps(limit), value);
    return _mm256_max_ps(_mm256_set1_ps(-limit), value);
  }

  // Transposes the 4 x 4 squares of both 128-bit halves.
  static void transpose4(const Vector* rows, Vector* columns) {
    Vector low01 = _mm256_unpacklo_epi32(rows[0], rows[1]), high01 = _mm256_unpackhi_epi32(rows[0], rows[1]);
    Vector low23 = _mm256_unpacklo_epi32(rows[2], rows[3]), high23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
    columns[0] = _mm256_unpacklo_epi64(low01, low23);
    columns[1] = _mm256_unpackhi_epi64(low01, low23);
    columns[2] = _mm256_unpacklo_epi64(high01, high23);
    columns[3] = _mm256_unpackhi_epi64(high01, high23);
  }

  static void transpose8(Vector* rows) {
    Vector top[4], bottom[4];
    transpose4(rows, top);
    transpose4(rows + 4, bottom);
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2x128_si256(top[i], bottom[i], 0x20);
      rows[i + 4] = _mm256_permute2x128_si256(top[i], bottom[i], 0x31);
    }
  }
};

}  // namespace
}  // namespace planmoe::zfp
