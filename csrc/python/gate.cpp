#include "../kernels/gate.h"

#include "bind.h"

namespace planmoe {

void bind_gate(py::module_& module) {
  py::class_<GateDecision>(module, "GateDecision")
      .def_readonly("balance_loss", &GateDecision::balance_loss)
      .def_readonly("expert", &GateDecision::expert)
      .def_readonly("slot", &GateDecision::slot)
      .def_readonly("weight", &GateDecision::weight)
      .def_readonly("counts", &GateDecision::counts)
      .def_readonly("probs", &GateDecision::probs)
      .def_readonly("total", &GateDecision::total)
      .def_readonly("share", &GateDecision::share);
  module.def(
      "decide_gate",
      [](const at::Tensor& logits, int64_t top_k, int64_t capacity, bool samples, bool drops_at_random) {
        return decide_gate(logits, {top_k, capacity, samples, drops_at_random});
      },
      py::arg("logits"), py::kw_only(), py::arg("top_k"), py::arg("capacity"), py::arg("samples"),
      py::arg("drops_at_random"), NoGil());
  module.def(
      "gate_gradient",
      [](at::Tensor expert, at::Tensor probs, at::Tensor total, at::Tensor share,
         const std::optional<at::Tensor>& weight_grad, const std::optional<at::Tensor>& loss_grad) {
        GateDecision decision;
        decision.expert = std::move(expert);
        decision.probs = std::move(probs);
        decision.total = std::move(total);
        decision.share = std::move(share);
        return gate_gradient(decision, weight_grad, loss_grad);
      },
      py::arg("expert"), py::arg("probs"), py::arg("total"), py::arg("share"), py::arg("weight_grad"),
      py::arg("loss_grad"), NoGil());
  module.def("gate_runs_on", &gate_runs_on, py::arg("tensor"));
}

}  // namespace planmoe
