// dedup: Pipe-A2A on tokens that cross between nodes once. A row for several ranks of another node goes to one of
// them, the one in the sender's place (its rail), which passes it on inside the node while the next piece is on its
// way. Coming back, the rows of a node are summed there first, in float32, and cross as one.
//
// Legs are posted in one order on all ranks: node distance by node distance, piece by piece. A leg waits only for a
// leg that was posted before it, so nothing can hang.
#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "../kernels/routing.h"
#include "../kernels/wire_rows.h"
#include "pipe.h"

namespace planmoe {
namespace {

constexpr int64_t kPieces = 8;

using Counts = std::vector<int64_t>;

Counts starts(const Counts& rows) {
  Counts result(rows.size(), 0);
  for (size_t i = 1; i < rows.size(); ++i) result[i] = result[i - 1] + rows[i - 1];
  return result;
}

void copy_rows(const at::Tensor& from, const at::Tensor& index, at::Tensor to) {
  if (from.device().is_cpu())
    gather_bytes(from, index, to);
  else if (!index.defined())
    to.copy_(from, /*non_blocking=*/true);
  else
    at::index_select_out(to, from, 0, index);
}

class DedupComm final : public PipeComm {
 public:
  explicit DedupComm(const CommOptions& options) : PipeComm(options), local_(local_ranks(options.node_of_rank)) {
    const auto& nodes = options.node_of_rank;
    for (int64_t peer = 0; peer < size(); ++peer) {
      const auto node = static_cast<size_t>(nodes[peer]);
      if (ranks_.size() <= node) ranks_.resize(node + 1);
      ranks_[node].push_back(peer);
    }
    ranks_.erase(std::remove_if(ranks_.begin(), ranks_.end(), [](const Counts& ranks) { return ranks.empty(); }),
                 ranks_.end());
    for (size_t node = 0; node < ranks_.size(); ++node) {
      group_ = std::max<int64_t>(group_, ranks_[node].size());
      if (std::count(ranks_[node].begin(), ranks_[node].end(), rank())) my_node_ = static_cast<int64_t>(node);
    }
  }

  ~DedupComm() override { close(); }  // the links' threads use what goes next

  int64_t num_pieces() const override { return kPieces; }

  std::vector<int64_t> first_hops() const override {
    Counts hops(size());
    for (size_t node = 0; node < ranks_.size(); ++node)
      for (const auto peer : ranks_[node])
        hops[peer] = static_cast<int64_t>(node) == my_node_ ? peer : passer(rank(), node);
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
      std::vector<FanOut> fans;
      for (const auto source : step.sources) {
        const auto place = source * kPieces + step.piece;
        if (trip->passed[place] == 0) continue;
        FanOut fan{place, passing.narrow(0, passed_at[place], trip->passed[place]), {}};
        for (size_t g = 0; g < mine().size(); ++g) {
          const auto count = trip->fan[place * group_ + g];
          at::Tensor copy;
          if (count > 0 && mine()[g] == rank())
            copy = rows.far_recv.narrow(0, received_at[place], count);
          else if (count == trip->passed[place])
            leg.sends.push_back({mine()[g], fan.rows});
          else if (count > 0)
            leg.sends.push_back({mine()[g], copy = take_buffer(count, passing.size(1))});
          fan.copies.push_back(copy);
        }
        fans.push_back(std::move(fan));
      }
      each_other_passer(step, [&](int64_t other, int64_t source) {
        const auto place = source * kPieces + step.piece;
        if (trip->far_received[place] > 0)
          leg.receives.push_back({other, rows.far_recv.narrow(0, received_at[place], trip->far_received[place])});
      });
      if (leg.receives.empty() && fans.empty()) return;
      if (!fans.empty())
        leg.prepare = [this, fans, trip, routes, first_time] { fan_out(fans, *trip, routes, first_time); };
      transfers.push_back(intra().post(std::move(leg)));
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
        FanIn fan{place, {}, take_buffer(trip->passed[place], rows.far_recv.size(1))};
        for (size_t g = 0; g < mine().size(); ++g) {
          const auto count = trip->fan[place * group_ + g];
          at::Tensor part;
          if (count > 0 && mine()[g] == rank())
            part = rows.far_send.narrow(0, received_at[place], count);
          else if (count > 0)
            inside.receives.push_back({mine()[g], part = take_buffer(count, rows.far_send.size(1))});
          fan.parts.push_back(part);
        }
        between.sends.push_back({source, fan.sum});
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
      if (between.empty()) return;
      if (!fans.empty()) between.prepare = [this, fans, trip, sums] { fan_in(fans, *trip, sums); };
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
    at::Tensor rows;
    std::vector<at::Tensor> copies;  // per rank of the node; not defined where nothing is copied
  };
  struct FanIn {
    int64_t place;
    std::vector<at::Tensor> parts;  // per rank of the node; not defined where it has nothing
    at::Tensor sum;
  };

