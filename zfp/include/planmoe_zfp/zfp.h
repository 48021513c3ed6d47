// Fixed-rate zfp codec for float32, float16 and bfloat16 arrays of one or two dimensions.
//
// The stream is the one libzfp 1.0 writes with its header off and a fixed rate, byte for byte, for every block whose
// largest magnitude lies in [2^-98, infinity). Outside that range libzfp's result is undefined; here
//   * a block holding an infinity or a NaN is written as a private escape and decodes to NaN in every position,
//   * a block whose largest magnitude is below 2^-98 decodes to zeros.
// 16-bit values are widened to float32, coded, and rounded to nearest even on the way back; a finite block decodes to
// finite 16-bit values (clamped at the largest finite one). A float32 block near FLT_MAX may decode to infinity, as in
// libzfp. Results do not depend on the caller's flush-to-zero or rounding-mode settings, nor on the kernel chosen.
//
// All functions are thread safe and single threaded, allocate nothing and throw nothing. `values` must be aligned for
// its data type; `stream` may have any alignment; the two must not overlap. Little-endian hosts only.
#pragma once

#include <cstddef>

namespace planmoe::zfp {

enum class DataType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// kLast (the default) centres decoded values between the truncated bit planes: +1.3 dB, no bias, same stream.
// kNone is what libzfp does unless it was built with ZFP_ROUND_LAST.
enum class Rounding : int { kNone = 0, kLast = 1 };

// Which implementation runs; all give the same bytes. kAutomatic takes the widest this processor has.
enum class Kernel : int { kAutomatic = 0, kScalar = 1, kAvx2 = 2, kAvx512 = 3 };

enum class Status : int {
  kOk = 0,
  kBadRate = 1,             // not a number, under 9 bits per block, or over kMaxRate
  kBadShape = 2,            // dimensions other than 1 or 2, 1-d with height != 1, or hidden not a multiple of 4
  kTooLarge = 3,            // a byte count overflows size_t
  kBadOption = 4,           // unknown data type, rounding or kernel
  kKernelUnavailable = 5,   // this processor or build lacks the kernel asked for
  kNullPointer = 6,         // a buffer that must hold something is null
  kCapacityTooSmall = 7,    // encode: the stream does not fit in the buffer; nothing was written
  kStreamSizeMismatch = 8,  // decode: the stream is not as long as shape and rate say (truncated, or other settings)
  kStreamCorrupt = 9,       // decode: bits that no encoder sets are set; the values are unspecified
  kMisaligned = 10,         // CUDA: a pointer is not aligned as zfp_cuda.h says
  kCudaError = 11,          // CUDA: a launch failed
};

// One sentence for each status: what is wrong and what to do about it.
const char* describe(Status status) noexcept;

constexpr double kMaxRate = 32.0;  // bits per value
constexpr std::size_t kBlockWidth = 4;
constexpr unsigned kMinBlockBits = 9;  // flag and exponent

// An array of width * height contiguous values, `width` varying fastest. Zero values are allowed, and take zero bytes.
struct Field {
  int num_dimensions = 1;  // 1: blocks of 4 values; 2: blocks of 4 x 4 values. Partial blocks are padded.
  std::size_t width = 0;
  std::size_t height = 1;  // 1 when num_dimensions is 1
  DataType data_type = DataType::kFloat32;
};

// A matrix of num_rows x hidden contiguous values. Each row is coded alone, as the 2-d field (width 4, height hidden/4),
// so that a block is 16 neighbouring values of one row and rows are independent. hidden must be a multiple of 4
// (others are refused), best of 16 (else the last block of a row is padded).
struct Rows {
  std::size_t num_rows = 0;
  std::size_t hidden = 0;
  DataType data_type = DataType::kFloat32;
};

// A block takes floor(rate * values per block + 0.5) bits, at least kMinBlockBits: rate is at least 0.53125 in 2-d and
// 2.125 in 1-d. The rate is in bits per value whatever the data type.
struct Options {
  double rate = 8.0;
  Rounding rounding = Rounding::kLast;  // decode only
  Kernel kernel = Kernel::kAutomatic;
};

// Bytes of the stream of `field`: all its blocks, rounded up to whole 64-bit words.
// Errors: kBadRate, kBadShape, kBadOption, kTooLarge; `bytes` is then 0.
Status stream_bytes(const Field& field, double rate, std::size_t& bytes) noexcept;

// Bytes of one row of `hidden` values: those of its own stream, so hidden * rate / 8 where that is a multiple of 8.
// Errors: as stream_bytes.
Status row_bytes(std::size_t hidden, double rate, std::size_t& bytes) noexcept;

// Writes exactly stream_bytes(field, options.rate) bytes to `stream`.
// Errors: those of stream_bytes, kKernelUnavailable, kNullPointer, kCapacityTooSmall.
Status encode(const Field& field, const Options& options, const void* values, void* stream,
              std::size_t stream_capacity) noexcept;

// Reads width * height values back; never reads outside stream[0, stream_size).
// Errors: those of stream_bytes, kKernelUnavailable, kNullPointer, kStreamSizeMismatch, kStreamCorrupt.
Status decode(const Field& field, const Options& options, const void* stream, std::size_t stream_size,
              void* values) noexcept;

// As encode, writing num_rows * row_bytes(hidden, options.rate) bytes; row r begins at r * row_bytes.
Status encode_rows(const Rows& rows, const Options& options, const void* values, void* stream,
                   std::size_t stream_capacity) noexcept;

// As decode; any run of whole rows of a stream decodes alone.
Status decode_rows(const Rows& rows, const Options& options, const void* stream, std::size_t stream_size,
                   void* values) noexcept;

// The kernel that kAutomatic stands for on this processor: never kAutomatic itself.
Kernel best_kernel() noexcept;

bool kernel_available(Kernel kernel) noexcept;

}  // namespace planmoe::zfp
