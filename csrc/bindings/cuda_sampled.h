// The lists and gathers of the sampled gradient, as functions of the module.
#pragma once

#include <pybind11/pybind11.h>

#include <limits>

#include "csrc/bindings/cuda_gradient.h"
#include "csrc/cuda/kernels.h"

namespace bft {

// CUB numbers what it scans and sorts with 32 bits.
constexpr int64_t kMaxSorted = std::numeric_limits<int32_t>::max();

inline cuda::RowRange checked_rows(const cuda::Problem& problem, int64_t first_row, int64_t rows) {
    check_range("first_row", first_row, 0, problem.rows);
    check_range("rows", rows, 0, problem.rows - first_row);
    return {first_row, rows};
}

inline const uint32_t* checked_mask(std::uintptr_t mask, const cuda::Problem& problem,
                                    int64_t rows) {
    return checked_pointer<uint32_t>("mask_ptr", mask, rows * ((problem.vocabulary + 31) / 32));
}

inline cuda::Lists checked_lists(const cuda::Problem& problem, std::uintptr_t offsets,
                                 std::uintptr_t columns, int64_t capacity) {
    check_range("capacity", capacity, 0, int64_t{1} << 48);
    return {checked_pointer<int64_t>("offsets_ptr", offsets, problem.rows + 1),
            checked_pointer<int32_t>("columns_ptr", columns, capacity), capacity};
}

// Storage for CUB, which takes an address of 0 for a question.
inline cuda::Temporary checked_temporary(std::uintptr_t address, int64_t bytes, bool wanted) {
    check_range("temporary_bytes", bytes, wanted, int64_t{1} << 48);
    return {checked_pointer<char>("temporary_ptr", address, wanted ? bytes : 0),
            static_cast<size_t>(bytes)};
}

inline void count_entries(const ProblemArguments& given, int64_t first_row, int64_t rows,
                          std::uintptr_t mask, std::uintptr_t counts, std::uintptr_t stream) {
    const cuda::Problem problem = checked_problem(given);
    cuda::count_entries(problem, checked_rows(problem, first_row, rows),
                        checked_mask(mask, problem, rows),
                        checked_pointer<int64_t>("counts_ptr", counts, problem.rows),
                        reinterpret_cast<void*>(stream));
}

inline size_t scan_bytes(int64_t rows) {
    check_range("N", rows, 0, kMaxRows);
    return cuda::scan_bytes(rows);
}

inline void scan_counts(std::uintptr_t counts, int64_t rows, std::uintptr_t offsets,
                        std::uintptr_t temporary, int64_t temporary_bytes, std::uintptr_t stream) {
    check_range("N", rows, 0, kMaxRows);
    cuda::scan_counts(checked_pointer<int64_t>("counts_ptr", counts, rows), rows,
                      checked_pointer<int64_t>("offsets_ptr", offsets, rows + 1),
                      checked_temporary(temporary, temporary_bytes, rows > 0),
                      reinterpret_cast<void*>(stream));
}

inline void list_entries(const ProblemArguments& given, int64_t first_row, int64_t rows,
                         std::uintptr_t mask, std::uintptr_t offsets, std::uintptr_t columns,
                         int64_t capacity, std::uintptr_t stream) {
    const cuda::Problem problem = checked_problem(given);
    cuda::list_entries(
        problem, checked_rows(problem, first_row, rows), checked_mask(mask, problem, rows),
        checked_lists(problem, offsets, columns, capacity), reinterpret_cast<void*>(stream));
}

inline void gather_hidden(const ProblemArguments& given, std::uintptr_t lse, std::uintptr_t nll,
                          std::uintptr_t grad, std::uintptr_t seed, float eps,
                          std::uintptr_t offsets, std::uintptr_t columns, int64_t capacity,
                          std::uintptr_t keys, std::uintptr_t packed, std::uintptr_t grad_hidden,
                          bool wide, std::uintptr_t stream) {
    const cuda::Problem problem = checked_problem(given);
    const int64_t n = problem.rows;
    check_range("D", problem.depth, 1, cuda::kMaxGathered);
    check_number("eps", eps, 0x1p-30f, 1);
    const cuda::KnownRows known{checked_pointer<float>("lse_ptr", lse, n), nullptr,
                                checked_pointer<float>("nll_ptr", nll, n),
                                checked_pointer<float>("grad_ptr", grad, n)};
    cuda::gather_hidden(problem, known, {checked_pointer<int64_t>("seed_ptr", seed, n > 0), eps},
                        checked_lists(problem, offsets, columns, capacity),
                        {checked_pointer<int32_t>("keys_ptr", keys, packed == 0 ? 0 : capacity),
                         checked_pointer<uint64_t>("packed_ptr", packed, keys == 0 ? 0 : capacity)},
                        checked_output("grad_hidden_ptr", grad_hidden, 0, problem.type, wide),
                        reinterpret_cast<void*>(stream));
}

inline void check_entries(int64_t entries, int64_t vocabulary) {
    check_range("E", entries, 0, kMaxSorted);
    check_range("V", vocabulary, 1, kMaxVocabulary);
}

inline size_t sort_bytes(int64_t entries, int64_t vocabulary) {
    check_entries(entries, vocabulary);
    return cuda::sort_bytes(entries, vocabulary);
}

inline void sort_entries(std::uintptr_t keys, std::uintptr_t packed, int64_t entries,
                         int64_t vocabulary, std::uintptr_t sorted_keys,
                         std::uintptr_t sorted_packed, std::uintptr_t temporary,
                         int64_t temporary_bytes, std::uintptr_t stream) {
    check_entries(entries, vocabulary);
    cuda::sort_entries(checked_pointer<int32_t>("keys_ptr", keys, entries),
                       checked_pointer<uint64_t>("packed_ptr", packed, entries), entries,
                       vocabulary,
                       checked_pointer<int32_t>("sorted_keys_ptr", sorted_keys, entries),
                       checked_pointer<uint64_t>("sorted_packed_ptr", sorted_packed, entries),
                       checked_temporary(temporary, temporary_bytes, entries > 0),
                       reinterpret_cast<void*>(stream));
}

inline void column_starts(std::uintptr_t sorted_keys, int64_t entries, int64_t vocabulary,
                          std::uintptr_t starts, std::uintptr_t stream) {
    check_entries(entries, vocabulary);
    cuda::column_starts(checked_pointer<int32_t>("sorted_keys_ptr", sorted_keys, entries), entries,
                        vocabulary, checked_pointer<int64_t>("starts_ptr", starts, vocabulary + 1),
                        reinterpret_cast<void*>(stream));
}

inline void gather_weight(const ProblemArguments& given, std::uintptr_t starts,
                          std::uintptr_t packed, std::uintptr_t grad_weight, int64_t stride_gv,
                          bool wide, bool adds, std::uintptr_t grad_bias, std::uintptr_t stream) {
    const cuda::Problem problem = checked_problem(given);
    check_range("D", problem.depth, 1, cuda::kMaxGathered);
    if (grad_weight != 0) check_range("stride_gv", stride_gv, problem.depth, int64_t{1} << 48);
    cuda::gather_weight(problem,
                        checked_pointer<int64_t>("starts_ptr", starts, problem.vocabulary + 1),
                        checked_pointer<uint64_t>("packed_ptr", packed, 0),
                        {checked_output("grad_weight_ptr", grad_weight, 0, problem.type, wide),
                         stride_gv, adds, checked_pointer<float>("grad_bias_ptr", grad_bias, 0)},
                        reinterpret_cast<void*>(stream));
}

inline void define_lists(pybind11::module_& module) {
    using pybind11::arg;
    using Released = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def("count_entries", &count_entries,
               "counts [N] int64, by position, of R rows from first_row on, among those that take "
               "part: how many bits of mask [R, ceil(V / 32)] are set.",
               pybind11::kw_only(), arg("problem"), arg("first_row"), arg("rows"), arg("mask_ptr"),
               arg("counts_ptr"), arg("stream"), Released());
    module.def("scan_bytes", &scan_bytes, "Bytes that scan_counts works in.", arg("N"));
    module.def("scan_counts", &scan_counts,
               "offsets [N + 1] int64: the sums of counts [N] int64 before each, and of all.",
               pybind11::kw_only(), arg("counts_ptr"), arg("N"), arg("offsets_ptr"),
               arg("temporary_ptr"), arg("temporary_bytes"), arg("stream"), Released());
    module.def("list_entries", &list_entries,
               "columns [capacity] int32 of the bits of mask, ascending, each row's from its "
               "offset on. A row that ends past the capacity has none.",
               pybind11::kw_only(), arg("problem"), arg("first_row"), arg("rows"), arg("mask_ptr"),
               arg("offsets_ptr"), arg("columns_ptr"), arg("capacity"), arg("stream"), Released());
    module.def("sort_bytes", &sort_bytes, "Bytes that sort_entries works in.", arg("E"), arg("V"));
    module.def("sort_entries", &sort_entries,
               "keys [E] int32 and packed [E] int64 by key, V where there is no entry; those of "
               "one column stay in order.",
               pybind11::kw_only(), arg("keys_ptr"), arg("packed_ptr"), arg("E"), arg("V"),
               arg("sorted_keys_ptr"), arg("sorted_packed_ptr"), arg("temporary_ptr"),
               arg("temporary_bytes"), arg("stream"), Released());
    module.def("column_starts", &column_starts,
               "starts [V + 1] int64: the first of each column among sorted keys [E] int32, and "
               "the number of those that are columns.",
               pybind11::kw_only(), arg("sorted_keys_ptr"), arg("E"), arg("V"), arg("starts_ptr"),
               arg("stream"), Released());
}

inline void define_gathers(pybind11::module_& module) {
    using pybind11::arg;
    using Released = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.attr("MAX_GATHERED") = cuda::kMaxGathered;
    module.def("gather_hidden", &gather_hidden,
               "Of the listed entries those of the sampled gradient, by lse and nll [N]. Rows of "
               "grad_hidden [N, D], of the operands' type or float32, times grad [N]; ignored "
               "ones, and those "
               "without a list, are left alone. keys [capacity] int32 and packed [capacity] int64, "
               "row and float32 value, where an entry is kept. Addresses of 0: not wanted.",
               pybind11::kw_only(), arg("problem"), arg("lse_ptr"), arg("nll_ptr"), arg("grad_ptr"),
               arg("seed_ptr"), arg("eps"), arg("offsets_ptr"), arg("columns_ptr"), arg("capacity"),
               arg("keys_ptr") = 0, arg("packed_ptr") = 0, arg("grad_hidden_ptr") = 0,
               arg("wide") = false, arg("stream"), Released());
    module.def("gather_weight", &gather_weight,
               "grad_weight [V, D] of sorted entries, of the operands' type or with wide of "
               "float32: written, or with adds added to. grad_bias [V] float32 is added to. "
               "Addresses of 0: not wanted.",
               pybind11::kw_only(), arg("problem"), arg("starts_ptr"), arg("packed_ptr"),
               arg("grad_weight_ptr") = 0, arg("stride_gv") = 0, arg("wide") = false,
               arg("adds") = false, arg("grad_bias_ptr") = 0, arg("stream"), Released());
}

}  // namespace bft
