// The error certificate of the sampled gradient; callable from a plain C++ file, as forward.h.
#pragma once

#include "csrc/cuda/forward.h"

namespace bft::cuda {

// What is known before, and eps of the sample.
struct Certified {
    const float* lse;    // [N]
    const float* norms;  // [V], |W_v|^2; null where hidden_variance is
    float eps;
};

// variance [N], by position, of the rows of the range: sums over v != target of
// p (eps - p)^+ slope^2; and hidden_variance [N], or null: the same sums, each term times |W_v|^2.
// A target outside of [0, V) leaves no column out. `sums` is [1 or 2, splits, R] floats to work in,
// 2 with norms.
void certificate(const Problem& problem, RowRange range, Splits splits, const Certified& known,
                 float* sums, float* variance, float* hidden_variance, void* stream);

// norms [V]: |W_v|^2, of elements as they are stored.
void squared_norms(const Problem& problem, float* norms, void* stream);

}  // namespace bft::cuda
