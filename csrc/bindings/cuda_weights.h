// The weights of Balanced Fine-Tuning of the CUDA kernels, as a function of the module.
#pragma once

#include <pybind11/pybind11.h>

#include <limits>

#include "csrc/bindings/cuda_problem.h"
#include "csrc/cuda/kernels.h"

namespace bft {

inline void balanced_weights(std::uintptr_t loss, std::uintptr_t labelled,
                             std::uintptr_t cu_seqlens, int64_t n, int64_t s, int64_t window,
                             float floor, double gamma, bool full_windows, bool geometric,
                             bool confidence, bool ratio, bool flat, bool by_sequence, bool counts,
                             std::uintptr_t num_items, std::uintptr_t before,
                             std::uintptr_t sequence, std::uintptr_t values, std::uintptr_t lowest,
                             std::uintptr_t ended, std::uintptr_t coefficient,
                             std::uintptr_t token_weight, std::uintptr_t window_confidence,
                             std::uintptr_t sequence_weight, std::uintptr_t sequence_confidence,
                             std::uintptr_t sums, std::uintptr_t stream) {
    constexpr float kSmallest = std::numeric_limits<float>::min();
    constexpr float kLargest = std::numeric_limits<float>::max();
    check_range("N", n, 0, kMaxRows);
    check_range("S", s, 0, kMaxRows);
    check_range("window", window, 1, std::numeric_limits<int64_t>::max());
    check_number("floor", floor, 0, kLargest);
    check_number("gamma", static_cast<float>(gamma), kSmallest, kLargest);
    const int64_t tiles = (n + cuda::kWeightTile - 1) / cuda::kWeightTile;
    const cuda::Documents documents{checked_pointer<float>("loss_ptr", loss, n),
                                    checked_pointer<bool>("labelled_ptr", labelled, n),
                                    checked_pointer<int64_t>("cu_seqlens_ptr", cu_seqlens, s + 1),
                                    n, s};
    const cuda::WeightScheme scheme{window,    floor,      gamma, full_windows,
                                    geometric, confidence, ratio, flat};
    const cuda::Normalizer normalizer{by_sequence, counts,
                                      checked_pointer<float>("num_items_ptr", num_items, 0)};
    const cuda::WeightScratch scratch{checked_pointer<int>("before_ptr", before, n + 1),
                                      checked_pointer<int>("sequence_ptr", sequence, n),
                                      checked_pointer<float>("values_ptr", values, n),
                                      checked_pointer<float>("lowest_ptr", lowest, n),
                                      checked_pointer<int>("ended_ptr", ended, tiles)};
    const cuda::Weights weights{
        checked_pointer<float>("coefficient_ptr", coefficient, n),
        checked_pointer<float>("token_weight_ptr", token_weight, n),
        checked_pointer<float>("window_confidence_ptr", window_confidence, n),
        checked_pointer<float>("sequence_weight_ptr", sequence_weight, s),
        checked_pointer<float>("sequence_confidence_ptr", sequence_confidence, s),
        checked_pointer<float>("sums_ptr", sums, tiles)};
    cuda::balanced_weights(documents, scheme, normalizer, scratch, weights,
                           reinterpret_cast<void*>(stream));
}

inline void define_weights(pybind11::module_& module) {
    using pybind11::arg;
    using Released = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.attr("WEIGHT_TILE") = cuda::kWeightTile;
    module.def(
        "balanced_weights", &balanced_weights,
        "Token and sequence weights, coefficients, and sums [tiles] of coefficient * loss, by "
        "tiles of WEIGHT_TILE positions; float32. loss [N] float32, labelled [N] bool, cu_seqlens "
        "[S + 1] int64. Windows are full ones, or clipped around their token; with geometric they "
        "average logarithms and documents take gamma. The token weight is 1, the confidence, or "
        "its ratio to the window's; with flat documents weigh 1. The coefficient is divided by the "
        "document's labels with by_sequence, with counts by the number of documents with labels "
        "(of labels without by_sequence), and by num_items [1] float32. Room to work in: before "
        "[N + 1], sequence [N] and ended [tiles] int32, values [N] and lowest [N] float32.",
        pybind11::kw_only(), arg("loss_ptr"), arg("labelled_ptr"), arg("cu_seqlens_ptr"), arg("N"),
        arg("S"), arg("window"), arg("floor"), arg("gamma"), arg("full_windows"), arg("geometric"),
        arg("confidence"), arg("ratio"), arg("flat"), arg("by_sequence"), arg("counts"),
        arg("num_items_ptr") = 0, arg("before_ptr"), arg("sequence_ptr"), arg("values_ptr"),
        arg("lowest_ptr"), arg("ended_ptr"), arg("coefficient_ptr"), arg("token_weight_ptr"),
        arg("window_confidence_ptr"), arg("sequence_weight_ptr"), arg("sequence_confidence_ptr"),
        arg("sums_ptr"), arg("stream"), Released());
}

}  // namespace bft
