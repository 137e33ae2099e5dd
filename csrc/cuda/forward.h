// Callable from a plain C++ file. Pointers are to the current device; work is in the order of the
// stream, a cudaStream_t passed as void*. Functions throw std::runtime_error if a launch fails.
#pragma once

#include <cstdint>

namespace bft::cuda {

// Rows and columns of a tile of logits.
constexpr int kTileN = 128, kTileV = 128;

enum class Type { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A problem in bft_kernels.reference's notation, and which of its rows take part.
struct Problem {
    Type type;                 // of hidden and weight
    const void* hidden;        // [N, D]
    const void* weight;        // [V, D]
    const float* bias;         // [V], or null
    const int64_t* target;     // [N]; in a row that takes part, one outside of [0, V) makes it NaN
    const int64_t* order;      // [N], rows that take part, then others
    const int64_t* row_count;  // [1], how many take part
    int64_t rows, vocabulary, depth;  // N, V, D
    int64_t stride_hn, stride_wv;     // between rows, in elements; a row is contiguous
    float softcap;                    // 0 for none
    float temperature;
};

// Where a gradient goes: of the operands' type, or, if wide, float32.
struct Output {
    void* at;
    bool wide;
};

// How the vocabulary is shared out among blocks.
struct Splits {
    int count;
    int columns;  // of each split, a multiple of the tile's; the last may have fewer
};
Splits splits_for(int64_t rows, int64_t vocabulary, int processors);

// A part of the rows: numbers among the rows that take part, of which there may be fewer.
struct RowRange {
    int64_t first, count;
};

// For gradient="sampled": which entries may be kept.
struct Candidates {
    const int64_t* seed;  // [1]
    const float* floor;   // [N], a lower bound of each row's lse; minus infinity is one
    float eps;
    uint32_t* mask;  // [R, ceil(V / 32)]: bits, lowest first; null where none are wanted
};

// What a row gives, each [N] by position, and null where not wanted.
struct RowResults {
    float* loss;
    float* nll;
    float* lse;
    float* lse_low;  // what rounding took from lse
    float* entropy;
    bool* correct;
};

constexpr int kSums = 6;

// Losses and statistics of the rows of the range. `sums` is [kSums, splits, R] floats to work in.
void linear_nll_forward(const Problem& problem, RowRange range, Splits splits, float* sums,
                        const Candidates& candidates, float label_smoothing, float z_loss,
                        const RowResults& results, void* stream);

// floor [N], where rows take part: the target's logit, less what rounding can make of it.
void target_floor(const Problem& problem, float* floor, void* stream);

}  // namespace bft::cuda
