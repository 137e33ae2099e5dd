#include "csrc/cpu/online_softmax.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "csrc/cpu/parallel.h"

namespace bft::cpu {
namespace {

constexpr int64_t kRowGrain = 8;
constexpr double kDoubleInfinity = std::numeric_limits<double>::infinity();
constexpr float kFloatInfinity = std::numeric_limits<float>::infinity();

// The bound of lse and the exponentials are rounded; a candidate too many is dropped later, one too
// few is lost.
constexpr double kSlack = 1 + 1e-4;

// An entry at the threshold must not be lost to the rounding of the draw.
constexpr float kDraws = 0x1.0001p0f;

// A row is thinned when it holds this many candidates and twice what the last thinning left.
constexpr uint32_t kThinFrom = 1024;

// dz/dy without the temperature, where the softcap gave z.
double slope_of(const Transform& transform, double z) {
    if (transform.softcap == 0) return 1;
    const double t = z * transform.temperature / transform.softcap;
    return 1 - t * t;
}

// A maximum ignores NaN, so NaN must be looked for where no value is above minus infinity.
bool any_nan(const float* z, int64_t count) {
    return std::any_of(z, z + count, [](float x) { return std::isnan(x); });
}

}  // namespace

// The state of one row. If the maximum is -inf, only masked columns were seen so far.
struct OnlineSoftmax::Row {
    double sum = 0;          // of e = exp(z - maximum)
    double moment = 0;       // of e * (z - maximum)
    double shifted_sum = 0;  // of z - maximum
    // For the certificate: sums over the entries below eps, without the target, of e and e^2 times
    // slope^2, and the same times |W_v|^2.
    double small[2] = {0, 0};
    double weighted_small[2] = {0, 0};
    double maximum = -kDoubleInfinity;
    double target_logit = std::numeric_limits<double>::quiet_NaN();
    double log_sum = std::numeric_limits<double>::quiet_NaN();  // this and nll are set by finish
    double nll = std::numeric_limits<double>::quiet_NaN();
    double bound_sum = 0;  // exp(lse_bound - maximum)
    float lse_bound = -kFloatInfinity;
    int32_t argmax = 0;
    int32_t target = 0;
    uint32_t thin_at = kThinFrom;
    RowKey key{};
    Candidates candidates;

    bool empty() const { return maximum == -kDoubleInfinity; }
    double lse() const { return maximum + log_sum; }
};

// Each thread has one, on cache lines of its own.
struct alignas(128) OnlineSoftmax::Scratch {
    std::vector<float> exponentials;
    std::vector<uint32_t> hits;
    // Of the candidates of a row.
    std::vector<uint32_t> columns;
    std::vector<float> logits;
    std::vector<float> probabilities;
    std::vector<uint32_t> kept;

    void reserve(size_t count) {
        if (exponentials.size() >= count) return;
        exponentials.resize(count);
        hits.resize(count + kPadding);
    }

