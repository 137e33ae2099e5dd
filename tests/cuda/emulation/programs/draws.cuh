// The draws of csrc/sampling.h, written out by a kernel: no loss needs them all.
#pragma once

#include "csrc/cuda/device.h"
#include "csrc/cuda/launch.h"
#include "csrc/sampling.h"

namespace bft::cuda {

// A rectangle of the [N, V] matrix: where it starts and how large it is.
struct Region {
    int64_t row0, rows;
    int64_t col0, cols;
};

// Writes draw<T>(row_key(seed, row0 + i), col0 + j) to out[i, j]. A thread owns an entry.
template <typename T>
__global__ void fill_draws_kernel(uint64_t seed, Region region, Global<T> out) {
    const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (at >= region.rows * region.cols) return;
    const auto key = row_key(seed, static_cast<uint64_t>(region.row0 + at / region.cols));
    out.store(at, draw<T>(key, static_cast<uint32_t>(region.col0 + at % region.cols)));
}

template <typename T>
void fill_draws(uint64_t seed, Region region, T* out, void* stream) {
    const auto blocks = static_cast<unsigned>((region.rows * region.cols + 255) / 256);
    launch(fill_draws_kernel<T>, {"fill_draws", blocks, 256, 0, stream}, seed, region, out);
}

}  // namespace bft::cuda
