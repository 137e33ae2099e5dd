// A tile of raw products y [kTileN, kTileV] = hidden weight^T, which stays in registers.
//
// A block of eight warps owns the tile. A warp owns 32 rows and 64 columns of it (warps 2r and
// 2r + 1 share rows), and a thread 64 entries, 4 rows x 16 columns: as mma.m16n8k16 distributes
// them, or, in float32, every eighth row and fourth column. Row i of a thread is row(i). Column j
// is column0() + step(j), where the step is known to the compiler and takes no register.
//
// Shared memory holds kStages stages, in each of which a row of either operand has 128 bytes: 64
// halves or 32 floats of the depth. cp.async fills them two stages ahead of the products, also
// beyond the end of a tile. The eight 16-byte pieces of a row lie in the order piece ^ (row % 8).
// So there are no bank conflicts when eight lanes access one piece of eight consecutive rows (a
// matrix of ldmatrix), of fewer rows (a quarter of a warp that loads float4), or all pieces of one
// row (cp.async).
#pragma once

#include "csrc/cuda/kernels.h"
#include "csrc/cuda/logits.cuh"

namespace bft::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32, kStages = 3;
constexpr int kRowBytes = 128, kPieces = kRowBytes / 16;
template <typename T>
constexpr int kTileD = kRowBytes / static_cast<int>(sizeof(T));
constexpr uint32_t kStagesBytes = kStages * (kTileN + kTileV) * kRowBytes;
// Rows and columns of a warp's part; kWarpColumns parts lie side by side.
constexpr int kWarpN = 32, kWarpV = 64, kWarpColumns = kTileV / kWarpV;

// What every kernel that makes logits reads. Each row of hidden and weight is contiguous.
template <typename T>
struct Operands {
    Global<const T> hidden;           // [N, D]
    Global<const T> weight;           // [V, D]
    Global<const float> bias;         // [V], or null
    Global<const int64_t> target;     // [N]
    Global<const int64_t> order;      // [N], the rows that take part, then the others
    Global<const int64_t> row_count;  // [1], how many take part
    int64_t stride_hn, stride_wv;     // in elements
    int vocabulary, depth;
    Transform transform;
};

// Where a piece of a row lies in its stage, in elements.
template <typename T>
__device__ __forceinline__ int place(int row, int piece) {
    return row * kTileD<T> + (piece ^ row % kPieces) * (16 / static_cast<int>(sizeof(T)));
}

// The same where the depth runs across the rows.
template <typename T>
__device__ __forceinline__ int place_across(int row, int piece) {
    constexpr int kSize = 16 / static_cast<int>(sizeof(T));
    return row * kTileV + (sizeof(T) == 2 ? piece ^ row % 8 : piece) * kSize;
}

// Copies 16 bytes of a row, from element d on. Past the depth, or if there is no row, it is zero.
// Without Aligned the row may start at any element, and is read element by element.
template <bool Aligned, typename T>
__device__ __forceinline__ void fetch_piece(Shared<T> to, Global<const T> row, int d, int depth,
                                            bool there) {
    constexpr int kSize = 16 / sizeof(T);
    const int valid = there ? min(max(depth - d, 0), kSize) : 0;
    if constexpr (Aligned) {
        cp_async<16>(to, valid > 0 ? row + d : row, valid * static_cast<int>(sizeof(T)));
    } else {
        Vector<T, kSize> piece;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            piece.at[i] = from_float<T>(0.0f);
            if (i < valid) piece.at[i] = row.template load<Cache::kReadOnly>(d + i);
        }
        to.store_vector(0, piece);
    }
}

