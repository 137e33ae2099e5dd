// Vectors of float for the kernels of one instruction set, on the vector extensions of GCC and
// Clang. A file that includes this is compiled once for each instruction set and defines
//
//     BFT_ISA     a namespace of its own, so that no two compilations share a symbol
//     BFT_LANES   floats in a vector: 16 with AVX-512, 8 with AVX2, 4 elsewhere
//
// Everything is internal to the file for the same reason: of an inline function the linker keeps
// one copy, which must not be made of instructions that this processor lacks.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>

// The intrinsic of this width, and its vector of floats.
#if BFT_LANES == 16
#define BFT_INTRINSIC(name) _mm512_##name
#define BFT_NATIVE(x) bit_cast<__m512>(x)
#elif BFT_LANES == 8
#define BFT_INTRINSIC(name) _mm256_##name
#define BFT_NATIVE(x) bit_cast<__m256>(x)
#else
#define BFT_INTRINSIC(name) _mm_##name
#define BFT_NATIVE(x) bit_cast<__m128>(x)
#endif
#endif

namespace bft::cpu::BFT_ISA {
namespace {

constexpr int kLanes = BFT_LANES;
constexpr float kInfinity = __builtin_inff();

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

template <typename To, typename From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename Vector = Floats, typename T>
inline Vector load(const T* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <typename Vector, typename T>
inline void store(T* to, Vector x) {
    std::memcpy(to, &x, sizeof x);
}

inline Floats splat(float x) { return x - Floats{}; }
inline Words splat_words(uint32_t x) { return x - Words{}; }

// 0, 1, 2, ...
inline Words lane_numbers() {
    Words x;
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = static_cast<uint32_t>(lane);
    return x;
}

// a > b ? a : b, which compilers do not always see to be one instruction.
inline Floats maximum(Floats a, Floats b) {
#if defined(__x86_64__)
    return bit_cast<Floats>(BFT_INTRINSIC(max_ps)(BFT_NATIVE(a), BFT_NATIVE(b)));
#endif
    return a > b ? a : b;
}

// Combines the two halves until one number is left: log2(lanes) steps, and small rounding errors.
template <typename Combine>
inline float horizontal(Floats x, Combine combine) {
    float lanes[kLanes];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) {
            lanes[lane] = combine(lanes[lane], lanes[lane + half]);
        }
    }
    return lanes[0];
}

inline float horizontal_sum(Floats x) {
    return horizontal(x, [](float a, float b) { return a + b; });
}

inline float horizontal_max(Floats x) {
    return horizontal(x, [](float a, float b) { return a > b ? a : b; });
}

// Bit i is set where a[i] < b[i].
inline uint32_t less_mask(Floats a, Floats b) {
#if defined(__x86_64__) && BFT_LANES == 16
    return _mm512_cmp_ps_mask(BFT_NATIVE(a), BFT_NATIVE(b), _CMP_LT_OQ);
#elif defined(__x86_64__)
    return static_cast<uint32_t>(BFT_INTRINSIC(movemask_ps)(BFT_NATIVE(a < b)));
#endif
    const Ints less = a < b;
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(less[lane] & 1) << lane;
    return bits;
}

// Appends the lanes whose bit is set, as first + lane, to places[found...]; returns the new number.
// May write kLanes numbers, whatever the bits are.
inline int64_t append_lanes(uint32_t bits, int64_t first, uint32_t* places, int64_t found) {
#if defined(__x86_64__) && BFT_LANES == 16  // no branch to mispredict
    const Words place = lane_numbers() + static_cast<uint32_t>(first);
    const __m512i packed =
        _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), bit_cast<__m512i>(place));
    std::memcpy(places + found, &packed, sizeof packed);
    return found + __builtin_popcount(bits);
#endif
    while (bits) {
        places[found++] = static_cast<uint32_t>(first + __builtin_ctz(bits));
        bits &= bits - 1;
    }
    return found;
}

