#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "../compressor/abstract.h"
#include "columns.h"
#include "gate_arguments.h"
#include "routing.h"
#include "wire_rows.h"

namespace planmoe {

// The kernels of an accelerator, where the extension was built with some; wire_rows.h and routing.h call them for
// tensors that are there. Same meaning as the functions of those headers. Everything runs on the current stream, in an
// order that is always the same, and the host waits for nothing. ValueError for tensors on different devices.
class DeviceKernels {
 public:
  virtual ~DeviceKernels() = default;

  // Whether there are kernels for this codec, rows of `rows` and a wire of activations of `dtype`.
  virtual bool covers(const AbstractCompressor& codec, at::ScalarType rows, at::ScalarType dtype) const = 0;

  virtual void pack(const AbstractCompressor& codec, const at::Tensor& rows, const std::optional<at::Tensor>& index,
                    at::ScalarType dtype, const at::Tensor& wire) const = 0;
  virtual void unpack(const AbstractCompressor& codec, const at::Tensor& wire, const at::Tensor& out,
                      const std::optional<at::Tensor>& index) const = 0;
  virtual void add(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype,
                   const std::optional<at::Tensor>& index, const at::Tensor& sum) const = 0;
  virtual void spread(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype,
                      const Spread& spread, bool weighted, const at::Tensor& out) const = 0;
  virtual void fold(const AbstractCompressor& codec, const at::Tensor& rows, const Spread& spread, bool weighted,
                    at::ScalarType dtype, const at::Tensor& wire) const = 0;
  virtual void dot(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype, const Spread& spread,
                   const at::Tensor& rows, const at::Tensor& result) const = 0;
  virtual void sum(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype,
                   const at::Tensor& returns, const std::optional<at::Tensor>& base, const at::Tensor& out) const = 0;
  // Sets `found`, int32 [1], where lossless cannot carry one of bfloat16 rows.
  virtual void find_misfits(const at::Tensor& rows, const at::Tensor& found) const = 0;
  // zfp of whole rows, [N, H], H a multiple of 4 -> uint8 [N, row_bytes] and back, all contiguous.
  virtual void encode_zfp(const at::Tensor& rows, double rate, const at::Tensor& wire) const = 0;
  virtual void decode_zfp(const at::Tensor& wire, double rate, const at::Tensor& rows) const = 0;
  virtual void gather(const at::Tensor& from, const at::Tensor& index, const at::Tensor& to) const = 0;
  virtual void pack_columns(const std::vector<Column>& columns, const at::Tensor& rows) const = 0;

  virtual OrderedTokens order_tokens(const OrderRequest& request, const at::Tensor& tables, const CountLayout& layout,
                                     const at::Tensor& message) const = 0;
  virtual bool covers(const ArrivedRows& arrived) const = 0;
  virtual Spread find_experts(const ArrivedRows& arrived) const = 0;
  virtual std::vector<at::Tensor> find_fan(const at::Tensor& rows, const RowRoutes& routes,
                                           const std::vector<int64_t>& ranks,
                                           const std::vector<int64_t>& counts) const = 0;

  // See gate.h.
  virtual void place_routes(const PlaceArguments& place, c10::Device device) const = 0;
  virtual void weigh_routes(const WeighArguments& weigh, c10::Device device) const = 0;
  virtual void find_gate_gradient(const GateGradientArguments& gate, c10::Device device) const = 0;
};

// Those for the device of `tensor`; nullptr: there are none, tensor operations do it.
const DeviceKernels* device_kernels(const at::Tensor& tensor);

// Called once, as the module loads.
bool add_device_kernels(c10::DeviceType type, std::unique_ptr<const DeviceKernels> kernels);

}  // namespace planmoe
