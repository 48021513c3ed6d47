// The codec on vectors of 32-bit lanes, one block per lane: values, coefficients and bit planes of all lanes' blocks
// advance together. Include it after the instruction set has been selected, with Lanes one of lanes_*.h.
//
// Lanes gives kLanes, Vector (kLanes 32-bit integers), Mask (one truth value per lane) and the operations used below.
// Arithmetic wraps; shift counts of 32 and more give 0.
#pragma once

#include "block_codec.h"
#include "kernels.h"
#include "lane_transform.h"

namespace planmoe::zfp {
namespace {

template <class Lanes, int kDimensions>
struct LaneKernel {
  using Vector = typename Lanes::Vector;
  using Mask = typename Lanes::Mask;
  using Transform = LaneTransform<Lanes, kDimensions>;
  static constexpr int kValues = kValuesPerBlock<kDimensions>;
  static constexpr std::size_t kLanes = Lanes::kLanes;
  // A plane takes at most 31 bits, so that a lane may run on to bit 9 + 32 * 31 while a slower one fills its block.
  static constexpr std::size_t kMaxWords = 33;
  using Words = std::uint32_t[kMaxWords][kLanes];  // the lanes' blocks as 32-bit words, word by word

  // ---- encoding ----

  struct Output {
    Vector pending;   // bits of the word each lane is filling
    Vector position;  // bits each lane has produced
    std::size_t low;  // no lane is filling an earlier word
  };

  static void store_words(Output& output, Mask remaining, Vector word, Words& words) {
    for (std::size_t w = output.low; Lanes::any(remaining); ++w) {
      Mask here = Lanes::both(remaining, Lanes::equal(word, Lanes::splat(static_cast<std::uint32_t>(w))));
      Lanes::store_where(here, words[w], output.pending);
      remaining = Lanes::first_only(remaining, here);
    }
  }

  // Appends the low `length` (0..31) bits of `code`.
  static void append(Output& output, Vector code, Vector length, Words& words) {
    Vector shift = Lanes::bit_and(output.position, Lanes::splat(31));
    Vector word = Lanes::template shift_right<5>(output.position);
    Vector next = Lanes::add(output.position, length);
    Vector next_word = Lanes::template shift_right<5>(next);
    Mask crossed = Lanes::greater(next_word, word);
    output.pending = Lanes::bit_or(output.pending, Lanes::shift_left_by(code, shift));
    output.position = next;
    if (!Lanes::any(crossed)) return;
    store_words(output, crossed, word, words);
    Vector carried = Lanes::shift_right_by(code, Lanes::subtract(Lanes::splat(32), shift));
    output.pending = Lanes::select(crossed, carried, output.pending);
    Vector low = Lanes::splat(static_cast<std::uint32_t>(output.low));
    if (!Lanes::any(Lanes::equal(next_word, low))) ++output.low;
  }

  // One plane's code: `significant` bits verbatim, then a test bit and a run of zeros for each further set bit.
  static Vector plane_code(Vector bits, Vector& significant, Vector& length) {
    const Vector zero = Lanes::splat(0), one = Lanes::splat(1), all = Lanes::splat(kValues);
    const Mask was_open = Lanes::greater(all, significant);
    Vector rest = Lanes::shift_right_by(bits, significant);
    Vector verbatim = Lanes::subtract(Lanes::shift_left_by(one, significant), one);
    Vector code = Lanes::bit_and(bits, verbatim);
    length = significant;
    while (Lanes::any_bit(rest)) {
      Vector lowest = Lanes::bit_and(rest, Lanes::subtract(zero, rest));
      Vector test = Lanes::smaller(rest, one);
      Vector run = Lanes::bit_length(lowest);  // zeros and the one; 0 in lanes that are done
      Vector piece = Lanes::bit_or(test, Lanes::add(lowest, lowest));
      code = Lanes::bit_or(code, Lanes::shift_left_by(piece, length));
      length = Lanes::add(length, Lanes::add(run, test));
      significant = Lanes::add(significant, run);
      rest = Lanes::shift_right_by(rest, run);
    }
    // Open planes end with a 0 test; the one that closes at the last coefficient leaves its final 1 unsaid.
    const Mask open = Lanes::greater(all, significant);
    const Mask closed_now = Lanes::first_only(was_open, open);
    length = Lanes::add(length, Lanes::select(open, one, zero));
    length = Lanes::subtract(length, Lanes::select(closed_now, one, zero));
    Vector unsaid = Lanes::select(closed_now, Lanes::shift_left_by(one, length), zero);
    return Lanes::first_bits_only(code, unsaid);
  }

