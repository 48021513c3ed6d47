#include <exception>
#include <memory>

#include "../compressor/abstract.h"
#include "bind.h"

namespace planmoe {
namespace {

// What a Python codec raised, as it is. pybind11's own error may be thrown into Python once only, but a link's thread
// keeps its error for every exchange that it can no longer carry.
class RaisedInPython final : public std::runtime_error {
 public:
  explicit RaisedInPython(const py::error_already_set& error)
      : std::runtime_error(error.what()), value_(new py::object(error.value()), [](py::object* value) {
          py::gil_scoped_acquire gil;
          delete value;
        }) {}

  void raise() const { PyErr_SetObject(py::type::handle_of(*value_).ptr(), value_->ptr()); }

 private:
  std::shared_ptr<py::object> value_;
};

template <class Function>
auto call_python(const Function& function) {
  py::gil_scoped_acquire gil;
  try {
    return function();
  } catch (const py::error_already_set& error) {
    throw RaisedInPython(error);
  }
}

// A compressor written in Python: the overridden methods of planmoe_ds.AbstractCompressor.
class PythonCompressor final : public AbstractCompressor, public py::trampoline_self_life_support {
 public:
  using AbstractCompressor::AbstractCompressor;

  int64_t row_bytes(int64_t hidden, at::ScalarType dtype) const override {
    return call_python([&] { return method("row_bytes")(hidden, dtype).cast<int64_t>(); });
  }
  bool lossless() const override {
    return call_python([&] { return method("is_lossless")().cast<bool>(); });
  }
  at::Tensor encode_tensor(const at::Tensor& rows, at::ScalarType dtype) const override {
    const auto wire = call_python([&] { return method("encode_tensor")(rows, dtype).cast<at::Tensor>(); });
    TORCH_CHECK_VALUE(wire.scalar_type() == at::kByte && wire.dim() == 2 && wire.size(0) == rows.size(0) &&
                          wire.size(1) == row_bytes(rows.size(1), dtype),
                      "encode_tensor must return uint8 [", rows.size(0), ", ", row_bytes(rows.size(1), dtype),
                      "] (row_bytes says so), got ", wire.scalar_type(), " ", wire.sizes());
    return wire;
  }
  at::Tensor decode_tensor(const at::Tensor& wire, int64_t hidden, at::ScalarType dtype) const override {
    const auto rows = call_python([&] { return method("decode_tensor")(wire, hidden, dtype).cast<at::Tensor>(); });
    TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) == wire.size(0) && rows.size(1) == hidden,
                      "decode_tensor must return [", wire.size(0), ", ", hidden, "], got ", rows.sizes());
    return rows;
  }

 private:
  py::function method(const char* name) const {
    auto found = py::get_override(static_cast<const AbstractCompressor*>(this), name);
    TORCH_CHECK_NOT_IMPLEMENTED(found, "a subclass of planmoe_ds.AbstractCompressor must define ", name, "()");
    return found;
  }
};

bool carries(const AbstractCompressor& codec, at::ScalarType dtype) {
  try {
    codec.check_dtype(dtype);
    return true;
  } catch (const c10::ValueError&) {
    return false;
  }
}

}  // namespace

void bind_compressors(py::module_& module) {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      std::rethrow_exception(error);
    } catch (const RaisedInPython& raised) {
      raised.raise();
    }
  });
  py::class_<AbstractCompressor, PythonCompressor, py::smart_holder>(module, "Compressor")
      .def(py::init<>())
      .def("row_bytes", &AbstractCompressor::row_bytes, py::arg("hidden"), py::arg("dtype"))
      .def_property_readonly("lossless", &AbstractCompressor::lossless)
      .def_property_readonly("identity", &AbstractCompressor::is_identity)
      .def_property_readonly("may_refuse", &AbstractCompressor::may_refuse)
      .def("carries", &carries, py::arg("dtype"))
      .def("misfits", &AbstractCompressor::misfits, py::arg("rows"), NoGil())
      .def("take_refused", &AbstractCompressor::take_refused, NoGil())
      .def("encode", &AbstractCompressor::encode, py::arg("rows"), py::arg("index") = py::none(), NoGil())
      .def("encode_into", &AbstractCompressor::encode_into, py::arg("rows"), py::arg("index"), py::arg("wire"), NoGil())
      .def("decode", &AbstractCompressor::decode, py::arg("wire"), py::arg("out"), py::arg("index") = py::none(),
           NoGil());
  module.def("make_compressor", &make_compressor, py::arg("name"));
  module.def("compressor_names", [] { return compressor_registry().names(); });
}

}  // namespace planmoe
