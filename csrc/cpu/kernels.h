// The inner loops, once for each instruction set, and the choice between them at run time.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/sampling.h"

namespace bft::cpu {

// An array of places has room for so many more than the places themselves.
constexpr int64_t kPadding = 16;

enum class DType { kFloat32, kBFloat16, kFloat16 };

// How raw products become logits: z = softcap * tanh((y + bias) / softcap) / temperature.
struct Transform {
    const float* bias = nullptr;  // [V]
    float softcap = 0;            // 0: none
    float temperature = 1;

    bool identity() const { return bias == nullptr && softcap == 0 && temperature == 1; }
};

// Sums over a piece of a row, relative to a maximum: e = exp(z - maximum).
struct ExponentialSums {
    float sum;     // e
    float moment;  // e * (z - maximum)
};

// Sums over the entries whose e lies below a threshold, each term times slope^2.
struct SmallSums {
    float first, second;                    // e, e^2
    float weighted_first, weighted_second;  // the same times |W_v|^2
};

// dy = (exp(z - lse) * scale - uniform) * slope for each entry of a row.
struct GradientRow {
    float lse, scale, uniform;
};

struct Kernels {
    const char* name;

    // y -> z in place; returns the largest z.
    float (*transform)(float* y, int64_t count, int64_t first_column, const Transform&);
    // e and its sums; out may be z. What follows z in memory is prefetched.
    ExponentialSums (*exponentials)(const float* z, int64_t count, float maximum, float* out);
    // The sum of z - maximum.
    float (*sum)(const float* z, int64_t count, float maximum);
    // The first place where x is not below `value`, or `count`.
    int64_t (*find_at_least)(const float* x, int64_t count, float value);
    // The places where the draw is below e * factor, ascending, and some where it is above by up
    // to 2^-15; returns how many. `hits` has room for `count` and kPadding more.
    int64_t (*draw_below)(const float* e, int64_t count, uint32_t first_column, RowKey key,
                          float factor, uint32_t* hits);
    // The places where e >= threshold, or NaN.
    int64_t (*at_least)(const float* e, int64_t count, float threshold, uint32_t* hits);
    // p[k] = exp(logits[k] - maximum - log_sum), and the places of the k whose draw is below p /
    // eps. `kept` has room for `count` and kPadding more.
    int64_t (*survivors)(const uint32_t* columns, const float* logits, int64_t count, float maximum,
                         float log_sum, RowKey key, float eps, float* p, uint32_t* kept);
    // Sums over the entries with e < threshold; norms [count] may be null.
    SmallSums (*small_sums)(const float* e, const float* z, int64_t count, float threshold,
                            const Transform&, const float* norms);
    // e *= softcap's slope at z.
    void (*multiply_slope)(float* e, const float* z, int64_t count, const Transform&);
    // z -> dy, except at the target; dy may be z.
    void (*gradient)(const float* z, float* dy, int64_t count, const GradientRow&,
                     const Transform&);
    // out[j] *= factor.
    void (*multiply)(float* out, int64_t count, float factor);
    // sum[j] = sum_k value[k] * table[index[k] * stride + j], in the order of k.
    void (*weighted_rows[3])(const void* table, int64_t stride, const int32_t* index,
                             const float* value, int64_t count, float* sum, int64_t width);
    // out[j] = x[j], or out[j] += x[j], rounded to the type of out once. It may bypass the
    // caches: call `settle` before another thread reads.
    void (*write[3])(void* out, const float* x, int64_t count, bool add);
    void (*settle)();
};

// The best kernels that this processor runs, or those chosen by select_kernels.
const Kernels& kernels();

// Names of the instruction sets that were compiled and that this processor runs, best first.
std::vector<const char*> available_kernels();

// Uses one of available_kernels() from now on; throws std::invalid_argument for another name.
void select_kernels(const char* name);

}  // namespace bft::cpu
