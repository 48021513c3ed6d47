// On the CPU a row goes through one float32 row that stays in cache; elsewhere, and for codecs that only know whole
// tensors, the same with tensor operations.
#include "wire_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "device.h"
#include "parallel.h"
#include "row_coder.h"

#define PLANMOE_DISPATCH(dtype, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, name, __VA_ARGS__)

namespace planmoe {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

const int64_t* places(const OptionalTensor& index) { return index ? index->const_data_ptr<int64_t>() : nullptr; }

bool by_rows(const AbstractCompressor& codec, const at::Tensor& tensor) {
  return tensor.device().is_cpu() && (codec.is_identity() || dynamic_cast<const RowCodec*>(&codec) != nullptr);
}

// The device's own kernels, where it has some for this codec.
const DeviceKernels* kernels_for(const AbstractCompressor& codec, const at::Tensor& rows, at::ScalarType dtype) {
  const auto* kernels = device_kernels(rows);
  return kernels && kernels->covers(codec, rows.scalar_type(), dtype) ? kernels : nullptr;
}

// The device's kernels that take float32 rows to and from `rows`, for codecs that only know whole tensors.
const DeviceKernels* wide_kernels(const at::Tensor& rows) {
  return rows.scalar_type() == at::kDouble ? nullptr : device_kernels(rows);
}

const AbstractCompressor& plain() {
  static const auto codec = make_compressor("none");
  return *codec;
}

at::Tensor wide_bytes(const at::Tensor& values) { return values.to(at::kFloat).contiguous().view(at::kByte); }

// Rows added at their index in their order, with the same bits each time: index_add_ on a device uses atomics.
void add_at(at::Tensor& sum, const at::Tensor& index, const at::Tensor& rows) {
  if (sum.device().is_cpu())
    sum.index_add_(0, index, rows);
  else
    sum.index_put_({index}, rows, /*accumulate=*/true);
}

// Both ends of a wire as the tensor path needs them.
at::Tensor decoded(const AbstractCompressor& codec, const at::Tensor& wire, int64_t hidden, at::ScalarType dtype) {
  const auto bytes = codec.row_bytes(hidden, dtype);
  codec.check_dtype(dtype);
  if (wire.size(0) == 0) return at::empty({0, hidden}, wire.options().dtype(wide(dtype)));
  return codec.decode_tensor(wire.narrow(1, 0, bytes).contiguous(), hidden, dtype);
}

void put_encoded(const AbstractCompressor& codec, const at::Tensor& rows, at::ScalarType dtype, at::Tensor& wire) {
  codec.check_dtype(dtype);
  if (rows.size(0) == 0) return;
  codec.encode_tensor_into(rows.contiguous(), dtype, wire.narrow(1, 0, codec.row_bytes(rows.size(1), dtype)));
}

}  // namespace

void pack(const AbstractCompressor& codec, const at::Tensor& rows, const OptionalTensor& index, at::ScalarType dtype,
          at::Tensor wire) {
  const int64_t hidden = rows.size(1);
  if (const auto* kernels = kernels_for(codec, rows, dtype)) return kernels->pack(codec, rows, index, dtype, wire);
  if (!by_rows(codec, rows)) return put_encoded(codec, index ? rows.index_select(0, *index) : rows, dtype, wire);
  const int64_t* from = places(index);
  auto* bytes = wire.mutable_data_ptr<uint8_t>();
  const int64_t stride = wire.stride(0);
  PLANMOE_DISPATCH(rows.scalar_type(), "pack", [&] {
    using row_t = scalar_t;
    const auto* values = rows.const_data_ptr<row_t>();
    if (codec.is_identity() && dtype == rows.scalar_type()) {
      return for_each_row(wire.size(0), hidden, [&](int64_t i) {
        std::memcpy(bytes + i * stride, values + (from ? from[i] : i) * hidden, hidden * sizeof(row_t));
      });
    }
    PLANMOE_DISPATCH(dtype, "pack", [&] {
      const RowCoder<scalar_t> coder(codec, hidden);
      for_each_row(wire.size(0), hidden, [&](int64_t i) {
        const row_t* row = values + (from ? from[i] : i) * hidden;
        coder.encode_from(row, bytes + i * stride);
      });
    });
  });
}

