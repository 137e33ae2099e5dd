// Token and sequence weights, the coefficient of each token's loss, and the loss, by tiles of
// positions. A document is spread over as many blocks as it has tiles, and nothing depends on the
// order in which blocks run.
#include <algorithm>

#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"
#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

constexpr uint32_t kWarpSumsBytes = 2 * kWarps * 4;  // two numbers of each warp
static_assert(kThreads == kWeightTile);

// Documents, as kernels access them. Numbers of positions and documents are 32-bit.
struct Layout {
    Global<const float> loss;
    Global<const bool> labelled;
    Global<const int64_t> cu_seqlens;
    int positions, count;

    // A boundary, clipped to a position inside the batch.
    __device__ __forceinline__ int bound(int64_t at) const {
        const int64_t end = positions;
        return static_cast<int>(min(max(cu_seqlens.load<Cache::kReadOnly>(at), int64_t{0}), end));
    }
};

// exp(-loss), rounded once: exp in float32 loses digits if the loss is large.
__device__ __forceinline__ float confidence_of(float loss) {
    return static_cast<float>(exp(-static_cast<double>(loss)));
}

// The smaller one, or NaN if one of them is: the hardware's minimum drops a NaN.
__device__ __forceinline__ float lower(float a, float b) { return b < a || b != b ? b : a; }

// How many of the 16 positions from `at` on have a label: a bool is 0 or 1.
template <bool Aligned>
__device__ __forceinline__ int count_labels(Global<const bool> labelled, int64_t at) {
    int found = 0;
    if constexpr (Aligned) {
        const auto words =
            bits_as<Vector<unsigned, 4>>(labelled.load_vector<16, Cache::kReadOnly>(at));
#pragma unroll
        for (int i = 0; i < 4; ++i) found += __popc(words.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) found += labelled.load<Cache::kReadOnly>(at + i);
    }
    return found;
}

// Numbers the labelled positions, lists what windows average without gaps, and finds the document
// of each position.
//
// A block owns kThreads positions, a thread one of them. Each block counts all labels before its
// positions itself, 16 a thread at a time, which costs less than a launch would. Shared memory has
// two numbers of each warp, which all threads read at once.
template <bool Aligned>
__global__ void __launch_bounds__(kThreads)
    close_gaps_kernel(Layout in, bool geometric, Global<int> before, Global<int> sequence,
                      Global<float> values) {
    const int first = static_cast<int>(blockIdx.x) * kThreads;
    int earlier = 0;
    for (int64_t at = threadIdx.x * 16; at < first; at += kThreads * 16) {
        earlier += count_labels<Aligned>(in.labelled, at);
    }
    const int position = first + static_cast<int>(threadIdx.x);
    const bool known = position < in.positions;
    const bool labelled = known && in.labelled.load<Cache::kReadOnly>(position);
    const uint32_t votes = __ballot_sync(kAllLanes, labelled);
    int slot = sum_warps(__reduce_add_sync(kAllLanes, earlier), Shared<int>(0, kWarps));
    slot += sum_warps(__popc(votes), Shared<int>(4 * kWarps, kWarps), warp_id());
    slot += __popc(votes & ((1u << lane_id()) - 1));
    if (position <= in.positions) before.store(position, slot);
    if (labelled) {
        const float loss = in.loss.load<Cache::kReadOnly>(position);
        values.store(slot, geometric ? -loss : confidence_of(loss));
    }
    if (!known) return;
    int low = 0, high = in.count;  // how many documents end at or before the position
    while (low < high) {
        const int middle = low + (high - low) / 2;
        const bool ended = in.cu_seqlens.load<Cache::kReadOnly>(middle + 1) <= position;
        low = ended ? middle + 1 : low;
        high = ended ? high : middle;
    }
    sequence.store(position, low);
}

// The sum of values from begin to end.
//
// Values of one sign are added in pairs, eight to a float32: three roundings, however long the
// window and however small the values. Logarithms need an absolute accuracy, so they are widened
// before they are added.
__device__ __forceinline__ double window_sum(Global<const float> values, int begin, int end,
                                             bool geometric) {
    double total = 0;
    for (int at = begin; at < end; at += 8) {
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            x[i] = at + i < end ? values.load<Cache::kReadOnly>(at + i) : 0.0f;
        }
        if (geometric) {
#pragma unroll
            for (int i = 0; i < 8; ++i) total += static_cast<double>(x[i]);
        } else {
            total += static_cast<double>(((x[0] + x[1]) + (x[2] + x[3])) +
                                         ((x[4] + x[5]) + (x[6] + x[7])));
        }
    }
    return total;
}

