// Argument checks of the bindings. Kernels trust what they are given; what comes from Python is
// checked here. std::invalid_argument becomes ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace bft {

inline int64_t check_range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) +
                                    ", expected a number from " + std::to_string(low) + " to " +
                                    std::to_string(high));
    }
    return value;
}

// Not NaN either.
inline void check_number(const char* name, float value, float low, float high) {
    if (!(value >= low && value <= high)) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) +
                                    ", expected a number from " + std::to_string(low) + " to " +
                                    std::to_string(high));
    }
}

// The address of an array of `elements` T as a pointer. An empty array may have no address: torch
// gives 0 for one.
template <typename T>
T* checked_pointer(const char* name, std::uintptr_t address, int64_t elements) {
    if ((address == 0 && elements > 0) || address % alignof(T) != 0) {
        throw std::invalid_argument(std::string(name) + ": got address " + std::to_string(address) +
                                    ", expected a multiple of " + std::to_string(alignof(T)) +
                                    " other than 0, of " + std::to_string(elements) + " elements");
    }
    return reinterpret_cast<T*>(address);
}

}  // namespace bft
