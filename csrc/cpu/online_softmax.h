// The forward: logits come in blocks of the vocabulary. After the last block every row's loss,
// statistics and sampled gradient are known, though no block was looked at twice.
//
// A row's sums are relative to the largest logit so far and are rescaled when it rises (online
// softmax). Entries are tested against a lower bound of lse, which lets too many through. They are
// thinned with the same draws when the bound has risen. The entries left at the end are those that
// a second pass would have kept.
//
// In a block the sums are float32, over its columns only; from block to block they are double.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/cpu/candidates.h"
#include "csrc/cpu/kernels.h"

namespace bft::cpu {

struct SoftmaxSettings {
    int64_t vocabulary = 0;
    Transform transform;
    const float* norms = nullptr;  // [V], |W_v|^2, for the certificate of dH; may be null
    float eps = 1;
    uint64_t seed = 0;
    bool sample = false;       // keep the sampled entries
    bool certificate = false;  // their variance
    float label_smoothing = 0;
    float z_loss = 0;
    int workers = 1;  // threads that may add blocks at the same time
};

// A block of logits: rows of the batch against columns of the vocabulary.
struct Block {
    float* logits;
    int64_t stride;  // between rows
    int64_t first_row, rows;
    int64_t first_column, columns;
};

// Where results go, one value a row; null for one that is not wanted.
struct SoftmaxResults {
    float *loss, *nll, *lse, *lse_low, *entropy;
    bool* correct;
    float *variance, *hidden_variance;
    int64_t* counts;  // sampled entries, the target's included
};

// Who takes a block: worker 0 with all threads, or one of several workers with one thread each.
struct Team {
    int threads = 1;
    int worker = 0;
};

class OnlineSoftmax {
  public:
    // targets [rows] in 0..V-1; positions [rows] in the flattened input; lse_bounds [rows], lower
    // bounds of lse, or null.
    OnlineSoftmax(const SoftmaxSettings& settings, int64_t rows, const int64_t* targets,
                  const int64_t* positions, const float* lse_bounds);
    ~OnlineSoftmax();
    OnlineSoftmax(const OnlineSoftmax&) = delete;
    OnlineSoftmax& operator=(const OnlineSoftmax&) = delete;

    // Takes the next columns of some rows, in ascending order of columns; leaves the logits z in
    // place of the raw products, and a copy that bypasses the caches in keep [rows, columns], which
    // may be null. Blocks of other rows may be added at the same time, each by a worker of its own.
    void add(const Block& block, float* keep, Team team);

    // The same, and leaves slope * exp(z - m) in place of the products, 0 at the target, where m is
    // the largest logit so far; sums [rows, width], relative to the previous m, are rescaled.
    void add_exponentials(const Block& block, float* sums, int64_t width, Team team);

    // After the last block. Sampled entries are thinned for good.
    void finish(int64_t first_row, int64_t rows, const SoftmaxResults& results, int threads);

    // After finish(): entries of all rows, ascending columns in each; offsets [rows + 1].
    void entries(const int64_t* offsets, int32_t* columns, float* values, int threads);

    // After finish(), from the sums of add_exponentials: dH for unit upstream gradient, without the
    // target's term. That term is target_values [rows] times the target's row of weight.
    void unit_factors(int64_t first_row, int64_t rows, float* factors, float* target_values) const;

  private:
    struct Row;
    struct Scratch;

    template <bool kExponentials>
    void add_block(const Block& block, float* keep, float* sums, int64_t width, Team team);
    void fetch_ahead(int64_t row, int64_t stop) const;
    void take_target(Row& row, float logit) const;
    void raise_maximum(Row& row, double maximum, double* factor) const;
    float draw_factor(const Row& row) const;
    void find_candidates(Row& row, const float* z, const float* e, const Block& block,
                         Scratch& scratch, CandidatePool& pool) const;
    int64_t draw_again(const Row& row, double log_sum, Scratch& scratch) const;
    void thin(Row& row, Scratch& scratch, CandidatePool& pool) const;
    void thin_for_good(Row& row, Scratch& scratch, CandidatePool& pool, double* variance,
                       double* weighted) const;
    void count_small(Row& row, double logit, double e, uint32_t column) const;
    void reserve_pools(int threads);

    SoftmaxSettings settings_;
    std::vector<Row> rows_;
    std::vector<CandidatePool> pools_;  // one for each thread or worker
};

// The exact gradient dy of rows whose lse is known; see the fields.
struct GradientSettings {
    Transform transform;
    const float* kept;  // [rows, columns], logits z as OnlineSoftmax::add keeps them; null: the
                        // block holds raw products
    int64_t vocabulary;
    float label_smoothing, z_loss;
    const int64_t* targets;  // each [rows of the block]
    const float *lse, *lse_low, *nll, *upstream;
};

// Overwrites the block with dy.
void gradient_block(const GradientSettings& settings, const Block& block, int threads);

}  // namespace bft::cpu
