// Runs csrc/cpu on buffers of exactly the size that it is told, under the sanitizers. What comes
// out is the business of test_fused.py and test_cpu.py. Compiled by test_cpu_sanitized.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "csrc/cpu/backward.h"
#include "csrc/cpu/online_softmax.h"

using namespace bft;
using namespace bft::cpu;

namespace {

std::mt19937 generator(20);

std::vector<float> normal(int64_t count, float scale = 1) {
    std::normal_distribution<float> distribution(0, scale);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& x : values) x = distribution(generator);
    return values;
}

struct Case {
    int64_t rows, vocabulary, width, block_rows, block_columns;
    float softcap, temperature, eps;
    bool bias, sample, certificate, norms;
    int threads;
};

// Calls visit(block) for all blocks, of random products; a block's memory ends where it ends.
template <typename Visit>
void each_block(const Case& c, Visit visit) {
    for (int64_t v = 0; v < c.vocabulary; v += c.block_columns) {
        const int64_t columns = std::min(c.block_columns, c.vocabulary - v);
        for (int64_t i = 0; i < c.rows; i += c.block_rows) {
            const int64_t rows = std::min(c.block_rows, c.rows - i);
            std::vector<float> products = normal(rows * columns, 4);
            visit(Block{products.data(), columns, i, rows, v, columns});
        }
    }
}

// Floats on a cache line of their own, as a streaming store wants them.
using Aligned = std::unique_ptr<float[], void (*)(void*)>;

Aligned aligned(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
    return {static_cast<float*>(std::aligned_alloc(64, bytes)), std::free};
}

void run(const Case& c) {
    const size_t n = static_cast<size_t>(c.rows);
    const std::vector<float> bias = normal(c.vocabulary), norms(bias.size(), 1.0f);
    std::vector<int64_t> targets(n), positions(n), counts(n), offsets(n + 1);
    for (size_t i = 0; i < n; ++i) {
        targets[i] = generator() % c.vocabulary;
        positions[i] = 3 * i + 1;
    }
    SoftmaxSettings settings;
    settings.vocabulary = c.vocabulary;
    settings.transform = {c.bias ? bias.data() : nullptr, c.softcap, c.temperature};
    settings.norms = c.norms ? norms.data() : nullptr;
    settings.eps = c.eps;
    settings.seed = 77;
    settings.sample = c.sample;
    settings.certificate = c.certificate;
    OnlineSoftmax softmax(settings, c.rows, targets.data(), positions.data(), nullptr);
    std::vector<Aligned> kept_blocks;
    each_block(c, [&](const Block& block) {
        kept_blocks.push_back(aligned(block.rows * block.columns));
        softmax.add(block, kept_blocks.back().get(), {c.threads});
    });
    std::vector<float> loss(n), nll(n), lse(n), lse_low(n), entropy(n), variance(n), weighted(n);
    std::unique_ptr<bool[]> correct(new bool[n]);
    softmax.finish(0, c.rows,
                   {loss.data(), nll.data(), lse.data(), lse_low.data(), entropy.data(),
                    correct.get(), variance.data(), weighted.data(), counts.data()},
                   c.threads);
    for (size_t i = 0; i < n; ++i) offsets[i + 1] = offsets[i] + counts[i];
    std::vector<int32_t> columns(static_cast<size_t>(offsets[n]));
    std::vector<float> values(columns.size());
    if (c.sample) softmax.entries(offsets.data(), columns.data(), values.data(), c.threads);

    const std::vector<float> ones(n, 1.0f);
    size_t number = 0;
    each_block(c, [&](const Block& block) {
        const int64_t i = block.first_row;
        const auto gradient = [&](const float* kept, const Block& out) {
            gradient_block({settings.transform, kept, c.vocabulary, 0, 0, targets.data() + i,
                            lse.data() + i, lse_low.data() + i, nll.data() + i, ones.data() + i},
                           out, c.threads);
        };
        gradient(nullptr, block);
        Block wide = block;  // a part of wider rows
        wide.stride = block.columns + 7;
        std::vector<float> out(static_cast<size_t>((block.rows - 1) * wide.stride + block.columns));
        wide.logits = out.data();
        gradient(kept_blocks[number++].get(), wide);
    });
    if (!c.sample) return;

    std::vector<float> hidden = normal(c.rows * c.width), weight = normal(c.vocabulary * c.width);
    std::vector<float> grad_hidden(hidden.size()), grad_weight(weight.size());
    std::vector<float> grad_bias(bias.size());
    const Entries entries{c.rows, offsets.data(), columns.data(), values.data(), ones.data()};
    const auto matrix = [&](std::vector<float>& x, int64_t rows) {
        return Matrix{x.data(), DType::kFloat32, rows, c.width, c.width};
    };
    spmm_hidden(entries, matrix(weight, c.vocabulary), matrix(grad_hidden, c.rows), c.threads);
    const Matrix out = matrix(grad_weight, c.vocabulary);
    spmm_weight(entries, matrix(hidden, c.rows), &out, false, grad_bias.data(), c.vocabulary,
                1 + c.rows % c.width, c.threads);
}

}  // namespace

int main() {
    int done = 0;
    for (const char* name : available_kernels()) {
        select_kernels(name);
        for (const int64_t vocabulary : {1, 3, 16, 37, 64, 515, 4000}) {
            for (const int64_t rows : {0, 1, 9, 30}) {
                for (int variant = 0; variant < 6; ++variant) {
                    run({rows, vocabulary, 1 + 11 * variant, variant % 2 ? 4 : 64,
                         variant < 3 ? 17 : 700, variant % 3 == 1 ? 3.0f : 0.0f,
                         variant == 5 ? 0.7f : 1.0f, variant % 2 ? 0.05f : 2e-4f, variant % 3 == 2,
                         variant != 4, variant > 1, variant > 3, 1 + variant % 3});
                    ++done;
                }
            }
        }
        // Flat rows, which are thinned before their end.
        for (const bool certificate : {false, true}) {
            run({9, 4000, 5, 4, 700, 3.0f, 1.0f, 2e-4f, true, true, certificate, certificate, 2});
            ++done;
        }
    }
    std::printf("%d cases on %zu instruction sets\n", done, available_kernels().size());
    return 0;
}
