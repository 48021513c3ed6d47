#include <torch/csrc/utils/pybind.h>

#include "build_info.h"
#include "clock.h"
#include "comm/abstract.h"
#include "compressor/abstract.h"

namespace py = pybind11;
using namespace planmoe;

namespace {

using Groups = std::vector<c10::intrusive_ptr<c10d::ProcessGroup>>;
using NoGil = py::call_guard<py::gil_scoped_release>;

// Waits in slices so that Ctrl-C reaches Python.
void wait(Exchange& exchange) {
  while (true) {
    {
      py::gil_scoped_release release;
      if (exchange.wait_for(200)) return;
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

std::vector<std::tuple<std::string, int64_t, int64_t>> spans(const Exchange& exchange) {
  std::vector<std::tuple<std::string, int64_t, int64_t>> result;
  for (const auto& transfer : exchange.transfers()) {
    auto [start, end] = transfer->span_ns();
    result.emplace_back(transfer->lane, start, end);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "planmoe_ds compiled backend: all-to-all algorithms and wire compressors";
  py::module_::import("torch.distributed");

  py::class_<Stamp>(module, "Stamp").def("ns", &Stamp::ns, NoGil());
  py::class_<Clock, std::shared_ptr<Clock>>(module, "Clock")
      .def(py::init([](const c10::Device& device) { return std::make_shared<Clock>(device); }), py::arg("device"))
      .def("stamp", &Clock::stamp);

  py::class_<Exchange, std::shared_ptr<Exchange>>(module, "Exchange")
      .def("wait", &wait)
      .def("spans", &spans)
      .def_property_readonly("bytes_sent", &Exchange::bytes_sent);

  py::class_<AbstractComm, std::shared_ptr<AbstractComm>>(module, "Comm")
      .def_property_readonly("rank", &AbstractComm::rank)
      .def_property_readonly("size", &AbstractComm::size)
      .def("close", &AbstractComm::close, NoGil())
      .def(
          "start",
          [](AbstractComm& comm, at::Tensor send, std::vector<int64_t> send_rows, at::Tensor recv,
             std::vector<int64_t> recv_rows) {
            return comm.start({std::move(send), std::move(send_rows), std::move(recv), std::move(recv_rows)});
          },
          py::arg("send"), py::arg("send_rows"), py::arg("recv"), py::arg("recv_rows"), NoGil());

  py::class_<AbstractCompressor, std::shared_ptr<AbstractCompressor>>(module, "Compressor")
      .def("row_bytes", &AbstractCompressor::row_bytes, py::arg("hidden"), py::arg("dtype"))
      .def_property_readonly("lossless", &AbstractCompressor::lossless)
      .def("encode", &AbstractCompressor::encode, py::arg("rows"), py::arg("index") = py::none(), NoGil())
      .def("decode", &AbstractCompressor::decode, py::arg("wire"), py::arg("out"), py::arg("index") = py::none(),
           NoGil());

  module.def(
      "make_comm",
      [](const std::string& name, Groups groups, std::vector<int64_t> node_of_rank, const c10::Device& device,
         int64_t timeout_ms) {
        return comm_registry().create(name,
                                      CommOptions{std::move(groups), std::move(node_of_rank), device, timeout_ms});
      },
      py::arg("name"), py::arg("groups"), py::arg("node_of_rank"), py::arg("device"), py::arg("timeout_ms") = 0);
  module.def("make_compressor", [](const std::string& name) { return compressor_registry().create(name); });
  module.def("comm_names", [] { return comm_registry().names(); });
  module.def("compressor_names", [] { return compressor_registry().names(); });
  module.def("build_info", &build_info);
}