void unpack(const AbstractCompressor& codec, const at::Tensor& wire, at::Tensor out, const OptionalTensor& index) {
  const int64_t hidden = out.size(1);
  const auto dtype = out.scalar_type();
  if (const auto* kernels = kernels_for(codec, out, dtype)) return kernels->unpack(codec, wire, out, index);
  if (!by_rows(codec, out)) {
    if (!index && wire.size(0) > 0)
      return codec.decode_tensor_into(wire.narrow(1, 0, codec.row_bytes(hidden, dtype)).contiguous(), out);
    if (index) out.index_copy_(0, *index, decoded(codec, wire, hidden, dtype).to(dtype));
    return;
  }
  const int64_t* to = places(index);
  const auto* bytes = wire.const_data_ptr<uint8_t>();
  const int64_t stride = wire.stride(0);
  PLANMOE_DISPATCH(dtype, "unpack", [&] {
    auto* values = out.mutable_data_ptr<scalar_t>();
    const RowCoder<scalar_t> coder(codec, hidden);
    for_each_row(wire.size(0), hidden, [&](int64_t i) {
      scalar_t* row = values + (to ? to[i] : i) * hidden;
      if (codec.is_identity())
        std::memcpy(row, bytes + i * stride, hidden * sizeof(scalar_t));
      else
        coder.decode_to(bytes + i * stride, row);
    });
  });
}

void unpack_add(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype,
                const OptionalTensor& index, at::Tensor sum, bool distinct) {
  const int64_t hidden = sum.size(1);
  if (const auto* kernels = kernels_for(codec, sum, dtype); kernels && (distinct || !index))
    return kernels->add(codec, wire, dtype, index, sum);
  if (!by_rows(codec, sum)) {
    auto rows = decoded(codec, wire, hidden, dtype).to(sum.scalar_type());
    if (index)
      add_at(sum, *index, rows);
    else
      sum.add_(rows);
    return;
  }
  const int64_t* to = places(index);
  const auto* bytes = wire.const_data_ptr<uint8_t>();
  PLANMOE_DISPATCH(dtype, "unpack_add", [&] {
    auto* sums = sum.mutable_data_ptr<Wide<scalar_t>>();
    const RowCoder<scalar_t> coder(codec, hidden);
    auto* row = scratch<Wide<scalar_t>>(hidden);
    for (int64_t i = 0; i < wire.size(0); ++i) {  // several rows may have one sum
      coder.decode(bytes + i * wire.stride(0), row);
      auto* target = sums + (to ? to[i] : i) * hidden;
      for (int64_t h = 0; h < hidden; ++h) target[h] += row[h];
    }
  });
}

void spread_rows(const AbstractCompressor& codec, const at::Tensor& wire, const Spread& spread, bool weighted,
                 at::Tensor out) {
  const int64_t hidden = out.size(1);
  const auto dtype = out.scalar_type();
  if (const auto* kernels = kernels_for(codec, out, dtype))
    return kernels->spread(codec, wire, dtype, spread, weighted, out);
  if (!by_rows(codec, out)) {
    const auto values = decoded(codec, wire, hidden, dtype);
    if (const auto* kernels = wide_kernels(out))
      return kernels->spread(plain(), wide_bytes(values), at::kFloat, spread, weighted, out);
    auto rows = values.index_select(0, spread.source);
    if (weighted) rows = rows.to(wide(dtype)) * spread.weight.unsqueeze(1);
    out.index_copy_(0, spread.target, rows.to(dtype));
    return;
  }
  const auto* start = spread.start.const_data_ptr<int64_t>();
  const auto* target = spread.target.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < spread.target.size(0); ++e)  // peers' numbers are in them
    TORCH_CHECK(target[e] >= 0 && target[e] < out.size(0), "planmoe: a peer sent a row for place ", target[e],
                " of the experts' buffer, which has ", out.size(0),
                ". The row was damaged on its way, or planmoe is not the same there");
  const auto* bytes = wire.const_data_ptr<uint8_t>();
  const int64_t stride = wire.stride(0);
  PLANMOE_DISPATCH(dtype, "spread_rows", [&] {
    using wide_t = Wide<scalar_t>;
    const auto* weight = weighted ? spread.weight.const_data_ptr<wide_t>() : nullptr;
    auto* values = out.mutable_data_ptr<scalar_t>();
    const RowCoder<scalar_t> coder(codec, hidden);
    for_each_row(wire.size(0), hidden, [&](int64_t i) {
      if (codec.is_identity() && !weighted) {
        for (int64_t e = start[i]; e < start[i + 1]; ++e)
          std::memcpy(values + target[e] * hidden, bytes + i * stride, hidden * sizeof(scalar_t));
        return;
      }
      auto* row = scratch<wide_t>(hidden);
      coder.decode(bytes + i * stride, row);
      for (int64_t e = start[i]; e < start[i + 1]; ++e) {
        const wide_t factor = weight ? weight[e] : wide_t{1};
        scalar_t* to = values + target[e] * hidden;
        for (int64_t h = 0; h < hidden; ++h) to[h] = narrow<scalar_t>(row[h] * factor);
      }
    });
  });
}

