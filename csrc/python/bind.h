#pragma once

#include <torch/csrc/utils/pybind.h>

namespace planmoe {

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

// Each adds its classes and functions to the module; types and docstrings are in planmoe_ds/_C.pyi.
void bind_compressors(py::module_& module);
void bind_gate(py::module_& module);
void bind_rows(py::module_& module);
void bind_comms(py::module_& module);
void bind_scheduler(py::module_& module);

}  // namespace planmoe
