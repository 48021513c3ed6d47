// Branch and bound, level by level: a node is a partial order of tasks, a level has all nodes of one length.
//
// Branching follows Giffler and Thompson (Operations Research 8, 1960): among the tasks that may come next, the one that
// would end first has to be beaten to its resource by one that could start before it ends, or it may come next itself.
// Of two nodes with the same tasks the one that is nowhere ahead is dropped. The bound of a node is the worst one of the
// resources', each that of its own tasks with interruptions allowed (Jackson's preemptive schedule), between the
// earliest start and the least tail that the other resources leave. Levels keep the best `width` nodes; rounds with a
// growing width go on until nothing had to be cut, which proves the best order optimal, or the time is up.
#include <algorithm>
#include <array>
#include <bitset>
#include <chrono>
#include <cmath>
#include <limits>
#include <optional>
#include <unordered_map>

#include "problem.h"

namespace planmoe {
namespace {

constexpr size_t kMostTasks = 256;
constexpr size_t kMostResources = 8;
constexpr int64_t kWidest = 1 << 15;
constexpr double kTolerance = 1e-9;  // relative: closer makespans are equal

using Set = std::bitset<kMostTasks>;

struct Node {
  Set scheduled;
  std::array<double, kMostResources> free{};
  std::vector<double> done;  // per task: when what waits for it may start
  double makespan = 0;
  double bound = 0;
  double tie = 0;
  int64_t parent = -1;
  int64_t task = -1;
};

struct Job {
  double head;
  double seconds;
  double tail;
};

// Makespan of one resource's jobs with interruptions: always work on what has the longest tail.
double preemptive_bound(std::vector<Job>& jobs, std::vector<std::pair<double, double>>& heap) {
  std::sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.head < b.head; });
  heap.clear();  // (tail, remaining seconds)
  double now = 0;
  double bound = 0;
  size_t next = 0;
  while (next < jobs.size() || !heap.empty()) {
    if (heap.empty()) now = std::max(now, jobs[next].head);
    while (next < jobs.size() && jobs[next].head <= now) {
      heap.emplace_back(jobs[next].tail, jobs[next].seconds);
      std::push_heap(heap.begin(), heap.end());
      ++next;
    }
    const double until = next < jobs.size() ? jobs[next].head : std::numeric_limits<double>::infinity();
    const double end = now + heap.front().second;
    if (end <= until) {
      bound = std::max(bound, end + heap.front().first);
      std::pop_heap(heap.begin(), heap.end());
      heap.pop_back();
      now = end;
    } else {
      heap.front().second -= until - now;
      now = until;
    }
  }
  return bound;
}

