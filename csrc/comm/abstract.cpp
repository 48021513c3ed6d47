#include "abstract.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <future>
#include <numeric>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace planmoe {
namespace {

constexpr int kPhases = 128;

void check_rows(const char* name, const at::Tensor& tensor, const char* splits_name, const std::vector<int64_t>& splits,
                int64_t group_size, c10::Device device) {
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, " must be 2-d [rows, width], got ", tensor.dim(), "-d");
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
  TORCH_CHECK_VALUE(tensor.device() == device, name, " is on ", tensor.device(), ", this exchange works on ", device);
  TORCH_CHECK_VALUE(static_cast<int64_t>(splits.size()) == group_size, splits_name, " has ", splits.size(),
                    " entries, the group has ", group_size, " ranks");
  for (auto rows : splits)
    TORCH_CHECK_VALUE(rows >= 0, splits_name, " must not be negative, got ", c10::IntArrayRef(splits));
  const auto largest = *std::max_element(splits.begin(), splits.end());  // larger ones could make the sum overflow
  TORCH_CHECK_VALUE(largest <= tensor.size(0), splits_name, " add up to ", largest, " rows or more, ", name, " has ",
                    tensor.size(0));
  auto total = std::accumulate(splits.begin(), splits.end(), int64_t{0});
  TORCH_CHECK_VALUE(total == tensor.size(0), splits_name, " add up to ", total, " rows, ", name, " has ",
                    tensor.size(0));
}

at::Tensor as_bytes(const at::Tensor& tensor) { return tensor.view(at::kByte); }

// Rows by rank from rows by rank and piece.
std::vector<int64_t> by_rank(const std::vector<int64_t>& rows, int64_t size) {
  const auto pieces = static_cast<int64_t>(rows.size()) / size;
  std::vector<int64_t> result(size, 0);
  for (int64_t place = 0; place < static_cast<int64_t>(rows.size()); ++place) result[place / pieces] += rows[place];
  return result;
}

}  // namespace

bool Exchange::wait_for(int64_t milliseconds) {
  for (const auto& transfer : transfers_)
    if (!transfer->wait_for(milliseconds)) return false;
  return true;
}

bool Exchange::passed() const {
  return std::all_of(transfers_.begin(), transfers_.end(), [](const auto& transfer) { return transfer->passed(); });
}

int64_t Exchange::bytes_sent() const {
  int64_t total = other_bytes_;
  for (const auto& transfer : transfers_) total += transfer->bytes_sent;
  return total;
}

int64_t Exchange::bytes_sent_on(const std::string& lane) const {
  int64_t total = 0;
  for (const auto& transfer : transfers_)
    if (transfer->lane == lane) total += transfer->bytes_sent;
  return total;
}

int64_t Leg::bytes_sent() const {
  int64_t total = 0;
  for (const auto& message : sends) total += static_cast<int64_t>(message.buffer.nbytes());
  return total;
}

AbstractComm::~AbstractComm() = default;

AbstractComm::AbstractComm(const CommOptions& options) : options_(options) {
  TORCH_CHECK_VALUE(!options_.groups.empty(), "an all-to-all needs at least one process group");
  rank_ = options_.groups[0]->getRank();
  size_ = options_.groups[0]->getSize();
  TORCH_CHECK_VALUE(rank_ >= 0 && rank_ < size_, "this process is not in the group (rank ", rank_, " of ", size_, ")");
  TORCH_CHECK_VALUE(static_cast<int64_t>(options_.node_of_rank.size()) == size_, "node_of_rank has ",
                    options_.node_of_rank.size(), " entries, the group has ", size_, " ranks");
  for (const auto node : options_.node_of_rank)
    TORCH_CHECK_VALUE(node >= 0, "node_of_rank must not be negative, got ", c10::IntArrayRef(options_.node_of_rank));
  TORCH_CHECK_VALUE(options_.timeout_ms >= 0, "timeout_ms must not be negative, got ", options_.timeout_ms);
}

// NCCL makes a communicator at its first use, by all its ranks together; an exchange may leave some of them out.
void AbstractComm::connect(size_t group) const {
  if (options_.device.is_cpu() || size_ == 1) return;
  std::vector<at::Tensor> one{at::zeros({1}, at::TensorOptions().device(options_.device))};
  options_.groups[group]->allreduce(one)->wait();
}

Link& AbstractComm::add_link(size_t group, std::string lane) {
  TORCH_CHECK_VALUE(group < options_.groups.size(), "this all-to-all needs ", group + 1,
                    " or more process groups over the same ranks, got ", options_.groups.size());
  const auto& carrier = options_.groups[group];
  TORCH_CHECK_VALUE(carrier->getSize() == size_ && carrier->getRank() == rank_, "groups[", group,
                    "] must be over the same ranks as groups[0], its size is ", carrier->getSize(), ", not ", size_,
                    ", or this rank's place there ", carrier->getRank(), ", not ", rank_);
  connect(group);
  if (options_.device.is_cpu()) {
    links_.push_back(make_thread_link(carrier, std::move(lane), options_.timeout_ms));
  } else {
    void* communicator = options_.communicator_of && size_ > 1 ? options_.communicator_of(carrier) : nullptr;
    links_.push_back(make_stream_link(carrier, communicator, std::move(lane), options_.device));
  }
  return *links_.back();
}

void AbstractComm::close() {
  std::lock_guard<std::mutex> lock(ending_);  // an abort in another thread still uses the links
  closed_ = true;
  links_.clear();
  options_.groups.clear();
}

