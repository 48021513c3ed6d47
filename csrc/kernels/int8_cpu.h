#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace planmoe {

constexpr int64_t kInt8Block = 128;  // values per scale

// rows [R, H] float32/float16/bfloat16 -> wire uint8 [N, code_bytes + 4 * ceil(H / 128)], gathered through `index`.
void int8_encode_cpu(const at::Tensor& rows, const std::optional<at::Tensor>& index, int64_t code_bytes,
                     at::Tensor& wire);

// The reverse, scattered through `index`.
void int8_decode_cpu(const at::Tensor& wire, int64_t code_bytes, const std::optional<at::Tensor>& index,
                     at::Tensor& out);

}  // namespace planmoe
