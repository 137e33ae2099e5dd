// The counter-based hash behind gradient="sampled": one random number per entry of the [N, V]
// probability matrix, computed from (seed, row, column) alone. Nothing is stored, so the forward,
// the backward, any tiling and every backend see the same number for the same entry, bit for bit.
//
//     key(seed, row)      = mix64(mix64(seed + GAMMA) + GAMMA * row)         64 bits, modulo 2^64
//     multiplier, offset  = (key >> 32) | 1,  key & 0xFFFFFFFF
//     bits(key, column)   = mix32(multiplier * column + offset)              32 bits, modulo 2^32
//     u                   = (float32(bits >> 8) + 0.5f) * 2^-24              in (0, 1]
//
// The seed and the row (the position in the flattened input) are 64 bits wide; a negative seed is
// its two's complement. The column is the vocabulary index. The sum with 0.5f rounds to nearest
// even, which makes 1 the largest u.
//
// Each row has a multiplier of its own because an offset, or an xor, is not enough: rows whose keys
// lie within V of each other would then draw shifted copies of the same numbers.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define BFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BFT_HOST_DEVICE inline
#endif

namespace bft {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15;

// The finaliser of splitmix64.
BFT_HOST_DEVICE uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

// mix32 without its last step, which leaves the upper 16 bits as they are.
BFT_HOST_DEVICE uint32_t mix32_high(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352D;
    return (x ^ (x >> 15)) * 0x846CA68B;
}

// lowbias32: two multiplications, which are cheap where 32-bit ones are fast.
BFT_HOST_DEVICE uint32_t mix32(uint32_t x) {
    x = mix32_high(x);
    return x ^ (x >> 16);
}

// Derive it once a row and keep it in registers: it takes all of the hash's 64-bit arithmetic.
struct RowKey {
    uint32_t multiplier;  // odd, so that no two columns of a row collide
    uint32_t offset;
};

BFT_HOST_DEVICE RowKey row_key(uint64_t seed, uint64_t row) {
    const uint64_t key = mix64(mix64(seed + kGamma) + kGamma * row);
    return {static_cast<uint32_t>(key >> 32) | 1u, static_cast<uint32_t>(key)};
}

// The number of one entry: T = uint32_t gives all 32 bits, T = float gives u.
template <typename T>
BFT_HOST_DEVICE T draw(RowKey key, uint32_t column) {
    const uint32_t bits = mix32(key.multiplier * column + key.offset);
    if constexpr (std::is_same_v<T, float>) {
        return (static_cast<float>(bits >> 8) + 0.5f) * 0x1p-24f;
    } else {
        static_assert(std::is_same_v<T, uint32_t>);
        return bits;
    }
}

}  // namespace bft
