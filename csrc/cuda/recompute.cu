// The backward from recomputed logits: dy of a block of the vocabulary, then two products. Each
// element of each result is written by one thread: no locks, no atomics, and two runs give the
// same bits.
#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"
#include "csrc/cuda/products.cuh"
#include "csrc/cuda/softmax.cuh"

namespace bft::cuda {

// upstream * dy of a tile [128 rows, 128 columns] of a block, exact or sampled, 0 past the block's
// columns; and the tile's sums over its rows.
//
// Blocks, warps, threads and shared memory are as in the forward, with one tile a block. The lanes
// that share a column join its sums, then the warps do through the stages' memory, 128 floats side
// by side for each.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(kThreads, 1)
    logit_gradient_kernel(Operands<T> in, RowValues known, GradientKind kind, int first_column,
                          int vocabulary, WorkGrid grid, Global<const int64_t> seed, Global<T> dy,
                          int64_t stride, Global<float> bias_sums) {
    const auto [row_block, first, there, tile, tile0, tile1] = work_of(in, grid);
    if (there == 0) return;

    TileLoader<T, Aligned> loader(in, first, there);
    loader.start(in, tile, tile + 1);
    Entries<T> z = next_products(in, loader);
    const int v0 = tile * kTileV, left = in.vocabulary - v0 - z.column0();
    to_logits(z, in, v0);
#pragma unroll
    for (int i = 0; i < z.kRows; ++i) {
        const bool known_row = z.row(i) < there;
        const int64_t row =
            in.order.template load<Cache::kReadOnly>(first + (known_row ? z.row(i) : 0));
        const Factors f = factors_of(known, kind.loss, static_cast<bool>(seed), row,
                                     static_cast<float>(vocabulary));
        const int64_t at = in.target.template load<Cache::kReadOnly>(row) - first_column - v0;
        const int target = at >= 0 && at < kTileV ? static_cast<int>(at) - z.column0() : -kTileV;
        const auto key = seed ? row_key(static_cast<uint64_t>(seed.load(0)), row) : RowKey{1, 0};
        const auto column0 = static_cast<uint32_t>(first_column + v0 + z.column0());
#pragma unroll
        for (int j = 0; j < z.kColumns; ++j) {
            float p = normal_exp(z.at(i, j) - f.lse), dz;
            if (seed) {
                const float u = draw<float>(key, column0 + static_cast<uint32_t>(z.step(j)));
                dz = sampled_dz(p, u, kind.eps);
            } else {
                dz = fmaf(p, f.probability, -f.even);
            }
            if (z.step(j) == target) dz = f.own;
            const float slope = in.transform.slope(z.at(i, j));
            z.at(i, j) = known_row && z.step(j) < left ? dz * slope * f.upstream : 0.0f;
        }
        const auto to = dy + ((first + z.row(i)) * stride + v0 + z.column0());
        if (!known_row) continue;
        if constexpr (sizeof(T) == 2) {
#pragma unroll
            for (int j = 0; j < z.kColumns; j += 2) {
                const uint32_t both = pack<T>(z.at(i, j), z.at(i, j + 1));
                to.store_vector(z.step(j), bits_as<Vector<T, 2>>(both));
            }
        } else {
#pragma unroll
            for (int j = 0; j < z.kColumns; ++j) to.store(z.step(j), z.at(i, j));
        }
    }
    if (!bias_sums) return;
    constexpr int kWarpRows = kTileN / kWarpN;
    const Shared<float> parts(0, kWarpRows * kTileV);
    cp_async_wait<0>();
    __syncthreads();  // every warp has read the last stage
#pragma unroll
    for (int j = 0; j < z.kColumns; ++j) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < z.kRows; ++i) sum += z.at(i, j);
#pragma unroll
        for (int step = z.kLanes; step < 32; step *= 2) {
            sum += __shfl_xor_sync(kAllLanes, sum, step);
        }
        if (lane_id() < z.kLanes) {
            parts.store(warp_row() / kWarpN * kTileV + z.column0() + z.step(j), sum);
        }
    }
    __syncthreads();
    const int column = threadIdx.x;
    if (column >= kTileV) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarpRows; ++w) sum += parts.load(w * kTileV + column);
    bias_sums.store(row_block * stride + v0 + column, sum);
}

