// Passes over rows of raw products, float32, that a GEMM has left in a buffer. Each element of each
// result is written by one thread, which adds in a fixed order.
//
// A block of eight warps owns a row. A warp takes a span of 256 neighbouring columns at a time, in
// turn with the other warps, and a lane takes every 32nd of them: eight loads of the warp, 128
// bytes side by side each, are on their way at once. Rows may begin anywhere and have any number of
// columns. A vote of the warp is a word of the mask.
//
// Shared memory has a few numbers of each warp, side by side, which all threads read at once.
#include "csrc/cuda/bits.cuh"
#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"
#include "csrc/cuda/softmax.cuh"

namespace bft::cuda {

constexpr int kLaneColumns = 8, kSpan = 32 * kLaneColumns;

// The buffer's rows, as kernels access them.
struct BufferRows {
    Global<const float> logits;  // [n, V], raw products
    int64_t stride;
    Global<const float> bias;         // [V], or null
    Global<const int64_t> target;     // [N]
    Global<const int64_t> order;      // [N], or null: rows are taken as they come
    Global<const int64_t> row_count;  // [1], how many of the order count
    int64_t first_row;
    int vocabulary;
    Transform transform;

    // The position of the block's row; -1 if the row does not count.
    __device__ __forceinline__ int64_t position() const {
        const int64_t at = first_row + blockIdx.x;
        if (!order) return at;
        return at < row_count.load<Cache::kReadOnly>(0) ? order.load<Cache::kReadOnly>(at) : -1;
    }
    // The target's column; -1 for one that is not in the vocabulary.
    __device__ __forceinline__ int label(int64_t row) const {
        const int64_t label = target.load<Cache::kReadOnly>(row);
        return label >= 0 && label < vocabulary ? static_cast<int>(label) : -1;
    }
    __device__ __forceinline__ Global<const float> own() const {
        return logits + blockIdx.x * stride;
    }
    __device__ __forceinline__ float logit(int64_t column) const {
        float y = own().load(column);
        if (bias) y += bias.load<Cache::kReadOnly>(column);
        return transform.logit(y);
    }
};

// A lane's columns of a span; they are 32 apart.
struct Span {
    float z[kLaneColumns];
    int column0, left;  // the lane's first column, and how many columns follow from it on

    __device__ __forceinline__ bool known(int i) const { return 32 * i < left; }
    __device__ __forceinline__ int column(int i) const { return column0 + 32 * i; }
};

// z of the span that starts at column v0; minus infinity past the vocabulary.
__device__ __forceinline__ Span load_span(const BufferRows& in, int v0) {
    Span span;
    span.column0 = v0 + lane_id();
    span.left = in.vocabulary - span.column0;
    const auto from = in.own() + span.column0;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) span.z[i] = span.known(i) ? from.load(32 * i) : 0.0f;
    if (in.bias) {
        const auto bias = in.bias + span.column0;
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
            if (span.known(i)) span.z[i] += bias.load<Cache::kReadOnly>(32 * i);
        }
    }
    if (in.transform.softcap > 0) {
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) span.z[i] = in.transform.cap(span.z[i]);
    }
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
        span.z[i] = span.known(i) ? span.z[i] * in.transform.inverse_temperature : -infinity();
    }
    return span;
}

// Calls use(v0) with the first column of each span of the warp.
template <typename Use>
__device__ __forceinline__ void for_spans(int vocabulary, Use use) {
    // Counts the columns that are left, because a column past the last may not fit an int.
    for (int left = vocabulary - warp_id() * kSpan; left > 0; left -= kWarps * kSpan) {
        use(vocabulary - left);
    }
}

