#include "build_info.h"
#include "python/bind.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "planmoe_ds compiled backend: all-to-all algorithms and wire compressors";
  pybind11::module_::import("torch.distributed");
  planmoe::bind_compressors(module);
  planmoe::bind_gate(module);
  planmoe::bind_rows(module);
  planmoe::bind_comms(module);
  planmoe::bind_scheduler(module);
  module.def("build_info", &planmoe::build_info);
}
