// The sampled gradient from its lists: dH row by row, dW column by column. Each element of each
// result is written by one thread, which adds in a fixed order.
//
// A block of eight warps is divided into teams of one, two, four or eight warps: as many as a row
// of the width needs. A team takes kBatch rows of the other matrix at a time, in turn with the
// other teams. A thread has `Pieces` pieces of 16 bytes of each row: the first beside those of its
// neighbours, the next a team's width further on. Their sums stay in registers.
//
// cp.async copies rows while those before them are in use: memory answers late, and a block that
// waits has a batch of 32 KiB on its way. A thread copies the pieces that it reads, so that no
// barrier is needed for them. Shared memory has the threads' first pieces of a row side by side, in
// the order of the threads, then their second ones: copies and loads have no bank conflicts. At the
// end the sums of the teams go through the same memory, laid out alike as vectors of four floats,
// and the threads of the first team join them in order.
#include "csrc/cuda/kernels.h"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/operands.h"
#include "csrc/cuda/softmax.cuh"
#include "csrc/cuda/tile.cuh"

namespace bft::cuda {

template <typename T>
constexpr int kSize = 16 / static_cast<int>(sizeof(T));  // elements of a piece
// Rows that a team takes at a time, and batches that are on their way meanwhile. The widest rows
// leave no room for a batch: the smallest devices give a block 99 KiB.
template <int Pieces>
constexpr int kBatch = Pieces < 8 ? 8 / Pieces : 1;
template <int Pieces>
constexpr int kAhead = Pieces < 16 ? 1 : 0;
// Multiprocessors with 99 KiB of shared memory have room for one block.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200)
constexpr bool kRoomForOne = true;
#else
constexpr bool kRoomForOne = false;
#endif
// Blocks that share a multiprocessor.
template <int Pieces, bool Aligned>
constexpr int kBlocks = kRoomForOne || Pieces >= 8 ? 1
                        : Pieces < 4 && Aligned    ? 3
                                                   : 2;
// Rows of up to so many pieces a thread may have several teams; wider ones take the whole block.
constexpr int kFewPieces = 2;
// The widest row, or slice of a row, of so few pieces.
template <typename T>
constexpr int kSliceD = kFewPieces * kSize<T> * kThreads;

// Shared memory: the rows, then two rooms for parts of logits.
constexpr uint32_t kRowsBytes = 16 * kThreads * 16;
constexpr uint32_t kPartsBytes = 2 * kWarps * kBatch<kFewPieces> * 4;
constexpr uint32_t kRowsAndPartsBytes = kRowsBytes + kPartsBytes;

struct Team {
    int warps;  // of each team
    __device__ __forceinline__ int threads() const { return 32 * warps; }
    __device__ __forceinline__ int count() const { return kWarps / warps; }
    __device__ __forceinline__ int rank() const {
        return static_cast<int>(threadIdx.x) / threads();
    }
    __device__ __forceinline__ int thread() const {
        return static_cast<int>(threadIdx.x) % threads();
    }
    // The element at which a thread's piece begins in the row.
    template <typename T>
    __device__ __forceinline__ int element(int piece) const {
        return (piece * threads() + thread()) * kSize<T>;
    }
};

// A thread's pieces of the rows of its team.
template <typename T, bool Aligned, int Pieces>
struct TeamRows {
    static_assert((kAhead<Pieces> + 1) * kBatch<Pieces> * Pieces <= 16);
    Team team;
    Shared<T> pieces{0, kRowsBytes / sizeof(T)};

