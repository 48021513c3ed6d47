// The row kernels for tensors: checks, dtypes, streams.
#include "device_rows.h"

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace planmoe::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::optional<Scalar> scalar_of(at::ScalarType dtype) {
  if (dtype == at::kFloat) return Scalar::kFloat;
  if (dtype == at::kHalf) return Scalar::kHalf;
  if (dtype == at::kBFloat16) return Scalar::kBFloat16;
  return std::nullopt;
}

template <class Number>
const Number* numbers(const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  check_same_device(name, tensor, like);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
  return tensor.const_data_ptr<Number>();
}

// What all launches have: the wire [n, width] and the rows [*, H].
RowArguments arguments_of(const at::Tensor& wire, const at::Tensor& rows, const OptionalTensor& index = std::nullopt) {
  check_same_device("wire", wire, rows);
  TORCH_CHECK_VALUE(wire.scalar_type() == at::kByte && wire.dim() == 2 && (wire.numel() == 0 || wire.stride(1) == 1),
                    "wire must be uint8 [rows, width], each row contiguous, got ", wire.scalar_type(), " ",
                    wire.sizes());
  TORCH_CHECK_VALUE(rows.is_contiguous(), "rows must be contiguous, got strides ", rows.strides());
  RowArguments arguments;
  arguments.wire = static_cast<uint8_t*>(wire.data_ptr());
  arguments.wire_stride = wire.stride(0);
  arguments.num_rows = wire.size(0);
  arguments.rows = rows.data_ptr();
  arguments.hidden = rows.size(1);
  if (index) arguments.index = numbers<int64_t>("index", *index, rows);
  return arguments;
}

void add_entries(RowArguments& arguments, const Spread& spread, bool weighted, const at::Tensor& rows) {
  arguments.start = numbers<int64_t>("start", spread.start, rows);
  arguments.target = numbers<int64_t>("target", spread.target, rows);
  TORCH_CHECK_VALUE(spread.start.numel() == arguments.num_rows + 1, "start has ", spread.start.numel(),
                    " entries, expected ", arguments.num_rows + 1, " for ", arguments.num_rows, " wire rows");
  if (weighted) arguments.weight = numbers<float>("weight", spread.weight, rows);
}

}  // namespace

void check_same_device(const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " is on ", tensor.device(), ", the rows are on ",
                    like.device(), "; all tensors of a call must be on one device");
}

void check_launch(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "planmoe: a CUDA kernel could not start: ", cudaGetErrorString(error));
}

namespace {

const RowKernels* kernels_of(const AbstractCompressor& codec, at::ScalarType wire_dtype) {
  const auto scalar = scalar_of(wire_dtype);
  const std::string name = codec.is_identity() ? "none" : codec.device_kernels();
  return scalar && !name.empty() ? find_row_kernels(name, *scalar) : nullptr;
}

using Operation = RowLaunch (RowKernels::*)[kNumScalars];

void run(const AbstractCompressor& codec, Operation operation, at::ScalarType wire_dtype, const at::Tensor& rows,
         const RowArguments& arguments) {
  const auto* kernels = kernels_of(codec, wire_dtype);
  const auto scalar = scalar_of(rows.scalar_type());
  const RowLaunch launch = kernels && scalar ? (kernels->*operation)[static_cast<int>(*scalar)] : nullptr;
  TORCH_CHECK_VALUE(launch != nullptr, "no CUDA kernel for ", rows.scalar_type(), " rows on a wire of ", wire_dtype,
                    " activations");
  const c10::cuda::CUDAGuard guard(rows.device());
  check_launch(launch(arguments, c10::cuda::getCurrentCUDAStream(rows.device().index()).stream()));
}

void run_encoder(const AbstractCompressor& codec, Operation operation, at::ScalarType wire_dtype,
                 const at::Tensor& rows, RowArguments arguments) {
  auto* refusals = codec.refusals();
  if (refusals) arguments.refused = refusals->flag_of_kernels();
  run(codec, operation, wire_dtype, rows, arguments);
  if (refusals) refusals->note_kernels(rows.device());
}

}  // namespace

bool DeviceRows::covers(const AbstractCompressor& codec, at::ScalarType rows, at::ScalarType dtype) const {
  const auto scalar = scalar_of(rows);
  const auto* kernels = kernels_of(codec, dtype);
  return scalar && kernels && kernels->pack[static_cast<int>(*scalar)] != nullptr;
}

void DeviceRows::pack(const AbstractCompressor& codec, const at::Tensor& rows, const OptionalTensor& index,
                      at::ScalarType dtype, const at::Tensor& wire) const {
  run_encoder(codec, &RowKernels::pack, dtype, rows, arguments_of(wire, rows, index));
}

