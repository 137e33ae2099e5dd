#include "csrc/cuda/weights.cuh"

#include <algorithm>

#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"

namespace bft::cuda {

static unsigned blocks_of(int64_t elements, int64_t each) {
    return static_cast<unsigned>(ceil_div(elements, each));
}

void balanced_weights(const Documents& documents, const WeightScheme& scheme,
                      const Normalizer& normalizer, const WeightScratch& scratch,
                      const Weights& weights, void* stream) {
    const int64_t n = documents.positions;
    const Layout layout{documents.loss, documents.labelled, documents.cu_seqlens,
                        static_cast<int>(n), static_cast<int>(documents.count)};
    // The last block has the number of all labels.
    const Launch numbering{"close_gaps", blocks_of(n + 1, kThreads), kThreads, kWarpSumsBytes,
                           stream};
    const auto close_gaps = rows_aligned<bool>(documents.labelled, 0) ? close_gaps_kernel<true>
                                                                      : close_gaps_kernel<false>;
    launch(close_gaps, numbering, layout, scheme.geometric, scratch.before, scratch.sequence,
           scratch.values);
    if (n > 0) {
        WeightScheme clipped = scheme;
        clipped.window = std::min(scheme.window, 2 * n);  // as good as any longer one
        launch(window_kernel,
               {"window", blocks_of(n, kWeightTile), kThreads, kWarpSumsBytes, stream}, layout,
               clipped, scratch.before, scratch.sequence, scratch.values, weights.token_weight,
               weights.window_confidence, scratch.lowest, scratch.ended);
    }
    if (documents.count > 0) {
        launch(weigh_documents_kernel,
               {"weigh_documents", blocks_of(documents.count, kWarps), kThreads, kWarpSumsBytes,
                stream},
               layout, scheme, scratch.before, scratch.lowest, weights.sequence_weight,
               weights.sequence_confidence);
    }
    if (n > 0) {
        launch(coefficient_kernel,
               {"coefficient", blocks_of(n, kWeightTile), kThreads, kWarpSumsBytes, stream}, layout,
               normalizer, normalizer.num_items, scratch.before, scratch.sequence, scratch.ended,
               static_cast<int>(ceil_div(n, kWeightTile)), weights.token_weight,
               weights.sequence_weight, weights.coefficient, weights.sums);
    }
}

}  // namespace bft::cuda
