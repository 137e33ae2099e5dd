// The gradients of the CUDA kernels, as functions of the module.
#pragma once

#include <pybind11/pybind11.h>

#include <limits>

#include "csrc/bindings/cuda_problem.h"
#include "csrc/cuda/kernels.h"

namespace bft {

inline cuda::GradientBlock checked_block(const cuda::Problem& problem, int first_column,
                                         int columns, std::uintptr_t dy, int64_t stride,
                                         int64_t other) {
    check_range("first_column", first_column, 0, problem.vocabulary - 1);
    check_range("columns", columns, 1, problem.vocabulary - first_column);
    check_range("stride_dy", stride, columns, std::numeric_limits<int32_t>::max());
    check_range("stride_dy % 128", stride % cuda::kTileV, 0, 0);
    check_range("dy_ptr % 16", static_cast<int64_t>(dy % 16), 0, 0);
    const auto tiles = [](int64_t n) { return (n + cuda::kTileN - 1) / cuda::kTileN; };
    check_range("blocks", tiles(columns) * tiles(other), 0, kMaxBlocks);
    const auto* checked = checked_pointer<uint16_t>("dy_ptr", dy, problem.rows * stride);
    return {first_column, columns, const_cast<uint16_t*>(checked), stride};
}

inline cuda::Output checked_output(const char* name, std::uintptr_t address, int64_t elements,
                                   cuda::Type type, bool wide) {
    if (wide || type == cuda::Type::kFloat32) {
        return {checked_pointer<float>(name, address, elements), true};
    }
    return {checked_pointer<uint16_t>(name, address, elements), false};
}

inline void logit_gradient(const ProblemArguments& given, int first_column, int columns,
                           std::uintptr_t dy, int64_t stride_dy, std::uintptr_t lse,
                           std::uintptr_t lse_low, std::uintptr_t nll, std::uintptr_t grad,
                           float label_smoothing, float z_loss, std::uintptr_t seed, float eps,
                           std::uintptr_t bias_sums, std::uintptr_t grad_bias, std::uintptr_t scale,
                           std::uintptr_t stream) {
    const cuda::Problem problem = checked_problem(given);
    const int64_t n = problem.rows;
    const auto block = checked_block(problem, first_column, columns, dy, stride_dy, n);
    check_number("label_smoothing", label_smoothing, 0, 1);
    if (seed != 0) check_number("eps", eps, 0x1p-30f, 1);
    const int64_t sums = grad_bias == 0 ? 0 : (n + cuda::kTileN - 1) / cuda::kTileN * stride_dy;
    const cuda::KnownRows known{checked_pointer<float>("lse_ptr", lse, n),
                                checked_pointer<float>("lse_low_ptr", lse_low, 0),
                                checked_pointer<float>("nll_ptr", nll, n),
                                checked_pointer<float>("grad_ptr", grad, n)};
    cuda::logit_gradient(
        problem, known,
        {label_smoothing, z_loss, checked_pointer<int64_t>("seed_ptr", seed, 0), eps}, block,
        checked_pointer<float>("bias_sums_ptr", bias_sums, sums),
        checked_pointer<float>("grad_bias_ptr", grad_bias, 0),
        checked_pointer<float>("scale_ptr", scale, 0), reinterpret_cast<void*>(stream));
}

inline void hidden_gradient(const ProblemArguments& given, int first_column, int columns,
                            std::uintptr_t dy, int64_t stride_dy, std::uintptr_t sums,
                            std::uintptr_t grad_hidden, bool wide, std::uintptr_t scale,
                            std::uintptr_t stream) {
    const cuda::Problem problem = checked_problem(given);
    const auto block = checked_block(problem, first_column, columns, dy, stride_dy, problem.depth);
    const int64_t elements = problem.rows * problem.depth;
    const bool whole = columns == problem.vocabulary;
    cuda::hidden_gradient(
        problem, block, checked_pointer<float>("sums_ptr", sums, whole ? 0 : elements),
        checked_output("grad_hidden_ptr", grad_hidden, elements, problem.type, wide),
        checked_pointer<float>("scale_ptr", scale, 0), reinterpret_cast<void*>(stream));
}

inline void weight_gradient(const ProblemArguments& given, int first_column, int columns,
                            std::uintptr_t dy, int64_t stride_dy, std::uintptr_t grad_weight,
                            int64_t stride_gv, bool wide, bool adds, std::uintptr_t scale,
                            std::uintptr_t stream) {
    const cuda::Problem problem = checked_problem(given);
    const auto block = checked_block(problem, first_column, columns, dy, stride_dy, problem.depth);
    check_range("stride_gv", stride_gv, problem.depth, int64_t{1} << 48);
    cuda::weight_gradient(
        problem, block,
        checked_output("grad_weight_ptr", grad_weight, problem.vocabulary, problem.type, wide),
        stride_gv, adds, checked_pointer<float>("scale_ptr", scale, 0),
        reinterpret_cast<void*>(stream));
}

inline void define_gradients(pybind11::module_& module) {
    using pybind11::arg;
    using Released = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def("logit_gradient", &logit_gradient,
               "Write dy [N, stride_dy], of the operands' type, of a block of columns: by row that "
               "takes part, times grad [N]; sampled with a seed. stride_dy is a multiple of 128. "
               "With grad_bias [V] float32 add its sums over rows, over scale [1], to the block's "
               "columns; bias_sums [ceil(N / 128), stride_dy] float32 is room to work in.",
               pybind11::kw_only(), arg("problem"), arg("first_column"), arg("columns"),
               arg("dy_ptr"), arg("stride_dy"), arg("lse_ptr"), arg("lse_low_ptr") = 0,
               arg("nll_ptr"), arg("grad_ptr"), arg("label_smoothing") = 0.0f, arg("z_loss") = 0.0f,
               arg("seed_ptr") = 0, arg("eps") = 1.0f, arg("bias_sums_ptr") = 0,
               arg("grad_bias_ptr") = 0, arg("scale_ptr") = 0, arg("stream"), Released());
    module.def("hidden_gradient", &hidden_gradient,
               "dy @ W over scale [1] into rows of grad_hidden [N, D], of the operands' type or "
               "float32. Blocks come in order: all but the last write sums [N, D] float32, all but "
               "the first add what is there.",
               pybind11::kw_only(), arg("problem"), arg("first_column"), arg("columns"),
               arg("dy_ptr"), arg("stride_dy"), arg("sums_ptr") = 0, arg("grad_hidden_ptr"),
               arg("wide") = false, arg("scale_ptr") = 0, arg("stream"), Released());
    module.def("weight_gradient", &weight_gradient,
               "dy.T @ H over scale [1] into the block's rows of grad_weight [V, D], of the "
               "operands' type or float32; with adds to what is there.",
               pybind11::kw_only(), arg("problem"), arg("first_column"), arg("columns"),
               arg("dy_ptr"), arg("stride_dy"), arg("grad_weight_ptr"), arg("stride_gv"),
               arg("wide") = false, arg("adds"), arg("scale_ptr") = 0, arg("stream"), Released());
}

}  // namespace bft
