#pragma once

#include "csrc/sampling.h"

namespace bft::cpu {

// out[i * cols + j] = draw<T>(row_key(seed, row0 + i), col0 + j), for T = float and uint32_t.
template <typename T>
void fill_draws(uint64_t seed, Region region, T* out, int threads);

}  // namespace bft::cpu