void DeviceRows::unpack(const AbstractCompressor& codec, const at::Tensor& wire, const at::Tensor& out,
                        const OptionalTensor& index) const {
  run(codec, &RowKernels::unpack, out.scalar_type(), out, arguments_of(wire, out, index));
}

void DeviceRows::add(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype,
                     const OptionalTensor& index, const at::Tensor& sum) const {
  run(codec, &RowKernels::add, dtype, sum, arguments_of(wire, sum, index));
}

void DeviceRows::spread(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype,
                        const Spread& spread, bool weighted, const at::Tensor& out) const {
  auto arguments = arguments_of(wire, out);
  add_entries(arguments, spread, weighted, out);
  run(codec, &RowKernels::spread, dtype, out, arguments);
}

void DeviceRows::fold(const AbstractCompressor& codec, const at::Tensor& rows, const Spread& spread, bool weighted,
                      at::ScalarType dtype, const at::Tensor& wire) const {
  auto arguments = arguments_of(wire, rows);
  add_entries(arguments, spread, weighted, rows);
  run_encoder(codec, &RowKernels::fold, dtype, rows, arguments);
}

void DeviceRows::dot(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype,
                     const Spread& spread, const at::Tensor& rows, const at::Tensor& result) const {
  auto arguments = arguments_of(wire, rows);
  add_entries(arguments, spread, /*weighted=*/false, rows);
  arguments.route = numbers<int64_t>("route", spread.route, rows);
  arguments.dots = result.mutable_data_ptr<float>();
  arguments.top_k = result.size(1);
  run(codec, &RowKernels::dot, dtype, rows, arguments);
}

void DeviceRows::sum(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype,
                     const at::Tensor& returns, const OptionalTensor& base, const at::Tensor& out) const {
  TORCH_CHECK_VALUE(returns.dim() == 2 && returns.size(0) == out.size(0), "returns must be [", out.size(0),
                    ", slots], got ", returns.sizes());
  auto arguments = arguments_of(wire, out);
  arguments.num_rows = out.size(0);
  arguments.returns = numbers<int32_t>("returns", returns, out);
  arguments.num_slots = returns.size(1);
  if (base) {
    TORCH_CHECK_VALUE(base->sizes() == out.sizes(), "base is ", base->sizes(), ", expected ", out.sizes());
    arguments.base = numbers<float>("base", *base, out);
  }
  run(codec, &RowKernels::sum, dtype, out, arguments);
}

void DeviceRows::find_misfits(const at::Tensor& rows, const at::Tensor& found) const {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.is_contiguous() && rows.scalar_type() == at::kBFloat16,
                    "rows must be contiguous bfloat16 [rows, hidden], got ", rows.scalar_type(), " ", rows.sizes());
  const c10::cuda::CUDAGuard guard(rows.device());
  RowArguments arguments;
  arguments.rows = rows.data_ptr();
  arguments.num_rows = rows.size(0);
  arguments.hidden = rows.size(1);
  arguments.refused = found.mutable_data_ptr<int32_t>();
  check_launch(check_lossless(arguments, c10::cuda::getCurrentCUDAStream(rows.device().index()).stream()));
}

void DeviceRows::gather(const at::Tensor& from, const at::Tensor& index, const at::Tensor& to) const {
  check_same_device("to", to, from);
  const c10::cuda::CUDAGuard guard(from.device());
  check_launch(gather_rows(from.const_data_ptr<uint8_t>(), from.stride(0),
                           index.defined() ? numbers<int64_t>("index", index, from) : nullptr,
                           to.mutable_data_ptr<uint8_t>(), to.stride(0), to.size(0), from.size(1),
                           c10::cuda::getCurrentCUDAStream(from.device().index()).stream()));
}

void DeviceRows::pack_columns(const std::vector<Column>& columns, const at::Tensor& rows) const {
  TORCH_CHECK_VALUE(columns.size() <= kMostColumns, "rows take ", kMostColumns, " columns at most, got ",
                    columns.size());
  ColumnArguments arguments;
  for (const auto& [values, bytes] : columns) {
    const auto size = values.element_size();
    arguments.columns[arguments.num_columns++] = {static_cast<const uint8_t*>(values.const_data_ptr()),
                                                  values.stride(0) * size, values.stride(1) * size, values.size(0),
                                                  bytes};
    arguments.numbers_per_row += values.size(0);
  }
  arguments.rows = rows.mutable_data_ptr<uint8_t>();
  arguments.num_rows = rows.size(0);
  arguments.width = rows.size(1);
  const c10::cuda::CUDAGuard guard(rows.device());
  check_launch(cuda::pack_columns(arguments, c10::cuda::getCurrentCUDAStream(rows.device().index()).stream()));
}

}  // namespace planmoe::cuda
