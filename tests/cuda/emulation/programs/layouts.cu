// What test_cuda_layouts.py reads the machine code of: which registers ldmatrix and mma take.
#include "csrc/cuda/device.h"

namespace bft::cuda {

// Two fragments through ldmatrix, their product, and all registers of a lane, in order: those of
// ldmatrix as words 0 to 7 of out, those of mma as 0 to 7 of sums. Swapped exchanges two registers
// of a on the way.
template <typename T, bool Across, bool Swapped>
__global__ void layouts_kernel(Global<uint32_t> out, Global<float> sums) {
    const Shared<T> tile(0, 512);
    const int lane = threadIdx.x;
    uint32_t a[4], b[4];
    if constexpr (Across) {
        ldmatrix_x4_trans(a, tile + lane * 8);
        ldmatrix_x4_trans(b, tile + (256 + lane * 8));
    } else {
        ldmatrix_x4(a, tile + lane * 8);
        ldmatrix_x4(b, tile + (256 + lane * 8));
    }
    float d[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const uint32_t half[2] = {b[2 * n], b[2 * n + 1]};
        if constexpr (Swapped) {
            mma_m16n8k16<T>(d[n], {a[0], a[2], a[1], a[3]}, half);
        } else {
            mma_m16n8k16<T>(d[n], a, half);
        }
    }
    const auto words = out + lane * 8;
    const auto products = sums + lane * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        words.store(i, a[i]);
        words.store(4 + i, b[i]);
        products.store(i, d[0][i]);
        products.store(4 + i, d[1][i]);
    }
}

template __global__ void layouts_kernel<bf16, false, false>(Global<uint32_t>, Global<float>);
template __global__ void layouts_kernel<bf16, true, false>(Global<uint32_t>, Global<float>);
template __global__ void layouts_kernel<bf16, false, true>(Global<uint32_t>, Global<float>);
template __global__ void layouts_kernel<fp16, false, false>(Global<uint32_t>, Global<float>);
template __global__ void layouts_kernel<fp16, true, false>(Global<uint32_t>, Global<float>);
template __global__ void layouts_kernel<fp16, true, true>(Global<uint32_t>, Global<float>);

}  // namespace bft::cuda
