// Stands in for CUDA's header of this name when device code is compiled by the host's compiler.
// Memory is reached through csrc/cuda/device.h only, so there are no atomics on pointers here, and
// __shared__ is refused: it would go unchecked.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "tests/cuda/emulation/types.h"
#include "tests/cuda/emulation/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "use Shared<T> of csrc/cuda/device.h");

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

using std::max;
using std::min;

inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

namespace bft::emulation {
template <typename To, typename From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace bft::emulation

inline unsigned __float_as_uint(float x) { return ::bft::emulation::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return ::bft::emulation::bits_as<float>(x); }
