// The weights of Balanced Fine-Tuning, as bft_kernels.weighting specifies them; callable from a
// plain C++ file, as forward.h.
#pragma once

#include <cstdint>

namespace bft::cuda {

// Positions of a block, and so of an element of `ended` and `sums`.
constexpr int kWeightTile = 256;

// Tokens of packed documents.
struct Documents {
    const float* loss;          // [N]; not looked at where there is no label
    const bool* labelled;       // [N]
    const int64_t* cu_seqlens;  // [S + 1] over the N positions; what nobody checked is clipped
    int64_t positions, count;   // N, S
};

struct WeightScheme {
    int64_t window;  // in labelled tokens
    float floor;     // added to the denominator of a ratio
    double gamma;
    bool full_windows;  // windows of full length only; else clipped around their token
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

// Room to work in, with as many tiles as hold N positions.
struct WeightScratch {
    int* before;    // [N + 1], labels before each position
    int* sequence;  // [N], the document of each position; S behind the last
    float* values;  // [N], what windows average, one labelled position after the other
    float* lowest;  // [N], window of the same document and tile, up to each position
    int* ended;     // [tiles], documents whose last label lies in the tile
};

// 0 where there is no label, and of documents without one.
struct Weights {
    float* coefficient;          // [N], what multiplies each token's loss
    float* token_weight;         // [N]
    float* window_confidence;    // [N]
    float* sequence_weight;      // [S]
    float* sequence_confidence;  // [S]
    float* sums;                 // [tiles], of coefficient * loss
};

// Four launches; nothing waits for the device, and two runs give the same bits.
void balanced_weights(const Documents& documents, const WeightScheme& scheme,
                      const Normalizer& normalizer, const WeightScratch& scratch,
                      const Weights& weights, void* stream);

}  // namespace bft::cuda
