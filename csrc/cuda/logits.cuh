// Functions of one logit, which the forward and the backward share.
#pragma once

#include "csrc/cuda/device.h"
#include "csrc/cuda/kernels.h"
#include "csrc/sampling.h"

namespace bft::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7F800000); }

// exp(x), 0 below the normal range.
__device__ __forceinline__ float normal_exp(float x) { return exp2_approx(x * kLog2E); }

// x, or `instead` if x is minus infinity, so that no -inf - (-inf) arises.
__device__ __forceinline__ float finite_or(float x, float instead) {
    return x == -infinity() ? instead : x;
}

// tanh within a few ulp near 0 too, where 1 - 2 / (exp(2x) + 1) alone would lose all digits.
__device__ __forceinline__ float exact_tanh(float x) {
    const float magnitude = fabsf(x), square = x * x;
    const float e = normal_exp(-2 * magnitude);
    const float far = __fdividef(1 - e, 1 + e);
    float p = fmaf(square, -5.70498872745e-3f, 2.06390887954e-2f);
    p = fmaf(p, square, -5.37397155531e-2f);
    p = fmaf(p, square, 1.33314422036e-1f);
    p = fmaf(p, square, -3.33332819422e-1f);
    const float near = fmaf(p * square, magnitude, magnitude);
    return copysignf(magnitude < 0.625f ? near : far, x);
}

// z = softcap(y) / temperature.
struct Transform {
    float softcap;  // 0 for none
    float inverse_softcap;
    float inverse_temperature;

    __device__ __forceinline__ float cap(float y) const {
        return softcap * exact_tanh(y * inverse_softcap);
    }
    __device__ __forceinline__ float logit(float y) const {
        return (softcap > 0 ? cap(y) : y) * inverse_temperature;
    }
    // dz/dy of the logit z.
    __device__ __forceinline__ float slope(float z) const {
        if (softcap == 0) return inverse_temperature;
        const float t = z / (softcap * inverse_temperature);
        return (1 - t * t) * inverse_temperature;
    }
};

// Whether the draw of an entry could be below x * factor / 2^16: true if it is, and seldom if it is
// not. `place` is its multiplier * column + offset. The draw's upper 16 bits, as the last digits of
// a float from 2^23 on, need neither the hash's last step nor a conversion; they let through one
// entry in 65,536 whatever its x is. Rounding to nearest keeps the order: if u16 <= y, 2^23 + u16
// is not above the rounded 2^23 + y.
__device__ __forceinline__ bool may_be_below(uint32_t place, float x, float factor) {
    return __uint_as_float((mix32_high(place) >> 16) + 0x4B000000) <= fmaf(x, factor, 0x1p23f);
}

// The sampled gradient away from the target: 0 if the draw drops the entry, NaN if p is NaN.
__device__ __forceinline__ float sampled_dz(float p, float draw, float eps) {
    const float kept = draw * eps < p ? fmaxf(p, eps) : 0.0f;
    return p != p ? p : kept;
}

// The factor of exp(z - reference) that gives an upper bound of p, for lse >= bound. A margin for
// rounding is included.
__device__ __forceinline__ float overrated(float reference, float bound) {
    return normal_exp(reference - bound + kExpMargin + kRounding * fabsf(bound));
}

// A word of the mask, for the 32 columns from `first` on: sets the target's bit, and clears the
// bits past the vocabulary.
__device__ __forceinline__ uint32_t trim_word(uint32_t word, int first, int vocabulary,
                                              int target) {
    const int left = vocabulary - first;
    if (target >= first && target - first < 32) word |= 1u << (target - first);
    return left < 32 ? word & (left > 0 ? (1u << left) - 1 : 0) : word;
}

// The term of an entry in the certificate.
__device__ __forceinline__ float variance_term(float z, float lse, float eps,
                                               const Transform& transform) {
    const float p = normal_exp(z - lse), slope = transform.slope(z);
    return p * fmaxf(eps - p, 0.0f) * slope * slope;
}

// The sum (the largest, the bits) of `Lanes` neighbouring lanes, in each of them.
template <int Lanes>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int step = 1; step < Lanes; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}
template <int Lanes>
__device__ __forceinline__ float max_lanes(float x) {
#pragma unroll
    for (int step = 1; step < Lanes; step *= 2) {
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
    }
    return x;
}
template <int Lanes>
__device__ __forceinline__ uint32_t join_lanes(uint32_t x) {
#pragma unroll
    for (int step = 1; step < Lanes; step *= 2) x |= __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

}  // namespace bft::cuda
