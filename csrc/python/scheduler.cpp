#include "../scheduler/problem.h"
#include "bind.h"

namespace planmoe {

void bind_scheduler(py::module_& module) {
  py::class_<ScheduleTask>(module, "ScheduleTask")
      .def(py::init([](const std::vector<std::pair<int64_t, double>>& legs, std::vector<int64_t> after, bool serial,
                       double latency, int64_t twin) {
             ScheduleTask task;
             for (const auto& [resource, seconds] : legs) task.legs.push_back({resource, seconds});
             task.after = std::move(after);
             task.serial = serial;
             task.latency = latency;
             task.twin = twin;
             return task;
           }),
           py::arg("legs"), py::arg("after"), py::kw_only(), py::arg("serial") = false, py::arg("latency") = 0.0,
           py::arg("twin") = -1);

  py::class_<ScheduleProblem>(module, "ScheduleProblem")
      .def(py::init<int64_t, std::vector<ScheduleTask>>(), py::arg("num_resources"), py::arg("tasks"))
      .def("tail", &ScheduleProblem::tail, py::arg("task"));

  py::class_<Timetable>(module, "Timetable")
      .def_readonly("starts", &Timetable::starts)
      .def_readonly("ends", &Timetable::ends)
      .def_readonly("makespan", &Timetable::makespan);

  py::class_<Solution>(module, "Solution")
      .def_readonly("order", &Solution::order)
      .def_readonly("makespan", &Solution::makespan)
      .def_readonly("lower_bound", &Solution::lower_bound)
      .def_readonly("is_optimal", &Solution::is_optimal)
      .def_readonly("num_nodes", &Solution::num_nodes);

  module.def("simulate_schedule", &simulate, py::arg("problem"), py::arg("order"));
  module.def("solve_schedule", &solve, py::arg("problem"), py::arg("seeds"), py::arg("seconds"), py::arg("max_nodes"),
             NoGil());
}

}  // namespace planmoe
