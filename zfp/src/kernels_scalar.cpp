#include "block_codec.h"
#include "kernels.h"

namespace planmoe::zfp {
namespace {

template <int kDimensions>
void encode_blocks(const float* blocks, std::size_t num_blocks, unsigned block_bits, BitWriter& writer) {
  for (std::size_t b = 0; b < num_blocks; ++b) {
    encode_block<kDimensions>(blocks + b * kValuesPerBlock<kDimensions>, block_bits, writer);
  }
}

template <int kDimensions>
bool decode_blocks(const BitReader& reader, std::size_t first_bit, std::size_t num_blocks, unsigned block_bits,
                   Rounding rounding, float* blocks) {
  bool valid = true;
  for (std::size_t b = 0; b < num_blocks; ++b) {
    float* values = blocks + b * kValuesPerBlock<kDimensions>;
    valid &= decode_block<kDimensions>(reader, first_bit + b * block_bits, block_bits, rounding, values);
  }
  return valid;
}

template <float (*convert)(std::uint16_t)>
void widen_all(const std::uint16_t* source, std::size_t count, float* target) {
  for (std::size_t i = 0; i < count; ++i) target[i] = convert(source[i]);
}

template <std::uint16_t (*convert)(float)>
void narrow_all(const float* source, std::size_t count, std::uint16_t* target) {
  for (std::size_t i = 0; i < count; ++i) target[i] = convert(source[i]);
}

constexpr KernelSet kScalarKernels = {
    {encode_blocks<1>, encode_blocks<2>},
    {decode_blocks<1>, decode_blocks<2>},
    {widen_all<widen_float16>, widen_all<widen_bfloat16>},
    {narrow_all<narrow_float16>, narrow_all<narrow_bfloat16>},
};

}  // namespace

const KernelSet* scalar_kernels() noexcept { return &kScalarKernels; }

}  // namespace planmoe::zfp
