// Writes the draws of csrc/sampling.h: for each line "SEED ROW0 ROWS COL0 COLS" on standard input,
// the bits of the rectangle as uint32 and then u as float32, both [ROWS, COLS], to standard output.
// Compiled by the host's compiler it computes there; by nvcc (-x cu), on a GPU.
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <vector>

#ifdef __CUDACC__
#include "tests/cuda/emulation/programs/draws.cuh"
#else
#include "csrc/sampling.h"
#endif

namespace {

template <typename T>
void write(int64_t seed, int64_t row0, int64_t rows, int64_t col0, int64_t cols) {
    std::vector<T> out(rows * cols);
#ifdef __CUDACC__
    T* there = nullptr;
    cudaMalloc(&there, out.size() * sizeof(T));
    bft::cuda::fill_draws<T>(seed, {row0, rows, col0, cols}, there, nullptr);
    const cudaError_t error =
        cudaMemcpy(out.data(), there, out.size() * sizeof(T), cudaMemcpyDeviceToHost);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    cudaFree(there);
#else
    for (int64_t i = 0; i < rows * cols; ++i) {
        const bft::RowKey key = bft::row_key(seed, row0 + i / cols);
        out[i] = bft::draw<T>(key, static_cast<uint32_t>(col0 + i % cols));
    }
#endif
    std::fwrite(out.data(), sizeof(T), out.size(), stdout);
}

}  // namespace

int main() {
    int64_t seed, row0, rows, col0, cols;
    while (std::cin >> seed >> row0 >> rows >> col0 >> cols) {
        write<uint32_t>(seed, row0, rows, col0, cols);
        write<float>(seed, row0, rows, col0, cols);
        std::fflush(stdout);
    }
}
