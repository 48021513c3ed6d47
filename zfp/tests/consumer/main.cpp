#include <planmoe_zfp/zfp.h>

#include <cstdio>
#include <vector>

namespace zfp = planmoe::zfp;

int main() {
  zfp::Rows rows{3, 64};
  std::vector<float> values(3 * 64, 1.5f), decoded(values.size());
  std::size_t row_bytes = 0;
  zfp::Status status = zfp::row_bytes(rows.hidden, 8.0, row_bytes);
  std::vector<unsigned char> stream(rows.num_rows * row_bytes);
  if (status == zfp::Status::kOk) status = zfp::encode_rows(rows, {}, values.data(), stream.data(), stream.size());
  if (status == zfp::Status::kOk) status = zfp::decode_rows(rows, {}, stream.data(), stream.size(), decoded.data());
  std::printf("%s: %zu bytes per row, first value %g\n", zfp::describe(status), row_bytes, decoded[0]);
  return status == zfp::Status::kOk && row_bytes == 64 ? 0 : 1;
}
