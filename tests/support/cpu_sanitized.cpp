// Runs csrc/cpu on buffers of exactly the size that it is told, under the sanitizers, and compares
// with a few lines in double. Exits with 1 at the first difference. Compiled by
// test_cpu_sanitized.py.
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

float normal() { return std::normal_distribution<float>()(generator); }

void check(bool right, const char* what, double got, double expected) {
    if (right) return;
    std::printf("%s: got %.9g, expected %.9g\n", what, got, expected);
    std::exit(1);
}

void check_close(const char* what, double got, double expected) {
    const double off = std::fabs(got - expected);
    check(off <= 2e-5 * (1 + std::fabs(expected)), what, got, expected);
}

struct Case {
    int64_t rows, vocabulary, width, block_rows, block_columns;
    float softcap, temperature, eps;
    bool bias, sample, certificate, norms;
    int threads;
};

struct Problem {
    std::vector<float> y, z, bias, norms;  // y, z [rows, V]
    std::vector<int64_t> targets, positions;

    explicit Problem(const Case& c) {
        for (int64_t v = 0; v < c.vocabulary; ++v) {
            bias.push_back(normal());
            norms.push_back(std::fabs(normal()));
        }
        for (int64_t i = 0; i < c.rows; ++i) {
            targets.push_back(generator() % c.vocabulary);
            positions.push_back(3 * i + 1);
            for (int64_t v = 0; v < c.vocabulary; ++v) {
                y.push_back(4 * normal());
                double value = y.back() + (c.bias ? bias[v] : 0);
                if (c.softcap != 0) value = c.softcap * std::tanh(value / c.softcap);
                z.push_back(static_cast<float>(value / c.temperature));
            }
        }
    }
};

Transform transform_of(const Case& c, const Problem& p) {
    return {c.bias ? p.bias.data() : nullptr, c.softcap, c.temperature};
}

