// Turns a problem into the arguments and the instance of a kernel.
#pragma once

#include <type_traits>

#include "csrc/cuda/kernels.h"
#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The number of blocks, if each block takes so many elements.
constexpr unsigned blocks_of(int64_t elements, int64_t each) {
    return static_cast<unsigned>(ceil_div(elements, each));
}

inline Transform transform_of(float softcap, float temperature) {
    return {softcap, softcap > 0 ? 1 / softcap : 0, 1 / temperature};
}

template <typename T>
Operands<T> operands_of(const Problem& problem) {
    return {static_cast<const T*>(problem.hidden),
            static_cast<const T*>(problem.weight),
            problem.bias,
            problem.target,
            problem.order,
            problem.row_count,
            problem.stride_hn,
            problem.stride_wv,
            static_cast<int>(problem.vocabulary),
            static_cast<int>(problem.depth),
            transform_of(problem.softcap, problem.temperature)};
}

// Whether rows start at multiples of 16 bytes.
template <typename T>
bool rows_aligned(const void* first, int64_t stride) {
    return reinterpret_cast<uintptr_t>(first) % 16 == 0 && stride * sizeof(T) % 16 == 0;
}

// Calls run(T()) with the type of the operands.
template <typename Run>
void with_operands(Type type, Run run) {
    if (type == Type::kFloat32) run(float());
    if (type == Type::kBFloat16) run(bf16());
    if (type == Type::kFloat16) run(fp16());
}

// Calls run(T(), std::bool_constant<Aligned>()) with the type of the operands, and whether all of
// their rows can be copied 16 bytes at a time.
template <typename Run>
void with_type(const Problem& problem, Run run) {
    with_operands(problem.type, [&](auto zero) {
        using T = decltype(zero);
        if (rows_aligned<T>(problem.hidden, problem.stride_hn) &&
            rows_aligned<T>(problem.weight, problem.stride_wv)) {
            run(zero, std::true_type());
        } else {
            run(zero, std::false_type());
        }
    });
}

// Calls run(T* or float*) with the gradient's place, by its type.
template <typename T, typename Run>
void with_output(const Output& output, Run run) {
    if (output.is_float32) {
        run(static_cast<float*>(output.at));
    } else {
        run(static_cast<T*>(output.at));
    }
}

}  // namespace bft::cuda
