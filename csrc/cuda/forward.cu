// The tiled forward: logits stay in registers; only a few sums for each row leave them.
#include <algorithm>

#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"
#include "csrc/cuda/softmax.cuh"
#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

// Sums that a split writes for each row, planes of [SPLITS, R] float32.
enum Sum {
    kMaximum,  // of z
    kTotal,    // e = exp(z - maximum)
    kMoment,   // e * (z - maximum), for the entropy
    kShifted,  // z - maximum, for label smoothing; minus infinity counts as a maximum of 0
    kTarget,   // the target's z, in the split that has it; undefined elsewhere
    kBefore,   // the largest z before the target's column, in that split too
};

// One launch: all splits of a part of the rows.
struct Pass {
    WorkGrid grid;
    bool statistics, smoothing;
    float overrating;  // 2^16 / eps
};

// What the block knows of its rows, and what it finds beside the sums; in memory after the stages.
struct RowNotes {
    Shared<int> target{kStagesBytes, kTileN};  // -1 for one that is not in the vocabulary
    Shared<uint32_t> multiplier{kStagesBytes + 4 * kTileN, kTileN};  // of the draws
    Shared<uint32_t> offset{kStagesBytes + 8 * kTileN, kTileN};
    Shared<float> lse_bound{kStagesBytes + 12 * kTileN, kTileN};
    Shared<float> before{kStagesBytes + 16 * kTileN, kWarpColumns * kTileN};
};
constexpr uint32_t kForwardShared = kStagesBytes + 16 * kTileN + 4 * kWarpColumns * kTileN;

// Running sums of a thread's rows. The maximum is that of the warp, the same in all lanes that
// share the row; the others are over the thread's own columns. Total and moment are of powers of 2
// relative to base(): one multiply-add gives the power, and its product is not rounded.
template <typename T>
struct Running {
    static constexpr int kRows = Entries<T>::kRows;
    float maximum[kRows], total[kRows], moment[kRows], shifted[kRows];
    int columns;  // that the thread has seen

    __device__ __forceinline__ static float base(float maximum) {
        return finite_or(maximum, 0.0f) * kLog2E;
    }
};

// Finds the target's z, and the largest z before it, for rows whose target lies in this tile.
template <typename T>
__device__ __forceinline__ void find_targets(Entries<T>& z, const Running<T>& state,
                                             const RowNotes& notes, int v0, Global<float> own) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < z.kRows; ++i) {
        any |= static_cast<unsigned>(notes.target.load(z.row(i)) - v0) < kTileV;
    }
    if (!__any_sync(kAllLanes, any)) return;  // one tile in many has one
#pragma unroll
    for (int i = 0; i < z.kRows; ++i) {
        const int at = notes.target.load(z.row(i)) - v0;
        const bool here = static_cast<unsigned>(at) < kTileV;
        const int distance = at - z.column0();
        float largest = -infinity(), found = 0;
        bool mine = false;
#pragma unroll
        for (int j = 0; j < z.kColumns; ++j) {
            if (z.step(j) < distance) largest = fmaxf(largest, z.at(i, j));
            if (z.step(j) == distance) mine = here, found = z.at(i, j);
        }
        if (mine) own.store(z.row(i), found);
        largest = fmaxf(max_lanes<Entries<T>::kLanes>(largest), state.maximum[i]);
        if (here && lane_id() % z.kLanes == 0) {
            notes.before.store(warp_column() / kWarpV * kTileN + z.row(i), largest);
        }
    }
}

// Where the block's bits go.
struct Bits {
    Global<uint32_t> words;  // [rows, row_words]
    int64_t row_words;
    int rows;
};