void fold_rows(const AbstractCompressor& codec, const at::Tensor& rows, const Spread& spread, bool weighted,
               at::Tensor wire) {
  const int64_t hidden = rows.size(1);
  const auto dtype = rows.scalar_type();
  if (const auto* kernels = kernels_for(codec, rows, dtype))
    return kernels->fold(codec, rows, spread, weighted, dtype, wire);
  if (const auto* kernels = by_rows(codec, rows) ? nullptr : wide_kernels(rows)) {
    const auto sums = at::empty({wire.size(0), hidden}, rows.options().dtype(at::kFloat));
    kernels->fold(plain(), rows, spread, weighted, at::kFloat, sums.view(at::kByte));
    return put_encoded(codec, sums, dtype, wire);
  }
  if (!by_rows(codec, rows)) {
    auto picked = rows.index_select(0, spread.target).to(wide(dtype));
    if (weighted) picked = picked * spread.weight.unsqueeze(1);
    auto sums = at::zeros({wire.size(0), hidden}, picked.options());
    add_at(sums, spread.source, picked);
    return put_encoded(codec, sums, dtype, wire);
  }
  const auto* start = spread.start.const_data_ptr<int64_t>();
  const auto* target = spread.target.const_data_ptr<int64_t>();
  auto* bytes = wire.mutable_data_ptr<uint8_t>();
  const int64_t stride = wire.stride(0);
  PLANMOE_DISPATCH(dtype, "fold_rows", [&] {
    using wide_t = Wide<scalar_t>;
    const auto* weight = weighted ? spread.weight.const_data_ptr<wide_t>() : nullptr;
    const auto* values = rows.const_data_ptr<scalar_t>();
    const RowCoder<scalar_t> coder(codec, hidden);
    for_each_row(wire.size(0), hidden, [&](int64_t i) {
      if (!weighted && start[i + 1] - start[i] == 1) {  // the row itself, -0 among its values
        const scalar_t* row = values + target[start[i]] * hidden;
        if (codec.is_identity())
          std::memcpy(bytes + i * stride, row, hidden * sizeof(scalar_t));
        else
          coder.encode_from(row, bytes + i * stride);
        return;
      }
      auto* sum = scratch<wide_t>(hidden);
      std::fill(sum, sum + hidden, wide_t{0});
      for (int64_t e = start[i]; e < start[i + 1]; ++e) {
        const wide_t factor = weight ? weight[e] : wide_t{1};
        const scalar_t* row = values + target[e] * hidden;
        for (int64_t h = 0; h < hidden; ++h) sum[h] += widen(row[h]) * factor;
      }
      coder.encode(sum, bytes + i * stride);
    });
  });
}