// Window confidences, token weights and, tile by tile, the lowest window of each document.
//
// A block owns a tile of positions, a thread one of them and its window; neighbours read
// neighbouring values. Positions of a document lie side by side. So the lowest window up to a
// position comes from a scan over lanes, then over the last lanes of the warps before, which are in
// shared memory and which all threads read at once.
__global__ void __launch_bounds__(kThreads)
    window_kernel(Layout in, WeightingScheme scheme, Global<const int> before,
                  Global<const int> sequences, Global<const float> values,
                  Global<float> token_weight, Global<float> window_confidence,
                  Global<float> lowest_windows, Global<int> ended) {
    const int position = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    const bool known = position < in.positions;
    const int sequence = known ? sequences.load<Cache::kReadOnly>(position) : in.count;
    const bool inside = sequence < in.count && in.labelled.load<Cache::kReadOnly>(position);
    float local = 0, token = 0;
    bool last = false;
    if (inside) {
        const int64_t slot = before.load<Cache::kReadOnly>(position);
        const int64_t first = before.load<Cache::kReadOnly>(in.bound(sequence));
        const int64_t stop = before.load<Cache::kReadOnly>(in.bound(sequence + 1));
        int64_t begin, end;
        if (scheme.full_windows) {
            const int64_t full = min(stop - first, scheme.window);
            begin = min(slot, stop - full);
            end = begin + full;
        } else {
            begin = max(slot - scheme.window / 2, first);
            end = min(slot + (scheme.window - scheme.window / 2), stop);
        }
        double mean =
            window_sum(values, static_cast<int>(begin), static_cast<int>(end), scheme.geometric);
        mean /= static_cast<double>(max(end - begin, int64_t{1}));
        local = static_cast<float>(scheme.geometric ? exp(mean) : mean);
        token = 1;
        if (scheme.confidence || scheme.ratio) {
            token = confidence_of(in.loss.load<Cache::kReadOnly>(position));
        }
        if (scheme.ratio) {
            token /= local + scheme.delta;
            if (token > 1) token = 1;  // keeps a NaN
        }
        last = slot + 1 == stop;
    }
    if (known) {
        window_confidence.store(position, local);
        token_weight.store(position, token);
    }

    float lowest = inside ? local : infinity();
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        // The first lanes get their own value, which changes nothing.
        const float other = __shfl_up_sync(kAllLanes, lowest, step);
        const int owner = __shfl_up_sync(kAllLanes, sequence, step);
        if (owner == sequence) lowest = lower(lowest, other);
    }
    const Shared<float> tails(0, kWarps);
    const Shared<int> owners(4 * kWarps, kWarps);
    if (lane_id() == 31) {
        tails.store(warp_id(), lowest);
        owners.store(warp_id(), sequence);
    }
    const int ends = __syncthreads_count(last);
    for (int w = 0; w < warp_id(); ++w) {
        if (owners.load(w) == sequence) lowest = lower(lowest, tails.load(w));
    }
    if (known) lowest_windows.store(position, lowest);
    if (threadIdx.x == 0) ended.store(blockIdx.x, ends);
}

// Confidence and weight of each document, from the lowest windows of its tiles. A warp owns a
// document, and its lanes take its tiles in turn. No shared memory.
__global__ void __launch_bounds__(kThreads)
    weigh_documents_kernel(Layout in, WeightingScheme scheme, Global<const int> before,
                           Global<const float> lowest_windows, Global<float> sequence_weight,
                           Global<float> sequence_confidence) {
    const int64_t sequence = int64_t{blockIdx.x} * kWarps + warp_id();
    if (sequence >= in.count) return;
    const int begin = in.bound(sequence), end = in.bound(sequence + 1);
    float lowest = infinity();
    for (int64_t tile = begin / kWeightTile + lane_id(); tile * kWeightTile < end; tile += 32) {
        const int64_t behind = min((tile + 1) * kWeightTile, int64_t{end});
        lowest = lower(lowest, lowest_windows.load<Cache::kReadOnly>(behind - 1));
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        lowest = lower(lowest, __shfl_xor_sync(kAllLanes, lowest, step));
    }
    if (lane_id() != 0) return;
    float weight = 1;
    if (!scheme.flat && scheme.geometric) {
        const double base = lowest > 1 ? 1.0f : lowest;  // keeps a NaN
        weight = static_cast<float>(1 - exp(scheme.gamma * log(base)));
    } else if (!scheme.flat) {
        weight = 1 - lowest;
    }
    const bool filled = before.load<Cache::kReadOnly>(end) > before.load<Cache::kReadOnly>(begin);
    sequence_weight.store(sequence, filled ? weight : 0.0f);
    sequence_confidence.store(sequence, filled ? lowest : 0.0f);
}