// One bit for each e of a row: a word has 32 columns, gathered from the lanes that share the row.
template <typename T>
__device__ __forceinline__ void store_bits(Entries<T>& e, int i, float factor,
                                           const RowNotes& notes, int v0, int vocabulary,
                                           const Bits& out) {
    constexpr int kColumns = Entries<T>::kColumns, kWords = kWarpV / 32;
    RowKey key{notes.multiplier.load(e.row(i)), notes.offset.load(e.row(i))};
    // The offset of the thread's first column: the place of a draw is then multiplier * step plus
    // this offset, modulo 2^32.
    key.offset += key.multiplier * static_cast<uint32_t>(v0 + e.column0());
    const int target = notes.target.load(e.row(i));
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
        uint32_t word = 0;
#pragma unroll
        for (int j = w * (kColumns / kWords); j < (w + 1) * (kColumns / kWords); ++j) {
            const uint32_t place = key.multiplier * static_cast<uint32_t>(e.step(j)) + key.offset;
            if (may_be_below(place, e.at(i, j), factor)) word |= 1u << e.step(j) % 32;
        }
        word = join_lanes<Entries<T>::kLanes>(word << e.column0() % 32);
        const int first = v0 + warp_column() + w * 32;
        word = trim_word(word, first, vocabulary, target);
        if (lane_id() % e.kLanes == w && first < vocabulary && e.row(i) < out.rows) {
            out.words.store(e.row(i) * out.row_words + first / 32, word);
        }
    }
}

// Adds a tile of z, which becomes e, to the sums; with Emit it writes the bits.
template <typename T, bool Emit>
__device__ __forceinline__ void add_tile(Entries<T>& z, Running<T>& state, const Pass& pass,
                                         const RowNotes& notes, int v0, int vocabulary,
                                         const Bits& out) {
    constexpr int kColumns = Entries<T>::kColumns, kLanes = Entries<T>::kLanes;
    const int left = vocabulary - v0 - z.column0();
#pragma unroll
    for (int i = 0; i < z.kRows; ++i) {
        const float before = state.maximum[i];
        float peak = before;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) peak = fmaxf(peak, z.at(i, j));
        peak = max_lanes<kLanes>(peak);
        // Avoids exp(-inf - (-inf)) while nothing finite came.
        const float reference = finite_or(peak, 0.0f);
        const float base = state.base(peak), fall = state.base(before) - base;
        if (pass.smoothing) {
            float shifted = state.columns > 0 ? (before - reference) * state.columns : 0.0f;
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                if (z.step(j) < left) shifted += z.at(i, j) - reference;
            }
            state.shifted[i] += shifted;
        }
        // The sum before this tile bounds the final lse from below, so that p is overrated. The
        // tile's own sum is left out, so that no entry has to wait for it.
        float factor = 0;
        if constexpr (Emit) {
            const float earlier = __logf(sum_lanes<kLanes>(state.total[i]));
            const float bound =
                fmaxf(finite_or(before, 0.0f) + earlier, notes.lse_bound.load(z.row(i)));
            factor = overrated(reference, bound) * pass.overrating;
        }
        // 0 while nothing came, whatever the fall from 0 is.
        const float scale = before == -infinity() ? 0.0f : exp2_approx(fall);
        float total = 0, moment = 0;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const float power = fmaf(z.at(i, j), kLog2E, -base);
            const float e = exp2_approx(power);
            total += e;
            moment = fmaf(e, fmaxf(power, -1e30f), moment);  // avoids 0 * -inf
            z.at(i, j) = e;
        }
        const float step = state.total[i] > 0 ? state.total[i] * fall : 0.0f;
        state.moment[i] = fmaf(scale, state.moment[i] + step, moment);
        state.total[i] = fmaf(scale, state.total[i], total);
        state.maximum[i] = peak;
        if constexpr (Emit) store_bits(z, i, factor, notes, v0, vocabulary, out);
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) state.columns += z.step(j) < left;
}

// How many columns the warps at warp_column() = offset have, in the tiles from v0 to v1.
__device__ __forceinline__ float columns_between(int v0, int v1, int vocabulary, int offset) {
    const int full = min(v1, vocabulary) - v0, rest = full % kTileV;
    return static_cast<float>(full / kTileV * kWarpV + min(max(rest - offset, 0), kWarpV));
}

