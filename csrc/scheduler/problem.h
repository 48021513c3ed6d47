#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace planmoe {

// What a task occupies of one resource, for how long.
struct TaskLeg {
  int64_t resource;
  double seconds;
};

// A task of a schedule: one leg for computing, one per class of links for an exchange.
//   serial: every leg waits for the one before it; otherwise they run side by side.
//   latency: what passes between the end of the last leg and the start of what waits for the task; it occupies nothing.
//   after: tasks (indices) that must have ended.
//   twin: a task that is interchangeable with this one and comes first wherever either is (-1: none).
struct ScheduleTask {
  std::vector<TaskLeg> legs;
  bool serial = false;
  double latency = 0;
  std::vector<int64_t> after;
  int64_t twin = -1;
};

// A set of tasks to put in order. Every resource works on one task at a time, without interruption, and exchanges keep
// one order on all resources that they have in common: they are launched one after the other.
class ScheduleProblem {
 public:
  // ValueError (std::invalid_argument) names costs that are negative or not finite, unknown tasks and resources, and
  // tasks that wait for each other.
  ScheduleProblem(int64_t num_resources, std::vector<ScheduleTask> tasks);

  int64_t num_resources() const { return num_resources_; }
  int64_t size() const { return static_cast<int64_t>(tasks_.size()); }
  const std::vector<ScheduleTask>& tasks() const { return tasks_; }
  const ScheduleTask& task(int64_t index) const { return tasks_[index]; }
  // Tasks, each after all that it waits for.
  const std::vector<int64_t>& topological() const { return topological_; }
  // Least seconds from the end of a task's last leg to the end of everything.
  double tail(int64_t index) const { return tails_[index]; }
  // The same from the end of one of its legs.
  double leg_tail(int64_t index, size_t leg) const;
  double length(int64_t index) const { return lengths_[index]; }  // from its start to the end of its last leg, at least
  bool is_exchange(int64_t index) const { return exchange_[index]; }

 private:
  void check() const;
  void sort_topologically();
  void complete_exchanges();

  int64_t num_resources_;
  std::vector<ScheduleTask> tasks_;
  std::vector<int64_t> topological_;
  std::vector<double> tails_;
  std::vector<double> lengths_;
  std::vector<bool> exchange_;
};

// Seconds at which every leg starts when every resource takes its tasks in `order` (a permutation in which no task comes
// before what it waits for; ValueError otherwise).
struct Timetable {
  std::vector<std::vector<double>> starts;  // per task and leg
  std::vector<double> ends;                 // of the task's last leg
  double makespan = 0;
};
Timetable simulate(const ScheduleProblem& problem, const std::vector<int64_t>& order);

struct Solution {
  std::vector<int64_t> order;
  double makespan = 0;
  double lower_bound = 0;
  bool is_optimal = false;
  int64_t num_nodes = 0;
};

// The order with the least makespan, or the best found in `seconds` or with `max_nodes` partial orders looked at (0: no
// limit), no worse than any of `seeds` (orders).
Solution solve(const ScheduleProblem& problem, const std::vector<std::vector<int64_t>>& seeds, double seconds,
               int64_t max_nodes);

}  // namespace planmoe
