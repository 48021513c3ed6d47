#include "columns.h"

#include <ATen/core/Tensor.h>

#include <cstring>

#include "device.h"
#include "parallel.h"

namespace planmoe {
namespace {

void check(const std::vector<Column>& columns, int64_t width) {
  TORCH_CHECK_VALUE(!columns.empty(), "a row needs at least one column");
  const auto& like = columns[0].values;
  int64_t used = 0;
  for (const auto& [values, bytes] : columns) {
    TORCH_CHECK_VALUE(values.dim() == 2 && like.dim() == 2 && values.size(1) == like.size(1),
                      "columns must be [K, T] for one T, got ", like.sizes(), " and ", values.sizes());
    TORCH_CHECK_VALUE(values.device() == like.device(), "columns are on ", like.device(), " and ", values.device());
    TORCH_CHECK_VALUE(bytes >= 1 && bytes <= values.element_size(), values.scalar_type(), " numbers have ",
                      values.element_size(), " bytes, ", bytes, " were asked for");
    used += values.size(0) * bytes;
  }
  TORCH_CHECK_VALUE(used <= width, "columns of ", used, " bytes do not fit rows of ", width);
}

void pack_on_host(const std::vector<Column>& columns, at::Tensor& rows) {
  const auto width = rows.size(1);
  int64_t first = 0;
  for (const auto& [values, bytes] : columns) {
    const auto size = values.element_size();
    const auto route_step = values.stride(0) * size, row_step = values.stride(1) * size;
    const auto* source = static_cast<const uint8_t*>(values.const_data_ptr());
    auto* target = rows.mutable_data_ptr<uint8_t>() + first;
    const auto num_routes = values.size(0), count = bytes;
    for_each_row(rows.size(0), num_routes, [&](int64_t row) {
      for (int64_t k = 0; k < num_routes; ++k)
        std::memcpy(target + row * width + k * count, source + k * route_step + row * row_step, count);
    });
    first += num_routes * bytes;
  }
}

// With tensor operations.
void pack_anywhere(const std::vector<Column>& columns, at::Tensor& rows) {
  int64_t first = 0;
  for (const auto& [values, bytes] : columns) {
    const auto width = values.size(0) * bytes;
    const auto whole =
        values.t().clone(at::MemoryFormat::Contiguous).view(at::kByte).view({rows.size(0), values.size(0), -1});
    rows.narrow(1, first, width).copy_(whole.narrow(2, 0, bytes).reshape({rows.size(0), width}));
    first += width;
  }
}

}  // namespace

at::Tensor pack_columns(const std::vector<Column>& columns, int64_t width) {
  check(columns, width);
  const auto& like = columns[0].values;
  auto rows = like.new_empty({like.size(1), width}, at::kByte);
  if (rows.size(0) == 0) return rows;
  if (like.device().is_cpu())
    pack_on_host(columns, rows);
  else if (const auto* kernels = device_kernels(like))
    kernels->pack_columns(columns, rows);
  else
    pack_anywhere(columns, rows);
  return rows;
}

}  // namespace planmoe
