// The error certificate of the CUDA kernels, as functions of the module.
#pragma once

#include <pybind11/pybind11.h>

#include "csrc/bindings/cuda_problem.h"
#include "csrc/cuda/kernels.h"

namespace bft {

inline void certificate(const ProblemArguments& given, int64_t first_row, int64_t rows, int splits,
                        int split_columns, std::uintptr_t sums, std::uintptr_t lse, float eps,
                        std::uintptr_t variance, std::uintptr_t norms,
                        std::uintptr_t hidden_variance, std::uintptr_t stream) {
    const cuda::Problem problem = checked_problem(given);
    const int64_t n = problem.rows;
    check_range("first_row", first_row, 0, n);
    check_range("rows", rows, 0, n - first_row);
    const cuda::Splits parts = checked_splits(splits, split_columns, problem.vocabulary, rows);
    check_number("eps", eps, 0x1p-30f, 1);
    if (n > 0 && (norms != 0) != (hidden_variance != 0)) {
        throw std::invalid_argument("norms_ptr and hidden_variance_ptr: got one of them");
    }
    const int64_t planes = norms != 0 ? 2 : 1;
    const cuda::Certified known{checked_pointer<float>("lse_ptr", lse, n),
                                checked_pointer<float>("norms_ptr", norms, 0), eps};
    cuda::certificate(problem, {first_row, rows}, parts, known,
                      checked_pointer<float>("sums_ptr", sums, planes * splits * rows),
                      checked_pointer<float>("variance_ptr", variance, n),
                      checked_pointer<float>("hidden_variance_ptr", hidden_variance, 0),
                      reinterpret_cast<void*>(stream));
}

inline void squared_norms(const ProblemArguments& given, std::uintptr_t norms,
                          std::uintptr_t stream) {
    const cuda::Problem problem = checked_problem(given);
    cuda::squared_norms(problem, checked_pointer<float>("norms_ptr", norms, problem.vocabulary),
                        reinterpret_cast<void*>(stream));
}

inline void define_certificate(pybind11::module_& module) {
    using pybind11::arg;
    using Released = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def("certificate", &certificate,
               "variance [N] of the sampled gradient, by position, of R rows from first_row on, "
               "among those that take part, from lse [N]. With norms [V] float32 of the rows of "
               "weight also hidden_variance [N]. sums [1, splits, R] float32, or [2, splits, R] "
               "with norms, is room to work in.",
               pybind11::kw_only(), arg("problem"), arg("first_row"), arg("rows"), arg("splits"),
               arg("split_columns"), arg("sums_ptr"), arg("lse_ptr"), arg("eps"),
               arg("variance_ptr"), arg("norms_ptr") = 0, arg("hidden_variance_ptr") = 0,
               arg("stream"), Released());
    module.def("squared_norms", &squared_norms,
               "|W_v|^2 of each row of weight, as stored, into norms [V] float32.",
               pybind11::kw_only(), arg("problem"), arg("norms_ptr"), arg("stream"), Released());
}

}  // namespace bft
