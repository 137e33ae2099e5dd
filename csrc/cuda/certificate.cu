// The error certificate of the sampled gradient, in a pass of its own once lse is known.
#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"
#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

// Planes of [SPLITS, R] float32 that the splits write.
enum CertificateSum { kPlain, kNormed };

// A thread's rows: their known values, and the thread's own sums.
template <typename T>
struct CertifiedRows {
    static constexpr int kRows = Entries<T>::kRows;
    float lse[kRows], plain[kRows], normed[kRows];
    int target[kRows];  // -1 for one that is not in the vocabulary
};

// Adds the terms of a tile.
template <typename T>
__device__ __forceinline__ void add_terms(Entries<T>& z, CertifiedRows<T>& rows,
                                          const Transform& transform, float eps,
                                          Global<const float> norms, int v0, int vocabulary) {
    const int left = vocabulary - v0 - z.column0();
#pragma unroll
    for (int j = 0; j < z.kColumns; ++j) {
        const bool known = z.step(j) < left;
        float norm = 0;
        if (norms && known) {
            const auto at = norms + (v0 + z.column0());
            norm = at.template load<Cache::kReadOnly>(z.step(j));
        }
#pragma unroll
        for (int i = 0; i < z.kRows; ++i) {
            float term = variance_term(z.at(i, j), rows.lse[i], eps, transform);
            if (!known || v0 + z.column0() + z.step(j) == rows.target[i]) term = 0;
            rows.plain[i] += term;
            rows.normed[i] = fmaf(term, norm, rows.normed[i]);
        }
    }
}

// Joins the threads' sums to those of the block's rows, through the stages' memory: first the lanes
// that share a row, then the warps that do, in the order of their columns.
template <typename T>
__device__ __forceinline__ void store_terms(const CertifiedRows<T>& rows, bool normed,
                                            Global<float> sums, int64_t plane, int there) {
    constexpr int kLanes = Entries<T>::kLanes;
    const Shared<float> parts(0, kWarpColumns * 2 * kTileN);
    cp_async_wait<0>();
    __syncthreads();  // every warp has read the last stage
#pragma unroll
    for (int i = 0; i < rows.kRows; ++i) {
        const float plain = sum_lanes<kLanes>(rows.plain[i]);
        const float with_norms = sum_lanes<kLanes>(rows.normed[i]);
        if (lane_id() % kLanes == 0) {
            const auto at = parts + (warp_column() / kWarpV * 2 * kTileN + Entries<T>::row(i));
            at.store(kPlain * kTileN, plain);
            at.store(kNormed * kTileN, with_norms);
        }
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x) % kTileN;
    const int which = static_cast<int>(threadIdx.x) / kTileN;
    if (row >= there || (which == kNormed && !normed)) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarpColumns; ++w) sum += parts.load((w * 2 + which) * kTileN + row);
    sums.store(which * plane + row, sum);
}
static_assert(kThreads == 2 * kTileN);

// Sums of p (eps - p)^+ slope^2 over a split of the vocabulary without the target, for a block of
// rows; with norms also the sums of these terms times |W_v|^2.
//
// A block owns kTileN of the rows that take part and the tiles of one split; tile.cuh says what
// warps, threads and stages own. lse, target and sums of a thread's rows, over its own columns,
// stay in its registers from tile to tile. All lanes that share a column read its norm at once.
// Sums are joined at the end, where each of the two planes has a thread for each row: they lie side
// by side, without bank conflicts.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(kThreads, 1)
    certificate_kernel(Operands<T> in, WorkGrid grid, float eps, Global<const float> lse,
                       Global<const float> norms, Global<float> sums) {
    const auto [row_block, first, there, split, tile0, tile1] = work_of(in, grid);
    if (there == 0) return;

    CertifiedRows<T> rows;
#pragma unroll
    for (int i = 0; i < rows.kRows; ++i) {
        const int row = Entries<T>::row(i);
        rows.plain[i] = rows.normed[i] = rows.lse[i] = 0;
        rows.target[i] = -1;
        if (row >= there) continue;
        const int64_t position = in.order.template load<Cache::kReadOnly>(first + row);
        const int64_t label = in.target.template load<Cache::kReadOnly>(position);
        if (label >= 0 && label < in.vocabulary) rows.target[i] = static_cast<int>(label);
        rows.lse[i] = lse.load<Cache::kReadOnly>(position);
    }

    TileLoader<T, Aligned> loader(in, first, there);
    loader.start(in, tile0, tile1);
    for (int tile = tile0; tile < tile1; ++tile) {
        Entries<T> z = next_products(in, loader);
        to_logits(z, in, tile * kTileV);
        add_terms(z, rows, in.transform, eps, norms, tile * kTileV, in.vocabulary);
    }
    const int64_t count = grid.range.count;
    store_terms(rows, static_cast<bool>(norms), sums + (split * count + row_block * kTileN),
                grid.splits * count, there);
}