// exp(x) for x <= 0 and a little above, within 1 ulp (the polynomial of Cephes' expf); 0 below
// -87.3, where the true value leaves the normal numbers; NaN for NaN.
inline Floats exp_down(Floats x) {
    const Floats kMagic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = x * 1.44269504088896341f + kMagic;
    const Floats n = shifted - kMagic;
    Floats f = x - n * 0.693359375f;
    f = f - n * -2.12194440e-4f;
    Floats p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + (f + 1.0f);
    // The low bits of `shifted` hold n. A product keeps a NaN; adding to the exponent would not.
    const Words scale = (bit_cast<Words>(shifted) << 23) + 0x3F800000u;
    return x < -87.3f ? Floats{} : p * bit_cast<Floats>(scale);
}

// tanh(x), within a few ulp (the polynomial of Cephes' tanhf near 0).
inline Floats tanh(Floats x) {
    const Floats magnitude = x < 0.0f ? -x : x;
    const Floats e = exp_down(magnitude * -2.0f);
    const Floats far = (1.0f - e) / (1.0f + e);
    const Floats square = x * x;
    Floats p = splat(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Floats near = p * square * magnitude + magnitude;
    const Floats result = magnitude < 0.625f ? near : far;
    return x < 0.0f ? -result : result;
}

// mix32 of csrc/sampling.h, lane by lane, without its last step, which alters only the low half.
inline Words mix32_high(Words x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    return (x ^ (x >> 15)) * 0x846CA68Bu;
}

// mix32 with its last step.
inline Words mix32(Words x) {
    x = mix32_high(x);
    return x ^ (x >> 16);
}

// --- storage types -------------------------------------------------------------------------------

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline Floats widen(const float* from) { return load(from); }

inline Floats widen(const BFloat16* from) {
    return bit_cast<Floats>(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

// Exponents are rebased by a product with 2^112, which is right for subnormal halves too.
inline Floats widen(const Float16* from) {
    const Words half = __builtin_convertvector(load<Halves>(from), Words);
    const Words magnitude = (half & 0x7FFFu) << 13;
    Words bits = bit_cast<Words>(bit_cast<Floats>(magnitude) * 0x1p112f);
    bits = magnitude >= 0x0F800000u ? (magnitude | 0x7F800000u) : bits;  // infinity and NaN
    return bit_cast<Floats>(bits | ((half & 0x8000u) << 16));
}

inline void narrow(float* to, Floats x) { store(to, x); }

// A store that bypasses the caches, for data not read soon; `to` is aligned to the vector.
inline void stream(float* to, Floats x) {
#if defined(__x86_64__)
    return BFT_INTRINSIC(stream_ps)(to, BFT_NATIVE(x));
#endif
    store(to, x);
}

// Must be called before another thread reads streamed data.
inline void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Round to nearest even.
inline void narrow(BFloat16* to, Floats x) {
    const Words bits = bit_cast<Words>(x);
    Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    rounded = x == x ? rounded : (bits >> 16) | 0x40u;  // a NaN stays one
    store(to, __builtin_convertvector(rounded, Halves));
}

inline void narrow(Float16* to, Floats x) {
    const Words bits = bit_cast<Words>(x);
    const Words magnitude = bits & 0x7FFFFFFFu;
    const Words sign = (bits >> 16) & 0x8000u;
    Words normal = magnitude + 0xC8000FFFu + ((magnitude >> 13) & 1u);  // rebase, round to even
    normal = normal >> 13;
    // Below 2^-14 the sum with 0.5 leaves the value, rounded to even, in the lowest bits.
    const Words small = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3F000000u;
    Words result = magnitude < 0x38800000u ? small : normal;
    result = magnitude >= 0x477FF000u ? splat_words(0x7C00u) : result;
    result = magnitude > 0x7F800000u ? splat_words(0x7E00u) : result;
    store(to, __builtin_convertvector(result | sign, Halves));
}

template <typename T>
inline float widen_one(const T* from) {
    T padded[kLanes] = {};
    padded[0] = *from;
    return widen(padded)[0];
}

template <typename T>
inline void narrow_one(T* to, float x) {
    T padded[kLanes];
    narrow(padded, splat(x));
    *to = padded[0];
}

}  // namespace
}  // namespace bft::cpu::BFT_ISA
