// The bits of the sampled gradient's mask, row by row.
#pragma once

#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

// Words of the mask that a lane loads before it looks at one: rows are far apart in memory.
constexpr int kWordsAhead = 8;

// A warp's part of a row's words: those from `begin` to `end`.
struct RowBits {
    Global<const uint32_t> words;
    int begin, end;

    __device__ __forceinline__ uint32_t word(int at) const {
        return at < end ? words.load<Cache::kReadOnly>(at) : 0;
    }

    // How many bits are set. Lanes own neighbouring words.
    __device__ __forceinline__ int count() const {
        int found = 0;
        for (int first = begin + lane_id(); first < end; first += 32 * kWordsAhead) {
#pragma unroll
            for (int i = 0; i < kWordsAhead; ++i) found += __popc(word(first + 32 * i));
        }
        return __reduce_add_sync(kAllLanes, found);
    }

    // Calls emit(place, column) for each bit that is set, in ascending order of columns and places.
    // Sums over the lanes before it tell a lane where its columns go. Most words are empty: if all
    // lanes have empty ones, nothing is written.
    template <typename Emit>
    __device__ __forceinline__ void list(int64_t place, Emit emit) const {
        for (int first = begin; first < end; first += 32 * kWordsAhead) {
            uint32_t ahead[kWordsAhead];
#pragma unroll
            for (int i = 0; i < kWordsAhead; ++i) ahead[i] = word(first + 32 * i + lane_id());
#pragma unroll
            for (int i = 0; i < kWordsAhead; ++i) {
                if (!__any_sync(kAllLanes, ahead[i] != 0)) continue;
                const int own = __popc(ahead[i]);
                int through = own;  // the sum of this lane and those before it
#pragma unroll
                for (int step = 1; step < 32; step *= 2) {
                    const int before = __shfl_up_sync(kAllLanes, through, step);
                    if (lane_id() >= step) through += before;
                }
                int64_t to = place + through - own;
                const int column0 = (first + 32 * i + lane_id()) * 32;
                for (uint32_t left = ahead[i]; left != 0; left &= left - 1) {
                    emit(to++, column0 + __ffs(static_cast<int>(left)) - 1);
                }
                place += __shfl_sync(kAllLanes, through, 31);
            }
        }
    }
};

}  // namespace bft::cuda
