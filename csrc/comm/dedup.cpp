// dedup: Pipe-A2A on tokens that cross between nodes once. A row for several ranks of another node goes to one of
// them, the one in the sender's place (its rail), which passes it on inside the node while the next piece is on its
// way. Coming back, the rows of a node are summed there first, in float32, and cross as one.
//
// Legs are posted in one order on all ranks: node distance by node distance, piece by piece. A leg waits only for a
// leg that was posted before it, so nothing can hang. What is passed on has a link of its own: on the other one inside
// the node the sums of the chunk before would wait behind it until it has arrived from the other nodes, and the link
// between nodes, which carries these sums next, would be idle.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>

#include "../kernels/routing.h"
#include "../kernels/wire_rows.h"
#include "nodes.h"
#include "pipe.h"

namespace planmoe {
namespace {

constexpr int64_t kPieces = 8;

using Counts = std::vector<int64_t>;

class DedupComm final : public PipeComm {
 public:
  explicit DedupComm(const CommOptions& options)
      : PipeComm(options),
        nodes_(options.node_of_rank, rank()),
        onward_(nodes_.count() > 1 ? add_link(2, "onward") : intra()) {}
  ~DedupComm() override { close(); }  // the links' threads use what goes next

  int64_t num_pieces() const override { return kPieces; }

  std::vector<int64_t> first_hops() const override {
    Counts hops(size());
    for (int64_t node = 0; node < nodes_.count(); ++node)
      for (const auto peer : nodes_.on(node))
        hops[peer] = node == nodes_.my_node() ? peer : nodes_.counterpart(rank(), node);
    return hops;
  }

 protected:
  std::shared_ptr<Exchange> post_dispatch(const ChunkRows& rows, const std::shared_ptr<Itinerary>& trip,
                                          const RowRoutes& routes) override {
    trip->fan_rows.resize(trip->fan.size());
    const auto sent_at = starts(trip->far_sent);
    const auto passed_at = starts(trip->passed);
    const auto received_at = starts(trip->far_received);
    const bool first_time = routes.top_k > 0;
    auto passing = take_buffer(passed_at.empty() ? 0 : passed_at.back() + trip->passed.back(), rows.far_send.size(1));
    std::vector<std::shared_ptr<Transfer>> transfers;
    std::vector<std::shared_ptr<Transfer>> arrivals;
    each_step([&](const Step& step) {
      Leg leg;
      leg.tag = next_tag();
      for (const auto source : step.sources) {
        const auto place = source * kPieces + step.piece;
        if (trip->passed[place] > 0)
          leg.receives.push_back({source, passing.narrow(0, passed_at[place], trip->passed[place])});
      }
      const auto place = step.next_hop * kPieces + step.piece;
      if (trip->far_sent[place] > 0)
        leg.sends.push_back({step.next_hop, rows.far_send.narrow(0, sent_at[place], trip->far_sent[place])});
      arrivals.push_back(leg.empty() ? nullptr : inter().post(std::move(leg)));
      if (arrivals.back()) transfers.push_back(arrivals.back());
    });
    transfers.push_back(post_near(rows, trip->near_sent, trip->near_received));
    size_t step_number = 0;
    each_step([&](const Step& step) {
      Leg leg;
      leg.tag = next_tag();
      leg.after = arrivals[step_number++];
      leg.timed_from_arrival = true;
      std::vector<FanOut> fans;
      for (const auto source : step.sources) {
        const auto place = source * kPieces + step.piece;
        if (trip->passed[place] == 0) continue;
        fans.push_back({place, passing.narrow(0, passed_at[place], trip->passed[place]),
                        rows.far_recv.narrow(0, received_at[place], trip->far_received[place])});
      }
      each_other_passer(step, [&](int64_t other, int64_t source) {
        const auto place = source * kPieces + step.piece;
        if (trip->far_received[place] > 0)
          leg.receives.push_back({other, rows.far_recv.narrow(0, received_at[place], trip->far_received[place])});
      });
      if (leg.receives.empty() && fans.empty()) return;
      if (!fans.empty())
        leg.prepare = [this, fans, trip, routes, first_time](Leg& sent) {
          for (const auto& fan : fans) fan_out(fan, *trip, routes, first_time, sent);
        };
      transfers.push_back(onward_.post(std::move(leg)));
    });
    return std::make_shared<Exchange>(std::move(transfers));
  }

