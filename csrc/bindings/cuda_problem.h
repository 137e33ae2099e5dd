// Checks of what the CUDA kernels of the linear cross-entropy are given.
#pragma once

#include <limits>

#include "csrc/bindings/checks.h"
#include "csrc/cuda/kernels.h"

namespace bft {

// Numbers of rows and columns are 32-bit in kernels, those of the last tile included.
constexpr int64_t kMaxVocabulary = std::numeric_limits<int32_t>::max() - 1024;
constexpr int64_t kMaxRows = kMaxVocabulary;
// Tiles of a launch are counted by the grid.
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();

// Problem, as Python gives it.
struct ProblemArguments {
    std::uintptr_t hidden, weight, bias, target, order, count;
    int64_t rows, vocabulary, depth, stride_hn, stride_wv;
    int dtype;
    float softcap, temperature;
};

template <typename T>
cuda::Problem checked_problem(const ProblemArguments& given, cuda::Type type) {
    const int64_t n = given.rows, v = given.vocabulary, d = given.depth;
    // Operands are read by rows: the address is one of elements, whatever their number.
    return {type,
            checked_pointer<T>("hidden_ptr", given.hidden, n),
            checked_pointer<T>("weight_ptr", given.weight, v),
            checked_pointer<float>("bias_ptr", given.bias, 0),
            checked_pointer<int64_t>("target_ptr", given.target, n),
            checked_pointer<int64_t>("order_ptr", given.order, n),
            checked_pointer<int64_t>("count_ptr", given.count, 1),
            n,
            v,
            d,
            given.stride_hn,
            given.stride_wv,
            given.softcap,
            given.temperature};
}

inline cuda::Problem checked_problem(const ProblemArguments& given) {
    constexpr int64_t kMaxStride = int64_t{1} << 48;
    check_range("N", given.rows, 0, kMaxRows);
    check_range("V", given.vocabulary, 1, kMaxVocabulary);
    check_range("D", given.depth, 1, int64_t{1} << 30);
    check_range("stride_hn", given.stride_hn, -kMaxStride, kMaxStride);
    check_range("stride_wv", given.stride_wv, -kMaxStride, kMaxStride);
    check_range("dtype", given.dtype, 0, 2);
    constexpr float kLargest = std::numeric_limits<float>::max();
    check_number("softcap", given.softcap, 0, kLargest);
    check_number("temperature", given.temperature, std::numeric_limits<float>::min(), kLargest);
    const auto type = static_cast<cuda::Type>(given.dtype);
    if (type == cuda::Type::kFloat32) return checked_problem<float>(given, type);
    return checked_problem<uint16_t>(given, type);
}

inline cuda::Splits checked_splits(int count, int columns, int64_t vocabulary, int64_t rows) {
    check_range("split_columns", columns, 1, std::numeric_limits<int32_t>::max());
    check_range("split_columns % 128", columns % cuda::kTileV, 0, 0);
    const int64_t needed = (vocabulary + columns - 1) / columns;
    check_range("splits", count, needed, needed);
    check_range("splits * row blocks", count * ((rows + cuda::kTileN - 1) / cuda::kTileN), 0,
                kMaxBlocks);
    return {count, columns};
}

}  // namespace bft