  static void encode_lanes(const float* blocks, unsigned block_bits, Words& words) {
    Vector planes[kValues];
    Output output{Transform::forward(blocks, planes), Lanes::splat(kHeaderBits), 0};
    const std::size_t num_words = (block_bits + 31) / 32;
    for (std::size_t w = 0; w < num_words; ++w) Lanes::store(words[w], Lanes::splat(0));
    const Vector end = Lanes::splat(block_bits);
    Vector significant = Lanes::splat(0);
    for (int plane = kNumPlanes - 1; plane >= 0 && Lanes::any(Lanes::greater(end, output.position)); --plane) {
      Vector length;
      Vector code = plane_code(Transform::plane_bits(planes, plane), significant, length);
      append(output, code, length, words);
    }
    Vector word = Lanes::template shift_right<5>(output.position);
    store_words(output, Lanes::equal(word, word), word, words);
  }

  static void append_block(const Words& words, std::size_t lane, unsigned block_bits, BitWriter& writer) {
    const unsigned num_whole = block_bits / 32, num_left = block_bits % 32;
    for (unsigned w = 0; w < num_whole; ++w) append_bits(writer, words[w][lane], 32);
    append_bits(writer, words[num_whole][lane] & low_mask(num_left), num_left);
  }

  static void encode(const float* blocks, std::size_t num_blocks, unsigned block_bits, BitWriter& writer) {
    alignas(64) Words words = {};
    alignas(64) float padded[kLanes * kValues];
    for (std::size_t first = 0; first < num_blocks; first += kLanes) {
      const std::size_t count = num_blocks - first < kLanes ? num_blocks - first : kLanes;
      const float* source = blocks + first * kValues;
      if (count < kLanes) {
        std::memset(padded, 0, sizeof(padded));
        std::memcpy(padded, source, count * kValues * sizeof(float));
        source = padded;
      }
      encode_lanes(source, block_bits, words);
      for (std::size_t lane = 0; lane < count; ++lane) append_block(words, lane, block_bits, writer);
    }
  }

  // ---- decoding ----

  struct Input {
    Vector current;  // the word that holds the next bit of each lane
    Vector following;
    Vector position;
    std::size_t low;  // no lane is at an earlier word
  };

  // Skips `length` (0..31) bits.
  static void skip(Input& input, Vector length, const Words& words) {
    Vector word = Lanes::template shift_right<5>(input.position);
    input.position = Lanes::add(input.position, length);
    Vector next_word = Lanes::template shift_right<5>(input.position);
    Mask remaining = Lanes::greater(next_word, word);
    if (!Lanes::any(remaining)) return;
    input.current = Lanes::select(remaining, input.following, input.current);
    for (std::size_t w = input.low; Lanes::any(remaining); ++w) {
      Mask here = Lanes::both(remaining, Lanes::equal(word, Lanes::splat(static_cast<std::uint32_t>(w))));
      input.following = Lanes::select(here, Lanes::load(words[w + 2]), input.following);
      remaining = Lanes::first_only(remaining, here);
    }
    Vector low = Lanes::splat(static_cast<std::uint32_t>(input.low));
    if (!Lanes::any(Lanes::equal(next_word, low))) ++input.low;
  }

