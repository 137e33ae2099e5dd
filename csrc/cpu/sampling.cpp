#include "csrc/cpu/sampling.h"

#include <algorithm>

#include "csrc/cpu/parallel.h"

namespace bft::cpu {

// Below this many entries, waking the threads costs more than they save.
constexpr int64_t kParallelEntries = 1 << 15;

template <typename T>
void fill_draws(uint64_t seed, Region region, T* out, int threads) {
    const int64_t grain =
        std::max<int64_t>(1, kParallelEntries / std::max<int64_t>(region.cols, 1));
    parallel_for(threads, region.rows, grain, [&](int, int64_t first, int64_t stop) {
        for (int64_t i = first; i < stop; ++i) {
            const RowKey key = row_key(seed, static_cast<uint64_t>(region.row0 + i));
            const uint32_t col0 = static_cast<uint32_t>(region.col0);
            T* row = out + i * region.cols;
            for (int64_t j = 0; j < region.cols; ++j) {
                row[j] = draw<T>(key, col0 + static_cast<uint32_t>(j));
            }
        }
    });
}

template void fill_draws<float>(uint64_t, Region, float*, int);
template void fill_draws<uint32_t>(uint64_t, Region, uint32_t*, int);

}  // namespace bft::cpu
