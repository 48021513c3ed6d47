// The same codec on CUDA devices: same shapes, options, stream bytes and decoded values as zfp.h, any data type.
//
// Every call is asynchronous on `cuda_stream` and allocates nothing. `values` and `stream` are device pointers, `stream`
// aligned to 8 bytes, `values` for its data type (to 4 values for full speed). Options::kernel must be kAutomatic.
// Further errors: kMisaligned, kCudaError (a launch failed; cudaGetLastError has been read). Errors of running kernels
// show up, as ever, when the stream is synchronized.
#pragma once

#include <cstddef>

#include "planmoe_zfp/zfp.h"

struct CUstream_st;  // *cuda_stream is a cudaStream_t

namespace planmoe::zfp {

Status encode_cuda(const Field& field, const Options& options, const void* values, void* stream,
                   std::size_t stream_capacity, CUstream_st* cuda_stream) noexcept;

// `num_corrupt`, if not null, is a device counter that grows by one for each corrupt block (or padding): the caller
// sets it to 0 and reads it once the stream is done. Corrupt blocks decode to unspecified values.
Status decode_cuda(const Field& field, const Options& options, const void* stream, std::size_t stream_size,
                   void* values, unsigned* num_corrupt, CUstream_st* cuda_stream) noexcept;

Status encode_rows_cuda(const Rows& rows, const Options& options, const void* values, void* stream,
                        std::size_t stream_capacity, CUstream_st* cuda_stream) noexcept;

Status decode_rows_cuda(const Rows& rows, const Options& options, const void* stream, std::size_t stream_size,
                        void* values, unsigned* num_corrupt, CUstream_st* cuda_stream) noexcept;

}  // namespace planmoe::zfp