  std::shared_ptr<Exchange> post_combine(const ChunkRows& rows, const std::shared_ptr<Itinerary>& trip,
                                         const RowSums& sums) override {
    const auto sent_at = starts(trip->far_sent);
    const auto received_at = starts(trip->far_received);
    std::vector<std::shared_ptr<Transfer>> transfers;
    each_step([&](const Step& step) {
      Leg inside;
      Leg between;
      inside.tag = next_tag();
      between.tag = next_tag();
      std::vector<FanIn> fans;
      for (const auto source : step.sources) {
        const auto place = source * kPieces + step.piece;
        if (trip->passed[place] == 0) continue;
        FanIn fan{place, source, {}, rows.far_recv.size(1)};
        for (size_t g = 0; g < mine().size(); ++g) {
          const auto count = trip->fan[place * nodes_.largest() + g];
          at::Tensor part;
          if (count > 0 && mine()[g] == rank())
            part = rows.far_send.narrow(0, received_at[place], count);
          else if (count > 0)
            inside.receives.push_back({mine()[g], part = take_buffer(count, rows.far_send.size(1))});
          fan.parts.push_back(part);
        }
        fans.push_back(std::move(fan));
      }
      each_other_passer(step, [&](int64_t other, int64_t source) {
        const auto place = source * kPieces + step.piece;
        if (trip->far_received[place] > 0)
          inside.sends.push_back({other, rows.far_send.narrow(0, received_at[place], trip->far_received[place])});
      });
      const auto place = step.next_hop * kPieces + step.piece;
      if (trip->far_sent[place] > 0)
        between.receives.push_back({step.next_hop, rows.far_recv.narrow(0, sent_at[place], trip->far_sent[place])});
      if (!inside.empty()) transfers.push_back(between.after = intra().post(std::move(inside)));
      if (between.receives.empty() && fans.empty()) return;
      if (!fans.empty())
        between.prepare = [this, fans, trip, sums](Leg& sent) {
          for (const auto& fan : fans) fan_in(fan, *trip, sums, sent);
        };
      transfers.push_back(inter().post(std::move(between)));
    });
    transfers.push_back(post_near(rows, trip->near_received, trip->near_sent));
    return std::make_shared<Exchange>(std::move(transfers));
  }

 private:
  // One piece of the messages to the node `distance` further on, and from the node as far behind.
  struct Step {
    Counts sources;    // ranks of the node behind whose rows this rank passes on
    int64_t node;      // the node behind
    int64_t next_hop;  // the rank of the node ahead that passes this rank's rows on
    int64_t piece;
  };
  struct FanOut {
    int64_t place;
    at::Tensor rows;  // that this rank passes on
    at::Tensor kept;  // where those for itself go
  };
  struct FanIn {
    int64_t place;
    int64_t source;
    std::vector<at::Tensor> parts;  // per rank of the node; not defined where it has nothing
    int64_t width;                  // of the sums
  };

  const Counts& mine() const { return nodes_.mine(); }

  // Who of this node passes the rows of `source` on.
  int64_t passer(int64_t source) const { return nodes_.counterpart(source, nodes_.my_node()); }

  template <class Function>
  void each_step(const Function& function) const {
    for (int64_t distance = 1; distance < nodes_.count(); ++distance) {
      Step step;
      step.node = (nodes_.my_node() - distance + nodes_.count()) % nodes_.count();
      step.next_hop = nodes_.counterpart(rank(), (nodes_.my_node() + distance) % nodes_.count());
      for (const auto source : nodes_.on(step.node))
        if (passer(source) == rank()) step.sources.push_back(source);
      for (step.piece = 0; step.piece < kPieces; ++step.piece) function(step);
    }
  }

