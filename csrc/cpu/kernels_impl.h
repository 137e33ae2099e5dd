// The kernels of kernels.h, in the vectors of simd.h. Included by one file for each instruction
// set.
//
// A row of a block is some hundreds to thousands of floats, which stay in the first-level cache
// from one kernel to the next; so each kernel is one short loop, and none is fused with another.
#pragma once

#include <type_traits>

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/simd.h"

namespace bft::cpu::BFT_ISA {
namespace {

constexpr uint32_t kAllLanes = (uint64_t{1} << kLanes) - 1;

// A vector of the first `lanes` floats, filled up with `padding`.
inline Floats load_lanes(const float* from, int64_t lanes, float padding = 0) {
    if (lanes == kLanes) return load(from);
    Floats x = splat(padding);
    std::memcpy(&x, from, static_cast<size_t>(lanes) * sizeof(float));
    return x;
}

inline void store_lanes(float* to, Floats x, int64_t lanes) {
    if (lanes == kLanes) return store(to, x);
    std::memcpy(to, &x, static_cast<size_t>(lanes) * sizeof(float));
}

// body(place, vector, lanes) for all of x, in order; the last vector is padded.
template <typename Body>
inline void each_vector(const float* x, int64_t count, float padding, Body body) {
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) body(j, load(x + j), static_cast<int64_t>(kLanes));
    if (j < count) body(j, load_lanes(x + j, count - j, padding), count - j);
}

// The slope of the softcap where it gave z.
inline Floats slope_at(Floats z, float to_tanh) {
    const Floats t = z * to_tanh;
    return 1.0f - t * t;
}

inline float slope_factor(const Transform& transform) {
    return transform.softcap == 0 ? 0 : transform.temperature / transform.softcap;
}

float largest(const float* x, int64_t count) {
    constexpr int64_t kChains = 4;  // enough to hide the latency of a maximum
    Floats most[kChains];
    for (Floats& chain : most) chain = splat(-kInfinity);
    int64_t j = 0;
    for (; j + kChains * kLanes <= count; j += kChains * kLanes) {
        for (int64_t k = 0; k < kChains; ++k) most[k] = maximum(most[k], load(x + j + k * kLanes));
    }
    each_vector(x + j, count - j, -kInfinity,
                [&](int64_t, Floats v, int64_t) { most[0] = maximum(most[0], v); });
    return horizontal_max(maximum(maximum(most[0], most[1]), maximum(most[2], most[3])));
}

float transform_row(float* y, int64_t count, int64_t first_column, const Transform& transform) {
    if (transform.identity()) return largest(y, count);
    const float* bias = transform.bias ? transform.bias + first_column : nullptr;
    const float inward = transform.softcap == 0 ? 1 : 1 / transform.softcap;
    const float outward = (transform.softcap == 0 ? 1 : transform.softcap) / transform.temperature;
    Floats most = splat(-kInfinity);
    each_vector(y, count, -kInfinity, [&](int64_t j, Floats x, int64_t lanes) {
        if (bias) x += load_lanes(bias + j, lanes);
        if (transform.softcap != 0) x = tanh(x * inward);
        x *= outward;
        store_lanes(y + j, x, lanes);
        if (lanes < kLanes) x = load_lanes(y + j, lanes, -kInfinity);
        most = maximum(most, x);
    });
    return horizontal_max(most);
}

ExponentialSums exponentials(const float* z, int64_t count, float maximum_, float* out) {
    Floats sum{}, moment{};
    each_vector(z, count, -kInfinity, [&](int64_t j, Floats x, int64_t lanes) {
        __builtin_prefetch(z + count + j);  // the next row
        x -= maximum_;
        const Floats e = exp_down(x);
        sum += e;
        moment += e * maximum(x, splat(-88.0f));  // 0 * -inf would be NaN
        store_lanes(out + j, e, lanes);
    });
    return {horizontal_sum(sum), horizontal_sum(moment)};
}

float sum_shifted(const float* z, int64_t count, float maximum_) {
    Floats sum{};
    each_vector(z, count, maximum_, [&](int64_t, Floats x, int64_t) { sum += x - maximum_; });
    return horizontal_sum(sum);
}

int64_t find_at_least(const float* x, int64_t count, float value) {
    int64_t j = 0;
    while (j + kLanes <= count && less_mask(load(x + j), splat(value)) == kAllLanes) j += kLanes;
    while (j < count && x[j] < value) ++j;
    return j;
}

// The draws of the columns whose hash inputs are x, in units of 2^-24.
inline Floats draws_of(Words x) {
    return __builtin_convertvector(bit_cast<Ints>(mix32(x) >> 8), Floats) + 0.5f;
}

int64_t draw_below(const float* e, int64_t count, uint32_t first_column, RowKey key, float factor,
                   uint32_t* hits) {
    constexpr int64_t kGroup = 4;  // vectors to a branch
    Words x = lane_numbers() * key.multiplier + (first_column * key.multiplier + key.offset);
    const uint32_t step = key.multiplier * static_cast<uint32_t>(kLanes);
    // In units of 2^-31. The margin is the most that the low 16 bits, which are not mixed, and the
    // rounding of u can be off: it lets one entry in 65,536 through without need.
    const float scale = factor * 0x1p31f, margin = 0x1p15f + 256;
    int64_t found = 0;
    const auto test = [&](Floats scaled) {
        const Words bits = mix32_high(x) >> 1;  // below 2^31 one instruction converts it
        x += step;
        return less_mask(__builtin_convertvector(bit_cast<Ints>(bits), Floats), scaled);
    };
    int64_t j = 0;
    for (; j + kGroup * kLanes <= count; j += kGroup * kLanes) {
        uint32_t bits[kGroup], any = 0;
        for (int64_t k = 0; k < kGroup; ++k) {
            bits[k] = test(load(e + j + k * kLanes) * scale + margin);
            any |= bits[k];
        }
        if (any == 0) continue;
        for (int64_t k = 0; k < kGroup; ++k) {
            found = append_lanes(bits[k], j + k * kLanes, hits, found);
        }
    }
    for (; j < count; j += kLanes) {
        const int64_t lanes = count - j < kLanes ? count - j : kLanes;
        const uint32_t there = kAllLanes >> (kLanes - lanes);
        const uint32_t bits = test(load_lanes(e + j, lanes) * scale + margin) & there;
        found = append_lanes(bits, j, hits, found);
    }
    return found;
}

int64_t at_least(const float* e, int64_t count, float threshold, uint32_t* hits) {
    int64_t found = 0;
    each_vector(e, count, -kInfinity, [&](int64_t j, Floats x, int64_t lanes) {
        const uint32_t there = kAllLanes >> (kLanes - lanes);
        found = append_lanes(~less_mask(x, splat(threshold)) & there, j, hits, found);
    });
    return found;
}

int64_t survivors(const uint32_t* columns, const float* logits, int64_t count, float maximum_,
                  float log_sum, RowKey key, float eps, float* p, uint32_t* kept) {
    int64_t found = 0;
    for (int64_t j = 0; j < count; j += kLanes) {
        const int64_t lanes = count - j < kLanes ? count - j : kLanes;
        const Floats logit = load_lanes(logits + j, lanes, -kInfinity);
        const Floats probability = exp_down((logit - maximum_) - log_sum);
        store_lanes(p + j, probability, lanes);
        const Words column =
            bit_cast<Words>(load_lanes(reinterpret_cast<const float*>(columns + j), lanes));
        const Floats u = draws_of(column * key.multiplier + key.offset) * 0x1p-24f;
        found = append_lanes(less_mask(u * eps, probability), j, kept, found);
    }
    return found;
}

SmallSums small_sums(const float* e, const float* z, int64_t count, float threshold,
                     const Transform& transform, const float* norms) {
    Floats first{}, second{}, weighted_first{}, weighted_second{};
    const float to_tanh = slope_factor(transform);
    each_vector(e, count, 0.0f, [&](int64_t j, Floats x, int64_t lanes) {
        Floats term = x < threshold ? x : Floats{};
        const Floats value = term;
        if (to_tanh != 0) {
            // A target is -inf here, which has no slope.
            const Floats slope = slope_at(load_lanes(z + j, lanes), to_tanh);
            term = x > 0.0f ? term * (slope * slope) : Floats{};
        }
        first += term;
        second += term * value;
        if (norms) {
            term *= load_lanes(norms + j, lanes);
            weighted_first += term;
            weighted_second += term * value;
        }
    });
    return {horizontal_sum(first), horizontal_sum(second), horizontal_sum(weighted_first),
            horizontal_sum(weighted_second)};
}

void multiply_slope(float* e, const float* z, int64_t count, const Transform& transform) {
    const float to_tanh = slope_factor(transform);
    each_vector(e, count, 0.0f, [&](int64_t j, Floats x, int64_t lanes) {
        store_lanes(e + j, x * slope_at(load_lanes(z + j, lanes), to_tanh), lanes);
    });
}

void gradient(const float* z, float* dy, int64_t count, const GradientRow& row,
              const Transform& transform) {
    const float to_tanh = slope_factor(transform);
    each_vector(z, count, 0.0f, [&](int64_t j, Floats x, int64_t lanes) {
        Floats value = exp_down(x - row.lse) * row.scale - row.uniform;
        if (to_tanh != 0) value *= slope_at(x, to_tanh);
        store_lanes(dy + j, value, lanes);
    });
}

void multiply(float* out, int64_t count, float factor) {
    each_vector(out, count, 0.0f, [&](int64_t j, Floats x, int64_t lanes) {
        store_lanes(out + j, x * factor, lanes);
    });
}

// kVectors sums in registers, over all entries.
template <int kVectors, typename T>
inline void weighted_strip(const T* table, int64_t stride, const int32_t* index, const float* value,
                           int64_t count, float* sum) {
    Floats x[kVectors] = {};
    for (int64_t k = 0; k < count; ++k) {
        const T* row = table + index[k] * stride;
        for (int r = 0; r < kVectors; ++r) x[r] += widen(row + r * kLanes) * value[k];
    }
    for (int r = 0; r < kVectors; ++r) store(sum + r * kLanes, x[r]);
}

// Strips are wide enough to keep two multipliers busy for the latency of a sum, a load a product.
template <typename T>
void weighted_rows(const void* table_, int64_t stride, const int32_t* index, const float* value,
                   int64_t count, float* sum, int64_t width) {
    const T* table = static_cast<const T*>(table_);
    int64_t j = 0;
    const auto strips = [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        for (; j + kVectors * kLanes <= width; j += kVectors * kLanes) {
            weighted_strip<kVectors>(table + j, stride, index, value, count, sum + j);
        }
    };
    strips(std::integral_constant<int, 8>{});
    strips(std::integral_constant<int, 4>{});
    strips(std::integral_constant<int, 2>{});
    strips(std::integral_constant<int, 1>{});
    for (; j < width; ++j) {
        float x = 0;
        for (int64_t k = 0; k < count; ++k)
            x += widen_one(table + index[k] * stride + j) * value[k];
        sum[j] = x;
    }
}

template <typename T>
void write_row(void* out_, const float* x, int64_t count, bool add) {
    T* out = static_cast<T*>(out_);
    int64_t j = 0;
    if constexpr (std::is_same_v<T, float>) {
        if (!add && reinterpret_cast<uintptr_t>(out) % sizeof(Floats) == 0) {
            for (; j + kLanes <= count; j += kLanes) stream(out + j, load(x + j));
        }
    }
    for (; j + kLanes <= count; j += kLanes) {
        const Floats value = load(x + j);
        narrow(out + j, add ? value + widen(out + j) : value);
    }
    for (; j < count; ++j) narrow_one(out + j, add ? x[j] + widen_one(out + j) : x[j]);
}

}  // namespace

const Kernels& table() {
    static const Kernels kernels{
        BFT_ISA_NAME,
        transform_row,
        exponentials,
        sum_shifted,
        find_at_least,
        draw_below,
        at_least,
        survivors,
        small_sums,
        multiply_slope,
        gradient,
        multiply,
        {weighted_rows<float>, weighted_rows<BFloat16>, weighted_rows<Float16>},
        {write_row<float>, write_row<BFloat16>, write_row<Float16>},
        stream_fence,
    };
    return kernels;
}

}  // namespace bft::cpu::BFT_ISA
