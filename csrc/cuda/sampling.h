// Callable from a plain C++ file: the stream is a cudaStream_t passed as void*.
#pragma once

#include "csrc/sampling.h"

namespace bft::cuda {

// out[i * cols + j] = draw<T>(row_key(seed, row0 + i), col0 + j), for T = float and uint32_t, on
// the current device and in the order of the stream. Throws std::runtime_error if the launch fails.
template <typename T>
void fill_draws(uint64_t seed, Region region, T* out, void* stream);

}  // namespace bft::cuda
