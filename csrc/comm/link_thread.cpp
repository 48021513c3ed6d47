// Legs over a CPU process group (gloo): a gloo work completes only inside wait(), so one thread per link waits.
#include <ATen/core/Tensor.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "../clock.h"
#include "../kernels/parallel.h"
#include "link.h"

namespace planmoe {
namespace {

constexpr int64_t kSliceMilliseconds = 200;  // how late a link that waits for another one notices the end

using Work = c10::intrusive_ptr<c10d::Work>;

class ThreadTransfer final : public Transfer {
 public:
  explicit ThreadTransfer(Leg leg) : leg_(std::move(leg)) {}

  bool wait_for(int64_t milliseconds) override {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!done_.wait_for(lock, std::chrono::milliseconds(milliseconds), [this] { return finished_; })) return false;
    if (error_) std::rethrow_exception(error_);
    return true;
  }

  std::pair<int64_t, int64_t> span_ns() const override { return {started_ns_, finished_ns_}; }

  void finish(std::exception_ptr error) {
    std::lock_guard<std::mutex> lock(mutex_);
    error_ = std::move(error);
    bytes_sent = leg_.bytes_sent();
    leg_ = Leg();  // the buffers go back to their owners, the transfer before this one too
    finished_ns_ = host_now_ns();
    finished_ = true;
    done_.notify_all();
  }

  void mark_started() { started_ns_ = host_now_ns(); }
  Leg& leg() { return leg_; }

 private:
  Leg leg_;
  std::mutex mutex_;
  std::condition_variable done_;
  std::exception_ptr error_;
  bool finished_ = false;
  int64_t started_ns_ = 0;
  int64_t finished_ns_ = 0;
};

class ThreadLink final : public Link {
 public:
  ThreadLink(c10::intrusive_ptr<c10d::ProcessGroup> group, std::string lane, int64_t timeout_ms)
      : group_(std::move(group)), lane_(std::move(lane)), timeout_(timeout_ms), thread_([this] { run(); }) {}

  ~ThreadLink() override {
    abort("planmoe: the exchange was shut down");
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
    }
    arrived_.notify_all();
    thread_.join();
  }

  void abort(const std::string& reason) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (abort_reason_.empty()) abort_reason_ = reason;
    for (const auto& [peer, work] : in_flight_) abort_quietly(work);
  }

  std::shared_ptr<Transfer> post(Leg leg) override {
    auto transfer = std::make_shared<ThreadTransfer>(std::move(leg));
    transfer->lane = lane_;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(transfer);
    }
    arrived_.notify_one();
    return transfer;
  }

 private:
  static void abort_quietly(const Work& work) {
    try {
      work->abort();
    } catch (const std::exception&) {
      // a backend that cannot abort: its own timeout ends the wait
    }
  }

  void run() {
    is_link_thread = true;
    std::exception_ptr broken;
    while (true) {
      std::shared_ptr<ThreadTransfer> transfer;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        arrived_.wait(lock, [this] { return ending_ || !queue_.empty(); });
        if (!abort_reason_.empty()) broken = std::make_exception_ptr(std::runtime_error(abort_reason_));
        if (queue_.empty()) return;
        transfer = queue_.front();
        queue_.pop_front();
      }
      transfer->mark_started();
      if (!broken) {
        try {
          carry(*transfer);
        } catch (...) {
          broken = std::current_exception();  // later legs would only wait for the same peer
        }
      }
      transfer->finish(broken);
    }
  }

  void carry(ThreadTransfer& transfer) {
    auto& leg = transfer.leg();
    post_receives(leg, 0);
    const auto num_posted = leg.receives.size();
    if (leg.after) wait_for_link(*leg.after);
    if (leg.timed_from_arrival) transfer.mark_started();
    if (leg.prepare) leg.prepare(leg);
    post_receives(leg, num_posted);
    for (const auto& message : leg.sends) {
      start(message, [&](std::vector<at::Tensor> buffers, int peer) { return group_->send(buffers, peer, leg.tag); });
    }
    for (const auto& [from, to] : leg.local_copies)  // not copy_(): this thread must not start a pool of its own
      std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
    for (const auto& [peer, work] : in_flight_) wait_for_peer(peer, work);
    std::lock_guard<std::mutex> lock(mutex_);
    in_flight_.clear();
  }

  void post_receives(const Leg& leg, size_t first) {
    for (size_t i = first; i < leg.receives.size(); ++i) {
      start(leg.receives[i],
            [&](std::vector<at::Tensor> buffers, int peer) { return group_->recv(buffers, peer, leg.tag); });
    }
  }

  void wait_for_link(Transfer& transfer) {
    while (!transfer.wait_for(kSliceMilliseconds)) check_not_aborted();
  }

  void check_not_aborted() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!abort_reason_.empty()) throw std::runtime_error(abort_reason_);
  }

  template <typename Call>
  void start(const Message& message, const Call& call) {
    Work work;
    try {
      work = call({message.buffer}, static_cast<int>(message.peer));
    } catch (const c10::Error&) {
      throw;                                 // about the message, not the peer
    } catch (const std::exception& error) {  // a connection known to be closed fails here, not in the wait
      fail(message.peer, error.what());
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (!abort_reason_.empty()) abort_quietly(work);
    in_flight_.emplace_back(message.peer, std::move(work));
  }

  void wait_for_peer(int64_t peer, const Work& work) {
    std::string reason = "aborted";
    try {
      if (work->wait(timeout_)) return;
    } catch (const std::exception& error) {
      reason = error.what();
    }
    fail(peer, reason);
  }

  [[noreturn]] void fail(int64_t peer, const std::string& reason) {
    check_not_aborted();
    TORCH_CHECK(false, "planmoe: the exchange on the ", lane_, " link with rank ", peer,
                " of the expert-parallel group did not finish (this is rank ", group_->getRank(),
                "): the peer died, left the step, or took longer than the timeout. Reported: ", reason);
  }

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::string lane_;
  std::chrono::milliseconds timeout_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<std::shared_ptr<ThreadTransfer>> queue_;
  std::vector<std::pair<int64_t, Work>> in_flight_;
  std::string abort_reason_;  // empty: not aborted
  bool ending_ = false;
  std::thread thread_;  // last: starts when everything above exists
};

}  // namespace

std::unique_ptr<Link> make_thread_link(c10::intrusive_ptr<c10d::ProcessGroup> group, std::string lane,
                                       int64_t timeout_ms) {
  return std::make_unique<ThreadLink>(std::move(group), std::move(lane), timeout_ms);
}

}  // namespace planmoe