// Calls visit(block, copy of its products) for all blocks; the copy ends where the block ends.
template <typename Visit>
void each_block(const Case& c, const Problem& p, Visit visit) {
    for (int64_t v = 0; v < c.vocabulary; v += c.block_columns) {
        const int64_t columns = std::min(c.block_columns, c.vocabulary - v);
        for (int64_t i = 0; i < c.rows; i += c.block_rows) {
            const int64_t rows = std::min(c.block_rows, c.rows - i);
            std::vector<float> block;
            for (int64_t a = 0; a < rows; ++a) {
                const float* from = p.y.data() + (i + a) * c.vocabulary + v;
                block.insert(block.end(), from, from + columns);
            }
            block.shrink_to_fit();
            visit(Block{block.data(), columns, i, rows, v, columns}, block);
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
    const Problem p(c);
    SoftmaxSettings settings;
    settings.vocabulary = c.vocabulary;
    settings.transform = transform_of(c, p);
    settings.norms = c.norms ? p.norms.data() : nullptr;
    settings.eps = c.eps;
    settings.seed = 77;
    settings.sample = c.sample;
    settings.certificate = c.certificate;
    OnlineSoftmax softmax(settings, c.rows, p.targets.data(), p.positions.data(), nullptr);
    std::vector<Aligned> kept_blocks;
    each_block(c, p, [&](const Block& block, std::vector<float>&) {
        kept_blocks.push_back(aligned(block.rows * block.columns));
        softmax.add(block, kept_blocks.back().get(), {c.threads});
    });

    const size_t n = static_cast<size_t>(c.rows);
    std::vector<float> loss(n), nll(n), lse(n), lse_low(n), entropy(n), variance(n), weighted(n);
    std::unique_ptr<bool[]> correct(new bool[n]);
    std::vector<int64_t> counts(n), offsets(n + 1);
    softmax.finish(0, c.rows,
                   {loss.data(), nll.data(), lse.data(), lse_low.data(), entropy.data(),
                    correct.get(), variance.data(), weighted.data(), counts.data()},
                   c.threads);
    for (size_t i = 0; i < n; ++i) offsets[i + 1] = offsets[i] + counts[i];
    std::vector<int32_t> columns(static_cast<size_t>(offsets[n]));
    std::vector<float> values(static_cast<size_t>(offsets[n]));
    if (c.sample) softmax.entries(offsets.data(), columns.data(), values.data(), c.threads);

    std::vector<float> dy(p.y);  // exact, for unit upstream gradient
    for (int64_t i = 0; i < c.rows; ++i) {
        const float* z = p.z.data() + i * c.vocabulary;
        double most = z[0], sum = 0, mean = 0, certificate = 0;
        for (int64_t v = 0; v < c.vocabulary; ++v) most = std::max<double>(most, z[v]);
        for (int64_t v = 0; v < c.vocabulary; ++v) sum += std::exp(z[v] - most);
        const double expected = most + std::log(sum);
        const RowKey key = row_key(settings.seed, static_cast<uint64_t>(p.positions[i]));
        int64_t place = offsets[i];
        for (int64_t v = 0; v < c.vocabulary; ++v) {
            const double probability = std::exp(z[v] - expected);
            mean += probability * z[v];
            const double t = c.softcap == 0 ? 0 : z[v] * c.temperature / c.softcap;
            const double slope = (1 - t * t) / c.temperature;
            const bool target = v == p.targets[i];
            dy[i * c.vocabulary + v] = static_cast<float>((probability - target) * slope);
            if (!target && probability < c.eps) {
                certificate += probability * (c.eps - probability) * slope * slope;
            }
            if (!c.sample) continue;
            const double u = draw<float>(key, static_cast<uint32_t>(v));
            const bool near = std::fabs(u * c.eps / probability - 1) < 1e-4;
            const bool kept = place < offsets[i + 1] && columns[place] == v;
            check(near || kept == (target || u * c.eps < probability), "kept", kept, !kept);
            if (!kept) continue;
            const double value = target ? probability - 1 : std::max<double>(probability, c.eps);
            check_close("value", values[place++], value * slope);
        }
        if (c.sample) check(place == offsets[i + 1], "entries", place, offsets[i + 1]);
        check_close("lse", double{lse[i]} + lse_low[i], expected);
        check_close("nll", nll[i], expected - z[p.targets[i]]);
        check_close("entropy", entropy[i], expected - mean);
        check(correct[i] == (z[p.targets[i]] == static_cast<float>(most)), "correct", correct[i],
              0);
        if (c.certificate) check_close("variance", variance[i] * 100, certificate * 100);
    }

    const std::vector<float> ones(n, 1.0f);
    size_t number = 0;
    each_block(c, p, [&](const Block& block, std::vector<float>&) {
        const int64_t i = block.first_row;
        const auto check_gradient = [&](const float* kept, const Block& out) {
            gradient_block({settings.transform, kept, c.vocabulary, 0, 0, p.targets.data() + i,
                            lse.data() + i, lse_low.data() + i, nll.data() + i, ones.data() + i},
                           out, c.threads);
            for (int64_t k = 0; k < block.rows * block.columns; ++k) {
                const int64_t row = k / block.columns, column = k % block.columns;
                const int64_t at = (i + row) * c.vocabulary + block.first_column + column;
                check_close("dy", out.logits[row * out.stride + column],
                            dy[static_cast<size_t>(at)]);
            }
        };
        check_gradient(nullptr, block);
        Block wide = block;  // a part of wider rows
        wide.stride = block.columns + 7;
        std::vector<float> out(static_cast<size_t>((block.rows - 1) * wide.stride + block.columns));
        wide.logits = out.data();
        check_gradient(kept_blocks[number++].get(), wide);
    });
    if (!c.sample) return;

    std::vector<float> hidden(n * c.width), weight(c.vocabulary * c.width), grad_bias(c.vocabulary);
    for (float& x : hidden) x = normal();
    for (float& x : weight) x = normal();
    std::vector<float> grad_hidden(hidden.size()), grad_weight(weight.size());
    const Entries entries{c.rows, offsets.data(), columns.data(), values.data(), ones.data()};
    const auto matrix = [&](std::vector<float>& x, int64_t rows) {
        return Matrix{x.data(), DType::kFloat32, rows, c.width, c.width};
    };
    spmm_hidden(entries, matrix(weight, c.vocabulary), matrix(grad_hidden, c.rows), c.threads);
    const Matrix out = matrix(grad_weight, c.vocabulary);
    spmm_weight(entries, matrix(hidden, c.rows), &out, false, grad_bias.data(), c.vocabulary,
                1 + c.rows % c.width, c.threads);
    std::vector<double> dh(hidden.size()), dw(weight.size()), db(grad_bias.size());
    for (int64_t i = 0; i < c.rows; ++i) {
        for (int64_t k = offsets[i]; k < offsets[i + 1]; ++k) {
            db[columns[k]] += values[k];
            for (int64_t d = 0; d < c.width; ++d) {
                dh[i * c.width + d] += double{values[k]} * weight[columns[k] * c.width + d];
                dw[columns[k] * c.width + d] += double{values[k]} * hidden[i * c.width + d];
            }
        }
    }
    for (size_t k = 0; k < dh.size(); ++k) check_close("dH", grad_hidden[k], dh[k]);
    for (size_t k = 0; k < dw.size(); ++k) check_close("dW", grad_weight[k], dw[k]);
    for (size_t k = 0; k < db.size(); ++k) check_close("db", grad_bias[k], db[k]);
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