  // The other ranks of this node that pass rows on in a step, with the sources of these rows.
  template <class Function>
  void each_other_passer(const Step& step, const Function& function) const {
    for (const auto source : nodes_.on(step.node))
      if (const auto other = passer(source); other != rank()) function(other, source);
  }

  std::shared_ptr<Transfer> post_near(const ChunkRows& rows, const Counts& send_rows, const Counts& recv_rows) {
    std::vector<bool> everyone(size(), true);  // counts are zero for other nodes
    return intra().post(
        make_leg({{rows.near_send, send_rows, rows.near_recv, recv_rows}}, rank(), everyone, next_tag()));
  }

  void fan_out(const FanOut& fan, Itinerary& trip, const RowRoutes& routes, bool first_time, Leg& leg) {
    auto* index = &trip.fan_rows[fan.place * nodes_.largest()];
    const auto* counts = &trip.fan[fan.place * nodes_.largest()];
    if (first_time) {
      const auto found = find_fan(fan.rows, routes, mine(), Counts(counts, counts + mine().size()));
      std::copy(found.begin(), found.end(), index);
    }
    for (size_t g = 0; g < mine().size(); ++g) {
      if (counts[g] == 0) continue;
      if (mine()[g] == rank()) {
        gather_bytes(fan.rows, index[g], fan.kept);
        continue;
      }
      auto rows = fan.rows;
      if (index[g].defined()) gather_bytes(fan.rows, index[g], rows = take_buffer(counts[g], fan.rows.size(1)));
      leg.sends.push_back({mine()[g], rows});
    }
  }

  at::Tensor zeros(int64_t rows, int64_t columns, at::ScalarType dtype) {
    if (columns == 0) return take_buffer(rows, 0).to(dtype);
    auto bytes = take_buffer(rows, columns * static_cast<int64_t>(c10::elementSize(dtype)));
    if (bytes.device().is_cpu() && bytes.numel() > 0)
      std::memset(bytes.mutable_data_ptr(), 0, bytes.nbytes());  // not zero_(): no pool of threads on a link
    else
      bytes.zero_();
    return bytes.view(dtype);
  }

  void fan_in(const FanIn& fan, const Itinerary& trip, const RowSums& sums, Leg& leg) {
    const auto wide = sums.dtype == at::kDouble ? at::kDouble : at::kFloat;
    const auto extra_bytes = sums.extra * static_cast<int64_t>(c10::elementSize(wide));
    const auto inner_bytes = aligned(sums.inner->row_bytes(sums.hidden, sums.dtype));
    const auto outer_bytes = aligned(sums.outer->row_bytes(sums.hidden, sums.dtype));
    const auto none = make_compressor("none");
    const auto num_rows = trip.passed[fan.place];
    auto sum = zeros(num_rows, sums.hidden, wide);
    auto extra = zeros(num_rows, sums.extra, wide);
    for (size_t g = 0; g < mine().size(); ++g) {
      if (!fan.parts[g].defined()) continue;
      const auto& rows = trip.fan_rows[fan.place * nodes_.largest() + g];
      const auto index = rows.defined() ? std::optional<at::Tensor>(rows) : std::nullopt;
      unpack_add(*sums.inner, fan.parts[g], sums.dtype, index, sum, /*distinct=*/true);
      if (sums.extra > 0)
        unpack_add(*none, fan.parts[g].narrow(1, inner_bytes, extra_bytes), wide, index, extra, /*distinct=*/true);
    }
    auto wire = take_buffer(num_rows, fan.width);
    pack(*sums.outer, sum, std::nullopt, sums.dtype, wire);
    if (sums.extra > 0) pack(*none, extra, std::nullopt, wide, wire.narrow(1, outer_bytes, extra_bytes));
    leg.sends.push_back({fan.source, wire});
  }

  Nodes nodes_;
  Link& onward_;
};

PLANMOE_REGISTER_COMM("dedup", DedupComm);

}  // namespace
}  // namespace planmoe
