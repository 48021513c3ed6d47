#pragma once

#include "../kernels/device.h"
#include "row_kernels.h"

namespace planmoe::cuda {

// ValueError unless both are on one device.
void check_same_device(const char* name, const at::Tensor& tensor, const at::Tensor& like);

void check_launch(cudaError_t error);

// The row kernels for tensors.
class DeviceRows : public DeviceKernels {
 public:
  using DeviceKernels::covers;
  bool covers(const AbstractCompressor& codec, at::ScalarType rows, at::ScalarType dtype) const final;
  void pack(const AbstractCompressor& codec, const at::Tensor& rows, const std::optional<at::Tensor>& index,
            at::ScalarType dtype, const at::Tensor& wire) const final;
  void unpack(const AbstractCompressor& codec, const at::Tensor& wire, const at::Tensor& out,
              const std::optional<at::Tensor>& index) const final;
  void add(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype,
           const std::optional<at::Tensor>& index, const at::Tensor& sum) const final;
  void spread(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype, const Spread& spread,
              bool weighted, const at::Tensor& out) const final;
  void fold(const AbstractCompressor& codec, const at::Tensor& rows, const Spread& spread, bool weighted,
            at::ScalarType dtype, const at::Tensor& wire) const final;
  void dot(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype, const Spread& spread,
           const at::Tensor& rows, const at::Tensor& result) const final;
  void sum(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype, const at::Tensor& returns,
           const std::optional<at::Tensor>& base, const at::Tensor& out) const final;
  void find_misfits(const at::Tensor& rows, const at::Tensor& found) const final;
  void encode_zfp(const at::Tensor& rows, double rate, const at::Tensor& wire) const final;
  void decode_zfp(const at::Tensor& wire, double rate, const at::Tensor& rows) const final;
  void gather(const at::Tensor& from, const at::Tensor& index, const at::Tensor& to) const final;
  void pack_columns(const std::vector<Column>& columns, const at::Tensor& rows) const final;

  void place_routes(const PlaceArguments& place, c10::Device device) const final;
  void weigh_routes(const WeighArguments& weigh, c10::Device device) const final;
  void find_gate_gradient(const GateGradientArguments& gate, c10::Device device) const final;
};

}  // namespace planmoe::cuda
