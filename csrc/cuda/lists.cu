// The lists of the sampled gradient. Each element of each result is written by one thread, and
// nothing depends on the order in which blocks run.
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"
#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

// Words of the mask that a lane asks for before it looks at one: rows are far apart in memory.
constexpr int kWordsAhead = 8;

// The bits of a warp's row.
struct RowBits {
    Global<const uint32_t> words;
    int count;    // of words
    int64_t row;  // position, or -1 past the rows that take part

    __device__ __forceinline__ uint32_t word(int at) const {
        return at < count ? words.load<Cache::kReadOnly>(at) : 0;
    }
};
__device__ __forceinline__ RowBits own_bits(RowRange range, Global<const int64_t> order,
                                            Global<const int64_t> row_count,
                                            Global<const uint32_t> mask, int words) {
    const int64_t local = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    const int64_t at = range.first + local;
    const bool there = local < range.count && at < row_count.load<Cache::kReadOnly>(0);
    return {mask + local * words, words, there ? order.load<Cache::kReadOnly>(at) : -1};
}

// How many bits of each row are set.
//
// A warp owns a row, and its lanes neighbouring words. No shared memory.
__global__ void __launch_bounds__(kThreads)
    count_entries_kernel(RowRange range, Global<const int64_t> order,
                         Global<const int64_t> row_count, Global<const uint32_t> mask, int words,
                         Global<int64_t> counts) {
    const RowBits bits = own_bits(range, order, row_count, mask, words);
    if (bits.row < 0) return;
    int found = 0;
    for (int first = lane_id(); first < words; first += 32 * kWordsAhead) {
#pragma unroll
        for (int i = 0; i < kWordsAhead; ++i) found += __popc(bits.word(first + 32 * i));
    }
    found = __reduce_add_sync(kAllLanes, found);
    if (lane_id() == 0) counts.store(bits.row, found);
}

// Columns of the set bits of each row, ascending; of a row that does not fit, none.
//
// A warp owns a row, and its lanes neighbouring words: sums over the lanes before it tell a lane
// where its columns go. Most words are empty: lanes that all have one write nothing. No shared
// memory.
__global__ void __launch_bounds__(kThreads)
    list_entries_kernel(RowRange range, Global<const int64_t> order,
                        Global<const int64_t> row_count, Global<const uint32_t> mask, int words,
                        Global<const int64_t> offsets, Global<int32_t> columns, int64_t capacity) {
    const RowBits bits = own_bits(range, order, row_count, mask, words);
    if (bits.row < 0 || offsets.load<Cache::kReadOnly>(bits.row + 1) > capacity) return;
    int64_t place = offsets.load<Cache::kReadOnly>(bits.row);
    for (int first = 0; first < words; first += 32 * kWordsAhead) {
        uint32_t ahead[kWordsAhead];
#pragma unroll
        for (int i = 0; i < kWordsAhead; ++i) {
            ahead[i] = bits.word(first + 32 * i + lane_id());
        }
#pragma unroll
        for (int i = 0; i < kWordsAhead; ++i) {
            if (!__any_sync(kAllLanes, ahead[i] != 0)) continue;
            const int own = __popc(ahead[i]);
            int through = own;  // of this lane and those before it
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int before = __shfl_up_sync(kAllLanes, through, step);
                if (lane_id() >= step) through += before;
            }
            int64_t to = place + through - own;
            const int column0 = (first + 32 * i + lane_id()) * 32;
            for (uint32_t left = ahead[i]; left != 0; left &= left - 1) {
                columns.store(to++, column0 + __ffs(static_cast<int>(left)) - 1);
            }
            place += __shfl_sync(kAllLanes, through, 31);
        }
    }
}

// The first entry of each column among sorted keys, and behind the last column their number.
//
// A thread owns a column and searches: neighbours, whose searches end near each other, read the
// same lines. No shared memory.
__global__ void __launch_bounds__(kThreads)
    column_starts_kernel(Global<const int32_t> keys, int64_t entries, int64_t vocabulary,
                         Global<int64_t> starts) {
    const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (column > vocabulary) return;
    int64_t low = 0, high = entries;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (keys.load<Cache::kReadOnly>(middle) < column) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    starts.store(column, low);
}

