#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>

#include "../registry.h"

namespace planmoe {

// A wire codec. Rows are independent and every row takes the same, known number of bytes, so receivers can allocate
// before data arrives. A new one is one file: subclass, implement the members below, PLANMOE_REGISTER_COMPRESSOR.
class AbstractCompressor {
 public:
  virtual ~AbstractCompressor() = default;

  // Bytes on the wire for one row of `hidden` values of `dtype` (float32, float16, bfloat16, float64 for `none`).
  virtual int64_t row_bytes(int64_t hidden, at::ScalarType dtype) const = 0;

  // True when decode(encode(x)) is x, bit for bit.
  virtual bool lossless() const = 0;

  // rows [R, H] -> uint8 [N, row_bytes]; with `index` (int64 [N]) wire row i encodes rows[index[i]].
  at::Tensor encode(const at::Tensor& rows, const std::optional<at::Tensor>& index) const;

  // wire uint8 [N, row_bytes] -> out [R, H]; with `index` (int64 [N], no duplicates) wire row i goes to out[index[i]],
  // other rows of `out` keep their value. Non-finite values come back non-finite, never as finite garbage.
  void decode(const at::Tensor& wire, at::Tensor out, const std::optional<at::Tensor>& index) const;

 protected:
  virtual at::Tensor encode_rows(const at::Tensor& rows, const std::optional<at::Tensor>& index) const = 0;
  virtual void decode_rows(const at::Tensor& wire, at::Tensor out, const std::optional<at::Tensor>& index) const = 0;
};

using CompressorRegistry = Registry<AbstractCompressor>;
CompressorRegistry& compressor_registry();

}  // namespace planmoe

#define PLANMOE_REGISTER_COMPRESSOR(name, Class) \
  static const bool registered_##Class =         \
      ::planmoe::compressor_registry().add(name, [] { return std::make_shared<Class>(); })