at::Tensor dot_rows(const AbstractCompressor& codec, const at::Tensor& wire, const Spread& spread,
                    const at::Tensor& rows, int64_t top_k) {
  const int64_t hidden = rows.size(1);
  const auto dtype = rows.scalar_type();
  if (const auto* kernels = kernels_for(codec, rows, dtype)) {
    auto dots = at::empty({wire.size(0), top_k}, rows.options().dtype(at::kFloat));
    kernels->dot(codec, wire, dtype, spread, rows, dots);
    return dots;
  }
  if (const auto* kernels = by_rows(codec, rows) ? nullptr : wide_kernels(rows)) {
    auto dots = at::empty({wire.size(0), top_k}, rows.options().dtype(at::kFloat));
    kernels->dot(plain(), wide_bytes(decoded(codec, wire, hidden, dtype)), at::kFloat, spread, rows, dots);
    return dots;
  }
  auto result = at::zeros({wire.size(0), top_k}, rows.options().dtype(wide(dtype)));
  if (!by_rows(codec, rows)) {
    auto left = decoded(codec, wire, hidden, dtype).index_select(0, spread.source).to(wide(dtype));
    auto right = rows.index_select(0, spread.target).to(wide(dtype));
    result.view({-1}).index_copy_(0, spread.source * top_k + spread.route, (left * right).sum(1));
    return result;
  }
  const auto* start = spread.start.const_data_ptr<int64_t>();
  const auto* target = spread.target.const_data_ptr<int64_t>();
  const auto* route = spread.route.const_data_ptr<int64_t>();
  const auto* bytes = wire.const_data_ptr<uint8_t>();
  PLANMOE_DISPATCH(dtype, "dot_rows", [&] {
    using wide_t = Wide<scalar_t>;
    const auto* values = rows.const_data_ptr<scalar_t>();
    auto* dots = result.mutable_data_ptr<wide_t>();
    const RowCoder<scalar_t> coder(codec, hidden);
    for_each_row(wire.size(0), hidden, [&](int64_t i) {
      auto* left = scratch<wide_t>(hidden);
      coder.decode(bytes + i * wire.stride(0), left);
      for (int64_t e = start[i]; e < start[i + 1]; ++e) {
        const scalar_t* right = values + target[e] * hidden;
        dots[i * top_k + route[e]] = dot(left, right, hidden);
      }
    });
  });
  return result;
}

void sum_rows(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype, const at::Tensor& returns,
              const OptionalTensor& base, at::Tensor out) {
  const auto* kernels = kernels_for(codec, out, dtype);
  TORCH_CHECK_VALUE(kernels != nullptr, "sum_rows needs rows on an accelerator with kernels for this codec and dtype, ",
                    "got ", out.scalar_type(), " rows on ", out.device());
  kernels->sum(codec, wire, dtype, returns, base, out);
}

bool sums_on_device(const AbstractCompressor& codec, at::ScalarType dtype, const at::Tensor& like) {
  const auto* kernels = device_kernels(like);
  return kernels && kernels->covers(codec, at::kFloat, dtype) && kernels->covers(codec, dtype, dtype);
}

void gather_bytes(const at::Tensor& from, const at::Tensor& index, at::Tensor to) {
  const auto num_rows = index.defined() ? index.size(0) : from.size(0);
  TORCH_CHECK_VALUE(to.dim() == 2 && from.dim() == 2 && to.size(0) == num_rows && to.size(1) == from.size(1),
                    "bytes of ", num_rows, " rows of ", from.sizes(), " do not fit ", to.sizes());
  TORCH_CHECK_VALUE(from.numel() == 0 || (from.stride(1) == 1 && to.stride(1) == 1),
                    "each row must be contiguous, got strides ", from.strides(), " and ", to.strides());
  if (!from.device().is_cpu()) {
    if (const auto* kernels = device_kernels(from)) return kernels->gather(from, index, to);
    return void(to.copy_(index.defined() ? from.index_select(0, index) : from, /*non_blocking=*/true));
  }
  const auto* rows = index.defined() ? index.const_data_ptr<int64_t>() : nullptr;
  const auto* source = from.const_data_ptr<uint8_t>();
  auto* target = to.mutable_data_ptr<uint8_t>();
  for_each_row(to.size(0), from.size(1), [&](int64_t i) {
    std::memcpy(target + i * to.stride(0), source + (rows ? rows[i] : i) * from.stride(0), from.size(1));
  });
}

}  // namespace planmoe
