#pragma once

#include <vector>

#include "abstract.h"

namespace planmoe {

// Pipe-A2A (ScheMoE, EuroSys 2024): the legs inside the node and between nodes are in flight at once, each on a link
// of its own, so that neither kind of wire waits for the other.
class PipeComm : public AbstractComm {
 public:
  explicit PipeComm(const CommOptions& options);

 protected:
  std::shared_ptr<Exchange> post(const std::vector<ExchangeSpec>& parts, int tag) override;

  const std::vector<bool>& same_node() const { return same_node_; }
  Link& intra() { return *intra_; }
  Link& inter() { return *inter_; }

 private:
  std::vector<bool> same_node_;
  std::vector<bool> other_node_;
  Link* intra_;
  Link* inter_;
};

}  // namespace planmoe
