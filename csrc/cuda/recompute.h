// The backward from recomputed logits; callable from a plain C++ file, as forward.h.
#pragma once

#include "csrc/cuda/forward.h"

namespace bft::cuda {

// A block of the vocabulary, and the gradient of its logits in between: dy [R, stride], of the
// operands' type, where R is the number of rows and stride a multiple of 128 that holds all
// columns.
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

// Which gradient: exact, or the sampled one where there is a seed.
struct GradientKind {
    float label_smoothing, z_loss;
    const int64_t* seed;  // [1], or null
    float eps;
};

// Writes dy of a block. With `bias` [V] adds the block's sums over the rows to it, by way of
// `bias_sums` [row blocks of 128, stride]. What is added is divided by `scale` [1], if not null.
void logit_gradient(const Problem& problem, const KnownRows& known, const GradientKind& kind,
                    const GradientBlock& block, float* bias_sums, float* bias, const float* scale,
                    void* stream);

// dy @ W into rows of grad_hidden [N, D]. Blocks of one vocabulary come in order: all but the last
// leave their sum in `sums` [N, D], all but the first add what is there.
void hidden_gradient(const Problem& problem, const GradientBlock& block, float* sums,
                     Output grad_hidden, const float* scale, void* stream);

// dy^T @ H into the block's rows of grad_weight [V, D], which are `stride` elements apart. With
// `adds` it is added to what is there.
void weight_gradient(const Problem& problem, const GradientBlock& block, Output grad_weight,
                     int64_t stride, bool adds, const float* scale, void* stream);

}  // namespace bft::cuda
