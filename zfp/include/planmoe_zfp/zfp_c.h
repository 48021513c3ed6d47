// The same codec for C and for foreign-function interfaces; see zfp.h for meanings, limits and errors.
// Every function returns a status: 0 when well, else a number that planmoe_zfp_describe puts into words.
#ifndef PLANMOE_ZFP_ZFP_C_H
#define PLANMOE_ZFP_ZFP_C_H

#include <stddef.h>

#if defined(__GNUC__)
#define PLANMOE_ZFP_EXPORT __attribute__((visibility("default")))
#elif defined(_WIN32)
#define PLANMOE_ZFP_EXPORT __declspec(dllexport)
#else
#define PLANMOE_ZFP_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Field of width * height contiguous values; data_type 0 float32, 1 float16, 2 bfloat16; height 1 in 1-d.
typedef struct planmoe_zfp_field {
  int num_dimensions;
  int data_type;
  size_t width;
  size_t height;
} planmoe_zfp_field;

// num_rows rows of `hidden` values, each coded alone.
typedef struct planmoe_zfp_rows {
  int data_type;
  size_t num_rows;
  size_t hidden;
} planmoe_zfp_rows;

// rate in bits per value; rounding 0 none, 1 last; kernel 0 automatic, 1 scalar, 2 AVX2, 3 AVX-512.
typedef struct planmoe_zfp_options {
  double rate;
  int rounding;
  int kernel;
} planmoe_zfp_options;

PLANMOE_ZFP_EXPORT const char* planmoe_zfp_describe(int status);
PLANMOE_ZFP_EXPORT int planmoe_zfp_best_kernel(void);
PLANMOE_ZFP_EXPORT int planmoe_zfp_kernel_available(int kernel);

PLANMOE_ZFP_EXPORT int planmoe_zfp_stream_bytes(const planmoe_zfp_field* field, double rate, size_t* bytes);
PLANMOE_ZFP_EXPORT int planmoe_zfp_row_bytes(size_t hidden, double rate, size_t* bytes);

PLANMOE_ZFP_EXPORT int planmoe_zfp_encode(const planmoe_zfp_field* field, const planmoe_zfp_options* options,
                                          const void* values, void* stream, size_t stream_capacity);
PLANMOE_ZFP_EXPORT int planmoe_zfp_decode(const planmoe_zfp_field* field, const planmoe_zfp_options* options,
                                          const void* stream, size_t stream_size, void* values);
PLANMOE_ZFP_EXPORT int planmoe_zfp_encode_rows(const planmoe_zfp_rows* rows, const planmoe_zfp_options* options,
                                               const void* values, void* stream, size_t stream_capacity);
PLANMOE_ZFP_EXPORT int planmoe_zfp_decode_rows(const planmoe_zfp_rows* rows, const planmoe_zfp_options* options,
                                               const void* stream, size_t stream_size, void* values);

#ifdef __cplusplus
}
#endif

#endif
