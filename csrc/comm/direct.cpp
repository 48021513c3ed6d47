// direct: one flat exchange with every peer, every receive posted before any send.
#include "abstract.h"

namespace planmoe {
namespace {

class DirectComm final : public AbstractComm {
 public:
  explicit DirectComm(const CommOptions& options)
      : AbstractComm(options), everyone_(size(), true), link_(add_link(0, "exchange")) {}

 protected:
  std::shared_ptr<Exchange> post(const std::vector<ExchangeSpec>& parts, int tag) override {
    return std::make_shared<Exchange>(
        std::vector<std::shared_ptr<Transfer>>{link_.post(make_leg(parts, rank(), everyone_, tag))});
  }

 private:
  std::vector<bool> everyone_;
  Link& link_;
};

PLANMOE_REGISTER_COMM("direct", DirectComm);

}  // namespace
}  // namespace planmoe
