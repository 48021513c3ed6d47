#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace planmoe {

// The ranks of a group by node, as one of them sees it. Nodes may have different numbers of ranks, in any order.
class Nodes {
 public:
  Nodes(const std::vector<int64_t>& node_of_rank, int64_t rank) : local_(node_of_rank.size()) {
    std::map<int64_t, std::vector<int64_t>> ranks;
    for (size_t peer = 0; peer < node_of_rank.size(); ++peer) {
      auto& node = ranks[node_of_rank[peer]];
      local_[peer] = static_cast<int64_t>(node.size());
      node.push_back(static_cast<int64_t>(peer));
    }
    for (const auto& [number, members] : ranks) {
      if (number == node_of_rank[rank]) my_node_ = count();
      ranks_.push_back(members);
      largest_ = std::max(largest_, static_cast<int64_t>(members.size()));
    }
  }

  int64_t count() const { return static_cast<int64_t>(ranks_.size()); }
  int64_t largest() const { return largest_; }  // most ranks on a node
  int64_t my_node() const { return my_node_; }
  const std::vector<int64_t>& mine() const { return ranks_[my_node_]; }
  const std::vector<int64_t>& on(int64_t node) const { return ranks_[node]; }  // ascending

  // The rank of `node` in `peer`'s place, on its rail; nodes with fewer ranks go round.
  int64_t counterpart(int64_t peer, int64_t node) const {
    const auto& ranks = ranks_[node];
    return ranks[local_[peer] % static_cast<int64_t>(ranks.size())];
  }

 private:
  std::vector<int64_t> local_;  // place of every rank on its node
  std::vector<std::vector<int64_t>> ranks_;
  int64_t largest_ = 0;
  int64_t my_node_ = 0;
};

// Where every block begins when blocks of so many rows lie one after the other.
inline std::vector<int64_t> starts(const std::vector<int64_t>& rows) {
  std::vector<int64_t> result(rows.size(), 0);
  for (size_t i = 1; i < rows.size(); ++i) result[i] = result[i - 1] + rows[i - 1];
  return result;
}

}  // namespace planmoe
