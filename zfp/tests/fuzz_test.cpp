// Random shapes, options, streams and values, on buffers of the exact size, under the address and undefined-behaviour
// sanitizers where there are any. Deterministic: `fuzz_test ITERATIONS [SEED]`.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "check.h"

namespace zfp = planmoe::zfp;
using zfp::Status;

namespace {

// Heap memory of exactly `size` bytes, `offset` bytes past an aligned address.
struct Buffer {
  Buffer(std::size_t size_in, std::size_t offset)
      : memory(static_cast<unsigned char*>(std::malloc(size_in + offset))),
        data(memory.get() + offset),
        size(size_in) {}
  struct Free {
    void operator()(unsigned char* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<unsigned char, Free> memory;
  unsigned char* data;
  std::size_t size;
};

struct Subject {
  bool is_rows;
  zfp::Field field;
  zfp::Rows rows;
  zfp::Options options;
  std::size_t num_value_bytes;
  std::size_t num_stream_bytes;
};

Subject random_subject(check::Random& random) {
  Subject subject{};
  const auto type = static_cast<zfp::DataType>(random.below(3));
  const int dimensions = 1 + static_cast<int>(random.below(2));
  const std::size_t width = random.below(2) == 0 ? 4 : random.below(150);
  subject.is_rows = random.below(4) == 0;
  subject.field = {dimensions, width, dimensions == 1 ? 1 : random.below(40), type};
  subject.rows = {random.below(6), 4 * (1 + random.below(60)), type};
  const bool is_line = dimensions == 1 && !subject.is_rows;
  const std::size_t least = 9, most = is_line ? 128 : 512;
  const std::size_t block_bits = random.below(3) == 0 ? most / 4 : least + random.below(most - least + 1);
  subject.options.rate = static_cast<double>(block_bits) / (is_line ? 4 : 16);
  subject.options.rounding = static_cast<zfp::Rounding>(random.below(2));
  const std::size_t count =
      subject.is_rows ? subject.rows.num_rows * subject.rows.hidden : subject.field.width * subject.field.height;
  subject.num_value_bytes = count * (type == zfp::DataType::kFloat32 ? 4 : 2);
  const Status status = subject.is_rows
                            ? zfp::row_bytes(subject.rows.hidden, subject.options.rate, subject.num_stream_bytes)
                            : zfp::stream_bytes(subject.field, subject.options.rate, subject.num_stream_bytes);
  CHECK(status == Status::kOk);
  if (subject.is_rows) subject.num_stream_bytes *= subject.rows.num_rows;
  return subject;
}

Status encode(const Subject& subject, zfp::Kernel kernel, const Buffer& values, Buffer& stream) {
  zfp::Options options = subject.options;
  options.kernel = kernel;
  return subject.is_rows ? zfp::encode_rows(subject.rows, options, values.data, stream.data, stream.size)
                         : zfp::encode(subject.field, options, values.data, stream.data, stream.size);
}

Status decode(const Subject& subject, zfp::Kernel kernel, const Buffer& stream, Buffer& values) {
  zfp::Options options = subject.options;
  options.kernel = kernel;
  return subject.is_rows ? zfp::decode_rows(subject.rows, options, stream.data, stream.size, values.data)
                         : zfp::decode(subject.field, options, stream.data, stream.size, values.data);
}

bool same(const Buffer& a, const Buffer& b) { return a.size == 0 || std::memcmp(a.data, b.data, a.size) == 0; }

// Bytes of any value, mostly zeros, or mostly ones.
void fill(Buffer& buffer, check::Random& random) {
  const std::size_t kind = random.below(3);
  for (std::size_t i = 0; i < buffer.size; ++i) {
    const bool is_random = kind == 0 || random.below(6) == 0;
    buffer.data[i] = static_cast<unsigned char>(is_random ? random.next() : kind == 1 ? 0 : 0xFF);
  }
}

void flip_some_bits(Buffer& buffer, check::Random& random) {
  for (std::size_t i = random.below(4); i > 0 && buffer.size > 0; --i) {
    buffer.data[random.below(buffer.size)] ^= static_cast<unsigned char>(1u << random.below(8));
  }
}

// Any stream decodes, or is found corrupt, in the same way with every kernel.
void decode_anything(const Subject& subject, const Buffer& stream) {
  Buffer expected(subject.num_value_bytes, 0), values(subject.num_value_bytes, 0);
  const Status status = decode(subject, zfp::Kernel::kScalar, stream, expected);
  CHECK(status == Status::kOk || status == Status::kStreamCorrupt);
  for (zfp::Kernel kernel : check::kernels()) {
    CHECK(decode(subject, kernel, stream, values) == status);
    CHECK(status != Status::kOk || same(values, expected));
  }
}

void fuzz_streams(const Subject& subject, check::Random& random) {
  Buffer stream(subject.num_stream_bytes, random.below(8));
  fill(stream, random);
  decode_anything(subject, stream);
  const std::size_t wrong = subject.num_stream_bytes + random.below(2 * subject.num_stream_bytes + 9);
  Buffer truncated(random.below(subject.num_stream_bytes + 1), 0), other(wrong, 0);
  Buffer values(subject.num_value_bytes, 0);
  for (const Buffer* bad : {&truncated, &other}) {
    if (bad->size == subject.num_stream_bytes) continue;
    CHECK(decode(subject, zfp::Kernel::kAutomatic, *bad, values) == Status::kStreamSizeMismatch);
  }
}

void fuzz_values(const Subject& subject, check::Random& random) {
  Buffer values(subject.num_value_bytes, 0);
  fill(values, random);
  const std::size_t offset = random.below(8);
  Buffer expected(subject.num_stream_bytes, offset), stream(subject.num_stream_bytes, offset);
  CHECK(encode(subject, zfp::Kernel::kScalar, values, expected) == Status::kOk);
  for (zfp::Kernel kernel : check::kernels()) {
    CHECK(encode(subject, kernel, values, stream) == Status::kOk);
    CHECK(same(stream, expected));
  }
  CHECK(decode(subject, zfp::Kernel::kAutomatic, stream, values) == Status::kOk);
  flip_some_bits(stream, random);
  decode_anything(subject, stream);
}

}  // namespace

int main(int count, char** arguments) {
  const long iterations = count > 1 ? std::atol(arguments[1]) : 1000;
  check::Random random(count > 2 ? static_cast<std::uint64_t>(std::atol(arguments[2])) : 1);
  for (long i = 0; i < iterations; ++i) {
    const Subject subject = random_subject(random);
    fuzz_streams(subject, random);
    fuzz_values(subject, random);
  }
  std::printf("%ld iterations, %zu kernels\n", iterations, check::kernels().size());
  return check::exit_code();
}
