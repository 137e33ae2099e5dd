// The draws of csrc/sampling.h, written out by a kernel: no loss needs them all.
#pragma once

#include <algorithm>

#include "csrc/cuda/device.h"
#include "csrc/cuda/launch.h"
#include "csrc/sampling.h"

namespace bft::cuda {

// A rectangle of the [N, V] matrix: where it starts and how large it is.
struct Region {
    int64_t row0, rows;
    int64_t col0, cols;
};

constexpr int kDrawThreads = 256;
// Entries a thread writes in each row it visits, where the row is long enough: they share the two
// 64-bit mixes of the row's key.
constexpr int64_t kEntriesPerThread = 16;
constexpr int64_t kMaxGridY = 65535;

// Writes draw<T>(row_key(seed, row0 + i), col0 + j) to out[i, j], row-major and contiguous.
//
// The grid is [columns, rows]. Both are walked in grid strides, so any rectangle fits any grid. A
// thread owns the columns j = x, x + stride, ... of the rows i = y, y + gridDim.y, ...: it derives
// a row's key once and neighbouring threads write neighbouring addresses. Offsets into out are
// 64-bit; a column is below 2^32, and its sum with col0 is too, as the caller has checked.
template <typename T>
__global__ void __launch_bounds__(kDrawThreads)
    fill_draws_kernel(uint64_t seed, Region region, Global<T> out) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const uint32_t col0 = static_cast<uint32_t>(region.col0);
    for (int64_t i = blockIdx.y; i < region.rows; i += gridDim.y) {
        const RowKey key = row_key(seed, static_cast<uint64_t>(region.row0 + i));
        const Global<T> row = out + i * region.cols;
        for (int64_t j = first; j < region.cols; j += stride) {
            row.store(j, draw<T>(key, col0 + static_cast<uint32_t>(j)));
        }
    }
}

template <typename T>
void fill_draws(uint64_t seed, Region region, T* out, void* stream) {
    if (region.rows == 0 || region.cols == 0) {
        return;  // a grid of zero blocks is a launch error
    }
    constexpr int64_t kColumnsPerBlock = kDrawThreads * kEntriesPerThread;
    const int64_t column_blocks = (region.cols + kColumnsPerBlock - 1) / kColumnsPerBlock;
    const dim3 grid(static_cast<unsigned>(column_blocks),
                    static_cast<unsigned>(std::min(region.rows, kMaxGridY)));
    launch(fill_draws_kernel<T>, {"fill_draws", grid, kDrawThreads, 0, stream}, seed, region, out);
}

}  // namespace bft::cuda
