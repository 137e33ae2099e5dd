#include "csrc/cuda/gather.cuh"

#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"

namespace bft::cuda {

// The narrowest team whose threads have few pieces of a row, or else the whole block.
template <typename T>
static Team team_for(int64_t depth) {
    int warps = 1;
    while (warps < kWarps && kFewPieces * kSize<T> * 32 * warps < depth) warps *= 2;
    return {warps};
}

// run(std::integral_constant<int, Pieces>()): how many pieces of a row a thread has.
template <typename T, int Pieces = kFewPieces, typename Run>
static void with_pieces(int64_t depth, Run run) {
    constexpr int kWidest = Pieces * kSize<T> * kThreads;
    if constexpr (kWidest < kMaxGathered) {
        if (depth > kWidest) return with_pieces<T, 2 * Pieces>(depth, run);
    }
    run(std::integral_constant<int, Pieces>());
}

// Whether rows of the depth, `stride` elements of Out apart, are pieces of 16 bytes of both types.
template <typename T, typename Out>
static bool rows_whole(const void* first, int64_t stride, int64_t depth) {
    return depth % kSize<T> == 0 && rows_aligned<Out>(first, stride);
}

void gather_hidden(const Problem& problem, const KnownRows& known, const Sample& sample,
                   const Lists& lists, const KeptEntries& kept, Output grad_hidden, void* stream) {
    if (problem.rows == 0) return;
    const int64_t depth = problem.depth;
    with_type(problem, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        with_pieces<T>(depth, [&](auto pieces) {
            launch(gather_hidden_kernel<T, decltype(aligned)::value, decltype(pieces)::value>,
                   {"gather_hidden", static_cast<unsigned>(problem.rows), kThreads,
                    kRowsAndPartsBytes, stream},
                   operands_of<T>(problem),
                   RowValues{known.lse, known.lse_low, known.nll, known.grad}, sample.seed,
                   sample.eps, lists.offsets, lists.columns, lists.capacity, team_for<T>(depth),
                   kept.keys, kept.packed,
                   grad_hidden.wide ? nullptr : static_cast<T*>(grad_hidden.at),
                   grad_hidden.wide ? static_cast<float*>(grad_hidden.at) : nullptr,
                   grad_hidden.wide ? rows_whole<T, float>(grad_hidden.at, depth, depth)
                                    : rows_whole<T, T>(grad_hidden.at, depth, depth));
        });
    });
}

void gather_weight(const Problem& problem, const int64_t* starts, const uint64_t* packed,
                   const WeightGradient& into, void* stream) {
    with_type(problem, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        const int64_t slices = into.weight.at ? ceil_div(problem.depth, kSliceD<T>) : 1;
        const dim3 grid(static_cast<unsigned>(problem.vocabulary), static_cast<unsigned>(slices));
        with_output<T>(into.weight, [&](auto* out) {
            using Out = std::remove_pointer_t<decltype(out)>;
            launch(gather_weight_kernel<T, Out, decltype(aligned)::value>,
                   {"gather_weight", grid, kThreads, kRowsBytes, stream}, operands_of<T>(problem),
                   starts, packed, team_for<T>(problem.depth), out, into.stride,
                   rows_whole<T, Out>(out, into.stride, problem.depth), into.adds, into.bias);
        });
    });
}

}  // namespace bft::cuda
