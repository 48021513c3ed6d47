#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "../compressor/abstract.h"

namespace planmoe {

// The rows of one chunk that this rank sends, passes on and receives, as numbers that all ranks agreed on beforehand.
// P ranks, B pieces, G most ranks on a node. Near: ranks of this node; far: the others. A token is one row for every
// near rank and for every far first hop that wants it.
struct Itinerary {
  std::vector<int64_t> near_sent;      // [P]
  std::vector<int64_t> near_received;  // [P]
  std::vector<int64_t> far_sent;       // [P * B] to first hop p
  std::vector<int64_t> far_received;   // [P * B] from source p, whoever passed them on
  // Only where this rank passes rows on:
  std::vector<int64_t> passed;  // [P * B] from source p, for ranks of this node
  std::vector<int64_t> fan;     // [P * B * G] of them, for the g-th rank of this node
  // [P * B * G] int64: their places in the piece; not defined where every row goes. Found as the first dispatch passes.
  std::vector<at::Tensor> fan_rows;
};

// A chunk's wire rows, uint8 [rows, width], contiguous. Near rows lie by rank, far rows by rank, then piece.
// dispatch: sends [near_sent], [far_sent] rows and receives [near_received], [far_received] ones; combine: the reverse.
struct ChunkRows {
  at::Tensor near_send;
  at::Tensor far_send;
  at::Tensor near_recv;
  at::Tensor far_recv;
};

// Where a dispatched far row says which experts want it: `top_k` integers of `id_bytes` (2 or 4) bytes from column
// `offset` on, negative for none. Only those count whose index on their rank is in [first_expert, last_expert).
struct RowRoutes {
  int64_t offset = 0;
  int64_t top_k = 0;
  int64_t id_bytes = 4;
  int64_t experts_per_rank = 1;
  int64_t first_expert = 0;
  int64_t last_expert = 1;
};

// Columns after a row's values start at a multiple of eight bytes.
inline int64_t aligned(int64_t bytes) { return (bytes + 7) / 8 * 8; }

// What combined far rows hold: `hidden` values of `dtype`, then `extra` float32 (float64 for float64 rows) values. They come from the experts'
// ranks encoded by `inner` and go on between nodes encoded by `outer`.
struct RowSums {
  std::shared_ptr<AbstractCompressor> inner;
  std::shared_ptr<AbstractCompressor> outer;
  int64_t hidden = 0;
  at::ScalarType dtype = at::kFloat;
  int64_t extra = 0;
};

}  // namespace planmoe
