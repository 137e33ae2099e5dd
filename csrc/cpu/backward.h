// The backward of the sampled gradient, by SpMM: dH from rows of weight, dW from rows of hidden.
#pragma once

#include <cstdint>

#include "csrc/cpu/kernels.h"

namespace bft::cpu {

// A row-major matrix whose rows are contiguous.
struct Matrix {
    void* data;
    DType type;
    int64_t rows, width, stride;
};

// dy of unit upstream gradient, row by row; columns ascend in each row.
struct Entries {
    int64_t rows;
    const int64_t* offsets;  // [rows + 1]
    const int32_t* columns;  // [offsets[rows]]
    const float* values;
    const float* upstream;  // [rows]
};

// dH [rows, D] = dy @ weight, a row of dH at a time.
void spmm_hidden(const Entries& entries, const Matrix& weight, const Matrix& grad_hidden,
                 int threads);

// dW [V, D] = dy^T @ hidden, added or stored, and the sums of dy into grad_bias [V] if it is given.
//
// Entries are sorted by column and row (a counting sort: each thread takes a range of columns and
// reads all entries), so that each row of dW is written once, by one thread, in row order: the
// result does not depend on the number of threads. Holds 8 bytes an entry and 16 a column.
//
// `slice` columns of hidden and dW are done for all of V before the next, while all rows of the
// slice of hidden are in a core's cache.
void spmm_weight(const Entries& entries, const Matrix& hidden, const Matrix* grad_weight, bool add,
                 float* grad_bias, int64_t vocabulary, int64_t slice, int threads);

}  // namespace bft::cpu
