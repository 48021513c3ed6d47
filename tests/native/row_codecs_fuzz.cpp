// Random rows and random wires through every row codec, on buffers of the exact size, under the address and
// undefined-behaviour sanitizers. Deterministic: `row_codecs_fuzz ITERATIONS`.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "compressor/rows/bf16.h"
#include "compressor/rows/e4m7.h"
#include "compressor/rows/fp8.h"
#include "compressor/rows/hadamard_int8.h"
#include "compressor/rows/int4.h"
#include "compressor/rows/int8.h"

namespace {

using planmoe::Vectors;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

std::mt19937 random_source(1);

size_t below(size_t limit) { return random_source() % limit; }

// Exactly as many elements as asked for, so that the sanitizer sees the first one beyond.
template <class T>
struct Buffer {
  explicit Buffer(size_t count) : data(new T[count]()), size(count) {}
  bool operator==(const Buffer& other) const {
    return std::memcmp(data.get(), other.data.get(), size * sizeof(T)) == 0;
  }
  std::unique_ptr<T[]> data;
  size_t size;
};

// Numbers of one size, or any bits: NaN, infinities, subnormals.
void fill(Buffer<float>& values, bool halves) {
  const size_t kind = below(4);
  const float size = std::ldexp(1.0f, static_cast<int>(below(250)) - 125);
  for (size_t i = 0; i < values.size; ++i) {
    uint32_t bits = static_cast<uint32_t>(random_source());
    const float number = static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-31f;
    if (kind == 0 || (kind == 1 && below(100) == 0)) {
      values.data[i] = std::bit_cast<float>(bits);
    } else {
      values.data[i] = kind == 2 && below(8) != 0 ? 0.0f : number * size;
    }
    if (halves) values.data[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(values.data[i]) & 0xFFFF0000);
  }
}

void fill(Buffer<uint8_t>& wire) {
  const size_t kind = below(3);
  for (size_t i = 0; i < wire.size; ++i)
    wire.data[i] = static_cast<uint8_t>(kind == 0 || below(6) == 0 ? random_source() : kind == 1 ? 0 : 0xFF);
}

std::vector<Vectors> vector_sets() {
  std::vector<Vectors> found;
  for (int set = 0; set <= static_cast<int>(planmoe::widest_vectors()); ++set)
    found.push_back(static_cast<Vectors>(set));
  return found;
}

// A codec as functions that say whether they could: (values, hidden, wire, vectors) and back.
struct Codec {
  int64_t (*row_bytes)(int64_t);
  bool (*encode)(const float*, int64_t, uint8_t*, Vectors);
  bool (*decode)(const uint8_t*, int64_t, float*, Vectors);
  bool of_halves = false;
};

#define ALWAYS(name)                                                         \
  {planmoe::name::row_bytes,                                                 \
   [](const float* values, int64_t hidden, uint8_t* wire, Vectors vectors) { \
     return planmoe::name::encode(values, hidden, wire, vectors), true;      \
   },                                                                        \
   [](const uint8_t* wire, int64_t hidden, float* values, Vectors vectors) { \
     return planmoe::name::decode(wire, hidden, values, vectors), true;      \
   }}

using planmoe::e4m7::Misfits;

template <Misfits misfits>
bool encode_e4m7(const float* values, int64_t hidden, uint8_t* wire, Vectors vectors) {
  return planmoe::e4m7::encode(values, hidden, wire, vectors, misfits);
}

template <Misfits misfits>
bool encode_any(const float* values, int64_t hidden, uint8_t* wire, Vectors vectors) {
  return encode_e4m7<misfits>(values, hidden, wire, vectors), true;
}

const Codec kCodecs[] = {
    ALWAYS(bf16),
    ALWAYS(fp8),
    ALWAYS(int8),
    ALWAYS(hadamard_int8),
    ALWAYS(int4),
    {planmoe::e4m7::row_bytes, encode_e4m7<Misfits::kRounded>, planmoe::e4m7::decode, true},
    // With rows that are not bfloat16 numbers, and with blocks that do not come back.
    {planmoe::e4m7::row_bytes, encode_any<Misfits::kRounded>, planmoe::e4m7::decode},
    {planmoe::e4m7::row_bytes, encode_any<Misfits::kNaN>, planmoe::e4m7::decode},
};

// The same bits, or both NaN.
bool same_number(float one, float other) {
  return std::bit_cast<uint32_t>(one) == std::bit_cast<uint32_t>(other) || (std::isnan(one) && std::isnan(other));
}

bool is_finite(float value) { return (std::bit_cast<uint32_t>(value) & 0x7FFFFFFF) < planmoe::kInfinityBits; }

// Whatever the processor, a row becomes the same bytes and comes back as the same values, NaN as something not finite.
void fuzz_values(const Codec& codec, int64_t hidden) {
  Buffer<float> values(hidden), expected(hidden), back(hidden);
  fill(values, codec.of_halves);
  Buffer<uint8_t> wire(codec.row_bytes(hidden)), other(codec.row_bytes(hidden));
  const bool fits = codec.encode(values.data.get(), hidden, wire.data.get(), Vectors::kPortable);
  for (const Vectors vectors : vector_sets()) {
    CHECK(codec.encode(values.data.get(), hidden, other.data.get(), vectors) == fits);
    CHECK(!fits || other == wire);
  }
  if (!fits) return;
  CHECK(codec.decode(wire.data.get(), hidden, expected.data.get(), Vectors::kPortable));
  for (int64_t i = 0; i < hidden; ++i) CHECK(is_finite(values.data[i]) || !is_finite(expected.data[i]));
  for (const Vectors vectors : vector_sets()) {
    CHECK(codec.decode(wire.data.get(), hidden, back.data.get(), vectors));
    for (int64_t i = 0; i < hidden; ++i) {
      CHECK(!codec.of_halves || same_number(back.data[i], values.data[i]));
      CHECK(same_number(back.data[i], expected.data[i]));
    }
  }
}

// Any bytes decode, or are found corrupt, in the same way with all instructions.
void fuzz_wire(const Codec& codec, int64_t hidden) {
  Buffer<uint8_t> wire(codec.row_bytes(hidden));
  Buffer<float> expected(hidden), values(hidden);
  fill(wire);
  const bool valid = codec.decode(wire.data.get(), hidden, expected.data.get(), Vectors::kPortable);
  for (const Vectors vectors : vector_sets()) {
    CHECK(codec.decode(wire.data.get(), hidden, values.data.get(), vectors) == valid);
    for (int64_t i = 0; valid && i < hidden; ++i) CHECK(same_number(values.data[i], expected.data[i]));
  }
}

}  // namespace

int main(int count, char** arguments) {
  const long iterations = count > 1 ? std::atol(arguments[1]) : 1000;
  for (long i = 0; i < iterations; ++i) {
    const int64_t hidden = below(2) == 0 ? 128 * (1 + below(6)) : 1 + below(600);
    for (const Codec& codec : kCodecs) {
      fuzz_values(codec, hidden);
      fuzz_wire(codec, hidden);
    }
  }
  std::printf("%ld iterations, %zu instruction sets\n", iterations, vector_sets().size());
  return 0;
}