    __device__ __forceinline__ TeamRows(Team team) : team(team) {}
    __device__ __forceinline__ Shared<T> piece(int stage, int k, int p) const {
        const int number = (stage * kBatch<Pieces> + k) * Pieces + p;
        return pieces + (number * kThreads + static_cast<int>(threadIdx.x)) * kSize<T>;
    }
    // Starts to copy a row.
    __device__ __forceinline__ void fetch(int stage, int k, Global<const T> row, int depth,
                                          bool there) const {
        const auto fetch_one = [&](int p) {
            const int d = team.template element<T>(p);
            fetch_piece<Aligned>(piece(stage, k, p), row, d, depth, there);
        };
        if constexpr (Aligned && Pieces <= 8) {
#pragma unroll
            for (int p = 0; p < Pieces; ++p) fetch_one(p);
        } else {
#pragma unroll 1  // registers are needed for the sums
            for (int p = 0; p < Pieces; ++p) fetch_one(p);
        }
    }
    __device__ __forceinline__ Vector<float, kSize<T>> load(int stage, int k, int p) const {
        Vector<float, kSize<T>> out;
        const auto in = piece(stage, k, p).template load_vector<kSize<T>>(0);
#pragma unroll
        for (int i = 0; i < kSize<T>; ++i) out.at[i] = to_float(in.at[i]);
        return out;
    }
};

// Processes entries [begin, end) in batches. Lane k holds the entry of row k % kRows of its team's
// batch. entry_at(place) returns that entry, or an empty one. fetch(stage, entry) starts the copies
// of a batch; use(stage, place, entry) reads them.
template <int Pieces, typename EntryAt, typename Fetch, typename Use>
__device__ __forceinline__ void take_batches(Team team, int64_t begin, int64_t end,
                                             EntryAt entry_at, Fetch fetch, Use use) {
    constexpr int kRows = kBatch<Pieces>, kStages = kAhead<Pieces> + 1;
    const int64_t step = team.count() * kRows;
    int64_t place = begin + team.rank() * kRows + lane_id() % kRows;
    auto coming = entry_at(place), entry = coming;
    if (kAhead<Pieces> > 0) {
        fetch(0, entry);
        cp_async_commit();
        coming = entry_at(place + step);
    }
    int stage = 0;
    for (int64_t start = begin; start < end; start += step, place += step) {
        const auto fetched = coming;
        const int into = (stage + kAhead<Pieces>) % kStages;
        fetch(into, fetched);
        cp_async_commit();
        coming = entry_at(place + kStages * step);  // long before its rows are fetched
        cp_async_wait<kAhead<Pieces>>();
        use(stage, place, kAhead<Pieces> > 0 ? entry : fetched);
        entry = fetched;
        stage = (stage + 1) % kStages;
    }
    cp_async_wait<0>();
}

// A thread's sums of its pieces.
template <typename T, int Pieces>
struct PieceSums {
    float at[Pieces][kSize<T>];

    template <bool Aligned>
    __device__ __forceinline__ void add(const TeamRows<T, Aligned, Pieces>& rows, int stage, int k,
                                        float value) {
#pragma unroll
        for (int p = 0; p < Pieces; ++p) {
            const auto x = rows.load(stage, k, p);
#pragma unroll
            for (int i = 0; i < kSize<T>; ++i) at[p][i] = fmaf(value, x.at[i], at[p][i]);
        }
    }
    // Adds the sums of the other teams to those of the first. All threads of the block must call
    // it. Each stores where its own pieces were, because others may still need theirs.
    __device__ __forceinline__ void join(Team team) {
        if (Pieces > kFewPieces || team.count() == 1) return;
        constexpr int kVectors = kSize<T> / 4;
        const Shared<float> room(0, Pieces * kSize<T> * kThreads);
        const auto place = [&](int p, int v, int rank) {
            return ((p * kVectors + v) * kThreads + rank * team.threads() + team.thread()) * 4;
        };
        if (team.rank() > 0) {
#pragma unroll
            for (int p = 0; p < Pieces; ++p) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
                    const float* sum = at[p] + 4 * v;
                    room.store_vector(place(p, v, team.rank()),
                                      Vector<float, 4>{{sum[0], sum[1], sum[2], sum[3]}});
                }
            }
        }
        __syncthreads();
        if (team.rank() > 0) return;
        for (int rank = 1; rank < team.count(); ++rank) {
#pragma unroll
            for (int p = 0; p < Pieces; ++p) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
                    const auto other = room.load_vector<4>(place(p, v, rank));
#pragma unroll
                    for (int i = 0; i < 4; ++i) at[p][4 * v + i] += other.at[i];
                }
            }
        }
    }
    // The first team writes, or adds to, a row. Whole: the row consists of pieces of 16 bytes.
    template <typename Out>
    __device__ __forceinline__ void store(Team team, Global<Out> row, int depth, bool whole,
                                          bool adds) const {
        if (team.rank() > 0) return;
        constexpr int kOut = kSize<Out>;
#pragma unroll
        for (int p = 0; p < Pieces; ++p) {
#pragma unroll
            for (int i = 0; i < kSize<T>; i += kOut) {
                const int d = team.element<T>(p) + i;
                if (whole) {
                    if (d >= depth) continue;
                    Vector<Out, kOut> sums{};
                    if (adds) sums = row.template load_vector<kOut>(d);
#pragma unroll
                    for (int j = 0; j < kOut; ++j) {
                        sums.at[j] = from_float<Out>(to_float(sums.at[j]) + at[p][i + j]);
                    }
                    row.template store_vector<Cache::kStreaming>(d, sums);
                } else {
#pragma unroll
                    for (int j = 0; j < kOut; ++j) {
                        if (d + j >= depth) continue;
                        const float before = adds ? to_float(row.load(d + j)) : 0.0f;
                        row.store(d + j, from_float<Out>(before + at[p][i + j]));
                    }
                }
            }
        }
    }
};