class Search {
 public:
  Search(const ScheduleProblem& problem, double seconds, int64_t max_nodes)
      : problem_(problem), max_nodes_(max_nodes), jobs_(problem.num_resources()), done_(problem.size()) {
    best_.makespan = std::numeric_limits<double>::infinity();
    if (seconds > 0)
      deadline_ = std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                                         std::chrono::duration<double>(seconds));
  }

  void offer(const std::vector<int64_t>& order) {
    const double makespan = simulate(problem_, order).makespan;
    if (makespan < best_.makespan) {
      best_.makespan = makespan;
      best_.order = order;
    }
  }

  Solution run() {
    Node root;
    root.done.assign(problem_.size(), 0);
    rate(root);
    best_.lower_bound = root.bound;
    offer(problem_.topological());
    for (int64_t width = 1; !is_closed() && width <= kWidest && !out_of_time(); width *= 4)
      if (!round(root, width)) break;
    best_.is_optimal = is_closed();
    best_.lower_bound = std::min(best_.lower_bound, best_.makespan);
    if (best_.is_optimal) best_.lower_bound = best_.makespan;
    return best_;
  }

 private:
  bool is_closed() const { return best_.lower_bound >= limit(); }
  double limit() const { return best_.makespan * (1 - kTolerance); }
  bool out_of_time() const {
    if (max_nodes_ > 0 && best_.num_nodes >= max_nodes_) return true;
    return deadline_ && std::chrono::steady_clock::now() > *deadline_;
  }

  // One search with at most `width` nodes per level; false when time ran out in it.
  bool round(const Node& root, int64_t width) {
    std::vector<std::vector<std::pair<int64_t, int64_t>>> trail;  // per level: (parent, task)
    std::vector<Node> level{root};
    double cut = std::numeric_limits<double>::infinity();  // least bound of a node that was cut
    for (int64_t depth = 0; depth < problem_.size(); ++depth) {
      std::vector<Node> children;
      std::unordered_map<Set, std::vector<size_t>> by_set;
      for (size_t place = 0; place < level.size(); ++place) {
        if (out_of_time()) return false;
        expand(level[place], static_cast<int64_t>(place), children, by_set);
      }
      std::erase_if(children, [](const Node& node) { return node.parent < 0; });
      const auto better = [](const Node& a, const Node& b) {
        return a.bound != b.bound ? a.bound < b.bound : a.tie < b.tie;
      };
      if (static_cast<int64_t>(children.size()) > width) {
        std::nth_element(children.begin(), children.begin() + width, children.end(), better);
        for (auto it = children.begin() + width; it != children.end(); ++it) cut = std::min(cut, it->bound);
        children.resize(width);
      }
      std::sort(children.begin(), children.end(), better);
      trail.emplace_back();
      for (const auto& child : children) trail.back().emplace_back(child.parent, child.task);
      level = std::move(children);
      if (level.empty()) break;
    }
    if (!level.empty()) finish(level.front(), trail);
    best_.lower_bound = std::max(best_.lower_bound, std::min(cut, best_.makespan));
    return true;
  }

  void finish(const Node& leaf, const std::vector<std::vector<std::pair<int64_t, int64_t>>>& trail) {
    if (leaf.makespan >= best_.makespan) return;
    std::vector<int64_t> order;
    size_t place = 0;
    for (auto level = trail.rbegin(); level != trail.rend(); ++level) {
      order.push_back((*level)[place].second);
      place = static_cast<size_t>((*level)[place].first);
    }
    std::reverse(order.begin(), order.end());
    offer(order);
  }

  bool may_come_next(const Node& node, int64_t index) const {
    if (node.scheduled[index]) return false;
    const auto& task = problem_.task(index);
    for (const auto before : task.after)
      if (!node.scheduled[before]) return false;
    return task.twin < 0 || node.scheduled[task.twin];
  }

  // Calls `see(leg, start)` for every leg of a task that would come next; returns the end of the last one.
  template <class See>
  double place(const Node& node, int64_t index, const See& see) const {
    const auto& task = problem_.task(index);
    double ready = 0;
    for (const auto before : task.after) ready = std::max(ready, node.done[before]);
    double end = 0;
    for (const auto& leg : task.legs) {
      const double start = std::max(ready, node.free[leg.resource]);
      see(leg, start);
      end = std::max(end, start + leg.seconds);
      if (task.serial) ready = start + leg.seconds;
    }
    return end;
  }

  void expand(const Node& node, int64_t place_of_node, std::vector<Node>& children,
              std::unordered_map<Set, std::vector<size_t>>& by_set) {
    const auto nothing = [](const TaskLeg&, double) {};
    int64_t first = -1;
    double first_end = std::numeric_limits<double>::infinity();
    candidates_.clear();
    for (int64_t index = 0; index < problem_.size(); ++index) {
      if (!may_come_next(node, index)) continue;
      candidates_.push_back(index);
      if (const double end = place(node, index, nothing); end < first_end) {
        first_end = end;
        first = index;
      }
    }
    for (const auto index : candidates_) {
      if (index != first && !beats(node, index, first, first_end)) continue;
      ++best_.num_nodes;
      auto child = append(node, index);
      rate(child);
      if (child.bound >= limit()) continue;
      child.parent = place_of_node;
      keep(std::move(child), children, by_set);
    }
  }

  // Whether a task could start on a resource of the task `first` before that one ends.
  bool beats(const Node& node, int64_t index, int64_t first, double first_end) const {
    const auto& legs = problem_.task(first).legs;
    bool found = false;
    place(node, index, [&](const TaskLeg& leg, double start) {
      const bool shared =
          std::any_of(legs.begin(), legs.end(), [&](const TaskLeg& l) { return l.resource == leg.resource; });
      found = found || (shared && start < first_end);
    });
    return found;
  }

  Node append(const Node& node, int64_t index) const {
    Node child = node;
    const double end =
        place(node, index, [&](const TaskLeg& leg, double start) { child.free[leg.resource] = start + leg.seconds; });
    child.scheduled.set(index);
    child.done[index] = end + problem_.task(index).latency;
    child.makespan = std::max(node.makespan, child.done[index]);
    child.task = index;
    return child;
  }

  // Adds a node unless another one with the same tasks is nowhere behind; drops those that are nowhere ahead of it.
  void keep(Node child, std::vector<Node>& children, std::unordered_map<Set, std::vector<size_t>>& by_set) const {
    auto& rivals = by_set[child.scheduled];
    for (const auto rival : rivals)
      if (children[rival].parent >= 0 && dominates(children[rival], child)) return;
    for (const auto rival : rivals)
      if (children[rival].parent >= 0 && dominates(child, children[rival])) children[rival].parent = -1;
    rivals.push_back(children.size());
    children.push_back(std::move(child));
  }

  bool dominates(const Node& a, const Node& b) const {
    if (a.makespan > b.makespan) return false;
    for (int64_t r = 0; r < problem_.num_resources(); ++r)
      if (a.free[r] > b.free[r]) return false;
    for (int64_t index = 0; index < problem_.size(); ++index) {  // what nobody waits for any more was set to 0
      if (!a.scheduled[index]) continue;
      if (a.done[index] > b.done[index]) return false;
    }
    return true;
  }

  // Sets the bound; forgets when tasks ended that nobody waits for any more.
  void rate(Node& node) {
    for (auto& jobs : jobs_) jobs.clear();
    std::fill(done_.begin(), done_.end(), -1.0);
    double chain = node.makespan;
    awaited_.reset();
    for (const auto index : problem_.topological()) {
      if (node.scheduled[index]) continue;
      const auto& task = problem_.task(index);
      double ready = 0;
      for (const auto before : task.after) {
        const bool known = node.scheduled[before];
        if (known) awaited_.set(before);
        ready = std::max(ready, known ? node.done[before] : done_[before]);
      }
      double end = 0;
      for (size_t leg = 0; leg < task.legs.size(); ++leg) {
        const auto& [resource, seconds] = task.legs[leg];
        const double start = std::max(ready, node.free[resource]);
        jobs_[resource].push_back({start, seconds, problem_.leg_tail(index, leg)});
        end = std::max(end, start + seconds);
        if (task.serial) ready = start + seconds;
      }
      done_[index] = end + task.latency;
      chain = std::max(chain, end + problem_.tail(index));
    }
    node.bound = chain;
    node.tie = 0;
    for (auto& jobs : jobs_) {
      const double bound = preemptive_bound(jobs, heap_);
      node.bound = std::max(node.bound, bound);
      node.tie += bound;
    }
    for (int64_t index = 0; index < problem_.size(); ++index)
      if (node.scheduled[index] && !awaited_[index]) node.done[index] = 0;
  }

  const ScheduleProblem& problem_;
  int64_t max_nodes_;
  std::optional<std::chrono::steady_clock::time_point> deadline_;
  Solution best_;
  std::vector<std::vector<Job>> jobs_;
  std::vector<double> done_;
  std::vector<std::pair<double, double>> heap_;
  std::vector<int64_t> candidates_;
  Set awaited_;
};

}  // namespace

Solution solve(const ScheduleProblem& problem, const std::vector<std::vector<int64_t>>& seeds, double seconds,
               int64_t max_nodes) {
  Search search(problem, seconds, max_nodes);
  for (const auto& seed : seeds) search.offer(seed);
  return search.run();
}

}  // namespace planmoe
