// A row's softmax: joins partial sums, computes the row's results from them, and gives the factors
// of dz for the backward. It serves logits in tiles and logits in a buffer.
#pragma once

#include "csrc/cuda/kernels.h"
#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

// A part of a row: its maximum, and sums relative to it: of e = exp(z - maximum), of
// e * (z - maximum), and of z - maximum.
struct Part {
    float maximum, total, moment, shifted;
};
__device__ __forceinline__ void scale_to(Part& part, float reference, float columns) {
    const float difference = part.maximum - reference, scale = expf(difference);
    const float step = part.total > 0 ? part.total * difference : 0.0f;
    part.moment = scale * (part.moment + step);
    part.total *= scale;
    part.shifted += (finite_or(part.maximum, 0.0f) - reference) * columns;
}

// Where a row's results go, as in RowResults.
struct RowOutputs {
    Global<float> loss, nll, lse, lse_low, entropy;
    Global<bool> correct;
};

inline RowOutputs outputs_of(const RowResults& results) {
    return {results.loss,    results.nll,     results.lse,
            results.lse_low, results.entropy, results.correct};
}

// `own`: the target's z, NaN if the target is not in the vocabulary. `first`: no earlier column has
// as large a z. `mean`: the mean of z - maximum, read only with label smoothing.
__device__ __forceinline__ void store_row(const RowOutputs& out, int64_t row, const Part& whole,
                                          float own, bool first, float mean, LossKind kind) {
    const float reference = finite_or(whole.maximum, 0.0f), log_total = logf(whole.total);
    float nll = log_total - (own - reference);
    if (nll < 0) nll = 0;  // keeps a NaN
    const float lse = reference + log_total, smoothing = kind.label_smoothing;
    float loss = nll;
    if (smoothing > 0) loss = (1 - smoothing) * nll + smoothing * (log_total - mean);
    if (kind.z_loss != 0) loss += kind.z_loss * lse * lse;
    out.loss.store(row, loss);
    out.nll.store(row, nll);
    out.lse.store(row, lse);
    if (out.lse_low) {
        const float high = lse - reference;  // Knuth's exact sum
        out.lse_low.store(row, (reference - (lse - high)) + (log_total - high));
    }
    if (out.entropy) {
        const float entropy = log_total - whole.moment / whole.total;
        out.entropy.store(row, entropy < 0 ? 0.0f : entropy);
        out.correct.store(row, own == whole.maximum && first && lse == lse);
    }
}

// What the forward stored for each row, and the upstream gradient, [N] each by position.
struct RowValues {
    Global<const float> lse, lse_low, nll, grad;
};

inline RowValues values_of(const KnownRows& known) {
    return {known.lse, known.lse_low, known.nll, known.grad};
}

// The entries of one row, by its final lse.
struct RowEntries {
    int64_t target;
    RowKey key;
    float lse, own, eps;  // own: dz at the target

    // The sampled dz of an entry; 0 where it is not kept.
    __device__ __forceinline__ float dz(float z, int column) const {
        const float u = draw<float>(key, static_cast<uint32_t>(column));
        return column == target ? own : sampled_dz(expf(z - lse), u, eps);
    }
};

struct Sampled {
    Global<const int64_t> seed;  // [1]
    float eps;
};
__device__ __forceinline__ RowEntries row_entries(const RowValues& known, const Sampled& sample,
                                                  int64_t row, int64_t target) {
    const auto seed = static_cast<uint64_t>(sample.seed.load<Cache::kReadOnly>(0));
    return {target, row_key(seed, static_cast<uint64_t>(row)),
            known.lse.load<Cache::kReadOnly>(row), expm1f(-known.nll.load<Cache::kReadOnly>(row)),
            sample.eps};
}

// dz = probability * p - even for other columns, and own at the target. The sampled gradient uses
// own only.
struct Factors {
    float lse, probability, even, own, upstream;
};
__device__ __forceinline__ Factors factors_of(const RowValues& known, LossKind kind, bool sampled,
                                              int64_t row, float vocabulary) {
    Factors f;
    f.lse = known.lse.load(row);
    f.upstream = known.grad.load(row);
    const float correction = known.lse_low ? expf(-known.lse_low.load(row)) : 1.0f;
    const float nll = known.nll.load(row), smoothing = kind.label_smoothing;
    f.own = expm1f(-nll);
    if (!sampled) {
        f.probability = 1 + 2 * kind.z_loss * f.lse;
        f.even = smoothing / vocabulary;
        f.own = (1 - smoothing) * f.own - f.even + (f.probability - 1 + smoothing) * expf(-nll);
        f.probability *= correction;
    }
    return f;
}

}  // namespace bft::cuda