// A listed entry; its column is -1 if there is none.
struct ListedEntry {
    int column;
    float value;  // dy for unit upstream gradient, if the list has values
};

// dH of the listed entries, in the operands' type or in float32, and the entries that are kept.
//
// A block owns a row: its teams fetch the listed rows of weight once and add them up. If the list
// has values, all its entries are kept. Otherwise the kernel drops entries by the final lse: the
// row of hidden stays in registers, and the fetched rows also give the logits. A warp writes its
// part of each logit to shared memory, one float for each row of the batch. After a barrier every
// warp of the team adds the parts up, a lane for each logit. Lanes read neighbouring floats or the
// same one. Two rooms for parts take turns, so that one barrier a batch is enough.
template <typename T, bool Aligned, int Pieces, bool Values>
__global__ void __launch_bounds__(kThreads, kBlocks<Pieces, Aligned>)
    spmm_hidden_kernel(Operands<T> in, RowValues known, Sampled sample,
                       Global<const int64_t> offsets, Global<const int32_t> columns,
                       Global<const float> values, int64_t capacity, Team team,
                       Global<int32_t> keys, Global<uint64_t> packed, Global<T> grad_hidden,
                       Global<float> wide_hidden, bool whole) {
    if (blockIdx.x >= in.row_count.template load<Cache::kReadOnly>(0)) return;
    const int64_t row = in.order.template load<Cache::kReadOnly>(blockIdx.x);
    const int64_t begin = offsets.load<Cache::kReadOnly>(row);
    const int64_t end = offsets.load<Cache::kReadOnly>(row + 1);
    if (end > capacity) return;
    const float upstream = known.grad.load<Cache::kReadOnly>(row);
    constexpr int kRows = kBatch<Pieces>;
    const TeamRows<T, Aligned, Pieces> rows(team);
    Vector<float, kSize<T>> hidden[Pieces];
    RowEntries entries{};
    if constexpr (!Values) {
        entries = row_entries(known, sample, row, in.target.template load<Cache::kReadOnly>(row));
        rows.fetch(0, 0, in.hidden + row * in.stride_hn, in.depth, true);
        cp_async_commit();
        cp_async_wait<0>();
#pragma unroll
        for (int p = 0; p < Pieces; ++p) hidden[p] = rows.load(0, 0, p);
    }

    PieceSums<T, Pieces> sums{};
    const int warp = static_cast<int>(threadIdx.x) / 32;
    int room = 0;
    const auto entry_at = [&](int64_t at) {
        if (at >= end) return ListedEntry{-1, 0};
        const float unit = Values ? values.load<Cache::kReadOnly>(at) : 0.0f;
        return ListedEntry{columns.load<Cache::kReadOnly>(at), unit};
    };
    const auto fetch = [&](int stage, ListedEntry entry) {
#pragma unroll(Values ? 2 : kRows)  // unrolling all four spills 8 bytes on sm_100
        for (int k = 0; k < kRows; ++k) {
            const int64_t other = __shfl_sync(kAllLanes, entry.column, k);
            const auto from = in.weight + (other >= 0 ? other * in.stride_wv : 0);
            rows.fetch(stage, k, from, in.depth, other >= 0);
        }
    };
    // dy of a lane's entry by the final lse.
    const auto decide = [&](int stage, int column) {
        float dots[kRows] = {};
#pragma unroll
        for (int p = 0; p < Pieces; ++p) {
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
                const auto x = rows.load(stage, k, p);
#pragma unroll
                for (int i = 0; i < kSize<T>; ++i) {
                    dots[k] = fmaf(x.at[i], hidden[p].at[i], dots[k]);
                }
            }
        }
        const Shared<float> parts(kRowsBytes + room * (kPartsBytes / 2), kWarps * kRows);
        room = 1 - room;
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            const float part = sum_lanes<32>(dots[k]);
            if (lane_id() == k) parts.store(warp * kRows + k, part);
        }
        __syncthreads();
        float y = 0;
        const int first = team.rank() * team.warps * kRows + lane_id() % kRows;
        for (int i = 0; i < team.warps; ++i) y += parts.load(first + i * kRows);
        if (column < 0) return 0.0f;
        if (in.bias) y += in.bias.template load<Cache::kReadOnly>(column);
        const float z = in.transform.logit(y);
        return entries.dz(z, column) * in.transform.slope(z);
    };
    const auto use = [&](int stage, int64_t at, ListedEntry entry) {
        const float unit = Values ? entry.value : decide(stage, entry.column);
        const float value = unit != 0 ? unit * upstream : 0.0f;  // upstream may be infinite
        if (keys && value != 0 && team.thread() < kRows) {
            keys.store(at, entry.column);
            packed.store(at, static_cast<uint64_t>(row) << 32 | __float_as_uint(value));
        }
        if (!grad_hidden && !wide_hidden) return;
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            const float other = __shfl_sync(kAllLanes, value, k);
            if (other != 0) sums.add(rows, stage, k, other);
        }
    };
    take_batches<Pieces>(team, begin, end, entry_at, fetch, use);
    if (!grad_hidden && !wide_hidden) return;
    sums.join(team);
    if (wide_hidden) {
        sums.store(team, wide_hidden + row * in.depth, in.depth, whole, false);
    } else {
        sums.store(team, grad_hidden + row * in.depth, in.depth, whole, false);
    }
}