// Adds up the splits of each row, in order. A thread owns a row; the rows of a warp are neighbours
// in the sums. No shared memory.
__global__ void __launch_bounds__(kThreads)
    add_splits_kernel(RowRange range, int splits, Global<const float> sums,
                      Global<const int64_t> order, Global<const int64_t> row_count,
                      Global<float> variance, Global<float> hidden_variance) {
    const int64_t local = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (local >= range.count || range.first + local >= row_count.load(0)) return;
    const int64_t row = order.load(range.first + local);
    const auto total = [&](CertificateSum which) {
        float sum = 0;
        for (int split = 0; split < splits; ++split) {
            sum += sums.load((int64_t{which} * splits + split) * range.count + local);
        }
        return sum;
    };
    variance.store(row, total(kPlain));
    if (hidden_variance) hidden_variance.store(row, total(kNormed));
}

// |W_v|^2 of each row of weight. A warp owns a row, and its lanes own neighbouring pieces of 16
// bytes, or elements if rows do not start at multiples of 16 bytes. No shared memory.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    squared_norms_kernel(Operands<T> in, Global<float> norms) {
    constexpr int kSize = Aligned ? 16 / static_cast<int>(sizeof(T)) : 1;
    const int64_t v = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    if (v >= in.vocabulary) return;
    const auto row = in.weight + v * in.stride_wv;
    const int whole = in.depth / kSize * kSize;
    float sum = 0;
    const auto add = [&](T element) { sum = fmaf(to_float(element), to_float(element), sum); };
    if constexpr (Aligned) {
        for (int d = lane_id() * kSize; d < whole; d += 32 * kSize) {
            const auto piece = row.template load_vector<kSize, Cache::kReadOnly>(d);
#pragma unroll
            for (int i = 0; i < kSize; ++i) add(piece.at[i]);
        }
    }
    for (int d = (Aligned ? whole : 0) + lane_id(); d < in.depth; d += 32) {
        add(row.template load<Cache::kReadOnly>(d));
    }
    sum = sum_lanes<32>(sum);
    if (lane_id() == 0) norms.store(v, sum);
}

void certificate(const Problem& problem, RowRange range, Splits splits, const Certified& known,
                 float* sums, float* variance, float* hidden_variance, void* stream) {
    const WorkGrid grid{range, splits.count, splits.columns / kTileV};
    const unsigned blocks = blocks_of(range.count, kTileN) * splits.count;
    with_type(problem, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        launch(certificate_kernel<T, decltype(aligned)::value>,
               {"certificate", blocks, kThreads, kStagesBytes, stream}, operands_of<T>(problem),
               grid, known.eps, known.lse, known.norms, sums);
    });
    const unsigned row_blocks = blocks_of(range.count, kThreads);
    launch(add_splits_kernel, {"add_splits", row_blocks, kThreads, 0, stream}, range, splits.count,
           sums, problem.order, problem.row_count, variance, hidden_variance);
}

void squared_norms(const Problem& problem, float* norms, void* stream) {
    const unsigned blocks = blocks_of(problem.vocabulary, kWarps);
    with_type(problem, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        launch(squared_norms_kernel<T, decltype(aligned)::value>,
               {"squared_norms", blocks, kThreads, 0, stream}, operands_of<T>(problem), norms);
    });
}

}  // namespace bft::cuda
