// All launches, in the order of a call, for plain C++ files. Pointers are to memory of the current
// device. Work is in the order of the stream, a cudaStream_t that is passed as void*. Functions
// throw std::runtime_error if a launch fails.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bft::cuda {

// Rows and columns of a tile of logits.
constexpr int kTileN = 128, kTileV = 128;

// The margins of bounds, those of bft_kernels/backends/common/lse_bound.py.
constexpr float kRounding = 1e-5f, kExpMargin = 1e-3f;

enum class Type { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A problem in bft_kernels.reference's notation, and which of its rows take part.
struct Problem {
    Type type;                        // of hidden and weight
    const void* hidden;               // [N, D]
    const void* weight;               // [V, D]
    const float* bias;                // [V], or null
    const int64_t* target;            // [N]; one outside of [0, V) makes its row NaN
    const int64_t* order;             // [N], the rows that take part, then the others
    const int64_t* row_count;         // [1], how many take part
    int64_t rows, vocabulary, depth;  // N, V, D
    int64_t stride_hn, stride_wv;     // between rows, in elements; a row is contiguous
    float softcap;                    // 0 for none
    float temperature;
};

// Where a gradient goes: in the operands' type, or, if is_float32, in float32.
struct Output {
    void* at;
    bool is_float32;
};

// How the vocabulary is divided among blocks.
struct Splits {
    int count;
    int columns;  // of each split, a multiple of the tile's; the last may have fewer
};
Splits splits_for(int64_t rows, int64_t vocabulary, int processors);

// A range of the rows that take part, by their numbers; there may be fewer such rows.
struct RowRange {
    int64_t first, count;
};

// For gradient="sampled": which entries may be kept.
struct Candidates {
    const int64_t* seed;     // [1]
    const float* lse_bound;  // [N], a lower bound of each row's lse; minus infinity is one
    float eps;
    uint32_t* mask;  // [R, ceil(V / 32)]: bits, the lowest first; null if not wanted
};

// The results of a row, each [N] by position; null for one that is not wanted.
struct RowResults {
    float* loss;
    float* nll;
    float* lse;
    float* lse_low;  // what rounding cut off from lse
    float* entropy;
    bool* correct;
};

// What a row's loss has beside its nll.
struct LossKind {
    float label_smoothing, z_loss;
};

constexpr int kSums = 6;

// Losses and statistics of the rows of the range. `sums` is a work space of [kSums, splits, R].
void linear_nll_forward(const Problem& problem, RowRange range, Splits splits, float* sums,
                        const Candidates& candidates, LossKind kind, const RowResults& results,
                        void* stream);

// lse_bound [N] of rows that take part: the target's logit, minus the largest rounding error.
void target_bound(const Problem& problem, float* lse_bound, void* stream);

// certificate.cu: the error certificate of the sampled gradient, in a pass of its own once lse is
// known.

// What is known before, and the sample's eps.
struct Certified {
    const float* lse;    // [N]
    const float* norms;  // [V], |W_v|^2; null if hidden_variance is
    float eps;
};

// variance [N], by position, of the rows of the range: sums over v != target of
// p (eps - p)^+ slope^2; and hidden_variance [N], or null: the same sums, each term times |W_v|^2.
// A target outside of [0, V) leaves no column out. `sums` is a work space of [1, splits, R] floats,
// or [2, splits, R] with norms.
void certificate(const Problem& problem, RowRange range, Splits splits, const Certified& known,
                 float* sums, float* variance, float* hidden_variance, void* stream);

// norms [V]: |W_v|^2, of elements as they are stored.
void squared_norms(const Problem& problem, float* norms, void* stream);

// recompute.cu: the gradients from logits that are computed again.

// A block of the vocabulary, and the gradient of its logits as an intermediate result: dy [R,
// stride], of the operands' type, where R is the number of rows and stride a multiple of 128 that
// holds all columns.
struct GradientBlock {
    int first_column, columns;
    void* dy;
    int64_t stride;
};

// What is known of each row, [N] each.
struct KnownRows {
    const float* lse;
    const float* lse_low;  // or null
    const float* nll;
    const float* grad;  // upstream
};

// Which gradient: the exact one, or the sampled one if there is a seed.
struct GradientKind {
    LossKind loss;
    const int64_t* seed;  // [1], or null
    float eps;
};

// Writes dy of a block. If `bias` [V] is given, adds the block's sums over the rows to it, by way
// of `bias_sums` [row blocks of 128, stride]. They are divided by `scale` [1] first, if not null.
void logit_gradient(const Problem& problem, const KnownRows& known, const GradientKind& kind,
                    const GradientBlock& block, float* bias_sums, float* bias, const float* scale,
                    void* stream);

// dy @ W into rows of grad_hidden [N, D]. Blocks of one vocabulary come in order. Every block but
// the last stores its sum in `sums` [N, D]. Every block but the first adds the sum stored before.
void hidden_gradient(const Problem& problem, const GradientBlock& block, float* sums,
                     Output grad_hidden, const float* scale, void* stream);

// dy^T @ H into the block's rows of grad_weight [V, D], which are `stride` elements apart. With
// `adds` the product is added to grad_weight; otherwise it overwrites it.
void weight_gradient(const Problem& problem, const GradientBlock& block, Output grad_weight,
                     int64_t stride, bool adds, const float* scale, void* stream);

// lists.cu: the sampled gradient's lists, made of the bits row by row, and then sorted by column.

// The columns of each row's entries, ascending, one row after the other.
struct Lists {
    const int64_t* offsets;  // [N + 1], where each row begins, by position
    int32_t* columns;        // [capacity]
    float* values;           // [capacity], dy for unit upstream gradient; or null
    int64_t capacity;        // rows that end past it have no list
};

// CUB's work space: as many bytes as it asks for.
struct Temporary {
    void* storage;
    size_t bytes;
};

// counts [N] of the rows of the range, by position: the set bits of mask [R, ceil(V / 32)].
void count_entries(const Problem& problem, RowRange range, const uint32_t* mask, int64_t* counts,
                   void* stream);

// Lists the columns of the bits of the rows of the range.
void list_entries(const Problem& problem, RowRange range, const uint32_t* mask, const Lists& lists,
                  void* stream);

// Sorts entries by keys [E], which are columns, or the vocabulary's size for a place without entry.
// Entries of one column stay in order.
size_t sort_bytes(int64_t entries, int64_t vocabulary);
void sort_entries(const int32_t* keys, const uint64_t* packed, int64_t entries, int64_t vocabulary,
                  int32_t* sorted_keys, uint64_t* sorted_packed, Temporary temporary, void* stream);

// starts [V + 1]: the first entry of each column among sorted keys [E], then their number.
void column_starts(const int32_t* sorted_keys, int64_t entries, int64_t vocabulary, int64_t* starts,
                   void* stream);

// spmm.cu: the sampled gradient from its lists.

// The widest rows that SpMM takes: a thread keeps its part of their sums in registers.
constexpr int kSpmmMaxWidth = 16384;

// The sample, which decides what entries are kept.
struct Sample {
    const int64_t* seed;  // [1]
    float eps;
};

// The entries that are kept, [capacity] each, in the order of the lists. Not written for entries
// that are dropped.
struct KeptEntries {
    int32_t* keys;     // the column
    uint64_t* packed;  // the row's position, and in the low half the bits of upstream * dy
};

// Writes the rows of grad_hidden [N, D], and the kept entries, of rows that have a list. Either may
// be null. Lists without values may hold more than the sample; they are thinned.
void spmm_hidden(const Problem& problem, const KnownRows& known, const Sample& sample,
                 const Lists& lists, const KeptEntries& kept, Output grad_hidden, void* stream);

// Where the gradients of weight and bias go; either may be null.
struct WeightGradient {
    Output weight;   // [V, D]
    int64_t stride;  // between its rows, in elements
    bool adds;       // to the weight's gradient; otherwise every row is written
    float* bias;     // [V], added to
};

// Takes packed entries sorted by column; starts [V + 1] has the place of each column's first one.
void spmm_weight(const Problem& problem, const int64_t* starts, const uint64_t* packed,
                 const WeightGradient& into, void* stream);

// rows.cu: the forward and the gradient from raw products that lie in a buffer.

// Rows of a buffer, and where they come from: the first is row `first_row` of the order, or of all
// rows if there is no order.
struct LogitRows {
    const float* logits;  // [count, V], rows `stride` elements apart
    int64_t stride;
    const float* bias;         // [V], or null
    const int64_t* target;     // [N], by position
    const int64_t* order;      // [N], positions of the rows that count, or null
    const int64_t* row_count;  // [1], how many of the order count; null without it
    int64_t first_row, count, vocabulary;
    float softcap;  // 0 for none
    float temperature;
};

// For gradient="sampled": which entries may be kept.
struct RowCandidates {
    const int64_t* seed;     // [1]
    const int64_t* popular;  // [popular_count], ascending columns; their sum bounds lse
    int popular_count;
    float eps;
    uint32_t* mask;  // [count, ceil(V / 32)], as in Candidates
};

void softmax_rows(const LogitRows& rows, LossKind kind, const RowCandidates& candidates,
                  const RowResults& results, void* stream);

// variance [N], and hidden_variance [N] with norms, as `certificate`; either may be null.
void certificate_rows(const LogitRows& rows, const Certified& known, float* variance,
                      float* hidden_variance, void* stream);

// Clears the bits that the final lse does not keep, and counts the others: counts [N].
void thin_rows(const LogitRows& rows, const KnownRows& known, const Sample& sample, uint32_t* mask,
               int64_t* counts, void* stream);

// Lists the columns and values of the bits.
void list_rows(const LogitRows& rows, const KnownRows& known, const Sample& sample,
               const uint32_t* mask, const Lists& lists, void* stream);

// Writes grad * dy over the logits, in a type that is not wider than float32.
void gradient_rows(const LogitRows& rows, const KnownRows& known, LossKind kind, Type type,
                   void* dy, int64_t stride_dy, void* stream);

// scale.cu: x [count] times factor [1]; a factor of 1 moves nothing.
void scale(Type type, void* x, int64_t count, const float* factor, void* stream);

// weighting.cu: the weights of Balanced Fine-Tuning, as bft_kernels.weighting specifies them.

// The number of positions of a block, and so of an element of `ended` and `sums`.
constexpr int kWeightTile = 256;

// Tokens of packed documents.
struct Documents {
    const float* loss;          // [N]; not read if there is no label
    const bool* labelled;       // [N]
    const int64_t* cu_seqlens;  // [S + 1] over the N positions; what nobody checked is clipped
    int64_t positions, count;   // N, S
};

struct WeightingScheme {
    int64_t window;  // in labelled tokens
    float delta;     // added to the denominator of a ratio
    double gamma;
    bool full_windows;  // only windows of full length; else clipped around their token
    bool geometric;     // windows average logarithms, and documents take gamma
    bool confidence;    // the token weight is the confidence
    bool ratio;         // or the confidence over its window's; else 1
    bool flat;          // documents weigh 1
};

// What the coefficient is divided by.
struct Normalizer {
    bool by_sequence;        // the document's labels
    bool counts;             // documents with labels, or labels if not by_sequence
    const float* num_items;  // [1], or null
};

// The work space; as many tiles as hold N positions.
struct WeightingScratch {
    int* before;    // [N + 1], labels before each position
    int* sequence;  // [N], the document of each position; S after the last document
    float* values;  // [N], what windows average, without gaps for unlabelled positions
    float* lowest;  // [N], the lowest window of the document in the tile, up to each position
    int* ended;     // [tiles], documents whose last label lies in the tile
};

// 0 for positions without a label, and for documents without one.
struct Weighting {
    float* coefficient;          // [N], what multiplies each token's loss
    float* token_weight;         // [N]
    float* window_confidence;    // [N]
    float* sequence_weight;      // [S]
    float* sequence_confidence;  // [S]
    float* sums;                 // [tiles], of coefficient * loss
};

// Four launches; nothing waits for the device, and two runs give the same bits.
void balanced_weighting(const Documents& documents, const WeightingScheme& scheme,
                        const Normalizer& normalizer, const WeightingScratch& scratch,
                        const Weighting& weighting, void* stream);

}  // namespace bft::cuda
