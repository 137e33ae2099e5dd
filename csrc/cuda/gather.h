// The sampled gradient from its lists; callable from a plain C++ file, as forward.h.
#pragma once

#include "csrc/cuda/lists.h"
#include "csrc/cuda/recompute.h"

namespace bft::cuda {

// The widest rows that the gathers take: a thread keeps its part of their sums in registers.
constexpr int kMaxGathered = 16384;

// Which entries are kept: those of the draws.
struct Sample {
    const int64_t* seed;  // [1]
    float eps;
};

// What the lists came to, [capacity] each, in their order.
struct KeptEntries {
    int32_t* keys;     // the column; left alone where an entry is not kept
    uint64_t* packed;  // position of the row, and below it the bits of upstream * dy; likewise
};

// The rows of grad_hidden [N, D], and the entries, of rows that have a list. Either may be null.
void gather_hidden(const Problem& problem, const KnownRows& known, const Sample& sample,
                   const Lists& lists, const KeptEntries& kept, Output grad_hidden, void* stream);

// Where the gradients of weight and bias go; either may be null.
struct WeightGradient {
    Output weight;   // [V, D]
    int64_t stride;  // between its rows, in elements
    bool adds;       // to the weight's; otherwise every row is written
    float* bias;     // [V], added to
};

// From packed entries sorted by column, of which starts [V + 1] tells the first of each.
void gather_weight(const Problem& problem, const int64_t* starts, const uint64_t* packed,
                   const WeightGradient& into, void* stream);

}  // namespace bft::cuda