// Joins the threads' parts of the row, in order; all threads get the same. All threads of the block
// must call it.
constexpr int kPartNumbers = 4 * kWarps;
__device__ __forceinline__ Part join_parts(Part part, Shared<float> room) {
    const float peak = max_lanes<32>(part.maximum);
    scale_to(part, finite_or(peak, 0.0f), 0);
    const float total = sum_lanes<32>(part.total), moment = sum_lanes<32>(part.moment);
    const float shifted = sum_lanes<32>(part.shifted);
    if (lane_id() == 0) {
        const auto at = room + warp_id() * 4;
        at.store(0, peak);
        at.store(1, total);
        at.store(2, moment);
        at.store(3, shifted);
    }
    __syncthreads();
    Part whole{-infinity(), 0, 0, 0};
    for (int w = 0; w < kWarps; ++w) whole.maximum = fmaxf(whole.maximum, room.load(4 * w));
    for (int w = 0; w < kWarps; ++w) {
        const auto at = room + w * 4;
        Part warp{at.load(0), at.load(1), at.load(2), at.load(3)};
        scale_to(warp, finite_or(whole.maximum, 0.0f), 0);
        whole.total += warp.total;
        whole.moment += warp.moment;
        whole.shifted += warp.shifted;
    }
    return whole;
}

// Columns that are likely in many rows, ascending. A repeated column counts once.
struct Popular {
    Global<const int64_t> columns;
    int count;
};

// A lower bound of the row's lse: its target's logit, or the sum over the popular columns.
__device__ __forceinline__ float lower_bound(const BufferRows& in, float own,
                                             const Popular& popular, Shared<float> room) {
    Part part{-infinity(), 0, 0, 0};
    for (int i = static_cast<int>(threadIdx.x); i < popular.count; i += kThreads) {
        const int64_t column = popular.columns.load<Cache::kReadOnly>(i);
        if (i > 0 && popular.columns.load<Cache::kReadOnly>(i - 1) == column) continue;
        const float z = in.logit(column), peak = fmaxf(part.maximum, z);
        const float reference = finite_or(peak, 0.0f);
        part.total = part.total * expf(part.maximum - reference) + expf(z - reference);
        part.maximum = peak;
    }
    const Part whole = join_parts(part, room);
    float bound = finite_or(whole.maximum, 0.0f) + logf(whole.total);
    // A logit that is not finite must not affect other rows and columns than its own.
    bound = fabsf(bound) < infinity() ? fmaxf(bound, own) : own;
    return bound - kRounding * fabsf(bound) - kRounding;
}

// For the mask: decides which entries may be kept.
struct RowDraws {
    Global<const int64_t> seed;
    Popular popular;
    float overrating;  // 2^16 / eps
    Global<uint32_t> mask;
};

// A word of the mask for each lane: for the 32 columns that the warp has at i = lane.
__device__ __forceinline__ uint32_t vote(const Span& e, RowKey key, float factor, int v0,
                                         int vocabulary, int target) {
    uint32_t own = 0;
    const uint32_t place0 = key.multiplier * static_cast<uint32_t>(e.column0) + key.offset;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
        const uint32_t place = place0 + key.multiplier * static_cast<uint32_t>(32 * i);
        const uint32_t word = __ballot_sync(kAllLanes, may_be_below(place, e.z[i], factor));
        if (lane_id() == i) own = word;
    }
    // Lanes past the words have no word, and their columns may not fit an int.
    const int first = v0 + 32 * min(lane_id(), kLaneColumns);
    return trim_word(own, first, vocabulary, target);
}

// What a lane knows, and its sums. The maximum is that of the warp. Sums are over the lane's own
// columns; those of z are relative to the anchor, which is the target's z if that is finite.
template <bool Emit>
struct RowState {
    int target;
    float anchor = 0, bound = 0;  // bound: a lower bound of lse, with Emit
    RowKey key{1, 0};
    Part seen{-infinity(), 0, 0, 0};
    float earlier = -infinity();  // the largest z before the target

    // The factor of e before it is compared with its draw. What the warp has seen also bounds the
    // final lse, so that no entry has to wait for that.
    __device__ __forceinline__ float factor(float reference) const {
        const float sum = __logf(sum_lanes<32>(seen.total));
        return overrated(reference, fmaxf(finite_or(seen.maximum, 0.0f) + sum, bound));
    }