// dW and db of sorted entries.
//
// A block owns a column, and a slice of the width as wide as its threads' sums. Its teams fetch the
// rows of hidden that kept the column. Most columns have few entries: if they are one batch, the
// first team takes them alone, and no sums are joined. The first warp of the first slice computes
// db; a lane takes every 32nd entry.
template <typename T, typename Out, bool Aligned>
__global__ void __launch_bounds__(kThreads, kBlocks<kFewPieces, Aligned>)
    spmm_weight_kernel(Operands<T> in, Global<const int64_t> starts, Global<const uint64_t> packed,
                       Team team, Global<Out> grad_weight, int64_t stride_gv, bool whole, bool adds,
                       Global<float> grad_bias) {
    const int64_t column = blockIdx.x;
    const int64_t begin = starts.load<Cache::kReadOnly>(column);
    const int64_t end = starts.load<Cache::kReadOnly>(column + 1);
    if (begin == end && (adds || !grad_weight)) return;
    const auto value_of = [](uint64_t word) {
        return __uint_as_float(static_cast<uint32_t>(word));
    };
    if (grad_bias && blockIdx.y == 0 && threadIdx.x < 32) {
        float sum = 0;
        for (int64_t at = begin + lane_id(); at < end; at += 32) {
            sum += value_of(packed.load<Cache::kReadOnly>(at));
        }
        sum = sum_lanes<32>(sum);
        if (lane_id() == 0) grad_bias.store(column, grad_bias.load(column) + sum);
    }
    if (!grad_weight) return;

    constexpr int kRows = kBatch<kFewPieces>;
    const int d0 = static_cast<int>(blockIdx.y) * kSliceD<T>,
              depth = min(in.depth - d0, kSliceD<T>);
    const TeamRows<T, Aligned, kFewPieces> rows(team);
    PieceSums<T, kFewPieces> sums{};
    const auto word_at = [&](int64_t at) {
        return at < end ? packed.load<Cache::kReadOnly>(at) : 0;
    };
    const auto fetch = [&](int stage, uint64_t word) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            const uint64_t other = __shfl_sync(kAllLanes, word, k);
            const auto from = in.hidden + (static_cast<int64_t>(other >> 32) * in.stride_hn + d0);
            rows.fetch(stage, k, from, depth, other != 0);
        }
    };
    const auto use = [&](int stage, int64_t, uint64_t word) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            const uint64_t other = __shfl_sync(kAllLanes, word, k);
            if (other != 0) sums.add(rows, stage, k, value_of(other));
        }
    };
    take_batches<kFewPieces>(team, begin, end, word_at, fetch, use);
    if (end - begin > kRows) sums.join(team);
    sums.store(team, grad_weight + (column * stride_gv + d0), depth, whole, adds);
}