// Fills the stages tile by tile of the columns, for the rows of one block.
template <typename T, bool Aligned>
class TileLoader {
  public:
    // The block has `there` of the rows that take part, from `first` on. A thread copies one piece
    // of every 32nd row.
    __device__ __forceinline__ TileLoader(const Operands<T>& in, int64_t first, int there)
        : hidden_(0, kStages * kTileN * kTileD<T>),
          weight_(kStages * kTileN * kRowBytes, kStages * kTileV * kTileD<T>),
          first_(first),
          there_(there) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) rows_[i] = Aligned ? position(in, i) : 0;
    }
    // Starts at tile `tile`, to end before tile `last`.
    __device__ __forceinline__ void start(const Operands<T>& in, int tile, int last) {
        tile_ = tile, last_ = last, d_ = 0, into_ = 0;
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) fetch(in);
    }
    // Waits for the next stage of products and returns it; starts to copy the one after the next.
    __device__ __forceinline__ int next(const Operands<T>& in) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // all copies have arrived, and the stage read last is free
        const int stage = into_ + 1 == kStages ? 0 : into_ + 1;
        fetch(in);
        return stage;
    }
    __device__ __forceinline__ Shared<T> hidden(int stage) const {
        return hidden_ + stage * (kTileN * kTileD<T>);
    }
    __device__ __forceinline__ Shared<T> weight(int stage) const {
        return weight_ + stage * (kTileV * kTileD<T>);
    }

  private:
    static constexpr int kCopies = kTileN * kPieces / kThreads;
    static_assert(kTileN == kTileV);

    __device__ __forceinline__ static int row(int i) {
        return static_cast<int>(threadIdx.x) / kPieces + i * (kThreads / kPieces);
    }
    // Position of the block's row(i), or -1 if there is none.
    __device__ __forceinline__ int position(const Operands<T>& in, int i) const {
        if (row(i) >= there_) return -1;
        return static_cast<int>(in.order.template load<Cache::kReadOnly>(first_ + row(i)));
    }
    __device__ __forceinline__ void fetch_rows(const Operands<T>& in, int i, int d, int from) {
        const int piece = threadIdx.x % kPieces, to = place<T>(row(i), piece);
        fetch_piece<Aligned>(hidden(into_) + to,
                             from >= 0 ? in.hidden + from * in.stride_hn : in.hidden, d, in.depth,
                             from >= 0);
        const int column = tile_ * kTileV + row(i);
        const bool known = column < in.vocabulary;
        fetch_piece<Aligned>(weight(into_) + to,
                             known ? in.weight + column * in.stride_wv : in.weight, d, in.depth,
                             known);
    }
    __device__ __forceinline__ void fetch(const Operands<T>& in) {
        if (tile_ < last_) {
            const int d =
                d_ + static_cast<int>(threadIdx.x) % kPieces * (16 / static_cast<int>(sizeof(T)));
            if constexpr (Aligned) {
#pragma unroll
                for (int i = 0; i < kCopies; ++i) fetch_rows(in, i, d, rows_[i]);
            } else {
#pragma unroll 1  // registers are for the products
                for (int i = 0; i < kCopies; ++i) fetch_rows(in, i, d, position(in, i));
            }
            d_ += kTileD<T>;
            if (d_ >= in.depth) ++tile_, d_ = 0;
        }
        cp_async_commit();
        into_ = into_ + 1 == kStages ? 0 : into_ + 1;
    }

    Shared<T> hidden_, weight_;
    int64_t first_;
    int there_;
    int rows_[kCopies];    // positions, or -1; only with Aligned
    int tile_, last_, d_;  // what is fetched next
    int into_;             // the stage it goes to
};

// The work of a launch: rows, among those that take part, and splits of the vocabulary.
struct WorkGrid {
    RowRange range;
    int splits, split_tiles;
};

// So many row blocks go together: their columns are fetched once, and their rows stay in L2.
constexpr int64_t kGroup = 8;

// The work of one block.
struct BlockWork {
    int64_t row_block, first;  // of the range; its first row, among those that take part
    int there;                 // rows, 0 past the last: only the device knows how many take part
    int split, tile0, tile1;
};
template <typename T>
__device__ __forceinline__ BlockWork work_of(const Operands<T>& in, const WorkGrid& of) {
    const int64_t row_blocks = (of.range.count + kTileN - 1) / kTileN, program = blockIdx.x;
    const int64_t group = program / (kGroup * of.splits) * kGroup;
    const int64_t size = min(row_blocks - group, kGroup), place = program % (kGroup * of.splits);
    const int64_t row_block = group + place % size, first = of.range.first + row_block * kTileN;
    const int64_t count = in.row_count.template load<Cache::kReadOnly>(0);
    const int64_t left = min(count, of.range.first + of.range.count) - first;
    const int split = static_cast<int>(place / size), tile0 = split * of.split_tiles;
    const int tiles = (in.vocabulary + kTileV - 1) / kTileV;
    return {row_block, first, static_cast<int>(min(max(left, int64_t{0}), int64_t{kTileN})),
            split,     tile0, min(tile0 + of.split_tiles, tiles)};
}

__device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 / kWarpColumns * kWarpN;
}
__device__ __forceinline__ int warp_column() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpColumns * kWarpV;
}
__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / 32; }

// The sum over the first `count` warps of the block, in order, of a number that is the same in all
// lanes of a warp. `parts` holds kWarps elements that nothing else uses.
template <typename T>
__device__ __forceinline__ T sum_warps(T of_warp, Shared<T> parts, int count = kWarps) {
    if (lane_id() == 0) parts.store(warp_id(), of_warp);
    __syncthreads();
    T sum = 0;
    for (int w = 0; w < count; ++w) sum += parts.load(w);
    return sum;
}

// The entries of a thread: float32 sums of products of halves, from tensor cores.
template <typename T>
struct Entries {
    static constexpr int kRows = 4, kColumns = 16, kLanes = 4;  // so many lanes share rows
    float sums[2][8][4];

