// Multiplies a gradient that was made in the forward by its upstream gradient.
#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"
#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

// Pieces of 16 bytes that a thread takes: so few blocks start if there is nothing to do.
constexpr int kSteps = 16;

// x times the factor, rounded once. A factor of 1, that of loss.backward(), moves nothing.
//
// A thread owns pieces of x that are a block's width apart; neighbours own neighbouring pieces.
// Whole: the pieces begin at multiples of 16 bytes. No shared memory.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(Global<T> x, int64_t count, bool whole, Global<const float> factor) {
    constexpr int kSize = 16 / static_cast<int>(sizeof(T));
    const float by = factor.load<Cache::kReadOnly>(0);
    if (by == 1) return;
    int64_t first = (int64_t{blockIdx.x} * kSteps * kThreads + threadIdx.x) * kSize;
    for (int step = 0; step < kSteps; ++step, first += kThreads * kSize) {
        const int64_t end = min(first + kSize, count);
        if (whole && end == first + kSize) {
            auto piece = x.template load_vector<kSize>(first);
#pragma unroll
            for (int i = 0; i < kSize; ++i) {
                piece.at[i] = from_float<T>(to_float(piece.at[i]) * by);
            }
            x.store_vector(first, piece);
        } else {
            for (int64_t i = first; i < end; ++i) {
                x.store(i, from_float<T>(to_float(x.load(i)) * by));
            }
        }
    }
}

void scale(Type type, void* x, int64_t count, const float* factor, void* stream) {
    with_operands(type, [&](auto zero) {
        using T = decltype(zero);
        const unsigned blocks = blocks_of(count, kSteps * kThreads * (16 / sizeof(T)));
        launch(scale_kernel<T>, {"scale", blocks, kThreads, 0, stream}, static_cast<T*>(x), count,
               rows_aligned<T>(x, 0), factor);
    });
}

}  // namespace bft::cuda
