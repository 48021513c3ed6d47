#include "../kernels/columns.h"
#include "../kernels/routing.h"
#include "../kernels/wire_rows.h"
#include "bind.h"

namespace planmoe {

void bind_rows(py::module_& module) {
  py::class_<Spread>(module, "Spread")
      .def_readonly("start", &Spread::start)
      .def_readonly("target", &Spread::target)
      .def_readonly("weight", &Spread::weight)
      .def_readonly("route", &Spread::route)
      .def_readonly("source", &Spread::source);

  py::class_<TokenOrder>(module, "TokenOrder")
      .def_readonly("near_token", &TokenOrder::near_token)
      .def_readonly("far_token", &TokenOrder::far_token)
      .def_readonly("near_sent", &TokenOrder::near_sent)
      .def_readonly("far_sent", &TokenOrder::far_sent)
      .def_readonly("far_final", &TokenOrder::far_final)
      .def_readonly("fan", &TokenOrder::fan)
      .def_readonly("expert_rows", &TokenOrder::expert_rows);

  module.def(
      "order_tokens",
      [](at::Tensor expert, int64_t num_experts, int64_t num_chunks, bool chunk_by_expert,
         std::vector<int64_t> chunk_of_rank, int64_t rank, std::vector<int64_t> node_of_rank,
         std::vector<int64_t> first_hop, int64_t num_pieces, int64_t rows_per_piece) {
        return order_tokens({std::move(expert), num_experts, num_chunks, chunk_by_expert, std::move(chunk_of_rank),
                             rank, std::move(node_of_rank), std::move(first_hop), num_pieces, rows_per_piece});
      },
      py::kw_only(), py::arg("expert"), py::arg("num_experts"), py::arg("num_chunks"), py::arg("chunk_by_expert"),
      py::arg("chunk_of_rank"), py::arg("rank"), py::arg("node_of_rank"), py::arg("first_hop"), py::arg("num_pieces"),
      py::arg("rows_per_piece"), NoGil());

  py::class_<OrderedTokens>(module, "OrderedTokens")
      .def_readonly("tokens", &OrderedTokens::tokens)
      .def_readonly("near_return", &OrderedTokens::near_return)
      .def_readonly("far_return", &OrderedTokens::far_return);

  module.def(
      "order_tokens_on_device",
      [](at::Tensor expert, int64_t num_experts, int64_t num_chunks, bool chunk_by_expert,
         std::vector<int64_t> chunk_of_rank, int64_t rank, std::vector<int64_t> node_of_rank,
         std::vector<int64_t> first_hop, int64_t num_pieces, int64_t rows_per_piece, const at::Tensor& tables,
         const at::Tensor& message, int64_t first_column) {
        return order_tokens_on_device(
            {std::move(expert), num_experts, num_chunks, chunk_by_expert, std::move(chunk_of_rank), rank,
             std::move(node_of_rank), std::move(first_hop), num_pieces, rows_per_piece},
            tables, {first_column}, message);
      },
      py::kw_only(), py::arg("expert"), py::arg("num_experts"), py::arg("num_chunks"), py::arg("chunk_by_expert"),
      py::arg("chunk_of_rank"), py::arg("rank"), py::arg("node_of_rank"), py::arg("first_hop"), py::arg("num_pieces"),
      py::arg("rows_per_piece"), py::arg("tables"), py::arg("message"), py::arg("first_column"), NoGil());
  module.def("routes_on_device", &routes_on_device, py::arg("tensor"));

  module.def(
      "find_experts",
      [](at::Tensor rows, const RowRoutes& routes, int64_t first_id, int64_t num_entries, int64_t weight_offset,
         at::ScalarType weight_dtype, at::ScalarType row_dtype, std::vector<int64_t> base,
         std::vector<int64_t> source_rows, int64_t place_offset, const std::optional<at::Tensor>& table,
         int64_t num_places) {
        return find_experts({std::move(rows), routes, first_id, num_entries, weight_offset, weight_dtype, row_dtype,
                             std::move(base), std::move(source_rows), place_offset, table.value_or(at::Tensor()),
                             num_places});
      },
      py::kw_only(), py::arg("rows"), py::arg("routes"), py::arg("first_id"), py::arg("num_entries"),
      py::arg("weight_offset"), py::arg("weight_dtype"), py::arg("row_dtype"), py::arg("base"), py::arg("source_rows"),
      py::arg("place_offset") = -1, py::arg("table") = py::none(), py::arg("num_places") = -1, NoGil());

  module.def("unpack_add", &unpack_add, py::arg("codec"), py::arg("wire"), py::arg("dtype"), py::arg("index"),
             py::arg("sum"), py::arg("distinct") = false, NoGil());
  module.def("sum_rows", &sum_rows, py::arg("codec"), py::arg("wire"), py::arg("dtype"), py::arg("returns"),
             py::arg("base"), py::arg("out"), NoGil());
  module.def("sums_on_device", &sums_on_device, py::arg("codec"), py::arg("dtype"), py::arg("like"));
  module.def("spread_rows", &spread_rows, py::arg("codec"), py::arg("wire"), py::arg("spread"), py::arg("weighted"),
             py::arg("out"), NoGil());
  module.def("fold_rows", &fold_rows, py::arg("codec"), py::arg("rows"), py::arg("spread"), py::arg("weighted"),
             py::arg("wire"), NoGil());
  module.def(
      "gather_bytes",
      [](const at::Tensor& from, const std::optional<at::Tensor>& index, const at::Tensor& to) {
        gather_bytes(from, index.value_or(at::Tensor()), to);
      },
      py::arg("from_"), py::arg("index"), py::arg("to"), NoGil());
  module.def(
      "pack_columns",
      [](const std::vector<std::pair<at::Tensor, int64_t>>& columns, int64_t width) {
        std::vector<Column> found;
        for (const auto& [values, bytes] : columns) found.push_back({values, bytes});
        return pack_columns(found, width);
      },
      py::arg("columns"), py::arg("width"), NoGil());
  module.def("dot_rows", &dot_rows, py::arg("codec"), py::arg("wire"), py::arg("spread"), py::arg("rows"),
             py::arg("top_k"), NoGil());
}

}  // namespace planmoe