// Joins the threads' sums to those of the block's rows, through the stages' memory: first the lanes
// that share a row, then the warps that do, in the order of their columns.
template <typename T>
__device__ __forceinline__ void store_sums(Running<T>& state, const Pass& pass,
                                           const RowNotes& notes, int v0, int v1, int vocabulary,
                                           Global<float> sums, int64_t plane, int there) {
    constexpr int kLanes = Entries<T>::kLanes;
    const Shared<float> parts(0, kWarpColumns * 4 * kTileN);
    cp_async_wait<0>();
    __syncthreads();  // every warp has read the last stage
#pragma unroll
    for (int i = 0; i < state.kRows; ++i) {
        const float total = sum_lanes<kLanes>(state.total[i]);
        const float moment = sum_lanes<kLanes>(state.moment[i]);
        const float shifted = sum_lanes<kLanes>(state.shifted[i]);
        // From powers of 2 relative to the base to powers of e relative to the maximum.
        const float reference = finite_or(state.maximum[i], 0.0f);
        const float rest = fmaf(reference, kLog2E, -state.base(state.maximum[i]));
        const float scale = exp2_approx(-rest);
        if (lane_id() % kLanes == 0) {
            const auto at = parts + (warp_column() / kWarpV * 4 * kTileN + Entries<T>::row(i));
            at.store(0, state.maximum[i]);
            at.store(kTileN, scale * total);
            at.store(2 * kTileN, scale * (moment - total * rest) * (1 / kLog2E));
            at.store(3 * kTileN, shifted);
        }
    }
    __syncthreads();
    const int row = threadIdx.x;
    if (row >= there) return;
    Part warps[kWarpColumns];
    float maximum = -infinity(), before = -infinity();
#pragma unroll
    for (int w = 0; w < kWarpColumns; ++w) {
        const auto at = parts + (w * 4 * kTileN + row);
        warps[w] = {at.load(0), at.load(kTileN), at.load(2 * kTileN), at.load(3 * kTileN)};
        maximum = fmaxf(maximum, warps[w].maximum);
        before = fmaxf(before, notes.before.load(w * kTileN + row));
    }
    Part whole = {maximum, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kWarpColumns; ++w) {
        const float columns = columns_between(v0, v1, vocabulary, w * kWarpV);
        scale_to(warps[w], finite_or(maximum, 0.0f), columns);
        whole.total += warps[w].total;
        whole.moment += warps[w].moment;
        if (columns > 0) whole.shifted += warps[w].shifted;
    }
    sums.store(kMaximum * plane + row, whole.maximum);
    sums.store(kTotal * plane + row, whole.total);
    if (pass.smoothing) sums.store(kShifted * plane + row, whole.shifted);
    if (pass.statistics) {
        sums.store(kMoment * plane + row, whole.moment);
        const int target = notes.target.load(row);
        if (target >= v0 && target < v1) sums.store(kBefore * plane + row, before);
    }
}

