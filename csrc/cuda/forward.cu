#include "csrc/cuda/forward.cuh"

#include <algorithm>

#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"

namespace bft::cuda {

// Waves of blocks that a launch is cut into, at least: the last one leaves few processors idle.
constexpr int64_t kWaves = 4;

Splits splits_for(int64_t rows, int64_t vocabulary, int processors) {
    const int64_t row_blocks = std::max<int64_t>(1, ceil_div(rows, kTileN));
    const int64_t tiles = ceil_div(vocabulary, kTileV);
    const int64_t wanted = std::clamp<int64_t>(ceil_div(kWaves * processors, row_blocks), 1, tiles);
    const int64_t each = ceil_div(tiles, wanted);
    return {static_cast<int>(ceil_div(tiles, each)), static_cast<int>(each * kTileV)};
}

template <typename T, bool Aligned, bool Emit>
static void run_tiles(const Problem& problem, const Pass& pass, float* sums,
                      const Candidates& candidates, void* stream) {
    const int64_t blocks = ceil_div(pass.range.count, kTileN) * pass.splits;
    launch(linear_nll_forward_kernel<T, Aligned, Emit>,
           {"linear_nll_forward", static_cast<unsigned>(blocks), kThreads, kForwardShared, stream},
           operands_of<T>(problem), pass, sums, candidates.seed, candidates.floor, candidates.mask);
}

void linear_nll_forward(const Problem& problem, RowRange range, Splits splits, float* sums,
                        const Candidates& candidates, float label_smoothing, float z_loss,
                        const RowResults& results, void* stream) {
    if (range.count == 0) return;  // a grid of zero blocks is a launch error
    const Pass pass{range,
                    splits.count,
                    splits.columns / kTileV,
                    kGroup,
                    results.entropy != nullptr,
                    label_smoothing > 0,
                    0x1p16f / candidates.eps};
    with_type(problem, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        constexpr bool kAligned = decltype(aligned)::value;
        if (candidates.mask != nullptr) {
            run_tiles<T, kAligned, true>(problem, pass, sums, candidates, stream);
        } else {
            run_tiles<T, kAligned, false>(problem, pass, sums, candidates, stream);
        }
    });
    const Combine combine{range,           splits.count,
                          splits.columns,  static_cast<int>(problem.vocabulary),
                          label_smoothing, z_loss};
    const auto blocks = static_cast<unsigned>(ceil_div(range.count, kThreads));
    launch(combine_kernel, {"combine", blocks, kThreads, 0, stream}, combine, sums, problem.target,
           problem.order, problem.row_count, results.loss, results.nll, results.lse,
           results.lse_low, results.entropy, results.correct);
}

void target_floor(const Problem& problem, float* floor, void* stream) {
    if (problem.rows == 0) return;
    const auto blocks = static_cast<unsigned>(ceil_div(problem.rows, kWarps));
    with_type(problem, [&](auto zero, auto) {
        using T = decltype(zero);
        launch(target_floor_kernel<T>, {"target_floor", blocks, kThreads, 0, stream},
               operands_of<T>(problem), floor);
    });
}

}  // namespace bft::cuda
