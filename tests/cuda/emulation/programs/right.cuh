// Kernels without a mistake, compiled by nvcc and by the host's compiler alike.
#pragma once

#include "csrc/cuda/device.h"

namespace bft::cuda {

// Fragments of all lanes, as they come: words [32, 4] of two loads of one 16 x 16 tile,
// and the accumulators [32, 4] of a [16, 16] times b [16, 8] given by columns.
template <typename T>
__global__ void fragments_kernel(Global<const T> tile, Global<const T> by_columns,
                                 Global<uint32_t> words, Global<float> sums) {
    const Shared<T> shared(0, 256), columns(512, 128);
    const int lane = threadIdx.x;
    shared.store_vector(8 * lane, tile.template load_vector<8>(8 * lane));
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