  struct Progress {
    Vector budget;       // bits left
    Vector significant;  // leading coefficients that some plane so far has touched
    Vector known;        // leading coefficients whose bit of the last plane is known
    Vector planes;       // planes read, at least in part; all of them when none was read
  };

  // Reads test bits and the runs they announce while they are 1; `window` is 0 in lanes that may not read any, and
  // past the budget. Returns the bits of the coefficients found.
  static Vector read_runs(Vector window, Vector& significant, Vector& budget) {
    const Vector zero = Lanes::splat(0), one = Lanes::splat(1), all = Lanes::splat(kValues);
    Vector bits = zero;
    for (Vector test = Lanes::bit_and(window, one); Lanes::any_bit(test); test = Lanes::bit_and(window, one)) {
      // The run of zeros ends at a 1, at the last coefficient, or with the budget.
      Vector left = Lanes::subtract(Lanes::splat(kValues - 1), significant);
      Vector limit = Lanes::smaller(left, Lanes::subtract(budget, one));
      window = Lanes::shift_right_by(window, test);
      Vector stops = Lanes::bit_or(window, Lanes::shift_left_by(one, limit));
      Vector lowest = Lanes::bit_and(stops, Lanes::subtract(zero, stops));
      lowest = Lanes::bit_and(lowest, Lanes::subtract(zero, test));  // 0 in lanes that are done
      Vector run = Lanes::bit_length(lowest);
      Vector read = Lanes::smaller(run, limit);
      bits = Lanes::bit_or(bits, Lanes::shift_left_by(lowest, significant));
      significant = Lanes::add(significant, run);
      budget = Lanes::subtract(budget, Lanes::add(read, test));
      window = Lanes::shift_right_by(window, read);
      window = Lanes::select(Lanes::greater(all, significant), window, zero);
    }
    return bits;
  }

  // One plane from `window`, each lane's next 32 bits.
  template <Rounding kRounding>
  static Vector plane_bits(Vector window, int plane, Progress& progress) {
    const Vector zero = Lanes::splat(0), one = Lanes::splat(1), all = Lanes::splat(kValues);
    const Mask touched = Lanes::greater(progress.budget, zero);
    const Mask open = Lanes::greater(all, progress.significant);
    const Vector verbatim = Lanes::smaller(progress.significant, progress.budget);
    const Vector missing = Lanes::subtract(progress.significant, verbatim);
    window = Lanes::bit_and(window, Lanes::subtract(Lanes::shift_left_by(one, progress.budget), one));
    Vector bits = Lanes::bit_and(window, Lanes::subtract(Lanes::shift_left_by(one, verbatim), one));
    window = Lanes::select(open, Lanes::shift_right_by(window, verbatim), zero);
    progress.budget = Lanes::subtract(progress.budget, verbatim);
    bits = Lanes::bit_or(bits, read_runs(window, progress.significant, progress.budget));
    // Lanes with budget left and coefficients to come have read a 0 test.
    const Mask still_open = Lanes::greater(all, progress.significant);
    const Mask ended = Lanes::both(Lanes::greater(progress.budget, zero), still_open);
    progress.budget = Lanes::subtract(progress.budget, Lanes::select(ended, one, zero));
    if (kRounding == Rounding::kLast) {
      const Vector known = Lanes::select(ended, all, Lanes::subtract(progress.significant, missing));
      const Vector planes = Lanes::splat(static_cast<std::uint32_t>(kNumPlanes - plane));
      progress.known = Lanes::select(touched, known, progress.known);
      progress.planes = Lanes::select(touched, planes, progress.planes);
    }
    return bits;
  }