// Adds the sums of the row blocks, in order, to db. A thread owns a column; neighbours read
// neighbouring addresses. No shared memory.
__global__ void __launch_bounds__(kThreads, 1)
    bias_gradient_kernel(Global<const int64_t> row_count, Global<const float> bias_sums,
                         int64_t stride, int columns, Global<const float> scale,
                         Global<float> bias) {
    const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (column >= columns) return;
    const int64_t blocks = (row_count.load(0) + kTileN - 1) / kTileN;
    float sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += bias_sums.load(block * stride + column);
    if (scale) sum /= scale.load(0);
    bias.store(column, bias.load(column) + sum);
}

// A tile [128 rows, 128 columns of the width] of dH, over the columns of a block: dy, whose depth
// runs along its rows, times W, whose depth runs across them; see products.cuh.
template <typename T, typename Out, bool Aligned>
__global__ void __launch_bounds__(kThreads, 1)
    hidden_gradient_kernel(Operands<T> in, Global<const T> dy, int64_t stride, Global<float> sums,
                           Global<Out> grad_hidden, Global<const float> scale, bool first,
                           bool last) {
    const int64_t count = in.row_count.template load<Cache::kReadOnly>(0);
    const int64_t row_blocks = (count + kTileN - 1) / kTileN, program = blockIdx.x;
    const int slices = (in.depth + kTileV - 1) / kTileV;
    if (program >= row_blocks * slices) return;
    const int64_t row0 = program % row_blocks * kTileN;
    const int there = static_cast<int>(min(count - row0, int64_t{kTileN}));
    const int d0 = static_cast<int>(program / row_blocks) * kTileV;

    const Shared<T> left(0, kStages * kTileN * kTileD<T>);
    const Shared<T> right(kStages * kTileN * kRowBytes, kStages * kTileV * kTileD<T>);
    const auto fetch = [&](Shared<T> to_dy, Shared<T> to_weight, int step) {
        const int k0 = step * kTileD<T>;
#pragma unroll
        for (int i = 0; i < kTileN * kPieces / kThreads; ++i) {
            const int piece = threadIdx.x % kPieces;
            const int row = static_cast<int>(threadIdx.x) / kPieces + i * (kThreads / kPieces);
            fetch_piece<true>(to_dy + place<T>(row, piece),
                              row < there ? dy + (row0 + row) * stride : dy,
                              k0 + piece * (16 / static_cast<int>(sizeof(T))),
                              static_cast<int>(stride), row < there);
        }
        fetch_across<Aligned>(to_weight, in.weight, d0, in.depth, [&](int k) {
            return k0 + k < in.vocabulary ? (k0 + k) * in.stride_wv : int64_t{-1};
        });
    };
    auto tile =
        sum_products<T, false>((in.vocabulary + kTileD<T> - 1) / kTileD<T>, left, right, fetch);
    const float divisor = scale ? scale.load(0) : 1.0f;
#pragma unroll
    for (int i = 0; i < tile.kRows; ++i) {
        if (tile.row(i) >= there) continue;
        const int64_t row = in.order.template load<Cache::kReadOnly>(row0 + tile.row(i));
        const int64_t at = row * in.depth + d0;
#pragma unroll
        for (int j = 0; j < tile.kColumns; ++j) {
            if (d0 + tile.column(j) >= in.depth) continue;
            float sum = tile.at(i, j) / divisor;
            if (!first) sum += sums.load(at + tile.column(j));
            if (last) grad_hidden.store(at + tile.column(j), from_float<Out>(sum));
            if (!last) sums.store(at + tile.column(j), sum);
        }
    }
}

