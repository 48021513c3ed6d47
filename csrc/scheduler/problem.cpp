#include "problem.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace planmoe {
namespace {

constexpr int64_t kMostTasks = 256;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_seconds(double seconds, const char* what, size_t task) {
  if (!std::isfinite(seconds) || seconds < 0)
    fail("task " + std::to_string(task) + " has a " + what + " of " + std::to_string(seconds) +
         " seconds, expected a finite number that is not negative");
}

}  // namespace

ScheduleProblem::ScheduleProblem(int64_t num_resources, std::vector<ScheduleTask> tasks)
    : num_resources_(num_resources), tasks_(std::move(tasks)) {
  check();
  sort_topologically();
  complete_exchanges();
  tails_.assign(size(), 0);
  lengths_.assign(size(), 0);
  for (int64_t i = 0; i < size(); ++i)
    for (const auto& leg : tasks_[i].legs)
      lengths_[i] = tasks_[i].serial ? lengths_[i] + leg.seconds : std::max(lengths_[i], leg.seconds);
  for (int64_t i = 0; i < size(); ++i) tails_[i] = tasks_[i].latency;
  for (auto it = topological_.rbegin(); it != topological_.rend(); ++it)
    for (const auto before : tasks_[*it].after)
      tails_[before] = std::max(tails_[before], tasks_[before].latency + lengths_[*it] + tails_[*it]);
}

double ScheduleProblem::leg_tail(int64_t index, size_t leg) const {
  double tail = tails_[index];
  const auto& task = tasks_[index];
  if (task.serial)
    for (size_t later = leg + 1; later < task.legs.size(); ++later) tail += task.legs[later].seconds;
  return tail;
}

void ScheduleProblem::check() const {
  if (num_resources_ < 1 || num_resources_ > 8)
    fail("a schedule has " + std::to_string(num_resources_) + " resources, expected 1 to 8");
  if (size() > kMostTasks)
    fail("a schedule has " + std::to_string(size()) + " tasks, expected at most " + std::to_string(kMostTasks));
  for (size_t i = 0; i < tasks_.size(); ++i) {
    const auto& task = tasks_[i];
    if (task.legs.empty()) fail("task " + std::to_string(i) + " occupies no resource");
    std::vector<bool> used(num_resources_);
    for (const auto& leg : task.legs) {
      check_seconds(leg.seconds, "duration", i);
      if (leg.resource < 0 || leg.resource >= num_resources_)
        fail("task " + std::to_string(i) + " is on resource " + std::to_string(leg.resource) + ", expected 0 to " +
             std::to_string(num_resources_ - 1));
      if (used[leg.resource])
        fail("task " + std::to_string(i) + " has two legs on resource " + std::to_string(leg.resource));
      used[leg.resource] = true;
    }
    check_seconds(task.latency, "latency", i);
    for (const auto before : task.after)
      if (before < 0 || before >= size())
        fail("task " + std::to_string(i) + " waits for task " + std::to_string(before) + ", there are tasks 0 to " +
             std::to_string(size() - 1));
    if (task.twin < -1 || task.twin >= size() || task.twin == static_cast<int64_t>(i))
      fail("task " + std::to_string(i) + " names task " + std::to_string(task.twin) + " as its twin");
  }
}

void ScheduleProblem::sort_topologically() {
  std::vector<int64_t> waits(size());
  std::vector<std::vector<int64_t>> next(size());
  for (int64_t i = 0; i < size(); ++i) {
    auto before = tasks_[i].after;
    if (tasks_[i].twin >= 0) before.push_back(tasks_[i].twin);
    waits[i] = static_cast<int64_t>(before.size());
    for (const auto b : before) next[b].push_back(i);
  }
  for (int64_t i = 0; i < size(); ++i)
    if (waits[i] == 0) topological_.push_back(i);
  for (size_t place = 0; place < topological_.size(); ++place)
    for (const auto after : next[topological_[place]])
      if (--waits[after] == 0) topological_.push_back(after);
  if (topological_.size() == tasks_.size()) return;
  std::string stuck;
  for (int64_t i = 0; i < size(); ++i)
    if (waits[i] > 0) stuck += (stuck.empty() ? "" : ", ") + std::to_string(i);
  fail("tasks " + stuck + " wait for each other (a cycle), so none of them can ever start");
}

// Exchanges keep one order on all links: an exchange has its place in it even on a link that it leaves idle.
void ScheduleProblem::complete_exchanges() {
  std::vector<int64_t> group(num_resources_);
  for (int64_t r = 0; r < num_resources_; ++r) group[r] = r;
  for (const auto& task : tasks_)
    for (const auto& leg : task.legs) {
      const auto from = group[leg.resource];
      const auto to = group[task.legs[0].resource];
      for (auto& g : group)
        if (g == from) g = to;
    }
  exchange_.assign(size(), false);
  for (int64_t i = 0; i < size(); ++i) {
    auto& legs = tasks_[i].legs;
    const auto mine = group[legs[0].resource];
    exchange_[i] = std::count(group.begin(), group.end(), mine) > 1;
    for (int64_t r = 0; r < num_resources_; ++r) {
      const bool has = std::any_of(legs.begin(), legs.end(), [r](const TaskLeg& leg) { return leg.resource == r; });
      if (group[r] == mine && !has) legs.push_back({r, 0.0});
    }
  }
}

Timetable simulate(const ScheduleProblem& problem, const std::vector<int64_t>& order) {
  Timetable table;
  table.starts.resize(problem.size());
  table.ends.assign(problem.size(), -1);
  std::vector<double> free(problem.num_resources(), 0);
  if (order.size() != static_cast<size_t>(problem.size()))
    fail("the order has " + std::to_string(order.size()) + " tasks, there are " + std::to_string(problem.size()));
  for (const auto index : order) {
    if (index < 0 || index >= problem.size() || table.ends[index] >= 0)
      fail("the order names task " + std::to_string(index) + ", which is unknown or named twice");
    const auto& task = problem.task(index);
    double ready = 0;
    for (const auto before : task.after) {
      if (table.ends[before] < 0)
        fail("the order has task " + std::to_string(index) + " before task " + std::to_string(before) +
             ", which it waits for");
      ready = std::max(ready, table.ends[before] + problem.task(before).latency);
    }
    double end = 0;
    for (const auto& leg : task.legs) {
      const double start = std::max(ready, free[leg.resource]);
      table.starts[index].push_back(start);
      free[leg.resource] = start + leg.seconds;
      end = std::max(end, free[leg.resource]);
      if (task.serial) ready = free[leg.resource];
    }
    table.ends[index] = end;
    table.makespan = std::max(table.makespan, end + task.latency);
  }
  return table;
}

}  // namespace planmoe
