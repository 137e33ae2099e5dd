#include "csrc/cpu/backward.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "csrc/cpu/parallel.h"

namespace bft::cpu {
namespace {

constexpr int64_t kColumnGrain = 256;

size_t bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

void* element_of(const Matrix& matrix, int64_t row, int64_t column) {
    return static_cast<char*>(matrix.data) +
           static_cast<size_t>(row * matrix.stride + column) * bytes_of(matrix.type);
}

// Entries grouped by column, in row order.
struct ByColumn {
    std::vector<int64_t> starts;      // [V + 1]
    std::unique_ptr<int32_t[]> rows;  // [entries]
    std::unique_ptr<float[]> values;  // [entries], the upstream gradient included
};

ByColumn sort_by_column(const Entries& entries, int64_t vocabulary, int threads) {
    const int64_t count = entries.offsets[entries.rows];
    ByColumn sorted;
    sorted.starts.assign(static_cast<size_t>(vocabulary) + 1, 0);
    sorted.rows.reset(new int32_t[count]);
    sorted.values.reset(new float[count]);
    int64_t* starts = sorted.starts.data();

    const int64_t part = (vocabulary + threads - 1) / threads;
    parallel_for(threads, vocabulary, std::max<int64_t>(part, 1),
                 [&](int, int64_t first, int64_t stop) {
                     const uint32_t low = static_cast<uint32_t>(first);
                     const uint32_t span = static_cast<uint32_t>(stop - first);
                     for (int64_t k = 0; k < count; ++k) {
                         const uint32_t column = static_cast<uint32_t>(entries.columns[k]);
                         if (column - low < span) ++starts[column + 1];
                     }
                 });
    for (int64_t v = 0; v < vocabulary; ++v) starts[v + 1] += starts[v];

    // Ranges of columns with about as many entries each; `next` has the place of a column's next.
    std::vector<int64_t> bounds{0};
    for (int thread = 1; thread < threads; ++thread) {
        const int64_t* bound =
            std::lower_bound(starts, starts + vocabulary, count * thread / threads);
        bounds.push_back(std::max<int64_t>(bounds.back(), bound - starts));
    }
    bounds.push_back(vocabulary);
    std::vector<int64_t> next(sorted.starts.begin(), sorted.starts.end() - 1);
    parallel_for(threads, threads, 1, [&](int, int64_t range, int64_t) {
        const uint32_t low = static_cast<uint32_t>(bounds[range]);
        const uint32_t span = static_cast<uint32_t>(bounds[range + 1]) - low;
        for (int64_t i = 0; i < entries.rows; ++i) {
            for (int64_t k = entries.offsets[i]; k < entries.offsets[i + 1]; ++k) {
                const uint32_t column = static_cast<uint32_t>(entries.columns[k]);
                if (column - low >= span) continue;
                const int64_t place = next[column]++;
                sorted.rows[place] = static_cast<int32_t>(i);
                sorted.values[place] = entries.values[k] * entries.upstream[i];
            }
        }
    });
    return sorted;
}

}  // namespace

void spmm_hidden(const Entries& entries, const Matrix& weight, const Matrix& grad_hidden,
                 int threads) {
    const Kernels& kernel = kernels();
    const auto weighted_rows = kernel.weighted_rows[static_cast<int>(weight.type)];
    const auto write = kernel.write[static_cast<int>(grad_hidden.type)];
    constexpr int64_t kGrain = 4;
    parallel_for(threads, entries.rows, kGrain, [&](int, int64_t first, int64_t stop) {
        std::vector<float> sum(static_cast<size_t>(weight.width));
        for (int64_t i = first; i < stop; ++i) {
            const int64_t begin = entries.offsets[i];
            weighted_rows(weight.data, weight.stride, entries.columns + begin,
                          entries.values + begin, entries.offsets[i + 1] - begin, sum.data(),
                          weight.width);
            kernel.multiply(sum.data(), weight.width, entries.upstream[i]);
            write(element_of(grad_hidden, i, 0), sum.data(), weight.width, false);
        }
        kernel.settle();
    });
}

void spmm_weight(const Entries& entries, const Matrix& hidden, const Matrix* grad_weight, bool add,
                 float* grad_bias, int64_t vocabulary, int64_t slice, int threads) {
    const Kernels& kernel = kernels();
    const ByColumn sorted = sort_by_column(entries, vocabulary, threads);
    const int64_t* starts = sorted.starts.data();
    if (grad_bias) {
        for (int64_t v = 0; v < vocabulary; ++v) {
            float sum = 0;
            for (int64_t k = starts[v]; k < starts[v + 1]; ++k) sum += sorted.values[k];
            grad_bias[v] = sum;
        }
    }
    if (grad_weight == nullptr) return;
    const auto weighted_rows = kernel.weighted_rows[static_cast<int>(hidden.type)];
    const auto write = kernel.write[static_cast<int>(grad_weight->type)];
    const int64_t slices = (hidden.width + slice - 1) / slice;
    const int64_t groups = (vocabulary + kColumnGrain - 1) / kColumnGrain;
    parallel_for(threads, slices * groups, 1, [&](int, int64_t task, int64_t) {
        const int64_t left = task / groups * slice;
        const int64_t width = std::min(slice, hidden.width - left);
        const int64_t first = task % groups * kColumnGrain;
        const int64_t stop = std::min(first + kColumnGrain, vocabulary);
        const void* table = element_of(hidden, 0, left);
        std::vector<float> sum(static_cast<size_t>(width));
        for (int64_t v = first; v < stop; ++v) {
            const int64_t begin = starts[v];
            const int64_t count = starts[v + 1] - begin;
            if (count == 0 && add) continue;
            weighted_rows(table, hidden.stride, sorted.rows.get() + begin,
                          sorted.values.get() + begin, count, sum.data(), width);
            write(element_of(*grad_weight, v, left), sum.data(), width, add);
        }
        kernel.settle();
    });
}

}  // namespace bft::cpu
