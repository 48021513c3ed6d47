// hierarchical: the two-level (2D) all-to-all. A row for another node first goes to the rank of its own node that has
// the destination's place there (its rail), then on with the rows of that whole node: one message between nodes per
// destination, where ranks of a node follow each other in the group.
//
// Only the source knows how many rows pass through a rank, so the ranks of a node tell each other before: one small
// message of int64 counts. Legs of an exchange, in one order on all ranks: counts (inside), rows (inside), rows
// (between). On an accelerator start() waits on the host for the counts; nothing else does.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include "nodes.h"
#include "pipe.h"

namespace planmoe {
namespace {

using Counts = std::vector<int64_t>;
constexpr int64_t kMostRows = int64_t{1} << 46;  // in one message

class HierarchicalComm final : public PipeComm {
 public:
  explicit HierarchicalComm(const CommOptions& options) : PipeComm(options), nodes_(options.node_of_rank, rank()) {
    targets_.resize(size());
    for (int64_t node = 0; node < nodes_.count(); ++node) {
      if (node == nodes_.my_node()) continue;
      for (const auto peer : nodes_.on(node)) targets_[nodes_.counterpart(peer, nodes_.my_node())].push_back(peer);
    }
  }

  ~HierarchicalComm() override { close(); }  // the links' threads use what goes next

 protected:
  std::shared_ptr<Exchange> post(const std::vector<ExchangeSpec>& parts, int tag) override {
    const auto counts_tag = next_tag();
    if (nodes_.count() == 1 || nodes_.largest() == 1) return PipeComm::post(parts, tag);
    const auto passing = std::make_shared<Passing>();
    auto counts = intra().post(counts_leg(parts, *passing, counts_tag));
    auto inside_leg = make_leg(parts, rank(), same_node(), tag);
    inside_leg.prepare = [this, parts, passing](Leg& leg) { add_first_hop(leg, parts, *passing); };
    auto inside = intra().post(std::move(inside_leg));
    auto between_leg = arrivals(parts, tag);
    between_leg.after = inside;
    between_leg.prepare = [this, parts, passing](Leg& leg) { add_second_hop(leg, parts.size(), *passing); };
    auto between = inter().post(std::move(between_leg));
    return std::make_shared<Exchange>(
        std::vector<std::shared_ptr<Transfer>>{std::move(counts), std::move(inside), std::move(between)});
  }

 private:
  // What passes through this rank, for its targets on other nodes.
  struct Passing {
    std::vector<at::Tensor> counts;   // per rank of this node: int64 [parts * targets] rows, on the device
    std::vector<Counts> counts_here;  // the same on the host, once they are known
    std::vector<at::Tensor> rows;     // per part and target: uint8 [rows, W], by source
  };

  const Counts& my_targets() const { return targets_[rank()]; }

  Leg counts_leg(const std::vector<ExchangeSpec>& parts, Passing& passing, int tag) const {
    Leg leg;
    leg.tag = tag;
    const auto width = static_cast<int64_t>(parts.size() * my_targets().size());
    for (const auto mate : nodes_.mine()) {
      Counts mine;
      for (const auto& part : parts)
        for (const auto target : targets_[mate]) mine.push_back(part.send_rows[target]);
      auto sent = at::tensor(at::IntArrayRef(mine), at::TensorOptions().dtype(at::kLong)).to(device());
      passing.counts.push_back(mate == rank() ? sent : at::empty({width}, sent.options()));
      if (mate == rank()) continue;
      if (width > 0) leg.receives.push_back({mate, passing.counts.back()});
      if (!mine.empty()) leg.sends.push_back({mate, sent});
    }
    return leg;
  }

