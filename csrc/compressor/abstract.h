#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>

#include "../registry.h"
#include "refusals.h"

namespace planmoe {

// A wire codec. Rows are independent and every row takes the same, known number of bytes, so receivers can allocate
// before data arrives. A new one is one file: subclass this or, for the CPU's fused kernels, RowCodec below, implement
// the members, PLANMOE_REGISTER_COMPRESSOR.
class AbstractCompressor {
 public:
  virtual ~AbstractCompressor() = default;

  // Bytes on the wire for one row of `hidden` values of `dtype` (float32, float16, bfloat16, float64 for `none`).
  virtual int64_t row_bytes(int64_t hidden, at::ScalarType dtype) const = 0;

  // True when decode(encode(x)) is x, bit for bit.
  virtual bool lossless() const = 0;

  // True when the wire holds the values themselves.
  virtual bool is_identity() const { return false; }

  // Under which name csrc/cuda has kernels for it; empty: none.
  virtual std::string device_kernels() const { return ""; }

  // Throws ValueError for a dtype that this codec cannot carry.
  virtual void check_dtype(at::ScalarType dtype) const;

  // True for codecs that have a fixed size and yet keep every bit, so that they cannot carry all rows. What they cannot
  // carry comes back as NaN; the engine asks, and sends what was refused as it is: see planmoe_ds/passes/base.py.
  bool may_refuse() const { return refusals() != nullptr; }

  // Where such a codec notes it, and its kernels: see RowArguments. It is changed by encoding.
  virtual Refusals* refusals() const { return nullptr; }

  // int32 [1] on the device of `rows` [R, H], not zero where one of them cannot be carried.
  virtual at::Tensor misfits(const at::Tensor& rows) const;

  // Whether a row that was encoded since the last call could not be carried; the host waits for encoders.
  bool take_refused() const { return may_refuse() && refusals()->take(); }

  // rows [R, H] -> uint8 [N, row_bytes]; with `index` (int64 [N]) wire row i encodes rows[index[i]].
  at::Tensor encode(const at::Tensor& rows, const std::optional<at::Tensor>& index) const;

  // The same into the first row_bytes columns of `wire`, uint8 [N, >= row_bytes], whose rows may lie apart.
  void encode_into(const at::Tensor& rows, const std::optional<at::Tensor>& index, at::Tensor wire) const;

  // wire uint8 [N, >= row_bytes] -> out [R, H]; with `index` (int64 [N], no duplicates) wire row i goes to
  // out[index[i]], other rows of `out` keep their value. Non-finite values come back non-finite, never as finite
  // garbage.
  void decode(const at::Tensor& wire, at::Tensor out, const std::optional<at::Tensor>& index) const;

  // Whole tensors on any device: rows [N, H] contiguous, float32 or `dtype` -> uint8 [N, row_bytes], and back to
  // [N, H] of float32 or `dtype`. wire [N, row_bytes] is contiguous.
  virtual at::Tensor encode_tensor(const at::Tensor& rows, at::ScalarType dtype) const = 0;
  virtual at::Tensor decode_tensor(const at::Tensor& wire, int64_t hidden, at::ScalarType dtype) const = 0;

  // The same into tensors that exist, contiguous where whole rows lie one after the other.
  virtual void encode_tensor_into(const at::Tensor& rows, at::ScalarType dtype, const at::Tensor& wire) const;
  virtual void decode_tensor_into(const at::Tensor& wire, const at::Tensor& out) const;
};

// A codec whose CPU side works row by row on float32 values, which planmoe fuses with gathering, weighting and summing.
// Accelerators: encode_on_device and decode_on_device; without them the rows travel through the host.
class RowCodec : public AbstractCompressor {
 public:
  // values [hidden] -> wire [row_bytes(hidden, dtype)], and back.
  virtual void encode_row(const float* values, int64_t hidden, at::ScalarType dtype, uint8_t* wire) const = 0;
  virtual void decode_row(const uint8_t* wire, int64_t hidden, at::ScalarType dtype, float* values) const = 0;

  at::Tensor encode_tensor(const at::Tensor& rows, at::ScalarType dtype) const final;
  at::Tensor decode_tensor(const at::Tensor& wire, int64_t hidden, at::ScalarType dtype) const final;

 protected:
  virtual at::Tensor encode_on_device(const at::Tensor& rows, at::ScalarType dtype) const;
  virtual at::Tensor decode_on_device(const at::Tensor& wire, int64_t hidden, at::ScalarType dtype) const;
};

// Factories take the setting, what stands behind a colon in "name:setting"; empty without a colon.
using CompressorRegistry = Registry<AbstractCompressor, const std::string&>;
CompressorRegistry& compressor_registry();

// The codec "name" or "name:setting". Throws ValueError for unknown names and bad settings.
std::shared_ptr<AbstractCompressor> make_compressor(const std::string& name);

void check_no_setting(const char* name, const std::string& setting);

}  // namespace planmoe

// For codecs without a setting, and for those made from one: Class(const std::string& setting).
#define PLANMOE_REGISTER_COMPRESSOR(name, Class)                                                                   \
  static const bool registered_##Class = ::planmoe::compressor_registry().add(name, [](const std::string& value) { \
    ::planmoe::check_no_setting(name, value);                                                                      \
    return std::make_shared<Class>();                                                                              \
  })
#define PLANMOE_REGISTER_COMPRESSOR_WITH_SETTING(name, Class)                  \
  static const bool registered_##Class = ::planmoe::compressor_registry().add( \
      name, [](const std::string& value) { return std::make_shared<Class>(value); })