    // Adds a span of z, which becomes e; returns the span's words of the mask.
    __device__ __forceinline__ uint32_t add(Span& span, int v0, int vocabulary, bool smoothing,
                                            float overrating, Shared<float> own_logit) {
        float peak = seen.maximum;
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) peak = fmaxf(peak, span.z[i]);
        peak = max_lanes<32>(peak);
        const float reference = finite_or(peak, 0.0f), fall = seen.maximum - reference;
        const float may = Emit ? factor(reference) * overrating : 0.0f;
        float total = 0, moment = 0;
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
            const float z = span.z[i], difference = z - reference;
            if (span.column(i) == target) own_logit.store(0, z);
            if (span.column(i) < target) earlier = fmaxf(earlier, z);
            if (smoothing && span.known(i)) seen.shifted += z - anchor;
            const float e = normal_exp(difference);
            total += e;
            moment = fmaf(e, fmaxf(difference, -1e30f), moment);  // avoids 0 * -inf
            span.z[i] = e;
        }
        const float scale = normal_exp(fall), step = seen.total > 0 ? seen.total * fall : 0.0f;
        seen.moment = fmaf(scale, seen.moment + step, moment);
        seen.total = fmaf(scale, seen.total, total);
        seen.maximum = peak;
        return Emit ? vote(span, key, may, v0, vocabulary, target) : 0;
    }
};

// The online softmax of a row: losses, statistics, and with Emit the bits of possible entries.
constexpr uint32_t kSoftmaxBytes = 4 * (2 * kPartNumbers + kWarps + 1);
template <bool Emit>
__global__ void __launch_bounds__(kThreads)
    softmax_rows_kernel(BufferRows in, LossKind kind, RowDraws draws, RowOutputs out) {
    const int64_t row = in.position();
    if (row < 0) return;
    const Shared<float> room(0, kPartNumbers), popular_room(4 * kPartNumbers, kPartNumbers);
    const Shared<float> before(8 * kPartNumbers, kWarps);
    const Shared<float> own_logit(8 * kPartNumbers + 4 * kWarps, 1);
    // NaN for an unchecked target outside of the vocabulary.
    if (threadIdx.x == 0) own_logit.store(0, __uint_as_float(0x7FFFFFFF));
    __syncthreads();

    RowState<Emit> state{in.label(row)};
    if (Emit || kind.label_smoothing > 0) {
        const float own = in.logit(max(state.target, 0));
        state.anchor = fabsf(own) < infinity() ? own : 0.0f;
        if constexpr (Emit) {
            state.bound = lower_bound(in, own, draws.popular, popular_room);
            state.key = row_key(static_cast<uint64_t>(draws.seed.load<Cache::kReadOnly>(0)),
                                static_cast<uint64_t>(row));
        }
    }
    const int words = (in.vocabulary - 1) / 32 + 1;
    for_spans(in.vocabulary, [&](int v0) {
        Span span = load_span(in, v0);
        const uint32_t word = state.add(span, v0, in.vocabulary, kind.label_smoothing > 0,
                                        draws.overrating, own_logit);
        const int at = v0 / 32 + lane_id();
        if (Emit && lane_id() < kLaneColumns && at < words) {
            draws.mask.store(int64_t{blockIdx.x} * words + at, word);
        }
    });

    float earlier = max_lanes<32>(state.earlier);
    if (lane_id() == 0) before.store(warp_id(), earlier);
    const Part whole = join_parts(state.seen, room);
    if (threadIdx.x != 0) return;
    for (int w = 0; w < kWarps; ++w) earlier = fmaxf(earlier, before.load(w));
    const float own = own_logit.load(0);
    const float mean = whole.shifted / static_cast<float>(in.vocabulary) +
                       (state.anchor - finite_or(whole.maximum, 0.0f));
    store_row(out, row, whole, own, earlier < own, mean, kind);
}

