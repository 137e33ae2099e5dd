// The sampled gradient's lists: from bits to columns row by row, and from there to rows column by
// column. Callable from a plain C++ file, as forward.h.
#pragma once

#include <cstddef>

#include "csrc/cuda/forward.h"

namespace bft::cuda {

// Columns of each row's entries, ascending, one row after the other.
struct Lists {
    const int64_t* offsets;  // [N + 1], where each row begins, by position
    int32_t* columns;        // [capacity]
    int64_t capacity;        // rows that end past it have no list
};

// What CUB works in: as many bytes as it asks for.
struct Temporary {
    void* storage;
    size_t bytes;
};

// counts [N] of the rows of the range, by position: bits of mask [R, ceil(V / 32)].
void count_entries(const Problem& problem, RowRange range, const uint32_t* mask, int64_t* counts,
                   void* stream);

// offsets [rows + 1] from counts [rows].
size_t scan_bytes(int64_t rows);
void scan_counts(const int64_t* counts, int64_t rows, int64_t* offsets, Temporary temporary,
                 void* stream);

// The columns of the bits of the rows of the range.
void list_entries(const Problem& problem, RowRange range, const uint32_t* mask, const Lists& lists,
                  void* stream);

// Sorts entries by keys [E], which are columns, or the vocabulary's size where there is no entry.
// Those of one column stay in order.
size_t sort_bytes(int64_t entries, int64_t vocabulary);
void sort_entries(const int32_t* keys, const uint64_t* packed, int64_t entries, int64_t vocabulary,
                  int32_t* sorted_keys, uint64_t* sorted_packed, Temporary temporary, void* stream);

// starts [V + 1]: the first entry of each column among sorted keys [E], then their number.
void column_starts(const int32_t* sorted_keys, int64_t entries, int64_t vocabulary, int64_t* starts,
                   void* stream);

}  // namespace bft::cuda
