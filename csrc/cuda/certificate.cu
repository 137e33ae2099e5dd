#include "csrc/cuda/certificate.cuh"

#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"

namespace bft::cuda {

void certificate(const Problem& problem, RowRange range, Splits splits, const Certified& known,
                 float* sums, float* variance, float* hidden_variance, void* stream) {
    if (range.count == 0) return;  // a grid of zero blocks is a launch error
    const CertificatePass pass{range, splits.count, splits.columns / kTileV, kGroup, known.eps};
    const int64_t blocks = ceil_div(range.count, kTileN) * splits.count;
    with_type(problem, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        launch(certificate_kernel<T, decltype(aligned)::value>,
               {"certificate", static_cast<unsigned>(blocks), kThreads, kStagesBytes, stream},
               operands_of<T>(problem), pass, known.lse, known.norms, sums);
    });
    const auto row_blocks = static_cast<unsigned>(ceil_div(range.count, kThreads));
    launch(add_splits_kernel, {"add_splits", row_blocks, kThreads, 0, stream}, range, splits.count,
           sums, problem.order, problem.row_count, variance, hidden_variance);
}

void squared_norms(const Problem& problem, float* norms, void* stream) {
    const auto blocks = static_cast<unsigned>(ceil_div(problem.vocabulary, kWarps));
    with_type(problem, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        launch(squared_norms_kernel<T, decltype(aligned)::value>,
               {"squared_norms", blocks, kThreads, 0, stream}, operands_of<T>(problem), norms);
    });
}

}  // namespace bft::cuda
