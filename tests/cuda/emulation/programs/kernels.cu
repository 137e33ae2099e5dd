// The test kernels for nvcc: that csrc/cuda/device.h assembles, and to look at what became of it.
#include "csrc/cuda/launch.h"
#include "tests/cuda/emulation/programs/right.cuh"
#include "tests/cuda/emulation/programs/wrong.cuh"

namespace bft::cuda {

template __global__ void fragments_kernel<bf16>(Global<const bf16>, Global<const bf16>,
                                                Global<uint32_t>, Global<float>);
template __global__ void fragments_kernel<fp16>(Global<const fp16>, Global<const fp16>,
                                                Global<uint32_t>, Global<float>);
template __global__ void round_kernel<bf16>(int, Global<const float>, Global<float>);
template __global__ void round_kernel<fp16>(int, Global<const float>, Global<float>);
template __global__ void mistake_kernel<early_read<true>>(In, Out);
template __global__ void mistake_kernel<misaligned_shared<true>>(In, Out);
template __global__ void mistake_kernel<misaligned_copy<true>>(In, Out);

}  // namespace bft::cuda
