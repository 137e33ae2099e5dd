// The first of CUB's two calls: no address yet, asks for the size.
#pragma once

#include <cuda_runtime.h>

namespace bft::emulation {

// Whether this call is the query. Otherwise `bytes` must be what it answered, and are filled with
// nonsense, as a device's would be.
inline bool asks_for_size(void* temporary, size_t& bytes, size_t needed, cudaError_t& error) {
    error = cudaSuccess;
    if (temporary == nullptr) {
        bytes = needed;
        return true;
    }
    if (bytes < needed) {
        error = cudaErrorInvalidValue;
        return true;
    }
    host_access("temporary storage of CUB", temporary, bytes, true);
    std::memset(temporary, 0xFF, bytes);
    return false;
}

}  // namespace bft::emulation
