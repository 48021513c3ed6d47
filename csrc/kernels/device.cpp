#include "device.h"

#include <map>

namespace planmoe {
namespace {

using Table = std::map<c10::DeviceType, std::unique_ptr<const DeviceKernels>>;

// Filled while the module loads, read-only after.
Table& table() {
  static Table kernels;
  return kernels;
}

}  // namespace

const DeviceKernels* device_kernels(const at::Tensor& tensor) {
  const auto found = table().find(tensor.device().type());
  return found == table().end() ? nullptr : found->second.get();
}

bool add_device_kernels(c10::DeviceType type, std::unique_ptr<const DeviceKernels> kernels) {
  return table().emplace(type, std::move(kernels)).second;
}

}  // namespace planmoe