  // This rank's rows for other nodes, straight from where they lie, and those of its node's ranks that pass here.
  void add_first_hop(Leg& leg, const std::vector<ExchangeSpec>& parts, Passing& passing) {
    for (size_t mate = 0; mate < passing.counts.size(); ++mate) {
      const auto here = passing.counts[mate].cpu();
      passing.counts_here.emplace_back(here.const_data_ptr<int64_t>(), here.const_data_ptr<int64_t>() + here.numel());
      for (const auto rows : passing.counts_here.back())  // so that no sum of them overflows
        TORCH_CHECK(rows >= 0 && rows <= kMostRows, "planmoe: rank ", nodes_.mine()[mate], " of the group says that ",
                    rows, " rows of its pass through rank ", rank(), ", which cannot be");
    }
    for (size_t part = 0; part < parts.size(); ++part) {
      const auto& send = parts[part].send;
      const auto send_start = starts(parts[part].send_rows);
      const auto own_rows = [&](int64_t target) {
        return send.narrow(0, send_start[target], parts[part].send_rows[target]);
      };
      for (const auto mate : nodes_.mine())
        for (const auto target : targets_[mate])
          if (mate != rank() && parts[part].send_rows[target] > 0) leg.sends.push_back({mate, own_rows(target)});
      for (size_t i = 0; i < my_targets().size(); ++i) {
        const auto place = part * my_targets().size() + i;
        Counts rows;
        for (const auto& counts : passing.counts_here) rows.push_back(counts[place]);
        const auto start = starts(rows);
        auto together = take_buffer(start.back() + rows.back(), send.size(1));
        for (size_t source = 0; source < rows.size(); ++source) {
          if (rows[source] == 0) continue;
          const auto passed = together.narrow(0, start[source], rows[source]);
          if (nodes_.mine()[source] == rank())
            leg.local_copies.emplace_back(own_rows(my_targets()[i]), passed);
          else
            leg.receives.push_back({nodes_.mine()[source], passed});
        }
        passing.rows.push_back(together);
      }
    }
  }

  void add_second_hop(Leg& leg, size_t num_parts, const Passing& passing) const {
    for (size_t part = 0; part < num_parts; ++part) {
      for (size_t i = 0; i < my_targets().size(); ++i) {
        const auto place = part * my_targets().size() + i;
        Counts rows;
        for (const auto& counts : passing.counts_here) rows.push_back(counts[place]);
        int64_t start = 0;
        each_run(nodes_.mine(), rows, [&](int64_t /*first*/, int64_t count) {
          leg.sends.push_back({my_targets()[i], passing.rows[place].narrow(0, start, count)});
          start += count;
        });
      }
    }
  }

  // What comes from other nodes: from the rank in this one's place there, in the order in which it lies here.
  Leg arrivals(const std::vector<ExchangeSpec>& parts, int tag) const {
    Leg leg;
    leg.tag = tag;
    for (const auto& part : parts) {
      const auto recv_start = starts(part.recv_rows);
      for (int64_t node = 0; node < nodes_.count(); ++node) {
        if (node == nodes_.my_node()) continue;
        Counts rows;
        for (const auto source : nodes_.on(node)) rows.push_back(part.recv_rows[source]);
        each_run(nodes_.on(node), rows, [&](int64_t first, int64_t count) {
          leg.receives.push_back({nodes_.counterpart(rank(), node), part.recv.narrow(0, recv_start[first], count)});
        });
      }
    }
    return leg;
  }

  // Calls function(first rank, rows) for every run of ranks that follow each other in the group, if it has rows.
  template <class Function>
  static void each_run(const Counts& ranks, const Counts& rows, const Function& function) {
    for (size_t first = 0, next = 0; first < ranks.size(); first = next) {
      int64_t count = 0;
      for (next = first; next < ranks.size() && ranks[next] == ranks[first] + static_cast<int64_t>(next - first);
           ++next)
        count += rows[next];
      if (count > 0) function(ranks[first], count);
    }
  }

  Nodes nodes_;
  std::vector<Counts> targets_;  // per rank of this node: the ranks of other nodes whose rows pass through it
};

PLANMOE_REGISTER_COMM("hierarchical", HierarchicalComm);

}  // namespace
}  // namespace planmoe
