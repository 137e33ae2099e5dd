// The lists of the sampled gradient. Each element of each result is written by one thread, and
// nothing depends on the order in which blocks run.
#include <cub/device/device_radix_sort.cuh>

#include "csrc/cuda/bits.cuh"
#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"
#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

// A warp's row: its position, or -1 past the rows that take part, and its bits.
struct OwnBits {
    int64_t row;
    RowBits bits;
};
__device__ __forceinline__ OwnBits own_bits(RowRange range, Global<const int64_t> order,
                                            Global<const int64_t> row_count,
                                            Global<const uint32_t> mask, int words) {
    const int64_t local = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    const int64_t at = range.first + local;
    const bool there = local < range.count && at < row_count.load<Cache::kReadOnly>(0);
    return {there ? order.load<Cache::kReadOnly>(at) : -1, {mask + local * words, 0, words}};
}

// How many bits of each row are set. A warp owns a row. No shared memory.
__global__ void __launch_bounds__(kThreads)
    count_entries_kernel(RowRange range, Global<const int64_t> order,
                         Global<const int64_t> row_count, Global<const uint32_t> mask, int words,
                         Global<int64_t> counts) {
    const auto [row, bits] = own_bits(range, order, row_count, mask, words);
    if (row < 0) return;
    const int found = bits.count();
    if (lane_id() == 0) counts.store(row, found);
}

// Lists the columns of the set bits of each row, ascending, or none if the row does not fit. A warp
// owns a row. No shared memory.
__global__ void __launch_bounds__(kThreads)
    list_entries_kernel(RowRange range, Global<const int64_t> order,
                        Global<const int64_t> row_count, Global<const uint32_t> mask, int words,
                        Global<const int64_t> offsets, Global<int32_t> columns, int64_t capacity) {
    const auto [row, bits] = own_bits(range, order, row_count, mask, words);
    if (row < 0 || offsets.load<Cache::kReadOnly>(row + 1) > capacity) return;
    bits.list(offsets.load<Cache::kReadOnly>(row),
              [&](int64_t to, int column) { columns.store(to, column); });
}

// The first entry of each column among sorted keys, and after the last column their number.
//
// A thread owns a column and searches for it. The searches of neighbours end near each other and
// read the same cache lines. No shared memory.
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

void count_entries(const Problem& problem, RowRange range, const uint32_t* mask, int64_t* counts,
                   void* stream) {
    launch(count_entries_kernel,
           {"count_entries", blocks_of(range.count, kWarps), kThreads, 0, stream}, range,
           problem.order, problem.row_count, mask, words_of(problem), counts);
}

void list_entries(const Problem& problem, RowRange range, const uint32_t* mask, const Lists& lists,
                  void* stream) {
    launch(list_entries_kernel,
           {"list_entries", blocks_of(range.count, kWarps), kThreads, 0, stream}, range,
           problem.order, problem.row_count, mask, words_of(problem), lists.offsets, lists.columns,
           lists.capacity);
}

// CUB's two calls: without storage it tells how many bytes it needs.
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
    const unsigned blocks = blocks_of(vocabulary + 1, kThreads);
    launch(column_starts_kernel, {"column_starts", blocks, kThreads, 0, stream}, sorted_keys,
           entries, vocabulary, starts);
}

}  // namespace bft::cuda
