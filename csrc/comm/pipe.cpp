#include "pipe.h"

namespace planmoe {

PipeComm::PipeComm(const CommOptions& options) : AbstractComm(options), same_node_(size()), other_node_(size()) {
  for (int64_t peer = 0; peer < size(); ++peer) {
    same_node_[peer] = options.node_of_rank[peer] == options.node_of_rank[rank()];
    other_node_[peer] = !same_node_[peer];
  }
  intra_ = &add_link(0, "intra");
  inter_ = &add_link(1, "inter");
}

std::shared_ptr<Exchange> PipeComm::post(const std::vector<ExchangeSpec>& parts, int tag) {
  std::vector<std::shared_ptr<Transfer>> transfers;
  auto inter_leg = make_leg(parts, rank(), other_node_, tag);  // the slow link first
  if (!inter_leg.empty()) transfers.push_back(inter().post(std::move(inter_leg)));
  auto intra_leg = make_leg(parts, rank(), same_node_, tag);
  if (!intra_leg.empty() || transfers.empty()) transfers.push_back(intra().post(std::move(intra_leg)));
  return std::make_shared<Exchange>(std::move(transfers));
}

namespace {
PLANMOE_REGISTER_COMM("pipe", PipeComm);
}  // namespace

}  // namespace planmoe
