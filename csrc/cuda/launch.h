#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace bft::cuda {

// Call right after <<<...>>>: turns the error of that launch into an exception. What goes wrong
// while the kernel runs shows at a later synchronisation, as with every CUDA library.
inline void check_launch(const char* kernel) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(kernel) + ": the CUDA launch failed: " +
                                 cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
    }
}

}  // namespace bft::cuda
