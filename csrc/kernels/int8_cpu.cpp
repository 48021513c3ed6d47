#include "int8_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace planmoe {
namespace {

template <class scalar>
float encode_block(const scalar* values, int64_t count, int8_t* codes) {
  float buffer[kInt8Block];
  float largest = 0.0f;
  float poison = 0.0f;  // 0 for finite values, NaN as soon as one is not
  for (int64_t i = 0; i < count; ++i) {
    buffer[i] = static_cast<float>(values[i]);
    largest = std::max(largest, std::abs(buffer[i]));
    poison += buffer[i] * 0.0f;
  }
  if (poison != 0.0f) {  // true for NaN
    std::memset(codes, 0, count);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = largest / 127.0f;
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float code = std::min(127.0f, std::max(-127.0f, std::nearbyint(buffer[i] * inverse)));
    codes[i] = static_cast<int8_t>(code);
  }
  return scale;
}

template <class Function>
void for_each_row(int64_t num_rows, int64_t hidden, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(hidden, 1));
  at::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) function(row);
  });
}

}  // namespace

void int8_encode_cpu(const at::Tensor& rows, const std::optional<at::Tensor>& index, int64_t code_bytes,
                     at::Tensor& wire) {
  const int64_t hidden = rows.size(1);
  const int64_t width = wire.size(1);
  const int64_t* source = index ? index->const_data_ptr<int64_t>() : nullptr;
  auto* bytes = wire.mutable_data_ptr<uint8_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "int8_encode", [&] {
    const auto* values = rows.const_data_ptr<scalar_t>();
    for_each_row(wire.size(0), hidden, [&](int64_t row) {
      const scalar_t* from = values + (source ? source[row] : row) * hidden;
      auto* codes = reinterpret_cast<int8_t*>(bytes + row * width);
      std::memset(codes + hidden, 0, code_bytes - hidden);
      for (int64_t start = 0, block = 0; start < hidden; start += kInt8Block, ++block) {
        const float scale = encode_block(from + start, std::min(kInt8Block, hidden - start), codes + start);
        std::memcpy(bytes + row * width + code_bytes + 4 * block, &scale, 4);
      }
    });
  });
}

void int8_decode_cpu(const at::Tensor& wire, int64_t code_bytes, const std::optional<at::Tensor>& index,
                     at::Tensor& out) {
  const int64_t hidden = out.size(1);
  const int64_t width = wire.size(1);
  const int64_t* target = index ? index->const_data_ptr<int64_t>() : nullptr;
  const auto* bytes = wire.const_data_ptr<uint8_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "int8_decode", [&] {
    auto* values = out.mutable_data_ptr<scalar_t>();
    for_each_row(wire.size(0), hidden, [&](int64_t row) {
      scalar_t* to = values + (target ? target[row] : row) * hidden;
      const auto* codes = reinterpret_cast<const int8_t*>(bytes + row * width);
      for (int64_t start = 0, block = 0; start < hidden; start += kInt8Block, ++block) {
        float scale;
        std::memcpy(&scale, bytes + row * width + code_bytes + 4 * block, 4);
        const int64_t end = std::min(start + kInt8Block, hidden);
        for (int64_t i = start; i < end; ++i) to[i] = static_cast<scalar_t>(static_cast<float>(codes[i]) * scale);
      }
    });
  });
}

}  // namespace planmoe