// The sums of the certificate over the columns of a row.
constexpr uint32_t kTwoSumsBytes = 4 * 2 * kWarps;
__global__ void __launch_bounds__(kThreads)
    certificate_rows_kernel(BufferRows in, Global<const float> lse, Global<const float> norms,
                            float eps, Global<float> variance, Global<float> hidden_variance) {
    const int64_t row = in.position();
    if (row < 0) return;
    const int target = in.label(row);
    const float of_row = lse.load<Cache::kReadOnly>(row);
    float plain = 0, normed = 0;
    for_spans(in.vocabulary, [&](int v0) {
        const Span span = load_span(in, v0);
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
            if (!span.known(i) || span.column(i) == target) continue;
            const float term = variance_term(span.z[i], of_row, eps, in.transform);
            plain += term;
            if (norms) {
                normed = fmaf(term, norms.load<Cache::kReadOnly>(span.column(i)), normed);
            }
        }
    });
    plain = sum_warps(sum_lanes<32>(plain), Shared<float>(0, kWarps));
    if (norms) normed = sum_warps(sum_lanes<32>(normed), Shared<float>(4 * kWarps, kWarps));
    if (threadIdx.x != 0) return;
    if (variance) variance.store(row, plain);
    if (norms) hidden_variance.store(row, normed);
}

// Clears the bits that the final lse does not keep, and counts the others. A thread owns a word,
// in which few bits are set.
constexpr uint32_t kCountsBytes = 4 * kWarps;
__global__ void __launch_bounds__(kThreads)
    thin_rows_kernel(BufferRows in, RowValues known, Sampled sample, Global<uint32_t> mask,
                     Global<int64_t> counts) {
    const int64_t row = in.position();
    if (row < 0) return;
    const RowEntries entries = row_entries(known, sample, row, in.label(row));
    const int words = (in.vocabulary - 1) / 32 + 1;
    const auto bits = mask + int64_t{blockIdx.x} * words;
    int found = 0;
    for (int w = static_cast<int>(threadIdx.x); w < words; w += kThreads) {
        const uint32_t candidates = bits.load(w);
        uint32_t kept = 0;
        for (uint32_t left = candidates; left != 0; left &= left - 1) {
            const int bit = __ffs(static_cast<int>(left)) - 1, column = 32 * w + bit;
            if (entries.dz(in.logit(column), column) != 0) kept |= 1u << bit;
        }
        if (kept != candidates) bits.store(w, kept);
        found += __popc(kept);
    }
    found = sum_warps(__reduce_add_sync(kAllLanes, found), Shared<int>(0, kWarps));
    if (threadIdx.x == 0) counts.store(row, found);
}

// Lists the columns and values of the set bits of a row, ascending, or none if the row does not
// fit. Warps own equal parts of the words, in order.
__global__ void __launch_bounds__(kThreads)
    list_rows_kernel(BufferRows in, RowValues known, Sampled sample, Global<const uint32_t> mask,
                     Global<const int64_t> offsets, Global<int32_t> columns, Global<float> values,
                     int64_t capacity) {
    const int64_t row = in.position();
    if (row < 0) return;
    const int64_t begin = offsets.load<Cache::kReadOnly>(row);
    const int64_t end = offsets.load<Cache::kReadOnly>(row + 1);
    if (begin == end || end > capacity) return;
    const RowEntries entries = row_entries(known, sample, row, in.label(row));
    const int words = (in.vocabulary - 1) / 32 + 1, each = (words - 1) / kWarps + 1;
    const auto own = mask + int64_t{blockIdx.x} * words;
    const RowBits bits{own, warp_id() * each, min((warp_id() + 1) * each, words)};
    const int earlier = sum_warps(bits.count(), Shared<int>(0, kWarps), warp_id());
    bits.list(begin + earlier, [&](int64_t to, int column) {
        const float z = in.logit(column);
        columns.store(to, column);
        values.store(to, entries.dz(z, column) * in.transform.slope(z));
    });
}