// The sums of z over a split of the vocabulary, for a block of rows; with Emit also the mask.
//
// A block owns kTileN of the rows that take part and the tiles of one split; tile.cuh says what
// warps and threads own. Statistics stay in a thread's registers from tile to tile. In each tile
// the lanes of a row share only the maximum: their sums, and those of the two warps of a row, are
// joined once, at the end. Beside the stages shared memory has what is known of each row
// (RowNotes): lanes that read it have rows of their own, or the same one, so there are no bank
// conflicts. A warp that finds a target stores its z at once; no two warps write the same word.
template <typename T, bool Aligned, bool Emit>
__global__ void __launch_bounds__(kThreads, 1)
    linear_nll_forward_kernel(Operands<T> in, Pass pass, Global<float> sums,
                              Global<const int64_t> seed, Global<const float> lse_bound,
                              Global<uint32_t> mask) {
    const auto [row_block, first, there, split, tile0, tile1] = work_of(in, pass.grid);
    if (there == 0) return;
    const int64_t local = row_block * kTileN;

    const RowNotes notes;
    if (threadIdx.x < kTileN) {
        const int row = threadIdx.x;
        int target = -1;
        RowKey key{1, 0};
        float least = 0;
        if (row < there) {
            const int64_t position = in.order.template load<Cache::kReadOnly>(first + row);
            const int64_t label = in.target.template load<Cache::kReadOnly>(position);
            if (label >= 0 && label < in.vocabulary) target = static_cast<int>(label);
            if constexpr (Emit) {
                const auto drawn = static_cast<uint64_t>(seed.load<Cache::kReadOnly>(0));
                key = row_key(drawn, static_cast<uint64_t>(position));
                least = lse_bound.load<Cache::kReadOnly>(position);
            }
        }
        notes.target.store(row, target);
        if constexpr (Emit) {
            notes.multiplier.store(row, key.multiplier);
            notes.offset.store(row, key.offset);
            notes.lse_bound.store(row, least);
        }
        for (int w = 0; w < kWarpColumns; ++w) notes.before.store(w * kTileN + row, -infinity());
    }

    const int64_t rows = pass.grid.range.count, plane = pass.grid.splits * rows;
    const Global<float> at = sums + (split * rows + local);
    Running<T> state;
    const int64_t row_words = (int64_t{in.vocabulary} + 31) / 32;
    const Bits bits{mask + local * row_words, row_words, there};
#pragma unroll
    for (int i = 0; i < state.kRows; ++i) {
        state.maximum[i] = -infinity();
        state.total[i] = state.moment[i] = state.shifted[i] = 0;
    }
    state.columns = 0;

    TileLoader<T, Aligned> loader(in, first, there);
    loader.start(in, tile0, tile1);
    for (int tile = tile0; tile < tile1; ++tile) {
        const int v0 = tile * kTileV;
        Entries<T> z = next_products(in, loader);
        to_logits(z, in, v0);
        find_targets(z, state, notes, v0, at + kTarget * plane);
        add_tile<T, Emit>(z, state, pass, notes, v0, in.vocabulary, bits);
    }
    store_sums(state, pass, notes, tile0 * kTileV, tile1 * kTileV, in.vocabulary, at, plane, there);
}

struct Combine {
    RowRange range;
    int splits, split_columns, vocabulary;
    LossKind kind;
};

// Joins the splits of each row, in order, and stores the row's results. A thread owns a row; the
// rows of a warp are neighbours in every plane of the sums. No shared memory.
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Combine pass, Global<const float> sums, Global<const int64_t> target,
                   Global<const int64_t> order, Global<const int64_t> row_count, RowOutputs out) {
    const int64_t local = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (local >= pass.range.count || pass.range.first + local >= row_count.load(0)) return;
    const int64_t row = order.load(pass.range.first + local), label = target.load(row);
    const int64_t plane = pass.splits * pass.range.count;
    const Global<const float> at = sums + local;

    const bool known = label >= 0 && label < pass.vocabulary;
    const int holder = known ? static_cast<int>(label / pass.split_columns) : 0;
    const auto of_holder = at + holder * pass.range.count;
    // NaN for an unchecked target outside of the vocabulary.
    const float own = known ? of_holder.load(kTarget * plane) : __uint_as_float(0x7FFFFFFF);

    float maximum = -infinity(), earlier = -infinity();
    for (int split = 0; split < pass.splits; ++split) {
        const float peak = at.load(kMaximum * plane + split * pass.range.count);
        maximum = fmaxf(maximum, peak);
        // Columns before the target's must hold less; later ones may equal it.
        if (split < holder) earlier = fmaxf(earlier, peak);
    }
    const float reference = finite_or(maximum, 0.0f);
    Part whole = {maximum, 0, 0, 0};
    for (int split = 0; split < pass.splits; ++split) {
        const auto here = at + split * pass.range.count;
        Part part = {here.load(kMaximum * plane), here.load(kTotal * plane), 0, 0};
        if (out.entropy) part.moment = here.load(kMoment * plane);
        if (pass.kind.label_smoothing > 0) part.shifted = here.load(kShifted * plane);
        const int left = pass.vocabulary - split * pass.split_columns;
        scale_to(part, reference, static_cast<float>(min(left, pass.split_columns)));
        whole.total += part.total;
        whole.moment += part.moment;
        whole.shifted += part.shifted;
    }

    const bool first =
        out.entropy && known && of_holder.load(kBefore * plane) < own && earlier < own;
    const float mean = whole.shifted / static_cast<float>(pass.vocabulary);
    store_row(out, row, whole, own, first, mean, pass.kind);
}