  template <Rounding kRounding>
  static void round(const Progress& progress, Vector* coefficients) {
    if (kRounding == Rounding::kNone) return;
    const Vector known = Lanes::shift_right_by(Lanes::splat(kRoundKnown), progress.planes);
    const Vector unknown = Lanes::shift_right_by(Lanes::splat(kRoundUnknown), progress.planes);
    PLANMOE_ZFP_UNROLL
    for (int j = 0; j < kValues; ++j) {
      Mask is_known = Lanes::greater(progress.known, Lanes::splat(static_cast<std::uint32_t>(j)));
      coefficients[j] = Lanes::add(coefficients[j], Lanes::select(is_known, known, unknown));
    }
  }

  // False when some lane holds a zero or an escaped block.
  template <Rounding kRounding>
  static bool decode_lanes(const Words& words, unsigned block_bits, float* blocks) {
    const Vector zero = Lanes::splat(0);
    Input input{Lanes::load(words[0]), Lanes::load(words[1]), Lanes::splat(kHeaderBits), 0};
    const Vector header = Lanes::bit_and(input.current, Lanes::splat((1u << kHeaderBits) - 1));
    const Mask coded = Transform::is_coded(header);
    Vector planes[kValues];
    PLANMOE_ZFP_UNROLL
    for (int j = 0; j < kValues; ++j) planes[j] = zero;
    const Vector budget = Lanes::select(coded, Lanes::splat(block_bits - kHeaderBits), zero);
    Progress progress{budget, zero, zero, Lanes::splat(kNumPlanes)};
    for (int plane = kNumPlanes - 1; plane >= 0 && Lanes::any_bit(progress.budget); --plane) {
      Vector shift = Lanes::bit_and(input.position, Lanes::splat(31));
      Vector upper = Lanes::shift_left_by(input.following, Lanes::subtract(Lanes::splat(32), shift));
      Vector window = Lanes::bit_or(Lanes::shift_right_by(input.current, shift), upper);
      const Vector before = progress.budget;
      Vector bits = plane_bits<kRounding>(window, plane, progress);
      Transform::deposit_plane(bits, plane, planes);
      skip(input, Lanes::subtract(before, progress.budget), words);
    }
    Transform::transpose_bits(planes);
    round<kRounding>(progress, planes);
    Transform::inverse(planes, header, blocks);
    return Lanes::all(coded);
  }

  static void read_block(const BitReader& reader, std::size_t position, std::size_t lane, unsigned block_bits,
                         Words& words) {
    const std::size_t num_words = (block_bits + 31) / 32;
    for (std::size_t w = 0; w < num_words; ++w) words[w][lane] = read_bits32(reader, position + 32 * w);
  }

  static bool padding_valid(const BitReader& reader, std::size_t position, unsigned block_bits) {
    std::uint32_t header = read_bits32(reader, position) & low_mask(kHeaderBits);
    if ((header & 1u) != 0 && header != kEscapeHeader) return true;
    return all_bits_zero(reader, position + 1, position + block_bits);
  }

  static bool decode(const BitReader& reader, std::size_t first_bit, std::size_t num_blocks, unsigned block_bits,
                     Rounding rounding, float* blocks) {
    alignas(64) Words words = {};
    alignas(64) float padded[kLanes * kValues];
    bool valid = true;
    for (std::size_t first = 0; first < num_blocks; first += kLanes) {
      const std::size_t count = num_blocks - first < kLanes ? num_blocks - first : kLanes;
      const std::size_t position = first_bit + first * block_bits;
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        read_block(reader, position + lane * block_bits, lane, block_bits, words);
      }
      float* target = count < kLanes ? padded : blocks + first * kValues;
      bool plain = rounding == Rounding::kLast ? decode_lanes<Rounding::kLast>(words, block_bits, target)
                                               : decode_lanes<Rounding::kNone>(words, block_bits, target);
      if (count < kLanes) std::memcpy(blocks + first * kValues, padded, count * kValues * sizeof(float));
      for (std::size_t lane = 0; lane < count && !plain; ++lane) {
        valid &= padding_valid(reader, position + lane * block_bits, block_bits);
      }
    }
    return valid;
  }
};

}  // namespace
}  // namespace planmoe::zfp
