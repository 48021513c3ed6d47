#include <c10/core/DeviceGuard.h>

#include <cstdlib>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "../clock.h"
#include "../comm/abstract.h"
#include "../comm/ledger.h"
#include "bind.h"

namespace planmoe {
namespace {

using Groups = std::vector<c10::intrusive_ptr<c10d::ProcessGroup>>;

// Whether torch was asked to keep a record of messages, which it has of those that its groups carry.
bool flight_recorder_wanted() {
  for (const auto* name : {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"})
    if (const auto* size = std::getenv(name); size != nullptr && std::string(size) != "0") return true;
  return false;
}

// NCCL's communicator for the device, which torch (2.8 and later) tells to Python only. Null for other libraries, where
// the group is not NCCL's itself, as with TORCH_DISTRIBUTED_DEBUG=DETAIL, and where torch is to keep a record.
void* communicator_of(const c10::intrusive_ptr<c10d::ProcessGroup>& group, const c10::Device& device) {
  if (flight_recorder_wanted()) return nullptr;
  py::gil_scoped_acquire gil;
  const auto classes = py::module_::import("torch._C._distributed_c10d");
  const auto backend = py::cast(group).attr("_get_backend")(py::cast(device));
  if (!py::hasattr(classes, "ProcessGroupNCCL") || !py::isinstance(backend, classes.attr("ProcessGroupNCCL")) ||
      !py::hasattr(backend, "_comm_ptr"))
    return nullptr;
  const c10::DeviceGuard guard(device);
  return reinterpret_cast<void*>(backend.attr("_comm_ptr")().cast<intptr_t>());
}

CommOptions make_options(Groups groups, std::vector<int64_t> node_of_rank, const c10::Device& device,
                         int64_t timeout_ms) {
  return {std::move(groups), std::move(node_of_rank), device, timeout_ms,
          [device](const auto& group) { return communicator_of(group, device); }};
}

// What a Python algorithm's post() returned: anything with wait(), or None when it is done. Keeps the buffers until then.
class PythonExchange final : public Exchange {
 public:
  PythonExchange(py::object handle, py::list parts)
      : Exchange({}), handle_(std::move(handle)), parts_(std::move(parts)) {}
  ~PythonExchange() override {
    py::gil_scoped_acquire gil;
    handle_ = py::object();
    parts_ = py::object();
  }

  bool wait_for(int64_t /*milliseconds*/) override {
    py::gil_scoped_acquire gil;
    if (!handle_.is_none()) handle_.attr("wait")();
    handle_ = py::none();
    parts_ = py::none();
    return true;
  }

 private:
  py::object handle_;
  py::object parts_;
};

// An all-to-all written in Python: the overridden post() of planmoe_ds.AbstractComm.
class PythonComm final : public AbstractComm, public py::trampoline_self_life_support {
 public:
  PythonComm(Groups groups, std::vector<int64_t> node_of_rank, const c10::Device& device, int64_t timeout_ms)
      : AbstractComm(make_options(std::move(groups), std::move(node_of_rank), device, timeout_ms)) {
    for (size_t group = 0; group < this->groups().size(); ++group) connect(group);
  }

 protected:
  std::shared_ptr<Exchange> post(const std::vector<ExchangeSpec>& parts, int /*tag*/) override {
    py::gil_scoped_acquire gil;
    py::list listed;
    for (const auto& part : parts) listed.append(py::make_tuple(part.send, part.send_rows, part.recv, part.recv_rows));
    const auto post = py::get_override(static_cast<const AbstractComm*>(this), "post");
    TORCH_CHECK_NOT_IMPLEMENTED(post, "a subclass of planmoe_ds.AbstractComm must define post(self, parts)");
    auto exchange = std::make_shared<PythonExchange>(post(listed), listed);
    exchange->set_bytes_sent(bytes_to_others(parts));
    return exchange;
  }

 private:
  int64_t bytes_to_others(const std::vector<ExchangeSpec>& parts) const {
    int64_t total = 0;
    for (const auto& part : parts) total += (part.send.size(0) - part.send_rows[rank()]) * part.send.size(1);
    return total;
  }
};

// The same all-to-all, but let go without the interpreter's lock: its links' threads end only when they are through with
// a Python codec, which needs it.
std::shared_ptr<AbstractComm> released_unlocked(std::shared_ptr<AbstractComm> comm) {
  auto* pointer = comm.get();
  return {pointer, [owner = std::move(comm)](AbstractComm* /*pointer*/) mutable {
            if (!PyGILState_Check()) return owner.reset();
            py::gil_scoped_release release;
            owner.reset();
          }};
}

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

void bind_values(py::module_& module) {
  py::class_<Stamp>(module, "Stamp").def("ns", &Stamp::ns, NoGil());
  py::class_<Clock, std::shared_ptr<Clock>>(module, "Clock")
      .def(py::init([](const c10::Device& device) { return std::make_shared<Clock>(device); }), py::arg("device"))
      .def("stamp", &Clock::stamp);

  py::class_<Exchange, std::shared_ptr<Exchange>>(module, "Exchange")
      .def("wait", &wait)
      .def("spans", &spans)
      .def("bytes_sent_on", &Exchange::bytes_sent_on, py::arg("lane"))
      .def_property_readonly("number", &Exchange::number)
      .def_property_readonly("passed", &Exchange::passed)
      .def_property_readonly("bytes_sent", &Exchange::bytes_sent);

  py::class_<Itinerary, std::shared_ptr<Itinerary>>(module, "Itinerary")
      .def(
          py::init([](std::vector<int64_t> near_sent, std::vector<int64_t> near_received, std::vector<int64_t> far_sent,
                      std::vector<int64_t> far_received, std::vector<int64_t> passed, std::vector<int64_t> fan) {
            return std::make_shared<Itinerary>(Itinerary{std::move(near_sent),
                                                         std::move(near_received),
                                                         std::move(far_sent),
                                                         std::move(far_received),
                                                         std::move(passed),
                                                         std::move(fan),
                                                         {}});
          }),
          py::kw_only(), py::arg("near_sent"), py::arg("near_received"), py::arg("far_sent"), py::arg("far_received"),
          py::arg("passed"), py::arg("fan"))
      .def_readonly("near_sent", &Itinerary::near_sent)
      .def_readonly("near_received", &Itinerary::near_received)
      .def_readonly("far_sent", &Itinerary::far_sent)
      .def_readonly("far_received", &Itinerary::far_received);

  py::class_<ChunkRows>(module, "ChunkRows")
      .def(py::init([](at::Tensor near_send, at::Tensor far_send, at::Tensor near_recv, at::Tensor far_recv) {
             return ChunkRows{std::move(near_send), std::move(far_send), std::move(near_recv), std::move(far_recv)};
           }),
           py::kw_only(), py::arg("near_send"), py::arg("far_send"), py::arg("near_recv"), py::arg("far_recv"));

  py::class_<RowRoutes>(module, "RowRoutes")
      .def(py::init([](int64_t offset, int64_t top_k, int64_t id_bytes, int64_t experts_per_rank, int64_t first_expert,
                       int64_t last_expert) {
             return RowRoutes{offset, top_k, id_bytes, experts_per_rank, first_expert, last_expert};
           }),
           py::kw_only(), py::arg("offset") = 0, py::arg("top_k") = 0, py::arg("id_bytes") = 4,
           py::arg("experts_per_rank") = 1, py::arg("first_expert") = 0, py::arg("last_expert") = 1);

  py::class_<RowSums>(module, "RowSums")
      .def(py::init([](std::shared_ptr<AbstractCompressor> inner, std::shared_ptr<AbstractCompressor> outer,
                       int64_t hidden, at::ScalarType dtype,
                       int64_t extra) { return RowSums{std::move(inner), std::move(outer), hidden, dtype, extra}; }),
           py::kw_only(), py::arg("inner"), py::arg("outer"), py::arg("hidden"), py::arg("dtype"),
           py::arg("extra") = 0);
}

void bind_ledger(py::module_& module) {
  py::class_<LaunchLedger>(module, "LaunchLedger")
      .def(py::init<int64_t>(), py::arg("world_size"))
      .def("record", &LaunchLedger::record, py::arg("communicator"), py::arg("global_ranks"))
      .def("digests", &LaunchLedger::digests, py::arg("global_ranks"));
}

std::shared_ptr<Exchange> start_rows(AbstractComm& comm, at::Tensor send, std::vector<int64_t> send_rows,
                                     at::Tensor recv, std::vector<int64_t> recv_rows) {
  return comm.start({{std::move(send), std::move(send_rows), std::move(recv), std::move(recv_rows)}});
}

}  // namespace

void bind_comms(py::module_& module) {
  bind_values(module);
  bind_ledger(module);
  py::class_<ExchangeSpec>(module, "ExchangeSpec")
      .def(py::init(
               [](at::Tensor send, std::vector<int64_t> send_rows, at::Tensor recv, std::vector<int64_t> recv_rows) {
                 return ExchangeSpec{std::move(send), std::move(send_rows), std::move(recv), std::move(recv_rows)};
               }),
           py::arg("send"), py::arg("send_rows"), py::arg("recv"), py::arg("recv_rows"));
  py::class_<AbstractComm, PythonComm, py::smart_holder>(module, "Comm")
      .def(py::init<Groups, std::vector<int64_t>, const c10::Device&, int64_t>(), py::arg("groups"),
           py::arg("node_of_rank"), py::arg("device"), py::arg("timeout_ms") = 0)
      .def_property_readonly("groups", &AbstractComm::groups)
      .def_property_readonly("device", &AbstractComm::device)
      .def_property_readonly("rank", &AbstractComm::rank)
      .def_property_readonly("size", &AbstractComm::size)
      .def_property_readonly("node_of_rank", &AbstractComm::node_of_rank)
      .def_property_readonly("first_hops", &AbstractComm::first_hops)
      .def_property_readonly("num_pieces", &AbstractComm::num_pieces)
      .def_property_readonly("passes_on", &AbstractComm::passes_on)
      .def("close", &AbstractComm::close, NoGil())
      .def("set_phase", &AbstractComm::set_phase, py::arg("phase"))
      .def("abort", &AbstractComm::abort, py::arg("reason"), NoGil())
      .def("take_buffer", &AbstractComm::take_buffer, py::arg("rows"), py::arg("width"), NoGil())
      .def("take_peak_bytes", &AbstractComm::take_peak_bytes)
      .def("start", &start_rows, py::arg("send"), py::arg("send_rows"), py::arg("recv"), py::arg("recv_rows"), NoGil())
      .def("start_parts", &AbstractComm::start, py::arg("parts"), NoGil())
      .def("dispatch", &AbstractComm::dispatch, py::arg("rows"), py::arg("itinerary"), py::arg("routes"), NoGil())
      .def("combine", &AbstractComm::combine, py::arg("rows"), py::arg("itinerary"), py::arg("sums"), NoGil());

  module.def(
      "make_comm",
      [](const std::string& name, Groups groups, std::vector<int64_t> node_of_rank, const c10::Device& device,
         int64_t timeout_ms) {
        return released_unlocked(
            comm_registry().create(name, make_options(std::move(groups), std::move(node_of_rank), device, timeout_ms)));
      },
      py::arg("name"), py::arg("groups"), py::arg("node_of_rank"), py::arg("device"), py::arg("timeout_ms") = 0);
  module.def("aligned", &aligned, py::arg("num_bytes"));
  module.def("comm_names", [] { return comm_registry().names(); });
}

}  // namespace planmoe