// A lower bound of each row's lse: its target's logit, minus the largest rounding error. It keeps
// out the other entries of a confident token before a block arrives at the target.
//
// A warp owns a row, and its lanes own neighbouring elements. No shared memory.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    target_bound_kernel(Operands<T> in, Global<float> lse_bound) {
    const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (at >= in.row_count.load(0)) return;
    const int64_t row = in.order.load(at);
    const int64_t label =
        min(max(in.target.load(row), int64_t{0}), static_cast<int64_t>(in.vocabulary - 1));
    const auto hidden = in.hidden + row * in.stride_hn, weight = in.weight + label * in.stride_wv;
    float total = 0, size = 0;
    for (int d = lane_id(); d < in.depth; d += 32) {
        const float product = to_float(hidden.load(d)) * to_float(weight.load(d));
        total += product;
        size += fabsf(product);
    }
    total = sum_lanes<32>(total), size = sum_lanes<32>(size);
    if (lane_id() != 0) return;
    const float bias = in.bias ? in.bias.load(label) : 0.0f;
    const Transform& transform = in.transform;
    float z = total - kRounding * (size + fabsf(bias)) + bias;
    if (transform.softcap > 0) z = transform.cap(z) - kRounding * transform.softcap;
    z *= transform.inverse_temperature;
    lse_bound.store(row, z - kRounding * fabsf(z));
}

// A launch has at least so many waves of blocks, so that the last one leaves few processors idle.
constexpr int64_t kWaves = 4;

Splits splits_for(int64_t rows, int64_t vocabulary, int processors) {
    const int64_t row_blocks = std::max<int64_t>(1, ceil_div(rows, kTileN));
    const int64_t tiles = ceil_div(vocabulary, kTileV);
    const int64_t wanted = std::clamp<int64_t>(ceil_div(kWaves * processors, row_blocks), 1, tiles);
    const int64_t each = ceil_div(tiles, wanted);
    return {static_cast<int>(ceil_div(tiles, each)), static_cast<int>(each * kTileV)};
}

void linear_nll_forward(const Problem& problem, RowRange range, Splits splits, float* sums,
                        const Candidates& candidates, LossKind kind, const RowResults& results,
                        void* stream) {
    const Pass pass{{range, splits.count, splits.columns / kTileV},
                    results.entropy != nullptr,
                    kind.label_smoothing > 0,
                    0x1p16f / candidates.eps};
    const unsigned blocks = blocks_of(range.count, kTileN) * splits.count;
    with_type(problem, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        constexpr bool kAligned = decltype(aligned)::value;
        launch(candidates.mask ? linear_nll_forward_kernel<T, kAligned, true>
                               : linear_nll_forward_kernel<T, kAligned, false>,
               {"linear_nll_forward", blocks, kThreads, kForwardShared, stream},
               operands_of<T>(problem), pass, sums, candidates.seed, candidates.lse_bound,
               candidates.mask);
    });
    const Combine combine{range, splits.count, splits.columns, static_cast<int>(problem.vocabulary),
                          kind};
    const unsigned row_blocks = blocks_of(range.count, kThreads);
    launch(combine_kernel, {"combine", row_blocks, kThreads, 0, stream}, combine, sums,
           problem.target, problem.order, problem.row_count, outputs_of(results));
}

void target_bound(const Problem& problem, float* lse_bound, void* stream) {
    const unsigned blocks = blocks_of(problem.rows, kWarps);
    with_type(problem, [&](auto zero, auto) {
        using T = decltype(zero);
        launch(target_bound_kernel<T>, {"target_bound", blocks, kThreads, 0, stream},
               operands_of<T>(problem), lse_bound);
    });
}

}  // namespace bft::cuda
