// Tiles of products over rows: sums [128, 128] = a b, where the depth of b runs across its rows.
//
// Blocks, warps and threads own the same as in tile.cuh, but in float32 a thread has four rows side
// by side, and columns in fours. A stage holds as much of the depth as there: 64 halves or 32
// floats. An operand whose depth runs along its rows lies as in tile.cuh. If the depth runs across
// the rows, a row of the stage has the 128 elements of one place in the depth. Rows of halves take
// two rounds of the banks, so their pieces lie in the order piece ^ (row % 8): a transposed matrix
// of ldmatrix is one piece of eight consecutive rows, and has no bank conflicts. Floats are read
// from one row at a time, side by side, and need no such order.
#pragma once

#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

// Fills a stage of an operand whose depth runs across rows, with kTileV columns from column0 on.
// row_at(k) gives a row's offset in x, or -1 if there is no such row.
template <bool Aligned, typename T, typename RowAt>
__device__ __forceinline__ void fetch_across(Shared<T> to, Global<const T> x, int column0,
                                             int columns, RowAt row_at) {
    constexpr int kSize = 16 / sizeof(T), kRowPieces = kTileV / kSize;
    constexpr int kCopies = kTileD<T> * kRowPieces / kThreads;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
        const int at = static_cast<int>(threadIdx.x) + i * kThreads;
        const int row = at / kRowPieces, piece = at % kRowPieces;
        const int64_t offset = row_at(row);
        fetch_piece<Aligned>(to + place_across<T>(row, piece), offset >= 0 ? x + offset : x,
                             column0 + piece * kSize, columns, offset >= 0);
    }
}

// The sums of a thread. Across: the depth of a runs across its rows, too.
template <typename T, bool Across>
struct Sums : Entries<T> {
    __device__ __forceinline__ static int column(int j) {
        return Entries<T>::column0() + Entries<T>::step(j);
    }
    __device__ __forceinline__ void add(Shared<T> left, Shared<T> right) {
        this->template add_products<Across, true>(left, right);
    }
};

template <bool Across>
struct Sums<float, Across> {
    static constexpr int kRows = 4, kColumns = 16;
    float sums[4][16];

    __device__ __forceinline__ float& at(int i, int j) { return sums[i][j]; }
    __device__ __forceinline__ static int row(int i) { return warp_row() + lane_id() / 4 * 4 + i; }
    __device__ __forceinline__ static int column(int j) {
        return warp_column() + j / 4 * 16 + lane_id() % 4 * 4 + j % 4;
    }
    __device__ __forceinline__ void add(Shared<float> left, Shared<float> right) {
#pragma unroll 1
        for (int k0 = 0; k0 < kTileD<float>; k0 += 4) {
            Vector<float, 4> a[4];  // of row i, or, with Across, of place i in the depth
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int to =
                    Across ? place_across<float>(k0 + i, row(0) / 4) : place<float>(row(i), k0 / 4);
                a[i] = left.load_vector<4>(to);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
#pragma unroll
                for (int j = 0; j < 16; j += 4) {
                    const auto b = right.load_vector<4>(place_across<float>(k0 + k, column(j) / 4));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float x = Across ? a[k].at[i] : a[i].at[k];
#pragma unroll
                        for (int c = 0; c < 4; ++c) {
                            sums[i][j + c] = fmaf(x, b.at[c], sums[i][j + c]);
                        }
                    }
                }
            }
        }
    }
};

// Sums over `steps` stages; fetch(stage, step) starts to fill one.
template <typename T, bool Across, typename Fetch>
__device__ __forceinline__ Sums<T, Across> sum_products(int steps, Shared<T> left, Shared<T> right,
                                                        Fetch fetch) {
    constexpr int kStage = kTileN * kTileD<T>;
    Sums<T, Across> sums = {};
    int into = 0;
    const auto next = [&](int step) {
        if (step < steps) fetch(left + into * kStage, right + into * kStage, step);
        cp_async_commit();
        into = into + 1 == kStages ? 0 : into + 1;
    };
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) next(step);
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // all copies have arrived, and the stage read last is free
        const int stage = into + 1 == kStages ? 0 : into + 1;
        next(step + kStages - 1);
        sums.add(left + stage * kStage, right + stage * kStage);
    }
    return sums;
}

}  // namespace bft::cuda
