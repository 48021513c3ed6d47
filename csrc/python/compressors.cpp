#include "../compressor/abstract.h"
#include "bind.h"

namespace planmoe {
namespace {

// A compressor written in Python: the overridden methods of planmoe_ds.AbstractCompressor.
class PythonCompressor final : public AbstractCompressor, public py::trampoline_self_life_support {
 public:
  using AbstractCompressor::AbstractCompressor;

  int64_t row_bytes(int64_t hidden, at::ScalarType dtype) const override {
    PYBIND11_OVERRIDE_PURE(int64_t, AbstractCompressor, row_bytes, hidden, dtype);
  }
  bool lossless() const override { PYBIND11_OVERRIDE_PURE_NAME(bool, AbstractCompressor, "is_lossless", lossless); }
  at::Tensor encode_tensor(const at::Tensor& rows, at::ScalarType dtype) const override {
    auto wire = python_encode(rows, dtype);
    TORCH_CHECK_VALUE(wire.scalar_type() == at::kByte && wire.dim() == 2 && wire.size(0) == rows.size(0) &&
                          wire.size(1) == row_bytes(rows.size(1), dtype),
                      "encode_tensor must return uint8 [", rows.size(0), ", ", row_bytes(rows.size(1), dtype),
                      "] (row_bytes says so), got ", wire.scalar_type(), " ", wire.sizes());
    return wire;
  }
  at::Tensor decode_tensor(const at::Tensor& wire, int64_t hidden, at::ScalarType dtype) const override {
    auto rows = python_decode(wire, hidden, dtype);
    TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) == wire.size(0) && rows.size(1) == hidden,
                      "decode_tensor must return [", wire.size(0), ", ", hidden, "], got ", rows.sizes());
    return rows;
  }

 private:
  at::Tensor python_encode(const at::Tensor& rows, at::ScalarType dtype) const {
    PYBIND11_OVERRIDE_PURE_NAME(at::Tensor, AbstractCompressor, "encode_tensor", encode_tensor, rows, dtype);
  }
  at::Tensor python_decode(const at::Tensor& wire, int64_t hidden, at::ScalarType dtype) const {
    PYBIND11_OVERRIDE_PURE_NAME(at::Tensor, AbstractCompressor, "decode_tensor", decode_tensor, wire, hidden, dtype);
  }
};

}  // namespace

void bind_compressors(py::module_& module) {
  py::class_<AbstractCompressor, PythonCompressor, py::smart_holder>(module, "Compressor")
      .def(py::init<>())
      .def("row_bytes", &AbstractCompressor::row_bytes, py::arg("hidden"), py::arg("dtype"))
      .def_property_readonly("lossless", &AbstractCompressor::lossless)
      .def("encode", &AbstractCompressor::encode, py::arg("rows"), py::arg("index") = py::none(), NoGil())
      .def("encode_into", &AbstractCompressor::encode_into, py::arg("rows"), py::arg("index"), py::arg("wire"), NoGil())
      .def("decode", &AbstractCompressor::decode, py::arg("wire"), py::arg("out"), py::arg("index") = py::none(),
           NoGil());
  module.def("make_compressor", [](const std::string& name) { return compressor_registry().create(name); });
  module.def("compressor_names", [] { return compressor_registry().names(); });
}

}  // namespace planmoe