// All at once: NCCL frees memory of the device when it aborts, which waits for what other links still run there.
void AbstractComm::abort(const std::string& reason) {
  std::lock_guard<std::mutex> lock(ending_);
  std::vector<std::future<void>> aborts;
  for (const auto& link : links_)
    aborts.push_back(std::async(std::launch::async, [&link, &reason] { link->abort(reason); }));
  for (auto& abort : aborts) abort.get();
}

int AbstractComm::next_tag() {
  next_tag_ = (next_tag_ + 1) % (1 << 20);
  return next_tag_ * kPhases + phase_;
}

void AbstractComm::set_phase(int phase) {
  TORCH_CHECK_VALUE(phase >= 0 && phase < kPhases, "phase is ", phase, ", expected 0 to ", kPhases - 1);
  phase_ = phase;
}

std::shared_ptr<Exchange> AbstractComm::numbered(std::shared_ptr<Exchange> exchange) {
  if (exchange->number() < 0) exchange->set_number(num_exchanges_++);
  return exchange;
}

void AbstractComm::check_open() const { TORCH_CHECK_VALUE(!closed_, "this all-to-all was closed"); }

std::shared_ptr<Exchange> AbstractComm::start(std::vector<ExchangeSpec> parts) {
  check_open();
  for (auto& part : parts) {
    check(part);
    part.send = as_bytes(part.send);
    part.recv = as_bytes(part.recv);
  }
  return numbered(post(parts, next_tag()));
}

std::vector<int64_t> AbstractComm::first_hops() const {
  std::vector<int64_t> hops(size_);
  std::iota(hops.begin(), hops.end(), 0);
  return hops;
}

std::shared_ptr<Exchange> AbstractComm::dispatch(const ChunkRows& rows, const std::shared_ptr<Itinerary>& itinerary,
                                                 const RowRoutes& routes) {
  check_open();
  return numbered(post_dispatch(rows, itinerary, routes));
}

std::shared_ptr<Exchange> AbstractComm::combine(const ChunkRows& rows, const std::shared_ptr<Itinerary>& itinerary,
                                                const RowSums& sums) {
  check_open();
  return numbered(post_combine(rows, itinerary, sums));
}

std::shared_ptr<Exchange> AbstractComm::post_dispatch(const ChunkRows& rows,
                                                      const std::shared_ptr<Itinerary>& itinerary,
                                                      const RowRoutes& /*routes*/) {
  const auto& trip = *itinerary;
  return start({{rows.far_send, by_rank(trip.far_sent, size_), rows.far_recv, by_rank(trip.far_received, size_)},
                {rows.near_send, trip.near_sent, rows.near_recv, trip.near_received}});
}

std::shared_ptr<Exchange> AbstractComm::post_combine(const ChunkRows& rows, const std::shared_ptr<Itinerary>& itinerary,
                                                     const RowSums& /*sums*/) {
  const auto& trip = *itinerary;
  return start({{rows.far_send, by_rank(trip.far_received, size_), rows.far_recv, by_rank(trip.far_sent, size_)},
                {rows.near_send, trip.near_received, rows.near_recv, trip.near_sent}});
}

void AbstractComm::check(const ExchangeSpec& spec) const {
  check_rows("send", spec.send, "send_rows", spec.send_rows, size_, options_.device);
  check_rows("recv", spec.recv, "recv_rows", spec.recv_rows, size_, options_.device);
  TORCH_CHECK_VALUE(spec.send.scalar_type() == spec.recv.scalar_type(), "send is ", spec.send.scalar_type(),
                    ", recv is ", spec.recv.scalar_type(), ": they must have one dtype");
  TORCH_CHECK_VALUE(spec.send.size(1) == spec.recv.size(1), "send rows are ", spec.send.size(1),
                    " wide, recv rows are ", spec.recv.size(1));
  TORCH_CHECK_VALUE(spec.send_rows[rank_] == spec.recv_rows[rank_], "rank ", rank_, " sends itself ",
                    spec.send_rows[rank_], " rows but receives ", spec.recv_rows[rank_]);
}

Leg make_leg(const std::vector<ExchangeSpec>& parts, int64_t rank, const std::vector<bool>& include, int tag) {
  Leg leg;
  leg.tag = tag;
  for (const auto& spec : parts) {
    const auto size = static_cast<int64_t>(spec.send_rows.size());
    std::vector<int64_t> send_start(size, 0);
    std::vector<int64_t> recv_start(size, 0);
    for (int64_t peer = 1; peer < size; ++peer) {
      send_start[peer] = send_start[peer - 1] + spec.send_rows[peer - 1];
      recv_start[peer] = recv_start[peer - 1] + spec.recv_rows[peer - 1];
    }
    for (int64_t step = 0; step < size; ++step) {  // rank + 1, rank + 2, ...: no peer is everybody's first
      const int64_t to = (rank + step) % size;
      const int64_t from = (rank - step + size) % size;
      if (include[from] && spec.recv_rows[from] > 0 && step > 0)
        leg.receives.push_back({from, spec.recv.narrow(0, recv_start[from], spec.recv_rows[from])});
      if (!include[to] || spec.send_rows[to] == 0) continue;
      auto rows = spec.send.narrow(0, send_start[to], spec.send_rows[to]);
      if (step > 0)
        leg.sends.push_back({to, rows});
      else
        leg.local_copies.emplace_back(rows, spec.recv.narrow(0, recv_start[rank], spec.recv_rows[rank]));
    }
  }
  return leg;
}

CommRegistry& comm_registry() {
  static CommRegistry registry("all-to-all algorithm");
  return registry;
}

}  // namespace planmoe