// grad * dy overwrites the logits: a row of dy begins where its logits do. A narrow dy may
// overwrite logits of this round's spans or of earlier ones, so every thread first reads its own.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gradient_rows_kernel(BufferRows in, RowValues known, LossKind kind, Global<T> dy,
                         int64_t stride_dy) {
    const int64_t row = in.position();
    if (row < 0) return;
    const int target = in.label(row);
    const Factors f = factors_of(known, kind, false, row, static_cast<float>(in.vocabulary));
    const auto to = dy + blockIdx.x * stride_dy;
    for (int left = in.vocabulary; left > 0; left -= kWarps * kSpan) {
        const bool mine = left > warp_id() * kSpan;
        Span span;
        if (mine) span = load_span(in, in.vocabulary - left + warp_id() * kSpan);
        __syncthreads();
        if (!mine) continue;
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
            if (!span.known(i)) continue;
            float dz = fmaf(normal_exp(span.z[i] - f.lse), f.probability, -f.even);
            if (span.column(i) == target) dz = f.own;
            const float slope = in.transform.slope(span.z[i]);
            to.store(span.column(i), from_float<T>(dz * slope * f.upstream));
        }
    }
}

static BufferRows rows_of(const LogitRows& rows) {
    return {rows.logits,
            rows.stride,
            rows.bias,
            rows.target,
            rows.order,
            rows.row_count,
            rows.first_row,
            static_cast<int>(rows.vocabulary),
            transform_of(rows.softcap, rows.temperature)};
}

void softmax_rows(const LogitRows& rows, LossKind kind, const RowCandidates& candidates,
                  const RowResults& results, void* stream) {
    const auto kernel =
        candidates.mask == nullptr ? softmax_rows_kernel<false> : softmax_rows_kernel<true>;
    const RowDraws draws{candidates.seed,
                         {candidates.popular, candidates.popular_count},
                         0x1p16f / candidates.eps,
                         candidates.mask};
    launch(kernel, {"softmax_rows", blocks_of(rows.count, 1), kThreads, kSoftmaxBytes, stream},
           rows_of(rows), kind, draws, outputs_of(results));
}

void certificate_rows(const LogitRows& rows, const Certified& known, float* variance,
                      float* hidden_variance, void* stream) {
    launch(certificate_rows_kernel,
           {"certificate_rows", blocks_of(rows.count, 1), kThreads, kTwoSumsBytes, stream},
           rows_of(rows), known.lse, known.norms, known.eps, variance, hidden_variance);
}

void thin_rows(const LogitRows& rows, const KnownRows& known, const Sample& sample, uint32_t* mask,
               int64_t* counts, void* stream) {
    launch(thin_rows_kernel,
           {"thin_rows", blocks_of(rows.count, 1), kThreads, kCountsBytes, stream}, rows_of(rows),
           values_of(known), Sampled{sample.seed, sample.eps}, mask, counts);
}

void list_rows(const LogitRows& rows, const KnownRows& known, const Sample& sample,
               const uint32_t* mask, const Lists& lists, void* stream) {
    launch(list_rows_kernel,
           {"list_rows", blocks_of(rows.count, 1), kThreads, kCountsBytes, stream}, rows_of(rows),
           values_of(known), Sampled{sample.seed, sample.eps}, mask, lists.offsets, lists.columns,
           lists.values, lists.capacity);
}

void gradient_rows(const LogitRows& rows, const KnownRows& known, LossKind kind, Type type,
                   void* dy, int64_t stride_dy, void* stream) {
    with_operands(type, [&](auto zero) {
        using T = decltype(zero);
        launch(gradient_rows_kernel<T>,
               {"gradient_rows", blocks_of(rows.count, 1), kThreads, 0, stream}, rows_of(rows),
               values_of(known), kind, static_cast<T*>(dy), stride_dy);
    });
}

}  // namespace bft::cuda
