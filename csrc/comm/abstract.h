#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../registry.h"
#include "../workspace.h"
#include "itinerary.h"
#include "link.h"

namespace planmoe {

// One all-to-all with variable splits over the ranks of a group.
//   send [sum(send_rows), W], recv [sum(recv_rows), W]: contiguous, same dtype and device; rows lie in group rank order.
//   send_rows[p] rows go to group rank p, recv_rows[p] rows come from it; both sides must agree on every count.
struct ExchangeSpec {
  at::Tensor send;
  std::vector<int64_t> send_rows;
  at::Tensor recv;
  std::vector<int64_t> recv_rows;
};

// An exchange in flight. Buffers belong to it until wait() returns; the caller must not touch them before.
class Exchange {
 public:
  explicit Exchange(std::vector<std::shared_ptr<Transfer>> transfers) : transfers_(std::move(transfers)) {}
  virtual ~Exchange() = default;

  // True once finished, false when `milliseconds` passed first. Rethrows what went wrong.
  // On an accelerator: makes the current stream wait instead of the host and returns true at once.
  virtual bool wait_for(int64_t milliseconds);
  bool passed() const;  // on an accelerator: whether the device has got past it
  const std::vector<std::shared_ptr<Transfer>>& transfers() const { return transfers_; }
  int64_t bytes_sent() const;                                   // to other ranks
  int64_t bytes_sent_on(const std::string& lane) const;         // over that link
  void set_bytes_sent(int64_t bytes) { other_bytes_ = bytes; }  // where there are no transfers to tell
  int64_t number() const { return number_; }                    // among those of its all-to-all, the same on every rank
  void set_number(int64_t number) { number_ = number; }

 private:
  std::vector<std::shared_ptr<Transfer>> transfers_;
  int64_t other_bytes_ = 0;
  int64_t number_ = -1;
};

// What an all-to-all is built from. Group ranks throughout; `node_of_rank` has one entry per group rank.
struct CommOptions {
  std::vector<c10::intrusive_ptr<c10d::ProcessGroup>> groups;  // same ranks each; one for every link of an algorithm
  std::vector<int64_t> node_of_rank;
  c10::Device device = c10::kCPU;
  int64_t timeout_ms = 0;  // bound of every wait; 0 = the process group's own timeout
  // The handle of the library behind a group, once the group was used (see make_messenger); null: none is known.
  std::function<void*(const c10::intrusive_ptr<c10d::ProcessGroup>& group)> communicator_of;
};

// An all-to-all algorithm. A new one is one file: subclass, implement post(), PLANMOE_REGISTER_COMM.
class AbstractComm {
 public:
  explicit AbstractComm(const CommOptions& options);
  virtual ~AbstractComm();

  // Checks the request (ValueError naming the offending value), then posts it. Does not block on the network, except
  // `hierarchical` on accelerators, which waits for the counts of its node.
  // Exchanges of one instance run in the order of the calls, which must be the same on every rank. Several parts, with
  // rows of different widths, travel as one exchange.
  std::shared_ptr<Exchange> start(std::vector<ExchangeSpec> parts);

  // A chunk's rows go out to every rank that wants them; see itinerary.h. Flat algorithms: one exchange of two parts.
  std::shared_ptr<Exchange> dispatch(const ChunkRows& rows, const std::shared_ptr<Itinerary>& itinerary,
                                     const RowRoutes& routes);

  // The way back: one row per row that was sent, the sum of what its receivers return. Flat algorithms: the row itself.
  std::shared_ptr<Exchange> combine(const ChunkRows& rows, const std::shared_ptr<Itinerary>& itinerary,
                                    const RowSums& sums);

  // Where a row for each rank goes first: to that rank, unless another one of its node passes rows on.
  virtual std::vector<int64_t> first_hops() const;
  bool passes_on() const { return num_pieces() > 0; }
  // Into how many pieces at most a message between nodes is cut, so that passing on starts before it is complete;
  // 0 where nothing is passed on.
  virtual int64_t num_pieces() const { return 0; }

  // Exchanges that start from now on are never taken for those of another phase (0 to 127) on another rank: theirs wait.
  // Not with NCCL, which knows no tags.
  void set_phase(int phase);

  // Ends the links' threads and lets go of the process groups; no exchange can start after. Call it before the
  // interpreter goes: threads that outlive it may be killed half-way.
  virtual void close();

  // Ends what is in flight: its waits, and all later ones, throw `reason`. From any thread.
  void abort(const std::string& reason);

  // uint8 [rows, width] for what is sent or received: used again once nobody holds it.
  at::Tensor take_buffer(int64_t rows, int64_t width) { return workspace_.take(rows, width, options_.device); }
  int64_t take_peak_bytes() { return workspace_.take_peak(); }  // of these buffers since the last call

  const std::vector<c10::intrusive_ptr<c10d::ProcessGroup>>& groups() const { return options_.groups; }
  const c10::Device& device() const { return options_.device; }
  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }
  const std::vector<int64_t>& node_of_rank() const { return options_.node_of_rank; }

 protected:
  // `tag` differs between exchanges in flight. Tensors are bytes: uint8 [rows, row_bytes].
  virtual std::shared_ptr<Exchange> post(const std::vector<ExchangeSpec>& parts, int tag) = 0;
  virtual std::shared_ptr<Exchange> post_dispatch(const ChunkRows& rows, const std::shared_ptr<Itinerary>& itinerary,
                                                  const RowRoutes& routes);
  virtual std::shared_ptr<Exchange> post_combine(const ChunkRows& rows, const std::shared_ptr<Itinerary>& itinerary,
                                                 const RowSums& sums);

  // A link over options.groups[group], one that is used for nothing else; it lives as long as this, or until close().
  // Every rank adds the same ones in the same order.
  Link& add_link(size_t group, std::string lane);
  // Lets all ranks of a group know each other; see add_link. From here on, if not before, NCCL takes memory of the device.
  void connect(size_t group) const;
  int next_tag();

 private:
  std::shared_ptr<Exchange> numbered(std::shared_ptr<Exchange> exchange);
  void check(const ExchangeSpec& spec) const;
  void check_open() const;

  CommOptions options_;
  std::vector<std::unique_ptr<Link>> links_;
  std::mutex ending_;  // held by close() and abort()
  Workspace workspace_;
  int64_t rank_;
  int64_t size_;
  int next_tag_ = 0;
  int phase_ = 0;
  int64_t num_exchanges_ = 0;
  bool closed_ = false;
};

// The messages of `parts` to and from the peers for which include[peer] holds, nearest rank first.
Leg make_leg(const std::vector<ExchangeSpec>& parts, int64_t rank, const std::vector<bool>& include, int tag);

using CommRegistry = Registry<AbstractComm, const CommOptions&>;
CommRegistry& comm_registry();

}  // namespace planmoe

#define PLANMOE_REGISTER_COMM(name, Class)                                                          \
  static const bool registered_##Class = ::planmoe::comm_registry().add(                            \
      name, [](const ::planmoe::CommOptions& options) -> std::shared_ptr<::planmoe::AbstractComm> { \
        return std::make_shared<Class>(options);                                                    \
      })