// The smallest team whose threads have few pieces of a row, or else the whole block.
template <typename T>
static Team team_for(int64_t depth) {
    int warps = 1;
    while (warps < kWarps && kFewPieces * kSize<T> * 32 * warps < depth) warps *= 2;
    return {warps};
}

// Calls run(std::integral_constant<int, Pieces>()): a thread has so many pieces of a row.
template <typename T, int Pieces = kFewPieces, typename Run>
static void with_pieces(int64_t depth, Run run) {
    constexpr int kWidest = Pieces * kSize<T> * kThreads;
    if constexpr (kWidest < kSpmmMaxWidth) {
        if (depth > kWidest) return with_pieces<T, 2 * Pieces>(depth, run);
    }
    run(std::integral_constant<int, Pieces>());
}

// Whether rows, `stride` elements of Out apart, consist of pieces of 16 bytes in both types.
template <typename T, typename Out>
static bool rows_whole(const void* first, int64_t stride, int64_t depth) {
    return depth % kSize<T> == 0 && rows_aligned<Out>(first, stride);
}

void spmm_hidden(const Problem& problem, const KnownRows& known, const Sample& sample,
                 const Lists& lists, const KeptEntries& kept, Output grad_hidden, void* stream) {
    const int64_t depth = problem.depth;
    with_type(problem, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        with_pieces<T>(depth, [&](auto pieces) {
            constexpr bool kAligned = decltype(aligned)::value;
            constexpr int kPieces = decltype(pieces)::value;
            launch(lists.values ? spmm_hidden_kernel<T, kAligned, kPieces, true>
                                : spmm_hidden_kernel<T, kAligned, kPieces, false>,
                   {"spmm_hidden", static_cast<unsigned>(problem.rows), kThreads,
                    kRowsAndPartsBytes, stream},
                   operands_of<T>(problem), values_of(known), Sampled{sample.seed, sample.eps},
                   lists.offsets, lists.columns, lists.values, lists.capacity, team_for<T>(depth),
                   kept.keys, kept.packed,
                   grad_hidden.is_float32 ? nullptr : static_cast<T*>(grad_hidden.at),
                   grad_hidden.is_float32 ? static_cast<float*>(grad_hidden.at) : nullptr,
                   grad_hidden.is_float32 ? rows_whole<T, float>(grad_hidden.at, depth, depth)
                                          : rows_whole<T, T>(grad_hidden.at, depth, depth));
        });
    });
}

void spmm_weight(const Problem& problem, const int64_t* starts, const uint64_t* packed,
                 const WeightGradient& into, void* stream) {
    with_type(problem, [&](auto zero, auto aligned) {
        using T = decltype(zero);
        const int64_t slices = into.weight.at ? ceil_div(problem.depth, kSliceD<T>) : 1;
        const dim3 grid(static_cast<unsigned>(problem.vocabulary), static_cast<unsigned>(slices));
        with_output<T>(into.weight, [&](auto* out) {
            using Out = std::remove_pointer_t<decltype(out)>;
            launch(spmm_weight_kernel<T, Out, decltype(aligned)::value>,
                   {"spmm_weight", grid, kThreads, kRowsBytes, stream}, operands_of<T>(problem),
                   starts, packed, team_for<T>(problem.depth), out, into.stride,
                   rows_whole<T, Out>(out, into.stride, problem.depth), into.adds, into.bias);
        });
    });
}

}  // namespace bft::cuda