  const Counts& mine() const { return ranks_[my_node_]; }

  int64_t passer(int64_t source, size_t node) const {
    return ranks_[node][local_[source] % static_cast<int64_t>(ranks_[node].size())];
  }

  template <class Function>
  void each_step(const Function& function) const {
    const auto num_nodes = static_cast<int64_t>(ranks_.size());
    for (int64_t distance = 1; distance < num_nodes; ++distance) {
      Step step;
      step.node = (my_node_ - distance + num_nodes) % num_nodes;
      step.next_hop = passer(rank(), (my_node_ + distance) % num_nodes);
      for (const auto source : ranks_[step.node])
        if (passer(source, my_node_) == rank()) step.sources.push_back(source);
      for (step.piece = 0; step.piece < kPieces; ++step.piece) function(step);
    }
  }

  // The other ranks of this node that pass rows on in a step, with the sources of these rows.
  template <class Function>
  void each_other_passer(const Step& step, const Function& function) const {
    for (const auto source : ranks_[step.node])
      if (const auto other = passer(source, my_node_); other != rank()) function(other, source);
  }

  std::shared_ptr<Transfer> post_near(const ChunkRows& rows, const Counts& send_rows, const Counts& recv_rows) {
    std::vector<bool> everyone(size(), true);  // counts are zero for other nodes
    return intra().post(
        make_leg({{rows.near_send, send_rows, rows.near_recv, recv_rows}}, rank(), everyone, next_tag()));
  }

  void fan_out(const std::vector<FanOut>& fans, Itinerary& trip, const RowRoutes& routes, bool first_time) const {
    for (const auto& fan : fans) {
      auto* index = &trip.fan_rows[fan.place * group_];
      if (first_time) {
        const Counts counts(&trip.fan[fan.place * group_], &trip.fan[fan.place * group_] + mine().size());
        const auto found = find_fan(fan.rows, routes, mine(), counts);
        std::copy(found.begin(), found.end(), index);
      }
      for (size_t g = 0; g < mine().size(); ++g)
        if (fan.copies[g].defined()) copy_rows(fan.rows, index[g], fan.copies[g]);
    }
  }

  at::Tensor zeros(int64_t rows, int64_t columns, at::ScalarType dtype) {
    if (columns == 0) return at::empty({rows, 0}, at::TensorOptions().dtype(dtype).device(device()));
    auto bytes = take_buffer(rows, columns * static_cast<int64_t>(c10::elementSize(dtype)));
    if (bytes.device().is_cpu() && bytes.numel() > 0)
      std::memset(bytes.mutable_data_ptr(), 0, bytes.nbytes());  // not zero_(): no pool of threads on a link
    else
      bytes.zero_();
    return bytes.view(dtype);
  }

  void fan_in(const std::vector<FanIn>& fans, const Itinerary& trip, const RowSums& sums) {
    const auto wide = sums.dtype == at::kDouble ? at::kDouble : at::kFloat;
    const auto extra_bytes = sums.extra * static_cast<int64_t>(c10::elementSize(wide));
    const auto inner_bytes = aligned(sums.inner->row_bytes(sums.hidden, sums.dtype));
    const auto outer_bytes = aligned(sums.outer->row_bytes(sums.hidden, sums.dtype));
    const auto none = compressor_registry().create("none");
    for (const auto& fan : fans) {
      auto sum = zeros(fan.sum.size(0), sums.hidden, wide);
      auto extra = zeros(fan.sum.size(0), sums.extra, wide);
      for (size_t g = 0; g < mine().size(); ++g) {
        if (!fan.parts[g].defined()) continue;
        const auto& rows = trip.fan_rows[fan.place * group_ + g];
        const auto index = rows.defined() ? std::optional<at::Tensor>(rows) : std::nullopt;
        unpack_add(*sums.inner, fan.parts[g], sums.dtype, index, sum);
        if (sums.extra > 0) unpack_add(*none, fan.parts[g].narrow(1, inner_bytes, extra_bytes), wide, index, extra);
      }
      pack(*sums.outer, sum, std::nullopt, sums.dtype, fan.sum);
      if (sums.extra > 0) pack(*none, extra, std::nullopt, wide, fan.sum.narrow(1, outer_bytes, extra_bytes));
    }
  }

  std::vector<int64_t> local_;
  std::vector<Counts> ranks_;  // of every node, ascending
  int64_t group_ = 0;          // most ranks on a node
  int64_t my_node_ = 0;
};

PLANMOE_REGISTER_COMM("dedup", DedupComm);

}  // namespace
}  // namespace planmoe
