#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../compressor/abstract.h"

namespace planmoe {

// Which rows of a buffer each wire row stands for: wire row i feeds target[start[i]] .. target[start[i + 1] - 1].
struct Spread {
  at::Tensor start;   // int64 [R + 1]
  at::Tensor target;  // int64 [M]
  at::Tensor weight;  // [M] float32, float64 for float64 rows
  at::Tensor route;   // int64 [M]: which of its token's K routes it is
  at::Tensor source;  // int64 [M]: the wire row, i
};

// Rows are float32, float16, bfloat16 or float64, wires uint8 with rows of any stride. Sums are in float32 (float64 for
// float64 rows) and in a fixed order on the CPU and
// in the kernels of device.h. Requests are not checked here.

// wire[i] = encode(rows[index[i]]), for activations of `dtype`.
void pack(const AbstractCompressor& codec, const at::Tensor& rows, const std::optional<at::Tensor>& index,
          at::ScalarType dtype, at::Tensor wire);

// out[index[i]] = decode(wire[i])
void unpack(const AbstractCompressor& codec, const at::Tensor& wire, at::Tensor out,
            const std::optional<at::Tensor>& index);

// sum[index[i]] += decode(wire[i]); sum [R, H] float32 (float64); `dtype` is the activations'. `distinct`: no place
// comes twice in `index`, so that accelerators need no atomic sums.
void unpack_add(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype,
                const std::optional<at::Tensor>& index, at::Tensor sum, bool distinct = false);

// out[t] = base[t] + sum over s of decode(wire[returns[t, s]]), for accelerators that have kernels for it: see
// sums_on_device(). returns: int32 [T, S], a negative place ends a row's. base: float32 [T, H], may be `out`.
void sum_rows(const AbstractCompressor& codec, const at::Tensor& wire, at::ScalarType dtype, const at::Tensor& returns,
              const std::optional<at::Tensor>& base, at::Tensor out);

// Whether sum_rows takes wires of activations of `dtype` on `device`.
bool sums_on_device(const AbstractCompressor& codec, at::ScalarType dtype, const at::Tensor& like);

// out[target[e]] = decode(wire[i]), times weight[e] if `weighted`, for the entries e of every wire row i. On the CPU a
// place that `out` does not have is an error.
void spread_rows(const AbstractCompressor& codec, const at::Tensor& wire, const Spread& spread, bool weighted,
                 at::Tensor out);

// wire[i] = encode(sum over the entries e of i of rows[target[e]], times weight[e] if `weighted`)
void fold_rows(const AbstractCompressor& codec, const at::Tensor& rows, const Spread& spread, bool weighted,
               at::Tensor wire);

// result[i, route[e]] = decode(wire[i]) . rows[target[e]]; result [R, K] float32 (float64), other
// places zero.
at::Tensor dot_rows(const AbstractCompressor& codec, const at::Tensor& wire, const Spread& spread,
                    const at::Tensor& rows, int64_t top_k);

// to[i] = from[index[i]], or from[i] where `index` is not defined; bytes.
void gather_bytes(const at::Tensor& from, const at::Tensor& index, at::Tensor to);

}  // namespace planmoe