// Coefficients, and sums of coefficient * loss over tiles.
//
// A block owns a tile of positions, a thread one of them. If the loss is divided by the number of
// documents, each block adds up those of all tiles itself. Shared memory has two numbers of each
// warp, which all threads read at once.
__global__ void __launch_bounds__(kThreads)
    coefficient_kernel(Layout in, Normalizer normalizer, Global<const float> num_items,
                       Global<const int> before, Global<const int> sequences,
                       Global<const int> ended, int tiles, Global<const float> token_weight,
                       Global<const float> sequence_weight, Global<float> coefficients,
                       Global<float> sums) {
    int items = 1;
    if (normalizer.counts && normalizer.by_sequence) {
        int found = 0;
        for (int i = static_cast<int>(threadIdx.x); i < tiles; i += kThreads) {
            found += ended.load<Cache::kReadOnly>(i);
        }
        items = sum_warps(__reduce_add_sync(kAllLanes, found), Shared<int>(0, kWarps));
    } else if (normalizer.counts) {
        items = before.load<Cache::kReadOnly>(in.positions);
    }
    const int position = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    const bool known = position < in.positions;
    float coefficient = 0, weighted = 0;
    if (known && in.labelled.load<Cache::kReadOnly>(position)) {
        const int sequence = sequences.load<Cache::kReadOnly>(position);
        if (sequence < in.count) {
            float token_scale = 1;
            if (normalizer.by_sequence) {
                const int labels = before.load<Cache::kReadOnly>(in.bound(sequence + 1)) -
                                   before.load<Cache::kReadOnly>(in.bound(sequence));
                token_scale /= static_cast<float>(max(labels, 1));
            }
            token_scale /= static_cast<float>(max(items, 1));
            if (num_items) token_scale /= num_items.load<Cache::kReadOnly>(0);
            coefficient = token_scale * (token_weight.load<Cache::kReadOnly>(position) *
                                         sequence_weight.load<Cache::kReadOnly>(sequence));
        }
        // If a weight is 0, an infinite loss must not turn the sum into NaN.
        if (coefficient != 0) weighted = coefficient * in.loss.load<Cache::kReadOnly>(position);
    }
    if (known) coefficients.store(position, coefficient);
    const float sum = sum_warps(sum_lanes<32>(weighted), Shared<float>(4 * kWarps, kWarps));
    if (threadIdx.x == 0) sums.store(blockIdx.x, sum);
}

void balanced_weighting(const Documents& documents, const WeightingScheme& scheme,
                        const Normalizer& normalizer, const WeightingScratch& scratch,
                        const Weighting& weighting, void* stream) {
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
    WeightingScheme clipped = scheme;
    clipped.window = std::min(scheme.window, 2 * n);  // a longer one covers no more
    launch(window_kernel, {"window", blocks_of(n, kWeightTile), kThreads, kWarpSumsBytes, stream},
           layout, clipped, scratch.before, scratch.sequence, scratch.values,
           weighting.token_weight, weighting.window_confidence, scratch.lowest, scratch.ended);
    launch(
        weigh_documents_kernel,
        {"weigh_documents", blocks_of(documents.count, kWarps), kThreads, kWarpSumsBytes, stream},
        layout, scheme, scratch.before, scratch.lowest, weighting.sequence_weight,
        weighting.sequence_confidence);
    launch(coefficient_kernel,
           {"coefficient", blocks_of(n, kWeightTile), kThreads, kWarpSumsBytes, stream}, layout,
           normalizer, normalizer.num_items, scratch.before, scratch.sequence, scratch.ended,
           static_cast<int>(ceil_div(n, kWeightTile)), weighting.token_weight,
           weighting.sequence_weight, weighting.coefficient, weighting.sums);
}

}  // namespace bft::cuda
