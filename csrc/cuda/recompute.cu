#include "csrc/cuda/recompute.cuh"

#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"

namespace bft::cuda {

// The problem whose vocabulary is the block.
static Problem part_of(const Problem& problem, const GradientBlock& block) {
    Problem part = problem;
    const int64_t bytes = problem.type == Type::kFloat32 ? 4 : 2;
    part.weight =
        static_cast<const char*>(problem.weight) + bytes * problem.stride_wv * block.first_column;
    if (problem.bias != nullptr) part.bias = problem.bias + block.first_column;
    part.vocabulary = block.columns;
    return part;
}

void logit_gradient(const Problem& problem, const KnownRows& known, const GradientKind& kind,
                    const GradientBlock& block, float* bias_sums, float* bias, const float* scale,
                    void* stream) {
    if (problem.rows == 0) return;
    const Problem part = part_of(problem, block);
    const int64_t blocks = ceil_div(problem.rows, kTileN) * ceil_div(block.columns, kTileV);
    with_type(part, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        launch(logit_gradient_kernel<T, decltype(aligned)::value>,
               {"logit_gradient", static_cast<unsigned>(blocks), kThreads, kStagesBytes, stream},
               operands_of<T>(part), RowValues{known.lse, known.lse_low, known.nll, known.grad},
               kind, block.first_column, static_cast<int>(problem.vocabulary), kGroup, problem.rows,
               kind.seed, static_cast<T*>(block.dy), block.stride,
               bias == nullptr ? nullptr : bias_sums);
    });
    if (bias == nullptr) return;
    const auto column_blocks = static_cast<unsigned>(ceil_div(block.columns, kThreads));
    launch(bias_gradient_kernel, {"bias_gradient", column_blocks, kThreads, 0, stream},
           problem.row_count, bias_sums, block.stride, block.columns, scale,
           bias + block.first_column);
}

void hidden_gradient(const Problem& problem, const GradientBlock& block, float* sums,
                     Output grad_hidden, const float* scale, void* stream) {
    if (problem.rows == 0) return;
    const Problem part = part_of(problem, block);
    const int64_t blocks = ceil_div(problem.rows, kTileN) * ceil_div(problem.depth, kTileV);
    const bool last = block.first_column + int64_t{block.columns} == problem.vocabulary;
    with_type(part, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        with_output<T>(grad_hidden, [&](auto* out) {
            using Out = std::remove_pointer_t<decltype(out)>;
            launch(
                hidden_gradient_kernel<T, Out, decltype(aligned)::value>,
                {"hidden_gradient", static_cast<unsigned>(blocks), kThreads, kStagesBytes, stream},
                operands_of<T>(part), static_cast<const T*>(block.dy), block.stride, sums, out,
                scale, block.first_column == 0, last);
        });
    });
}

void weight_gradient(const Problem& problem, const GradientBlock& block, Output grad_weight,
                     int64_t stride, bool adds, const float* scale, void* stream) {
    const Problem part = part_of(problem, block);
    const int64_t blocks = ceil_div(block.columns, kTileV) * ceil_div(problem.depth, kTileV);
    with_type(part, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        with_output<T>(grad_weight, [&](auto* out) {
            using Out = std::remove_pointer_t<decltype(out)>;
            launch(
                weight_gradient_kernel<T, Out, decltype(aligned)::value>,
                {"weight_gradient", static_cast<unsigned>(blocks), kThreads, kStagesBytes, stream},
                operands_of<T>(part), static_cast<const T*>(block.dy), block.stride,
                out + stride * block.first_column, stride, adds, scale);
        });
    });
}

}  // namespace bft::cuda