// A tile [128 columns of the block, 128 columns of the width] of dW, over all rows that take part:
// dy^T times H, the depths of both across their rows; see products.cuh.
template <typename T, typename Out, bool Aligned>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient_kernel(Operands<T> in, Global<const T> dy, int64_t stride,
                           Global<Out> grad_weight, int64_t stride_gv, bool adds,
                           Global<const float> scale) {
    const int64_t count = in.row_count.template load<Cache::kReadOnly>(0);
    if (adds && count == 0) return;
    const int slices = (in.depth + kTileV - 1) / kTileV;
    const int v0 = static_cast<int>(blockIdx.x) / slices * kTileV;
    const int d0 = static_cast<int>(blockIdx.x) % slices * kTileV;

    const Shared<T> left(0, kStages * kTileN * kTileD<T>);
    const Shared<T> right(kStages * kTileN * kRowBytes, kStages * kTileV * kTileD<T>);
    const auto fetch = [&](Shared<T> to_dy, Shared<T> to_hidden, int step) {
        const int64_t k0 = int64_t{step} * kTileD<T>;
        fetch_across<true>(to_dy, dy, v0, static_cast<int>(stride),
                           [&](int k) { return k0 + k < count ? (k0 + k) * stride : int64_t{-1}; });
        fetch_across<Aligned>(to_hidden, in.hidden, d0, in.depth, [&](int k) {
            if (k0 + k >= count) return int64_t{-1};
            return in.order.template load<Cache::kReadOnly>(k0 + k) * in.stride_hn;
        });
    };
    auto tile = sum_products<T, true>(static_cast<int>((count + kTileD<T> - 1) / kTileD<T>), left,
                                      right, fetch);
    const float divisor = scale ? scale.load(0) : 1.0f;
#pragma unroll
    for (int i = 0; i < tile.kRows; ++i) {
        if (v0 + tile.row(i) >= in.vocabulary) continue;
        const int64_t at = (v0 + tile.row(i)) * stride_gv + d0;
#pragma unroll
        for (int j = 0; j < tile.kColumns; ++j) {
            if (d0 + tile.column(j) >= in.depth) continue;
            float sum = tile.at(i, j) / divisor;
            if (adds) sum += to_float(grad_weight.load(at + tile.column(j)));
            grad_weight.store(at + tile.column(j), from_float<Out>(sum));
        }
    }
}

// The same problem with the block as its vocabulary.
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
    const WorkGrid grid{{0, problem.rows}, static_cast<int>(ceil_div(block.columns, kTileV)), 1};
    const unsigned blocks = blocks_of(problem.rows, kTileN) * grid.splits;
    with_type(part, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        launch(logit_gradient_kernel<T, decltype(aligned)::value>,
               {"logit_gradient", blocks, kThreads, kStagesBytes, stream}, operands_of<T>(part),
               values_of(known), kind, block.first_column, static_cast<int>(problem.vocabulary),
               grid, kind.seed, static_cast<T*>(block.dy), block.stride,
               bias == nullptr ? nullptr : bias_sums);
    });
    if (bias == nullptr) return;
    const unsigned column_blocks = blocks_of(block.columns, kThreads);
    launch(bias_gradient_kernel, {"bias_gradient", column_blocks, kThreads, 0, stream},
           problem.row_count, bias_sums, block.stride, block.columns, scale,
           bias + block.first_column);
}

void hidden_gradient(const Problem& problem, const GradientBlock& block, float* sums,
                     Output grad_hidden, const float* scale, void* stream) {
    const Problem part = part_of(problem, block);
    const unsigned blocks = blocks_of(problem.rows, kTileN) * blocks_of(problem.depth, kTileV);
    const bool last = block.first_column + int64_t{block.columns} == problem.vocabulary;
    with_type(part, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        with_output<T>(grad_hidden, [&](auto* out) {
            using Out = std::remove_pointer_t<decltype(out)>;
            launch(hidden_gradient_kernel<T, Out, decltype(aligned)::value>,
                   {"hidden_gradient", blocks, kThreads, kStagesBytes, stream},
                   operands_of<T>(part), static_cast<const T*>(block.dy), block.stride, sums, out,
                   scale, block.first_column == 0, last);
        });
    });
}

void weight_gradient(const Problem& problem, const GradientBlock& block, Output grad_weight,
                     int64_t stride, bool adds, const float* scale, void* stream) {
    const Problem part = part_of(problem, block);
    const unsigned blocks = blocks_of(block.columns, kTileV) * blocks_of(problem.depth, kTileV);
    with_type(part, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        with_output<T>(grad_weight, [&](auto* out) {
            using Out = std::remove_pointer_t<decltype(out)>;
            launch(weight_gradient_kernel<T, Out, decltype(aligned)::value>,
                   {"weight_gradient", blocks, kThreads, kStagesBytes, stream},
                   operands_of<T>(part), static_cast<const T*>(block.dy), block.stride,
                   out + stride * block.first_column, stride, adds, scale);
        });
    });
}

}  // namespace bft::cuda
