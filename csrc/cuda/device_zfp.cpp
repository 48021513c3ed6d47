// zfp's CUDA kernels for tensors.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "device_rows.h"
#include "planmoe_zfp/zfp_cuda.h"

namespace planmoe::cuda {
namespace {

zfp::DataType type_of(at::ScalarType dtype) {
  if (dtype == at::kHalf) return zfp::DataType::kFloat16;
  return dtype == at::kBFloat16 ? zfp::DataType::kBFloat16 : zfp::DataType::kFloat32;
}

zfp::Rows shape_of(const at::Tensor& rows) {
  return {static_cast<size_t>(rows.size(0)), static_cast<size_t>(rows.size(1)), type_of(rows.scalar_type())};
}

void check(zfp::Status status) { TORCH_CHECK_VALUE(status == zfp::Status::kOk, "zfp: ", zfp::describe(status)); }

}  // namespace

void DeviceRows::encode_zfp(const at::Tensor& rows, double rate, const at::Tensor& wire) const {
  const c10::cuda::CUDAGuard guard(rows.device());
  zfp::Options options;
  options.rate = rate;
  check(zfp::encode_rows_cuda(shape_of(rows), options, rows.const_data_ptr(), wire.mutable_data_ptr(), wire.numel(),
                              c10::cuda::getCurrentCUDAStream(rows.device().index()).stream()));
}

void DeviceRows::decode_zfp(const at::Tensor& wire, double rate, const at::Tensor& rows) const {
  const c10::cuda::CUDAGuard guard(wire.device());
  zfp::Options options;
  options.rate = rate;
  check(zfp::decode_rows_cuda(shape_of(rows), options, wire.const_data_ptr(), wire.numel(), rows.mutable_data_ptr(),
                              nullptr, c10::cuda::getCurrentCUDAStream(wire.device().index()).stream()));
}

}  // namespace planmoe::cuda
