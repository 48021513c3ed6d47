// pipe: Pipe-A2A (ScheMoE, EuroSys 2024): the legs inside the node and between nodes are in flight at once, each on a
// link of its own, so that neither kind of wire waits for the other.
#include "abstract.h"

namespace planmoe {
namespace {

class PipeComm final : public AbstractComm {
 public:
  explicit PipeComm(const CommOptions& options) : AbstractComm(options), same_node_(size()), other_node_(size()) {
    TORCH_CHECK_VALUE(options.groups.size() >= 2, "pipe needs two process groups over the same ranks, got ",
                      options.groups.size());
    TORCH_CHECK_VALUE(options.groups[1]->getSize() == size() && options.groups[1]->getRank() == rank(),
                      "pipe needs two process groups over the same ranks");
    for (int64_t peer = 0; peer < size(); ++peer) {
      same_node_[peer] = options.node_of_rank[peer] == options.node_of_rank[rank()];
      other_node_[peer] = !same_node_[peer];
    }
    intra_ = &add_link(0, "intra");
    inter_ = &add_link(1, "inter");
  }

 protected:
  std::shared_ptr<Exchange> post(const ExchangeSpec& spec, int tag) override {
    std::vector<std::shared_ptr<Transfer>> transfers;
    auto inter = make_leg(spec, rank(), other_node_, tag);  // the slow link first
    if (!inter.sends.empty() || !inter.receives.empty()) transfers.push_back(inter_->post(std::move(inter)));
    transfers.push_back(intra_->post(make_leg(spec, rank(), same_node_, tag)));
    return std::make_shared<Exchange>(std::move(transfers));
  }

 private:
  std::vector<bool> same_node_;
  std::vector<bool> other_node_;
  Link* intra_ = nullptr;
  Link* inter_ = nullptr;
};

PLANMOE_REGISTER_COMM("pipe", PipeComm);

}  // namespace
}  // namespace planmoe
