#pragma once

#include <cstdint>
#include <vector>

namespace planmoe {

// The order in which this rank launched exchanges, as one digest per peer over all communicators that it shares with
// that peer. Two ranks that launch their common communicators in one order have equal digests of each other.
class LaunchLedger {
 public:
  explicit LaunchLedger(int64_t world_size) : digests_(world_size, 0) {}

  void record(int64_t communicator, const std::vector<int64_t>& global_ranks) {
    for (const auto rank : global_ranks) {
      auto& digest = digests_.at(rank);
      digest = (digest ^ static_cast<uint64_t>(communicator + 1)) * 0x100000001b3ULL;  // FNV-1a
    }
  }

  std::vector<int64_t> digests(const std::vector<int64_t>& global_ranks) const {
    std::vector<int64_t> result;
    for (const auto rank : global_ranks) result.push_back(static_cast<int64_t>(digests_.at(rank) & 0x7fffffffULL));
    return result;
  }

 private:
  std::vector<uint64_t> digests_;
};

}  // namespace planmoe
