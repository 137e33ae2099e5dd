// What CUDA declares globally: dim3 and the indices of the running thread.
#pragma once

#include <cstdint>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr uint64_t count() const { return uint64_t{x} * y * z; }
};

// Written by the scheduler each time it resumes a thread; kernels only read them.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
