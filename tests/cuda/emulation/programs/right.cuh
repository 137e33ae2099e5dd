// Kernels without a mistake, compiled by nvcc and by the host's compiler alike.
#pragma once

#include "csrc/cuda/device.h"

namespace bft::cuda {

// c [M, N] = a [M, K] b [N, K]^T in float32, for K a multiple of 8. A block of four warps owns a
// 32 x 32 tile of c, and a warp a 16 x 16 part of it. Three stages of 32 columns are in flight.
// Rows are 40 elements apart, so that ldmatrix meets no bank twice.
template <typename T>
__global__ void __launch_bounds__(128)
    gemm_kernel(int rows, int columns, int depth, Global<const T> a, Global<const T> b,
                Global<float> c) {
    constexpr int kTile = 32, kDepth = 32, kPitch = 40, kStages = 3, kStage = kTile * kPitch;
    const Shared<T> a_tile(0, kStages * kStage);
    const Shared<T> b_tile(kStages * kStage * sizeof(T), kStages * kStage);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;

    // A thread copies one 16-byte piece of each tile's row: four pieces a row.
    const auto fetch = [&](int stage, int k0) {
        const int row = thread / 4, k = k0 + thread % 4 * 8;
        const int to = stage * kStage + row * kPitch + thread % 4 * 8;
        const bool in_a = row0 + row < rows && k < depth;
        const bool in_b = column0 + row < columns && k < depth;
        cp_async<16>(a_tile + to, in_a ? a + (int64_t{row0 + row} * depth + k) : a, in_a ? 16 : 0);
        cp_async<16>(b_tile + to, in_b ? b + (int64_t{column0 + row} * depth + k) : b,
                     in_b ? 16 : 0);
    };

    float sums[2][4] = {};
    const int steps = (depth + kDepth - 1) / kDepth;
    for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < steps) fetch(stage, stage * kDepth);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // everyone's copies are there, and the stage read last is free
        const int next = step + kStages - 1;
        if (next < steps) fetch(next % kStages, next * kDepth);
        cp_async_commit();
        const int base = step % kStages * kStage;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            uint32_t of_a[4], of_b[4];
            const int a_row = warp / 2 * 16 + lane % 16, a_column = k + lane / 16 * 8;
            ldmatrix_x4(of_a, a_tile + (base + a_row * kPitch + a_column));
            const int b_row = warp % 2 * 16 + lane % 8 + lane / 16 * 8;
            const int b_column = k + lane / 8 % 2 * 8;
            ldmatrix_x4(of_b, b_tile + (base + b_row * kPitch + b_column));
            mma_m16n8k16<T>(sums[0], of_a, {of_b[0], of_b[1]});
            mma_m16n8k16<T>(sums[1], of_a, {of_b[2], of_b[3]});
        }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = row0 + warp / 2 * 16 + lane / 4 + i / 2 * 8;
            const int column = column0 + warp % 2 * 16 + part * 8 + lane % 4 * 2 + i % 2;
            if (row < rows && column < columns) {
                c.store(int64_t{row} * columns + column, sums[part][i]);
            }
        }
    }
}
constexpr size_t kGemmShared = 2 * 3 * 32 * 40 * 2;

// out[block] = the sum of x over the block's share.
__global__ void sum_kernel(int n, Global<const float> x, Global<float> out) {
    const Shared<float> of_warps(0, 32);
    float sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        sum += x.load<Cache::kReadOnly>(i);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, lanes);
    if (threadIdx.x % 32 == 0) of_warps.store(threadIdx.x / 32, sum);
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? of_warps.load(threadIdx.x) : 0.0f;
        for (int lanes = 16; lanes > 0; lanes /= 2) {
            sum += __shfl_xor_sync(0xFFFFFFFF, sum, lanes);
        }
        if (threadIdx.x == 0) out.store(blockIdx.x, sum);
    }
}

// The odd x of each warp, moved to the front of its 32 places; counts[warp] says how many.
__global__ void compact_kernel(Global<const int> x, Global<int> out, Global<int> counts) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    const int value = x.load(i);
    const unsigned kept = __ballot_sync(0xFFFFFFFF, value % 2 != 0);
    if (value % 2 != 0) out.store(i - lane + __popc(kept & ((1u << lane) - 1)), value);
    if (lane == 0) counts.store(i / 32, __popc(kept));
}

// Fragments of all lanes, as they come: words [32, 4] of two loads of one 16 x 16 tile,
// and the accumulators [32, 4] of a [16, 16] times b [16, 8] given by columns.
template <typename T>
__global__ void fragments_kernel(Global<const T> tile, Global<const T> by_columns,
                                 Global<uint32_t> words, Global<float> sums) {
    const Shared<T> shared(0, 256), columns(512, 128);
    const int lane = threadIdx.x;
    for (int i = lane; i < 32; i += 32) {
        shared.store_vector(8 * i, tile.template load_vector<8>(8 * i));
    }
    if (lane < 16) columns.store_vector(8 * lane, by_columns.template load_vector<8>(8 * lane));
    __syncwarp();
    uint32_t plain[4], turned[4], b[4];
    const Shared<T> row = shared + (lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x4(plain, row);
    ldmatrix_x4_trans(turned, row);
    ldmatrix_x4(b, columns + (lane % 8 * 16 + lane / 8 % 2 * 8));
    for (int i = 0; i < 4; ++i) words.store(8 * lane + i, plain[i]);
    for (int i = 0; i < 4; ++i) words.store(8 * lane + 4 + i, turned[i]);
    float d[4] = {};
    mma_m16n8k16<T>(d, plain, {b[0], b[1]});
    for (int i = 0; i < 4; ++i) sums.store(4 * lane + i, d[i]);
}

// out [2, n] = x as T and back, by two, and 2^x.
template <typename T>
__global__ void round_kernel(int n, Global<const float> x, Global<float> out) {
    const int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    const Vector<float, 2> pair = x.load_vector<2, Cache::kStreaming>(i);
    const auto halves = bits_as<Vector<T, 2>>(pack<T>(pair.at[0], pair.at[1]));
    for (int j = 0; j < 2; ++j) {
        out.store(i + j, to_float(halves.at[j]));
        out.store<Cache::kStreaming>(n + i + j, exp2_approx(pair.at[j]));
    }
}

}  // namespace bft::cuda
