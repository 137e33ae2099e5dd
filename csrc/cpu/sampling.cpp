#include "csrc/cpu/sampling.h"

namespace bft::cpu {

// Below this many entries, waking the threads costs more than they save.
constexpr int64_t kParallelEntries = 1 << 15;

template <typename T>
void fill_draws(uint64_t seed, Region region, T* out) {
#pragma omp parallel for schedule(static) if (region.rows * region.cols >= kParallelEntries)
    for (int64_t i = 0; i < region.rows; ++i) {
        const RowKey key = row_key(seed, static_cast<uint64_t>(region.row0 + i));
        const uint32_t col0 = static_cast<uint32_t>(region.col0);
        T* row = out + i * region.cols;
        for (int64_t j = 0; j < region.cols; ++j) {
            row[j] = draw<T>(key, col0 + static_cast<uint32_t>(j));
        }
    }
}

template void fill_draws<float>(uint64_t, Region, float*);
template void fill_draws<uint32_t>(uint64_t, Region, uint32_t*);

}  // namespace bft::cpu
