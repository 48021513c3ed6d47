#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../comm/itinerary.h"
#include "wire_rows.h"

namespace planmoe {

// T tokens, K routes each, E experts, P ranks, L = E / P experts per rank, X chunks, B pieces, G most ranks on a node.
struct OrderRequest {
  at::Tensor expert;  // int64 [K, T] on the CPU, negative where the router dropped the route
  int64_t num_experts = 1;
  int64_t num_chunks = 1;
  bool chunk_by_expert = false;        // chunk x has the experts l of every rank with l * X / L == x
  std::vector<int64_t> chunk_of_rank;  // [P] chunk x has the routes to the ranks of x; of neither: tokens t * X / T
  int64_t rank = 0;
  std::vector<int64_t> node_of_rank;
  std::vector<int64_t> first_hop;
  int64_t num_pieces = 0;      // 0: ranks pass nothing on
  int64_t rows_per_piece = 1;  // smaller messages are cut into fewer pieces

  bool divides_tokens() const { return !chunk_by_expert && chunk_of_rank.empty(); }
};

// The tokens of one rank in the order in which their rows leave, and how many rows that makes for whom.
struct TokenOrder {
  std::vector<at::Tensor> near_token;  // X times int64 [rows], by rank
  std::vector<at::Tensor> far_token;   // X times int64 [rows], by first hop, then piece
  at::Tensor near_sent;                // int64 [X, P]
  at::Tensor far_sent;                 // int64 [X, P, B]: B is at least 1
  at::Tensor far_final;                // int64 [X, P, B]: rows that end at rank p, by the piece in which they travel
  at::Tensor fan;                      // int64 [X, P, B, G]: of far_sent[p], the rows for each rank of p's node
  at::Tensor expert_rows;              // int64 [X, E]
};

TokenOrder order_tokens(const OrderRequest& request);

// The same where the experts' numbers are on an accelerator with kernels of ours: the host learns the counts later.
// The order of a rank's lists is near ranks first, then first hops on other nodes.
struct OrderedTokens {
  at::Tensor tokens;  // int64: by chunk, then list, then token; as many as the counts say
  at::Tensor
      near_return;  // int32 [X, or 1 where chunks divide tokens, T, S]: the token's places in near_token, then -1
  std::optional<at::Tensor> far_return;  // likewise in far_token; none where all ranks are near
};

// Where order_tokens_on_device adds its counts to message, int64 [P, width], which holds zeros from this column on: for
// peer p expert_rows [X, L], near_sent [X], far_final [X, B]; where ranks pass rows on, far_sent [X, B], fan [X, B, G];
// last, for rank 0, how many routes lead to experts that do not exist.
struct CountLayout {
  int64_t first_column = 0;
};

// tables: int32 [3, P] on the device: every rank's list, the first hop of every list, every rank's place on its node; a
// fourth row where chunks go by rank: chunk_of_rank.
OrderedTokens order_tokens_on_device(const OrderRequest& request, const at::Tensor& tables, const CountLayout& layout,
                                     const at::Tensor& message);

// Whether there are kernels for tensors like this one.
bool routes_on_device(const at::Tensor& tensor);

// int64 [n] on the CPU.
at::Tensor to_tensor(const std::vector<int64_t>& values);

// Place of every rank among those of its node.
std::vector<int64_t> local_ranks(const std::vector<int64_t>& node_of_rank);

// Arrived rows of one side, near or far: uint8 [R, width], by source rank.
struct ArrivedRows {
  at::Tensor rows;
  RowRoutes routes;
  int64_t first_id = 0;        // of this rank's experts
  int64_t num_entries = 0;     // rows that the experts get from them
  int64_t weight_offset = -1;  // column of K weights of `weight_dtype`; -1: none
  at::ScalarType weight_dtype = at::kFloat;
  at::ScalarType row_dtype = at::kFloat;
  // Rows of source p for expert l lie in the buffer from base[p * L + l] on, in the order of their arrival. With
  // place_offset >= 0 there are K int32 there that say where after the base each lies.
  std::vector<int64_t> base;         // [P * L]
  std::vector<int64_t> source_rows;  // [P] rows from every source
  int64_t place_offset = -1;
  // Accelerators: int64 [P * L + P], base less the entries for the same expert from sources before on this side (base
  // itself with place_offset), then every source's first row. Not defined: tensor operations do without.
  at::Tensor table;
  // Accelerators: rows of the buffer. What peers sent may be anything, above all where an exchange was aborted: no entry
  // leads out of the buffer, and those that are missing are zero. -1: not known, peers are trusted.
  int64_t num_places = -1;
};

// Which rows of the experts' buffer every arrived row feeds.
Spread find_experts(const ArrivedRows& arrived);

// For rows [n, width] that this rank passes on: the rows that each of its node's ranks wants, counts[g] of them; not
// defined where it is all of them.
std::vector<at::Tensor> find_fan(const at::Tensor& rows, const RowRoutes& routes, const std::vector<int64_t>& ranks,
                                 const std::vector<int64_t>& counts);

}  // namespace planmoe
