#include "csrc/cuda/lists.cuh"

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"

namespace bft::cuda {

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
