// 16 lanes of 32 bits: AVX-512 F, BW, DQ, VL, CD. See lane_kernel.h for what each operation means.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace planmoe::zfp {
namespace {

struct LanesAvx512 {
  using Vector = __m512i;
  using Mask = __mmask16;
  static constexpr std::size_t kLanes = 16;

  static Vector splat(std::uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
  static Vector load(const void* source) { return _mm512_loadu_si512(source); }
  static void store(void* target, Vector value) { _mm512_storeu_si512(target, value); }
  static void store_where(Mask mask, void* target, Vector value) { _mm512_mask_storeu_epi32(target, mask, value); }

  static Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
  static Vector subtract(Vector a, Vector b) { return _mm512_sub_epi32(a, b); }
  static Vector smaller(Vector a, Vector b) { return _mm512_min_epu32(a, b); }
  static Vector larger(Vector a, Vector b) { return _mm512_max_epu32(a, b); }
  static Vector bit_and(Vector a, Vector b) { return _mm512_and_si512(a, b); }
  static Vector bit_or(Vector a, Vector b) { return _mm512_or_si512(a, b); }
  static Vector bit_xor(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
  static Vector first_bits_only(Vector a, Vector b) { return _mm512_andnot_si512(b, a); }
  static Vector half(Vector a) { return _mm512_srai_epi32(a, 1); }
  template <int kCount>
  static Vector shift_left(Vector a) {
    return _mm512_slli_epi32(a, kCount);
  }
  template <int kCount>
  static Vector shift_right(Vector a) {
    return _mm512_srli_epi32(a, kCount);
  }
  static Vector shift_left_uniform(Vector a, int count) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(count)); }
  static Vector shift_right_uniform(Vector a, int count) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(count)); }
  static Vector shift_left_by(Vector a, Vector count) { return _mm512_sllv_epi32(a, count); }
  static Vector shift_right_by(Vector a, Vector count) { return _mm512_srlv_epi32(a, count); }

  // One more than the position of the highest set bit, 0 for 0; for values below 2^24.
  static Vector bit_length(Vector a) { return subtract(splat(32), _mm512_lzcnt_epi32(a)); }

  static Mask equal(Vector a, Vector b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static Mask greater(Vector a, Vector b) { return _mm512_cmpgt_epi32_mask(a, b); }  // signed
  static Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
  static Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static Mask first_only(Mask a, Mask b) { return static_cast<Mask>(a & ~b); }
  static Vector select(Mask mask, Vector yes, Vector no) { return _mm512_mask_mov_epi32(no, mask, yes); }
  static bool any(Mask mask) { return mask != 0; }
  static bool all(Mask mask) { return mask == 0xFFFF; }
  static bool any_bit(Vector a) { return _mm512_test_epi32_mask(a, a) != 0; }

  static Vector multiply_floats(Vector a, Vector b) {
    return _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
  static Vector truncate(Vector a) { return _mm512_cvttps_epi32(_mm512_castsi512_ps(a)); }
  static Vector to_float(Vector a) { return _mm512_castps_si512(_mm512_cvtepi32_ps(a)); }

  // values[i], lane b <-> blocks[b * kValues + i].
  template <int kValues>
  static void load_blocks(const float* blocks, Vector* values) {
    for (int i = 0; i < kValues; ++i) values[i] = load(blocks + 16 * i);
    if constexpr (kValues == 16) {
      transpose16(values);
    } else {
      for (int i = 0; i < 4; ++i) values[i] = transpose_quads(values[i]);
      transpose4(values);
    }
  }
  template <int kValues>
  static void store_blocks(Vector* values, float* blocks) {
    if constexpr (kValues == 16) {
      transpose16(values);
    } else {
      transpose4(values);
      for (int i = 0; i < 4; ++i) values[i] = transpose_quads(values[i]);
    }
    for (int i = 0; i < kValues; ++i) store(blocks + 16 * i, values[i]);
  }

  static void widen_float16(const std::uint16_t* source, float* target) {
    _mm512_storeu_ps(target, _mm512_cvtph_ps(load_half(source)));
  }
  static void widen_bfloat16(const std::uint16_t* source, float* target) {
    store(target, shift_left<16>(_mm512_cvtepu16_epi32(load_half(source))));
  }
  static void narrow_float16(const float* source, std::uint16_t* target) {
    store_half(target, _mm512_cvtps_ph(clamp(_mm512_loadu_ps(source), 65504.0f), _MM_FROUND_TO_NEAREST_INT));
  }
  static void narrow_bfloat16(const float* source, std::uint16_t* target) {
    Vector bits = _mm512_castps_si512(clamp(_mm512_loadu_ps(source), 0x1.FEp127f));
    Vector odd = bit_and(shift_right<16>(bits), splat(1));
    bits = add(bits, add(odd, splat(0x7FFF)));
    store_half(target, _mm512_cvtepi32_epi16(shift_right<16>(bits)));
  }

 private:
  static __m256i load_half(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }
  static void store_half(void* target, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(target), value); }

  // NaN passes through: min and max return their second operand then.
  static __m512 clamp(__m512 value, float limit) {
    value = _mm512_min_ps(_mm512_set1_ps(limit), value);
    return _mm512_max_ps(_mm512_set1_ps(-limit), value);
  }

  // 32-bit element 4 a + b <-> 4 b + a.
  static Vector transpose_quads(Vector a) {
    const Vector index = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(index, a);
  }

  // Element (row i, column 4 b + a) of `rows` -> (row a, column 4 i + b), for a register of transposed quads.
  static void transpose4(Vector* rows) {
    Vector t[4];
    for (int i = 0; i < 2; ++i) {
      t[2 * i] = _mm512_shuffle_i32x4(rows[2 * i], rows[2 * i + 1], 0x44);
      t[2 * i + 1] = _mm512_shuffle_i32x4(rows[2 * i], rows[2 * i + 1], 0xEE);
    }
    rows[0] = _mm512_shuffle_i32x4(t[0], t[2], 0x88);
    rows[1] = _mm512_shuffle_i32x4(t[0], t[2], 0xDD);
    rows[2] = _mm512_shuffle_i32x4(t[1], t[3], 0x88);
    rows[3] = _mm512_shuffle_i32x4(t[1], t[3], 0xDD);
  }

  static void transpose16(Vector* rows) {
    Vector t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      for (int j = 0; j < 2; ++j) {
        rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
        rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
      }
    }
    // rows[4 g + c], 128-bit piece p: column 4 p + c of rows 4 g .. 4 g + 3.
    for (int c = 0; c < 4; ++c) {
      Vector quads[4] = {rows[c], rows[4 + c], rows[8 + c], rows[12 + c]};
      transpose4(quads);
      for (int p = 0; p < 4; ++p) t[4 * p + c] = quads[p];
    }
    for (int i = 0; i < 16; ++i) rows[i] = t[i];
  }
};

}  // namespace
}  // namespace planmoe::zfp
