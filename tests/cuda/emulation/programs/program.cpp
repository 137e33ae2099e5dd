// Runs the test kernels in the emulation. Prints a line for each result; exits with 1 at the first
// that is not right. Compiled and read by test_emulation.py.
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

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

void check(bool right, const std::string& what) {
    if (right) return;
    std::printf("wrong: %s\n", what.c_str());
    std::exit(1);
}

// Whole numbers from `first` on.
std::vector<float> numbers(size_t n, float first) {
    std::vector<float> values(n);
    std::iota(values.begin(), values.end(), first);
    return values;
}

template <typename T>
void check_rounding() {
    const int n = 30;
    Array<float> x("x", numbers(n, 1), Rights::kRead);
    Array<float> out("out", std::vector<float>(2 * n));
    launch(round_kernel<T>, {"round", 1, 64, 0, nullptr}, n, x.data(), out.data());
    for (int i = 0; i < n; ++i) {
        const float value = x.values()[i];
        check(out.values()[i] == value, "pack");
        check(out.values()[n + i] == std::ldexp(1.0f, static_cast<int>(value)), "exp2");
    }
}

using Kernel = void (*)(In, Out);

// The mended kernel runs; the wrong one is caught, for the right reason.
void check_caught(const char* name, Kind kind, Kernel wrong, Kernel mended, unsigned blocks = 1,
                  Contents contents = Contents::kInitialised) {
    Array<float> in("in", numbers(64, 1), Rights::kRead);
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
    std::vector<bf16> elements, columns;
    for (const float x : numbers(256, 0)) elements.push_back(from_float<bf16>(x));
    for (int i = 0; i < 128; ++i) columns.push_back(from_float<bf16>(i % 16 == i / 16 + 3 ? 1 : 0));
    Array<bf16> tile("tile", elements, Rights::kRead), of_b("b", columns, Rights::kRead);
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
        check_rounding<bf16>();
        check_rounding<fp16>();
        check_mistakes();
        std::printf("seed %d is right\n", static_cast<int>(seed));
    }
    print_fragments();
    print_conversions();
}
