#include "planmoe_zfp/zfp_c.h"

#include "planmoe_zfp/zfp.h"

namespace {

namespace zfp = planmoe::zfp;

zfp::Field to_field(const planmoe_zfp_field& field) {
  return {field.num_dimensions, field.width, field.height, static_cast<zfp::DataType>(field.data_type)};
}

zfp::Rows to_rows(const planmoe_zfp_rows& rows) {
  return {rows.num_rows, rows.hidden, static_cast<zfp::DataType>(rows.data_type)};
}

zfp::Options to_options(const planmoe_zfp_options& options) {
  return {options.rate, static_cast<zfp::Rounding>(options.rounding), static_cast<zfp::Kernel>(options.kernel)};
}

constexpr int kNullPointer = static_cast<int>(zfp::Status::kNullPointer);

}  // namespace

extern "C" {

const char* planmoe_zfp_describe(int status) { return zfp::describe(static_cast<zfp::Status>(status)); }

int planmoe_zfp_best_kernel(void) { return static_cast<int>(zfp::best_kernel()); }

int planmoe_zfp_kernel_available(int kernel) {
  return kernel >= 0 && kernel <= 3 && zfp::kernel_available(static_cast<zfp::Kernel>(kernel));
}

int planmoe_zfp_stream_bytes(const planmoe_zfp_field* field, double rate, size_t* bytes) {
  if (field == nullptr || bytes == nullptr) return kNullPointer;
  return static_cast<int>(zfp::stream_bytes(to_field(*field), rate, *bytes));
}

int planmoe_zfp_row_bytes(size_t hidden, double rate, size_t* bytes) {
  if (bytes == nullptr) return kNullPointer;
  return static_cast<int>(zfp::row_bytes(hidden, rate, *bytes));
}

int planmoe_zfp_encode(const planmoe_zfp_field* field, const planmoe_zfp_options* options, const void* values,
                       void* stream, size_t stream_capacity) {
  if (field == nullptr || options == nullptr) return kNullPointer;
  return static_cast<int>(zfp::encode(to_field(*field), to_options(*options), values, stream, stream_capacity));
}

int planmoe_zfp_decode(const planmoe_zfp_field* field, const planmoe_zfp_options* options, const void* stream,
                       size_t stream_size, void* values) {
  if (field == nullptr || options == nullptr) return kNullPointer;
  return static_cast<int>(zfp::decode(to_field(*field), to_options(*options), stream, stream_size, values));
}

int planmoe_zfp_encode_rows(const planmoe_zfp_rows* rows, const planmoe_zfp_options* options, const void* values,
                            void* stream, size_t stream_capacity) {
  if (rows == nullptr || options == nullptr) return kNullPointer;
  return static_cast<int>(zfp::encode_rows(to_rows(*rows), to_options(*options), values, stream, stream_capacity));
}

int planmoe_zfp_decode_rows(const planmoe_zfp_rows* rows, const planmoe_zfp_options* options, const void* stream,
                            size_t stream_size, void* values) {
  if (rows == nullptr || options == nullptr) return kNullPointer;
  return static_cast<int>(zfp::decode_rows(to_rows(*rows), to_options(*options), stream, stream_size, values));
}

}  // extern "C"
