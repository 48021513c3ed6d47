// The table of kernels that one instruction set provides. See lane_kernel.h.
#pragma once

#include "lane_kernel.h"
#include "lanes_twice.h"

namespace planmoe::zfp {
namespace {

// Vectors in pairs, but for a rest that fits in one.
template <class Lanes, int kDimensions>
void encode_blocks(const float* blocks, std::size_t num_blocks, unsigned block_bits, BitWriter& writer) {
  const std::size_t rest = num_blocks % (2 * Lanes::kLanes);
  const std::size_t num_single = rest <= Lanes::kLanes ? rest : 0, num_paired = num_blocks - num_single;
  if (num_paired > 0) LaneKernel<LanesTwice<Lanes>, kDimensions>::encode(blocks, num_paired, block_bits, writer);
  blocks += num_paired * kValuesPerBlock<kDimensions>;
  if (num_single > 0) LaneKernel<Lanes, kDimensions>::encode(blocks, num_single, block_bits, writer);
}

template <class Lanes, int kDimensions>
bool decode_blocks(const BitReader& reader, std::size_t first_bit, std::size_t num_blocks, unsigned block_bits,
                   Rounding rounding, float* blocks) {
  using Single = LaneKernel<Lanes, kDimensions>;
  using Paired = LaneKernel<LanesTwice<Lanes>, kDimensions>;
  const std::size_t rest = num_blocks % (2 * Lanes::kLanes);
  const std::size_t num_single = rest <= Lanes::kLanes ? rest : 0, num_paired = num_blocks - num_single;
  bool valid = num_paired == 0 || Paired::decode(reader, first_bit, num_paired, block_bits, rounding, blocks);
  first_bit += num_paired * block_bits;
  blocks += num_paired * kValuesPerBlock<kDimensions>;
  return (num_single == 0 || Single::decode(reader, first_bit, num_single, block_bits, rounding, blocks)) && valid;
}

template <class Lanes, void (*convert)(const std::uint16_t*, float*)>
void widen_all(const std::uint16_t* source, std::size_t count, float* target) {
  constexpr std::size_t kLanes = Lanes::kLanes;
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) convert(source + i, target + i);
  if (i == count) return;
  std::uint16_t last[kLanes] = {};
  float widened[kLanes];
  std::memcpy(last, source + i, (count - i) * sizeof(*source));
  convert(last, widened);
  std::memcpy(target + i, widened, (count - i) * sizeof(*target));
}

template <class Lanes, void (*convert)(const float*, std::uint16_t*)>
void narrow_all(const float* source, std::size_t count, std::uint16_t* target) {
  constexpr std::size_t kLanes = Lanes::kLanes;
  std::size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) convert(source + i, target + i);
  if (i == count) return;
  float last[kLanes] = {};
  std::uint16_t narrowed[kLanes];
  std::memcpy(last, source + i, (count - i) * sizeof(*source));
  convert(last, narrowed);
  std::memcpy(target + i, narrowed, (count - i) * sizeof(*target));
}

template <class Lanes>
constexpr KernelSet kLaneKernels = {
    {encode_blocks<Lanes, 1>, encode_blocks<Lanes, 2>},
    {decode_blocks<Lanes, 1>, decode_blocks<Lanes, 2>},
    {widen_all<Lanes, Lanes::widen_float16>, widen_all<Lanes, Lanes::widen_bfloat16>},
    {narrow_all<Lanes, Lanes::narrow_float16>, narrow_all<Lanes, Lanes::narrow_bfloat16>},
};

}  // namespace
}  // namespace planmoe::zfp
