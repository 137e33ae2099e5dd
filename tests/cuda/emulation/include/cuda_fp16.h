// Stands in for CUDA's header: the type and its conversions, rounding to nearest even.
#pragma once

#include <cuda_runtime.h>

struct __half {
    uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, exponent = x.bits >> 10 & 31;
    const uint32_t mantissa = x.bits & 0x3FF;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | mantissa << 13);
    if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline __half __float2half(float x) {
    const uint32_t bits = __float_as_uint(x);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const float magnitude = std::fabs(x);
    if (x != x) return {0x7FFF};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
    if (magnitude < 0x1p-14f) {  // subnormal: the sum below rounds at 2^-24
        const float rounded = magnitude + 0.5f;
        return {static_cast<uint16_t>(sign | (__float_as_uint(rounded) - __float_as_uint(0.5f)))};
    }
    const uint32_t rebased = (bits & 0x7FFFFFFF) - (112u << 23);
    return {static_cast<uint16_t>(sign | (rebased + 0xFFF + (rebased >> 13 & 1)) >> 13)};
}
inline __half __float2half_rn(float x) { return __float2half(x); }