    __device__ __forceinline__ float& at(int i, int j) {
        return sums[i / 2][j / 2][i % 2 * 2 + j % 2];
    }
    __device__ __forceinline__ static int row(int i) {
        return warp_row() + i / 2 * 16 + i % 2 * 8 + lane_id() / 4;
    }
    __device__ __forceinline__ static int column0() { return warp_column() + lane_id() % 4 * 2; }
    __device__ __forceinline__ static constexpr int step(int j) { return j / 2 * 8 + j % 2; }
    // Takes stages whose depth runs along their rows, or across them; see products.cuh.
    template <bool LeftAcross = false, bool RightAcross = false>
    __device__ __forceinline__ void add_products(Shared<T> left, Shared<T> right) {
        const int lane = lane_id();
#pragma unroll
        for (int k = 0; k < kTileD<T>; k += 16) {
            uint32_t a[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const int row = warp_row() + m * 16;
                if constexpr (LeftAcross) {
                    const int depth = k + lane / 16 * 8 + lane % 8;
                    ldmatrix_x4_trans(a[m], left + place_across<T>(depth, row / 8 + lane / 8 % 2));
                } else {
                    ldmatrix_x4(a[m], left + place<T>(row + lane % 16, k / 8 + lane / 16));
                }
            }
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t b[4];
                if constexpr (RightAcross) {
                    const int depth = k + lane / 8 % 2 * 8 + lane % 8;
                    const int piece = warp_column() / 8 + n + lane / 16;
                    ldmatrix_x4_trans(b, right + place_across<T>(depth, piece));
                } else {
                    const int row = warp_column() + n * 8 + lane / 16 * 8 + lane % 8;
                    ldmatrix_x4(b, right + place<T>(row, k / 8 + lane / 8 % 2));
                }
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    mma_m16n8k16<T>(sums[m][n], a[m], {b[0], b[1]});
                    mma_m16n8k16<T>(sums[m][n + 1], a[m], {b[2], b[3]});
                }
            }
        }
    }
};

// In float32, without tensor cores, because they do not keep its precision.
template <>
struct Entries<float> {
    static constexpr int kRows = 4, kColumns = 16, kLanes = 4;
    float sums[4][16];

    __device__ __forceinline__ float& at(int i, int j) { return sums[i][j]; }
    __device__ __forceinline__ static int row(int i) { return warp_row() + lane_id() / 4 + i * 8; }
    __device__ __forceinline__ static int column0() { return warp_column() + lane_id() % 4; }
    __device__ __forceinline__ static constexpr int step(int j) { return j * 4; }
    __device__ __forceinline__ void add_products(Shared<float> hidden, Shared<float> weight) {
#pragma unroll 1  // or the loads of all pieces are hoisted, and registers run out
        for (int piece = 0; piece < kPieces; ++piece) {
            Vector<float, 4> a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = hidden.load_vector<4>(place<float>(row(i), piece));
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                const auto b = weight.load_vector<4>(place<float>(column0() + step(j), piece));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) sums[i][j] = fmaf(a[i].at[k], b.at[k], sums[i][j]);
                }
            }
        }
    }
};

// The products of the loader's next tile.
template <typename T, bool Aligned>
__device__ __forceinline__ Entries<T> next_products(const Operands<T>& in,
                                                    TileLoader<T, Aligned>& loader) {
    Entries<T> y = {};
    for (int d = 0; d < in.depth; d += kTileD<T>) {
        const int stage = loader.next(in);
        y.add_products(loader.hidden(stage), loader.weight(stage));
    }
    return y;
}

// y becomes z of the columns from v0 on, minus infinity past the vocabulary.
template <typename T>
__device__ __forceinline__ void to_logits(Entries<T>& y, const Operands<T>& in, int v0) {
    const int left = in.vocabulary - v0 - y.column0();
    if (in.bias) {
#pragma unroll
        for (int j = 0; j < Entries<T>::kColumns; ++j) {
            const auto at = in.bias + (v0 + y.column0());
            float bias = 0;
            if (y.step(j) < left) bias = at.template load<Cache::kReadOnly>(y.step(j));
#pragma unroll
            for (int i = 0; i < Entries<T>::kRows; ++i) y.at(i, j) += bias;
        }
    }
    if (in.transform.softcap > 0) {
#pragma unroll
        for (int j = 0; j < Entries<T>::kColumns; ++j) {
#pragma unroll
            for (int i = 0; i < Entries<T>::kRows; ++i) y.at(i, j) = in.transform.cap(y.at(i, j));
        }
    }
#pragma unroll
    for (int j = 0; j < Entries<T>::kColumns; ++j) {
        const bool known = y.step(j) < left;
#pragma unroll
        for (int i = 0; i < Entries<T>::kRows; ++i) {
            y.at(i, j) = known ? y.at(i, j) * in.transform.inverse_temperature : -infinity();
        }
    }
}

}  // namespace bft::cuda
