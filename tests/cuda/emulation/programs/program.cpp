// Runs the test kernels in the emulation. Prints a line for each result; exits with 1 at the first
// that is not right. Compiled and read by test_emulation.py.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <cub/device/device_radix_sort.cuh>

#include "csrc/cuda/launch.h"
#include "tests/cuda/emulation/programs/right.cuh"
#include "tests/cuda/emulation/programs/wrong.cuh"

using namespace bft::cuda;
using bft::emulation::Array;
using bft::emulation::Contents;
using bft::emulation::Error;
using bft::emulation::Kind;
using bft::emulation::options;
using bft::emulation::Rights;

namespace {

std::mt19937 generator(7);

void check(bool right, const std::string& what) {
    if (right) return;
    std::printf("wrong: %s\n", what.c_str());
    std::exit(1);
}

template <typename T>
std::vector<T> draw(size_t n, int low, int high) {
    std::vector<T> values;
    std::uniform_int_distribution<int> numbers(low, high);
    for (size_t i = 0; i < n; ++i) {
        if constexpr (sizeof(T) == 2) {
            values.push_back(from_float<T>(static_cast<float>(numbers(generator)) / 8));
        } else {
            values.push_back(static_cast<T>(numbers(generator)));
        }
    }
    return values;
}

// Eighths of small integers: every sum is exact, so any order gives the same bits.
template <typename T>
void check_gemm(int rows, int columns, int depth) {
    Array<T> a("a", draw<T>(rows * depth, -9, 9), Rights::kRead);
    Array<T> b("b", draw<T>(columns * depth, -9, 9), Rights::kRead);
    Array<float> c("c", std::vector<float>(rows * columns), Rights::kReadWrite,
                   Contents::kUninitialised);
    const dim3 grid((columns + 31) / 32, (rows + 31) / 32);
    launch(gemm_kernel<T>, {"gemm", grid, 128, kGemmShared, nullptr}, rows, columns, depth,
           a.data(), b.data(), c.data());
    for (int i = 0; i < rows * columns; ++i) {
        float expected = 0;
        for (int k = 0; k < depth; ++k) {
            expected += to_float(a.values()[i / columns * depth + k]) *
                        to_float(b.values()[i % columns * depth + k]);
        }
        check(c.values()[i] == expected, "gemm at " + std::to_string(i));
    }
}

void check_reductions() {
    const int n = 1000;
    Array<float> x("x", draw<float>(n, -50, 50), Rights::kRead);
    Array<float> sums("sums", std::vector<float>(3));
    launch(sum_kernel, {"sum", 3, 96, 128, nullptr}, n, x.data(), sums.data());
    float expected = 0, got = 0;
    for (const float value : x.values()) expected += value;
    for (const float value : sums.values()) got += value;
    check(got == expected, "sum");

    Array<int> ints("ints", draw<int>(192, 0, 9), Rights::kRead);
    Array<int> kept("kept", std::vector<int>(192)), counts("counts", std::vector<int>(6));
    launch(compact_kernel, {"compact", 3, 64, 0, nullptr}, ints.data(), kept.data(), counts.data());
    for (int warp = 0; warp < 6; ++warp) {
        std::vector<int> odd;
        for (int i = 32 * warp; i < 32 * warp + 32; ++i) {
            if (ints.values()[i] % 2 != 0) odd.push_back(ints.values()[i]);
        }
        check(counts.values()[warp] == static_cast<int>(odd.size()), "compact, count");
        const auto begin = kept.values().begin() + 32 * warp;
        check(std::equal(odd.begin(), odd.end(), begin), "compact, values");
    }
}

template <typename T>
void check_rounding() {
    const int n = 100;
    Array<float> x("x", draw<float>(n, 1, 30), Rights::kRead);
    Array<float> out("out", std::vector<float>(2 * n));
    launch(round_kernel<T>, {"round", 1, 64, 0, nullptr}, n, x.data(), out.data());
    for (int i = 0; i < n; ++i) {
        const float value = x.values()[i];
        check(out.values()[i] == value, "pack");
        check(out.values()[n + i] == std::ldexp(1.0f, static_cast<int>(value)), "exp2");
    }
}

void check_cub() {
    const int n = 300;
    Array<uint32_t> keys("keys", draw<uint32_t>(n, 0, 4000), Rights::kRead);
    Array<int> values("values", draw<int>(n, 0, 1 << 20), Rights::kRead);
    Array<uint32_t> sorted("sorted", std::vector<uint32_t>(n));
    Array<int> moved("moved", std::vector<int>(n));
    size_t bytes = 0;
    cub::DeviceRadixSort::SortPairs(nullptr, bytes, keys.data(), sorted.data(), values.data(),
                                    moved.data(), n, 4, 12);
    Array<char> temporary("temporary", std::vector<char>(bytes));
    const cudaError_t error = cub::DeviceRadixSort::SortPairs(
        temporary.data(), bytes, keys.data(), sorted.data(), values.data(), moved.data(), n, 4, 12);
    std::vector<std::pair<uint32_t, int>> expected;
    for (int i = 0; i < n; ++i) expected.push_back({keys.values()[i], values.values()[i]});
    std::stable_sort(expected.begin(), expected.end(),
                     [](auto a, auto b) { return (a.first >> 4 & 255) < (b.first >> 4 & 255); });
    check(error == cudaSuccess, "sort, status");
    for (int i = 0; i < n; ++i) {
        check(sorted.values()[i] == expected[i].first && moved.values()[i] == expected[i].second,
              "sort");
    }
    size_t too_few = bytes - 1;
    check(cub::DeviceRadixSort::SortPairs(temporary.data(), too_few, keys.data(), sorted.data(),
                                          values.data(), moved.data(), n, 4,
                                          12) == cudaErrorInvalidValue,
          "sort, too little storage");
}

using Kernel = void (*)(In, Out);

// The mended kernel runs; the wrong one is caught, for the right reason.
void check_caught(const char* name, Kind kind, Kernel wrong, Kernel mended, unsigned blocks = 1,
                  Contents contents = Contents::kInitialised) {
    Array<float> in("in", draw<float>(64, 1, 9), Rights::kRead);
    const auto run = [&](Kernel kernel) {
        Array<float> out("out", std::vector<float>(64), Rights::kReadWrite, contents);
        launch(kernel, {name, blocks, 64, 1024, nullptr}, in.data(), out.data());
    };
    run(mended);
    std::string message = "nothing";
    try {
        run(wrong);
    } catch (const Error& error) {
        message = error.what();
        if (error.kind == kind) {
            if (options().seed == 1) std::printf("caught: %s\n", message.c_str());
            return;
        }
    }
    check(false,
          std::string(name) + ", expected " + bft::emulation::name(kind) + ", got " + message);
}

#define CAUGHT(kernel, kind, ...)                              \
    check_caught(#kernel, kind, mistake_kernel<kernel<false>>, \
                 mistake_kernel<kernel<true>>, ##__VA_ARGS__)

void check_mistakes() {
    CAUGHT(past_the_end, Kind::kOutOfBounds);
    CAUGHT(into_the_next_array, Kind::kOutOfBounds);
    CAUGHT(unwritten, Kind::kUninitialised);
    CAUGHT(unwritten_output, Kind::kUninitialised, 1, Contents::kUninitialised);
    CAUGHT(two_write, Kind::kRace);
    CAUGHT(read_before_barrier, Kind::kRace);
    CAUGHT(write_after_read, Kind::kRace);
    CAUGHT(warp_without_barrier, Kind::kRace);
    CAUGHT(ldmatrix_without_barrier, Kind::kRace);
    CAUGHT(overtaken_stage, Kind::kRace);
    CAUGHT(early_read, Kind::kAsyncPending);
    CAUGHT(uncommitted_copy, Kind::kAsyncPending);
    CAUGHT(wait_without_barrier, Kind::kAsyncUnordered);
    CAUGHT(barrier_in_a_branch, Kind::kDivergentBarrier);
    CAUGHT(two_barriers, Kind::kDivergentBarrier);
    CAUGHT(missing_lane, Kind::kMissingLane);
    CAUGHT(mma_in_a_branch, Kind::kMissingLane);
    CAUGHT(lane_outside_the_mask, Kind::kMissingLane);
    CAUGHT(misaligned_global, Kind::kMisaligned);
    CAUGHT(misaligned_shared, Kind::kMisaligned);
    CAUGHT(misaligned_copy, Kind::kMisaligned);
    CAUGHT(ldmatrix_off_by_one, Kind::kMisaligned);
    CAUGHT(write_to_input, Kind::kReadOnly);
    CAUGHT(blocks_collide, Kind::kGlobalRace, 2);
    options().collectives_order_memory = false;
    CAUGHT(shuffle_for_a_barrier, Kind::kRace);
    options().collectives_order_memory = true;
}

// Element e of the tile is the number e, so that a fragment says where it came from. Column n of b
// takes column n + 3 of the tile.
void print_fragments() {
    std::vector<bf16> numbers, columns;
    for (int i = 0; i < 256; ++i) numbers.push_back(from_float<bf16>(static_cast<float>(i)));
    for (int i = 0; i < 128; ++i) columns.push_back(from_float<bf16>(i % 16 == i / 16 + 3 ? 1 : 0));
    Array<bf16> tile("tile", numbers, Rights::kRead), of_b("b", columns, Rights::kRead);
    Array<uint32_t> words("words", std::vector<uint32_t>(32 * 8));
    Array<float> sums("sums", std::vector<float>(32 * 4));
    launch(fragments_kernel<bf16>, {"fragments", 1, 32, 768, nullptr}, tile.data(), of_b.data(),
           words.data(), sums.data());
    for (int lane = 0; lane < 32; ++lane) {
        std::printf("lane");
        for (int i = 0; i < 16; ++i) {
            const uint32_t word = words.values()[8 * lane + i / 2];
            const auto half = static_cast<uint16_t>(word >> 16 * (i % 2));
            std::printf(" %g", to_float(__ushort_as_bfloat16(half)));
        }
        for (int i = 0; i < 4; ++i) std::printf(" %g", sums.values()[4 * lane + i]);
        std::printf("\n");
    }
}

// All halves as floats, and 2^16 floats of all sizes as halves and bfloat16s, for numpy to judge.
void print_conversions() {
    for (uint32_t i = 0; i < 1 << 16; ++i) {
        const float wide = __half2float(__ushort_as_half(static_cast<uint16_t>(i)));
        const float x = __uint_as_float(i * 65537u ^ i << 7);
        std::printf("convert %u %u %u %u\n", __float_as_uint(wide), __float_as_uint(x),
                    unsigned{__half_as_ushort(__float2half_rn(x))},
                    unsigned{__bfloat16_as_ushort(__float2bfloat16_rn(x))});
    }
}

}  // namespace

int main() {
    for (uint64_t seed = 1; seed <= 3; ++seed) {
        options().seed = seed;
        check_gemm<bf16>(70, 45, 136);
        check_gemm<fp16>(33, 64, 24);
        check_reductions();
        check_rounding<bf16>();
        check_rounding<fp16>();
        check_cub();
        check_mistakes();
        options().collectives_order_memory = false;
        check_gemm<bf16>(40, 20, 64);
        check_reductions();
        options().collectives_order_memory = true;
        std::printf("seed %d is right\n", static_cast<int>(seed));
    }
    print_fragments();
    print_conversions();
}
