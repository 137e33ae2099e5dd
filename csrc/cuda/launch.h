#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#ifdef BFT_EMULATION
#include <tuple>

#include "tests/cuda/emulation/launch.h"
#endif

namespace bft::cuda {

// Turns the error of a launch into an exception. An error while the kernel runs shows at a later
// synchronisation, as with every CUDA library.
inline void check_launch(const char* kernel, cudaError_t error) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(kernel) + ": the CUDA launch failed: " +
                                 cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
    }
}

struct Launch {
    const char* kernel;  // its name in messages
    dim3 grid;           // of zero blocks: nothing is launched, though CUDA sees an error
    dim3 block;
    size_t shared_bytes;  // dynamic; above 48 KiB if the device has it
    void* stream;         // a cudaStream_t
};

// kernel<<<...>>>(arguments...) with a check for errors; arguments must convert to the kernel's
// parameters. With BFT_EMULATION it runs the kernel in the emulation until that has ended.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& how, Arguments&&... arguments) {
    if (how.grid.x == 0) return;
#ifndef BFT_EMULATION
    if (how.shared_bytes > 48 << 10) {
        // If this fails, the launch fails, too.
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(how.shared_bytes));
    }
    kernel<<<how.grid, how.block, how.shared_bytes, static_cast<cudaStream_t>(how.stream)>>>(
        std::forward<Arguments>(arguments)...);
    check_launch(how.kernel, cudaGetLastError());
#else
    const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    emulation::run(how.kernel, how.grid, how.block, how.shared_bytes,
                   [&] { std::apply(kernel, values); });
#endif
}

}  // namespace bft::cuda