    void reserve_candidates(size_t count) {
        if (columns.size() >= count) return;
        columns.resize(count);
        logits.resize(count);
        probabilities.resize(count);
        kept.resize(count + kPadding);
    }
};

OnlineSoftmax::OnlineSoftmax(const SoftmaxSettings& settings, int64_t rows, const int64_t* targets,
                             const int64_t* positions, const float* lse_bounds)
    : settings_(settings), rows_(static_cast<size_t>(rows)), pools_(settings.workers) {
    for (int64_t i = 0; i < rows; ++i) {
        Row& row = rows_[i];
        row.target = static_cast<int32_t>(targets[i]);
        if (settings.sample) {
            row.key = row_key(settings.seed, static_cast<uint64_t>(positions[i]));
        }
        if (lse_bounds) row.lse_bound = lse_bounds[i];
    }
}

OnlineSoftmax::~OnlineSoftmax() = default;

void OnlineSoftmax::reserve_pools(int threads) {
    if (pools_.size() < static_cast<size_t>(threads)) pools_.resize(threads);
}

void OnlineSoftmax::add(const Block& block, float* keep, Team team) {
    add_block<false>(block, keep, nullptr, 0, team);
}

void OnlineSoftmax::add_exponentials(const Block& block, float* sums, int64_t width, Team team) {
    add_block<true>(block, nullptr, sums, width, team);
}

template <bool kExponentials>
void OnlineSoftmax::add_block(const Block& block, float* keep, float* sums, int64_t width,
                              Team team) {
    const Kernels& kernel = kernels();
    if (team.worker == 0 && team.threads > 1) reserve_pools(team.threads);
    std::vector<Scratch> scratches(team.threads);
    const size_t columns = static_cast<size_t>(block.columns);
    parallel_static(team.threads, block.rows, [&](int thread, int64_t first, int64_t stop) {
        Scratch& scratch = scratches[thread];
        CandidatePool& pool = pools_[team.worker + thread];
        scratch.reserve(columns);
        for (int64_t i = first; i < stop; ++i) {
            Row& row = rows_[block.first_row + i];
            fetch_ahead(block.first_row + i, block.first_row + stop);
            float* z = block.logits + i * block.stride;
            const float most =
                kernel.transform(z, block.columns, block.first_column, settings_.transform);
            double factor = 1;
            if (!(most > -kFloatInfinity) && any_nan(z, block.columns)) {
                row.sum = std::numeric_limits<double>::quiet_NaN();
            }
            if (most > row.maximum) {
                if (settings_.label_smoothing != 0 && block.first_column > 0) {
                    row.shifted_sum += block.first_column * (row.maximum - most);
                }
                row.argmax = static_cast<int32_t>(block.first_column +
                                                  kernel.find_at_least(z, block.columns, most));
                raise_maximum(row, most, &factor);
            }
            if (settings_.label_smoothing != 0) {
                row.shifted_sum +=
                    row.empty() ? -kDoubleInfinity
                                : kernel.sum(z, block.columns, static_cast<float>(row.maximum));
            }
            const int64_t place = row.target - block.first_column;
            const bool has_target = place >= 0 && place < block.columns;
            float target_logit = 0;
            if (has_target) {
                // The target is neither sampled nor certified, so kernels see -inf in its place.
                target_logit = z[place];
                z[place] = -kFloatInfinity;
            }
            float* e = scratch.exponentials.data();
            if (row.empty()) {  // every column so far is masked
                std::fill(e, e + block.columns, 0.0f);
            } else {
                const ExponentialSums sums_ =
                    kernel.exponentials(z, block.columns, static_cast<float>(row.maximum), e);
                row.sum += sums_.sum;
                row.moment += sums_.moment;
            }
            if (has_target) take_target(row, target_logit);
            if (settings_.sample || settings_.certificate) {
                find_candidates(row, z, e, block, scratch, pool);
            }
            if constexpr (kExponentials) {
                if (settings_.transform.softcap != 0) {
                    kernel.multiply_slope(e, z, block.columns, settings_.transform);
                    if (has_target) e[place] = 0;  // its slope is that of -inf
                }
                std::copy(e, e + block.columns, z);
                if (factor != 1) {
                    float* sum = sums + (block.first_row + i) * width;
                    kernel.multiply(sum, width, static_cast<float>(factor));
                }
            } else {
                if (has_target) z[place] = target_logit;
                if (keep) kernel.write[0](keep + i * block.columns, z, block.columns, false);
            }
        }
        if (keep) kernel.settle();
    });
}

// A row is visited once a block of the vocabulary, long after its state has left the caches.
void OnlineSoftmax::fetch_ahead(int64_t row, int64_t stop) const {
    if (row + 1 < stop) rows_[row + 1].candidates.prefetch();
    if (row + 2 < stop) {
        const char* state = reinterpret_cast<const char*>(&rows_[row + 2]);
        for (size_t line = 0; line < sizeof(Row); line += 64) __builtin_prefetch(state + line, 1);
    }
}

void OnlineSoftmax::take_target(Row& row, float logit) const {
    row.target_logit = logit;
    if (row.empty()) return;
    const double below = logit - row.maximum;
    const double e = std::exp(below);
    row.sum += e;
    if (e > 0) row.moment += e * below;
}

// Makes the sums relative to a larger maximum: they are multiplied by *factor.
void OnlineSoftmax::raise_maximum(Row& row, double maximum, double* factor) const {
    *factor = 0;
    if (!row.empty()) {
        const double change = row.maximum - maximum;
        *factor = std::exp(change);
        row.moment = *factor * (row.moment + row.sum * change);
        row.sum *= *factor;
        for (double* small : {row.small, row.weighted_small}) {
            small[0] *= *factor;
            small[1] *= *factor * *factor;
        }
    }
    row.maximum = maximum;
    if (settings_.sample || settings_.certificate)
        row.bound_sum = std::exp(row.lse_bound - maximum);
}

// The factor that makes exp(z - maximum) at least p / eps.
float OnlineSoftmax::draw_factor(const Row& row) const {
    const double bound = std::max(row.sum, row.bound_sum);
    const double factor = kSlack / (bound * settings_.eps);
    return static_cast<float>(std::min(factor, 1e27));
}

void OnlineSoftmax::find_candidates(Row& row, const float* z, const float* e, const Block& block,
                                    Scratch& scratch, CandidatePool& pool) const {
    const Kernels& kernel = kernels();
    if (row.empty() || std::isnan(row.sum)) return;  // every result of the row is NaN
    const float factor = draw_factor(row);
    const float threshold = 1 / factor;
    const uint32_t first = static_cast<uint32_t>(block.first_column);
    uint32_t* hits = scratch.hits.data();
    const int64_t found = settings_.sample ? kernel.draw_below(e, block.columns, first, row.key,
                                                               factor * kDraws, hits)
                                           : kernel.at_least(e, block.columns, threshold, hits);
    if (settings_.certificate) {
        const float* norms = settings_.norms ? settings_.norms + block.first_column : nullptr;
        const SmallSums sums =
            kernel.small_sums(e, z, block.columns, threshold, settings_.transform, norms);
        row.small[0] += sums.first;
        row.small[1] += sums.second;
        row.weighted_small[0] += sums.weighted_first;
        row.weighted_small[1] += sums.weighted_second;
    }
    const auto entry = [=](int64_t k) -> Candidate {
        const uint32_t place = hits[k];
        const uint32_t tag = e[place] < threshold ? 0 : Candidate::kUncounted;
        return {(first + place) | tag, z[place]};
    };
    row.candidates.add(found, entry, pool);
    if (row.candidates.count() >= row.thin_at) {
        thin(row, scratch, pool);
        row.thin_at = std::max(kThinFrom, 2 * row.candidates.count());
    }
}

// Fills in the probabilities of a row's candidates, given the logarithm of the sum, and the places
// of those that are kept, in order; returns how many they are.
int64_t OnlineSoftmax::draw_again(const Row& row, double log_sum, Scratch& scratch) const {
    scratch.reserve_candidates(row.candidates.count());
    uint32_t* column = scratch.columns.data();
    float* logit = scratch.logits.data();
    row.candidates.each([&](const Candidate& entry) {
        *column++ = entry.column();
        *logit++ = entry.logit;
    });
    return kernels().survivors(scratch.columns.data(), scratch.logits.data(),
                               row.candidates.count(), static_cast<float>(row.maximum),
                               static_cast<float>(log_sum), row.key, settings_.eps,
                               scratch.probabilities.data(), scratch.kept.data());
}

// Drops the candidates that the bound of lse now rules out.
void OnlineSoftmax::thin(Row& row, Scratch& scratch, CandidatePool& pool) const {
    const double bound = std::max(row.sum, row.bound_sum);
    const int64_t survivors = draw_again(row, std::log(bound / kSlack), scratch);
    const uint32_t* kept = scratch.kept.data();
    if (!settings_.certificate) {
        row.candidates.replace(
            survivors,
            [&](int64_t k) -> Candidate {
                return {scratch.columns[kept[k]], scratch.logits[kept[k]]};
            },
            pool);
        return;
    }
    const float* p = scratch.probabilities.data();
    uint32_t place = 0;
    int64_t next = 0;
    row.candidates.filter(
        [&](Candidate& entry) {
            const uint32_t here = place++;
            if (entry.uncounted() && p[here] < settings_.eps) {
                const double e = std::exp(entry.logit - row.maximum);
                count_small(row, entry.logit, e, entry.column());
                entry.tagged_column = entry.column();
            }
            if (!settings_.sample) return entry.uncounted();
            if (next == survivors || kept[next] != here) return false;
            ++next;
            return true;
        },
        pool);
}

void OnlineSoftmax::count_small(Row& row, double logit, double e, uint32_t column) const {
    const double s = slope_of(settings_.transform, logit);
    double term = e * s * s;
    row.small[0] += term;
    row.small[1] += term * e;
    if (settings_.norms) {
        term *= settings_.norms[column];
        row.weighted_small[0] += term;
        row.weighted_small[1] += term * e;
    }
}

void OnlineSoftmax::finish(int64_t first_row, int64_t rows, const SoftmaxResults& results,
                           int threads) {
    reserve_pools(threads);
    std::vector<Scratch> scratches(threads);
    const double unit = 1 / static_cast<double>(settings_.transform.temperature);
    const double a = settings_.label_smoothing;
    const float eps = settings_.eps;
    parallel_for(threads, rows, kRowGrain, [&](int thread, int64_t first, int64_t stop) {
        for (int64_t i = first; i < stop; ++i) {
            Row& row = rows_[first_row + i];
            if (i + 1 < stop) rows_[first_row + i + 1].candidates.prefetch_first();
            row.log_sum = std::log(row.sum);
            // A sum of positive terms, the target's among them: below 0 only by rounding.
            const double nll = (row.maximum - row.target_logit) + row.log_sum;
            row.nll = nll < 0 ? 0 : nll;
            const float rounded = static_cast<float>(row.lse());
            if (results.nll) results.nll[i] = static_cast<float>(row.nll);
            if (results.lse) results.lse[i] = rounded;
            if (results.lse_low) {
                const double low = (row.maximum - rounded) + row.log_sum;
                results.lse_low[i] = static_cast<float>(low);
            }
            if (results.loss) {
                double total = row.nll;
                if (a != 0) {
                    const double smooth =
                        row.log_sum - row.shifted_sum / static_cast<double>(settings_.vocabulary);
                    total = (1 - a) * row.nll + a * smooth;
                }
                if (settings_.z_loss != 0) total += settings_.z_loss * row.lse() * row.lse();
                results.loss[i] = static_cast<float>(total);
            }
            if (results.entropy) {
                const double entropy = row.log_sum - row.moment / row.sum;
                results.entropy[i] = static_cast<float>(std::max(entropy, 0.0));
            }
            if (results.correct) results.correct[i] = row.argmax == row.target;

            double variance = 0, weighted = 0;
            if (settings_.certificate) {
                const double scale = 1 / row.sum;
                variance = scale * (eps * row.small[0] - scale * row.small[1]);
                weighted = scale * (eps * row.weighted_small[0] - scale * row.weighted_small[1]);
            }
            thin_for_good(row, scratches[thread], pools_[thread], &variance, &weighted);
            const double squared = unit * unit;
            if (results.variance) {
                results.variance[i] = static_cast<float>(std::max(variance, 0.0) * squared);
            }
            if (results.hidden_variance) {
                results.hidden_variance[i] = static_cast<float>(std::max(weighted, 0.0) * squared);
            }
            if (results.counts) results.counts[i] = row.candidates.count() + 1;
        }
    });
}

// Keeps the entries that a second pass would have kept, with the value of dy in place of the logit,
// and adds to the certificate's sums the entries that they lack.
void OnlineSoftmax::thin_for_good(Row& row, Scratch& scratch, CandidatePool& pool, double* variance,
                                  double* weighted) const {
    const int64_t survivors = draw_again(row, row.log_sum, scratch);
    const float eps = settings_.eps;
    const float* p = scratch.probabilities.data();
    const uint32_t* kept = scratch.kept.data();
    if (settings_.certificate) {
        uint32_t place = 0;
        row.candidates.each([&](const Candidate& entry) {
            const double here = p[place++];
            if (!entry.uncounted() || here >= eps) return;
            const double s = slope_of(settings_.transform, entry.logit);
            const double term = here * (eps - here) * s * s;
            *variance += term;
            if (settings_.norms) *weighted += term * settings_.norms[entry.column()];
        });
    }
    const float unit = 1 / settings_.transform.temperature;
    row.candidates.replace(
        settings_.sample ? survivors : 0,
        [&](int64_t k) -> Candidate {
            const uint32_t place = kept[k];
            const double s = slope_of(settings_.transform, scratch.logits[place]);
            return {scratch.columns[place], std::max(p[place], eps) * static_cast<float>(s) * unit};
        },
        pool);
}

void OnlineSoftmax::entries(const int64_t* offsets, int32_t* columns, float* values, int threads) {
    reserve_pools(threads);
    const double unit = 1 / static_cast<double>(settings_.transform.temperature);
    const int64_t count = static_cast<int64_t>(rows_.size());
    parallel_for(threads, count, kRowGrain, [&](int thread, int64_t first, int64_t stop) {
        for (int64_t i = first; i < stop; ++i) {
            Row& row = rows_[i];
            if (i + 1 < stop) rows_[i + 1].candidates.prefetch_first();
            int64_t place = offsets[i];
            const auto put = [&](int32_t column, float value) {
                columns[place] = column;
                values[place++] = value;
            };
            const float at_target = static_cast<float>(
                std::expm1(-row.nll) * slope_of(settings_.transform, row.target_logit) * unit);
            bool target_put = false;
            row.candidates.each([&](const Candidate& entry) {
                const int32_t column = static_cast<int32_t>(entry.column());
                if (!target_put && column > row.target) {
                    put(row.target, at_target);
                    target_put = true;
                }
                put(column, entry.logit);  // by now the value of dy
            });
            if (!target_put) put(row.target, at_target);
            row.candidates.clear(pools_[thread]);
        }
    });
}

void OnlineSoftmax::unit_factors(int64_t first_row, int64_t rows, float* factors,
                                 float* target_values) const {
    for (int64_t i = 0; i < rows; ++i) {
        const Row& row = rows_[first_row + i];
        const double extra = 2 * settings_.z_loss * row.lse();
        const double unit = 1 / settings_.transform.temperature;
        factors[i] = static_cast<float>((1 + extra) / row.sum * unit);
        target_values[i] =
            static_cast<float>((std::expm1(-row.nll) + extra * std::exp(-row.nll)) *
                               slope_of(settings_.transform, row.target_logit) * unit);
    }
}

void gradient_block(const GradientSettings& settings, const Block& block, int threads) {
    const Kernels& kernel = kernels();
    const Transform& transform = settings.transform;
    const double unit = 1 / static_cast<double>(transform.temperature);
    const double a = settings.label_smoothing;
    const double uniform = a / static_cast<double>(settings.vocabulary);
    parallel_static(threads, block.rows, [&](int, int64_t first, int64_t stop) {
        for (int64_t i = first; i < stop; ++i) {
            float* dy = block.logits + i * block.stride;
            const float* z = dy;
            if (settings.kept) {
                z = settings.kept + i * block.columns;
            } else {
                kernel.transform(dy, block.columns, block.first_column, transform);
            }
            const int64_t place = settings.targets[i] - block.first_column;
            const bool has_target = place >= 0 && place < block.columns;
            const float target_logit = has_target ? z[place] : 0;
            const double upstream = settings.upstream[i] * unit;
            const double extra =
                2.0 * settings.z_loss * (double{settings.lse[i]} + settings.lse_low[i]);
            // The part of lse that rounding cut off is a factor of the whole row.
            const double scale = upstream * (1 + extra) * std::exp(-double{settings.lse_low[i]});
            kernel.gradient(z, dy, block.columns,
                            {settings.lse[i], static_cast<float>(scale),
                             static_cast<float>(upstream * uniform)},
                            transform);
            if (has_target) {
                // p - 1 as expm1(-nll): for confident tokens the difference would lose its digits.
                const double nll = settings.nll[i];
                const double value =
                    (1 - a) * std::expm1(-nll) + (extra + a) * std::exp(-nll) - uniform;
                dy[place] =
                    static_cast<float>(upstream * value * slope_of(transform, target_logit));
            }
        }
    });
}

}  // namespace bft::cpu