static int words_of(const Problem& problem) {
    return static_cast<int>(ceil_div(problem.vocabulary, 32));
}

// Of a launch with a warp for each row of the range.
static unsigned warp_blocks(RowRange range) {
    return static_cast<unsigned>(ceil_div(range.count, kWarps));
}

void count_entries(const Problem& problem, RowRange range, const uint32_t* mask, int64_t* counts,
                   void* stream) {
    if (range.count == 0) return;
    launch(count_entries_kernel, {"count_entries", warp_blocks(range), kThreads, 0, stream}, range,
           problem.order, problem.row_count, mask, words_of(problem), counts);
}

void list_entries(const Problem& problem, RowRange range, const uint32_t* mask, const Lists& lists,
                  void* stream) {
    if (range.count == 0) return;
    launch(list_entries_kernel, {"list_entries", warp_blocks(range), kThreads, 0, stream}, range,
           problem.order, problem.row_count, mask, words_of(problem), lists.offsets, lists.columns,
           lists.capacity);
}

// CUB's two calls: without storage it tells how many bytes it needs.
static void scan(const int64_t* counts, int64_t rows, int64_t* offsets, Temporary& temporary,
                 void* stream) {
    check_launch("scan_counts", cub::DeviceScan::InclusiveSum(
                                    temporary.storage, temporary.bytes, counts, offsets,
                                    static_cast<int>(rows), static_cast<cudaStream_t>(stream)));
}

size_t scan_bytes(int64_t rows) {
    Temporary temporary{};
    scan(nullptr, rows, nullptr, temporary, nullptr);
    return temporary.bytes;
}

void scan_counts(const int64_t* counts, int64_t rows, int64_t* offsets, Temporary temporary,
                 void* stream) {
    check_launch("scan_counts",
                 cudaMemsetAsync(offsets, 0, sizeof *offsets, static_cast<cudaStream_t>(stream)));
    if (rows > 0) scan(counts, rows, offsets + 1, temporary, stream);
}

static void sort(const int32_t* keys, const uint64_t* packed, int64_t entries, int64_t vocabulary,
                 int32_t* sorted_keys, uint64_t* sorted_packed, Temporary& temporary,
                 void* stream) {
    int bits = 1;  // of the largest key, which is the vocabulary's size
    while (vocabulary >> bits != 0) ++bits;
    check_launch("sort_entries",
                 cub::DeviceRadixSort::SortPairs(
                     temporary.storage, temporary.bytes, reinterpret_cast<const uint32_t*>(keys),
                     reinterpret_cast<uint32_t*>(sorted_keys), packed, sorted_packed,
                     static_cast<int>(entries), 0, bits, static_cast<cudaStream_t>(stream)));
}

size_t sort_bytes(int64_t entries, int64_t vocabulary) {
    Temporary temporary{};
    sort(nullptr, nullptr, entries, vocabulary, nullptr, nullptr, temporary, nullptr);
    return temporary.bytes;
}

void sort_entries(const int32_t* keys, const uint64_t* packed, int64_t entries, int64_t vocabulary,
                  int32_t* sorted_keys, uint64_t* sorted_packed, Temporary temporary,
                  void* stream) {
    if (entries == 0) return;
    sort(keys, packed, entries, vocabulary, sorted_keys, sorted_packed, temporary, stream);
}

void column_starts(const int32_t* sorted_keys, int64_t entries, int64_t vocabulary, int64_t* starts,
                   void* stream) {
    const auto blocks = static_cast<unsigned>(ceil_div(vocabulary + 1, kThreads));
    launch(column_starts_kernel, {"column_starts", blocks, kThreads, 0, stream}, sorted_keys,
           entries, vocabulary, starts);
}

}  // namespace bft::cuda
