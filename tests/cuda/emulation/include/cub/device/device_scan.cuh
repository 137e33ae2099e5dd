// Stands in for CUB's header: prefix sums on the host, by the same two calls.
#pragma once

#include "tests/cuda/emulation/include/cub/temporary.h"

namespace cub {

struct DeviceScan {
    // Both may be given the same input and output.
    template <typename In, typename Out, typename Count>
    static cudaError_t ExclusiveSum(void* temporary, size_t& temporary_bytes, const In* in,
                                    Out* out, Count count, cudaStream_t = nullptr) {
        return scan("cub::DeviceScan::ExclusiveSum", temporary, temporary_bytes, in, out, count,
                    false);
    }
    template <typename In, typename Out, typename Count>
    static cudaError_t InclusiveSum(void* temporary, size_t& temporary_bytes, const In* in,
                                    Out* out, Count count, cudaStream_t = nullptr) {
        return scan("cub::DeviceScan::InclusiveSum", temporary, temporary_bytes, in, out, count,
                    true);
    }

  private:
    template <typename In, typename Out, typename Count>
    static cudaError_t scan(const char* name, void* temporary, size_t& temporary_bytes,
                            const In* in, Out* out, Count count, bool inclusive) {
        cudaError_t error;
        if (bft::emulation::asks_for_size(temporary, temporary_bytes, 256, error)) return error;
        bft::emulation::host_access(name, in, count * sizeof(In), false);
        bft::emulation::host_access(name, out, count * sizeof(Out), true);
        Out sum{};
        for (Count i = 0; i < count; ++i) {
            const Out before = sum;
            sum += static_cast<Out>(in[i]);
            out[i] = inclusive ? sum : before;
        }
        return cudaSuccess;
    }
};

}  // namespace cub
