// Stands in for CUB's header: a stable sort on the host, by the same two calls.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

namespace cub {

struct DeviceRadixSort {
    // By the bits [begin_bit, end_bit) of unsigned keys.
    template <typename Key, typename Value, typename Count>
    static cudaError_t SortPairs(void* temporary, size_t& temporary_bytes, const Key* keys_in,
                                 Key* keys_out, const Value* values_in, Value* values_out,
                                 Count count, int begin_bit = 0, int end_bit = 8 * sizeof(Key),
                                 cudaStream_t = nullptr) {
        static_assert(std::is_unsigned_v<Key>, "other keys are ordered by a twist of their bits");
        constexpr const char* kName = "cub::DeviceRadixSort::SortPairs";
        const size_t n = static_cast<size_t>(count);
        const size_t needed = 256 + n * (sizeof(Key) + sizeof(Value));
        if (temporary == nullptr) {  // the first of the two calls asks for the size
            temporary_bytes = needed;
            return cudaSuccess;
        }
        if (temporary_bytes < needed) return cudaErrorInvalidValue;
        bft::emulation::host_access(kName, temporary, temporary_bytes, true);
        std::memset(temporary, 0xFF, temporary_bytes);  // nonsense, as a device's would be
        bft::emulation::host_access(kName, keys_in, n * sizeof(Key), false);
        bft::emulation::host_access(kName, values_in, n * sizeof(Value), false);
        bft::emulation::host_access(kName, keys_out, n * sizeof(Key), true);
        bft::emulation::host_access(kName, values_out, n * sizeof(Value), true);

        const int bits = end_bit - begin_bit;
        const Key mask = bits >= static_cast<int>(8 * sizeof(Key)) ? static_cast<Key>(~Key{})
                                                                   : (Key{1} << bits) - 1;
        const std::vector<Key> keys(keys_in, keys_in + n);
        const std::vector<Value> values(values_in, values_in + n);
        std::vector<size_t> order(n);
        std::iota(order.begin(), order.end(), size_t{0});
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
            return (keys[a] >> begin_bit & mask) < (keys[b] >> begin_bit & mask);
        });
        for (size_t i = 0; i < n; ++i) {
            keys_out[i] = keys[order[i]];
            values_out[i] = values[order[i]];
        }
        return cudaSuccess;
    }
};

}  // namespace cub
