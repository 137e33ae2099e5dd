// Each of these has one mistake, which `Mended` takes away. They run as one block of 64 threads
// with 1024 bytes of shared memory, on 64 floats to read and 64 to write.
#pragma once

#include "csrc/cuda/device.h"

namespace bft::cuda {

using In = Global<const float>;
using Out = Global<float>;

// What thread i does. `values` are the first 64 floats of shared memory.
template <void (*Mistake)(int, Shared<float>, In, Out)>
__global__ void mistake_kernel(In in, Out out) {
    Mistake(threadIdx.x, {0, 64}, in, out);
}
#define MISTAKE(name)                                                                   \
    template <bool Mended>                                                              \
    __device__ void name([[maybe_unused]] int i, [[maybe_unused]] Shared<float> values, \
                         [[maybe_unused]] In in, [[maybe_unused]] Out out)

MISTAKE(past_the_end) {
    if (!Mended || i < 63) out.store(i, in.load(i + 1));
}

// Element 64 of the first array is inside of shared memory, where the second array starts.
MISTAKE(into_the_next_array) {
    const Shared<float> second(256, 64);
    values.store(Mended ? i : i + 1, in.load(i));
    second.store(i, 0);
}

MISTAKE(unwritten) {
    if (Mended || i != 5) values.store(i, in.load(i));
    __syncthreads();
    out.store(i, values.load(63 - i));
}

MISTAKE(two_write) { values.store(Mended ? i : i / 2, in.load(i)); }

MISTAKE(read_before_barrier) {
    values.store(i, in.load(i));
    if (Mended) __syncthreads();
    __nanosleep(100);  // by now all are written, without a promise
    out.store(i, values.load(63 - i));
}

MISTAKE(write_after_read) {
    values.store(i, in.load(i));
    __syncthreads();
    out.store(i, values.load((i + 32) % 64));
    if (Mended) __syncthreads();
    values.store(i, 0);
}

MISTAKE(warp_without_barrier) {
    values.store(i, 0);
    __syncthreads();
    values.store(i, in.load(i));
    if (Mended) __syncwarp();
    out.store(i, values.load(i ^ 1));
}

MISTAKE(shuffle_for_a_barrier) {
    values.store(i, in.load(i));
    if (Mended) __syncwarp();
    if (__any_sync(0xFFFFFFFF, 1)) out.store(i, values.load(i ^ 1));
}

MISTAKE(early_read) {
    cp_async<4>(values + i, in + i);
    cp_async_commit();
    cp_async_wait<Mended ? 0 : 1>();
    out.store(i, values.load(i));
}

MISTAKE(uncommitted_copy) {
    cp_async<4>(values + i, in + i);
    if (Mended) cp_async_commit();
    cp_async_wait<0>();
    out.store(i, values.load(i));
}

// The barrier comes before the wait: each thread then knows its own copies only.
MISTAKE(wait_without_barrier) {
    cp_async<4>(values + i, in + i);
    cp_async_commit();
    if (!Mended) __syncthreads();
    cp_async_wait<0>();
    if (Mended) __syncthreads();
    __nanosleep(100);  // by now all have waited: the elements are there, without a promise
    out.store(i, values.load(63 - i));
}

MISTAKE(overtaken_stage) {
    values.store(i, in.load(i));
    __syncthreads();
    out.store(i, values.load((i + 32) % 64));
    Mended ? __syncthreads() : __nanosleep(100);  // all have read, or the error differs by order
    cp_async<4>(values + i, in + i);
    cp_async_commit();
    cp_async_wait<0>();
}

MISTAKE(barrier_in_a_branch) {
    if (Mended || i < 32) __syncthreads();
}

MISTAKE(two_barriers) {
    if (i < 32 || Mended) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

MISTAKE(missing_lane) {
    if (i % 32 == 7 && !Mended) return;
    out.store(i, __shfl_xor_sync(0xFFFFFFFF, in.load(i), 1));
}

// The instruction is the same, but one half of the warp executes another copy of it.
MISTAKE(mma_in_a_branch) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (Mended || i % 2 == 0) {
        mma_m16n8k16<bf16>(d, a, b);
    } else {
        mma_m16n8k16<bf16>(d, a, b);
    }
}

// Lane i writes row i of a 16 x 16 tile, and ldmatrix hands it to other lanes.
MISTAKE(ldmatrix_without_barrier) {
    const Shared<bf16> tile(512 * (i / 32), 256);
    const Shared<bf16> row = tile + (i % 16 * 16 + i % 32 / 16 * 8);
    row.store_vector(0, Vector<bf16, 8>{});
    if (Mended) __syncwarp();
    uint32_t fragment[4];
    ldmatrix_x4(fragment, row);
}

MISTAKE(ldmatrix_off_by_one) {
    const Shared<bf16> tile(0, 512);
    for (int at = i; at < 512; at += 64) tile.store(at, bf16{});
    __syncthreads();
    uint32_t fragment[4];
    ldmatrix_x4(fragment, tile + (i % 16 * 16 + (Mended ? 8 : 1)));
}

MISTAKE(lane_outside_the_mask) {
    if (i % 32 < 16) out.store(i, __shfl_sync(0xFFFF, in.load(i), Mended ? 3 : 20));
}

MISTAKE(misaligned_global) {
    if (i < 8) out.store_vector(4 * i, in.load_vector<4>(Mended ? 4 * i : 4 * i + 1));
}

MISTAKE(misaligned_shared) {
    if (i < 8) values.store_vector(8 * i + (Mended ? 4 : 2), in.load_vector<4>(4 * i));
}

MISTAKE(misaligned_copy) {
    if (i == 0) cp_async<16>(values, in + (Mended ? 4 : 2));
    cp_async_commit();
    cp_async_wait<0>();
}

// The launch gives it a buffer registered for reading, as writable.
MISTAKE(write_to_input) {
    const Out writable(const_cast<float*>(in.pointer()));
    (Mended ? out : writable).store(i, 0);
}

MISTAKE(unwritten_output) {
    if (Mended) out.store(i, in.load(i));
    out.store(i, out.load(i) + 1);
}

// Of two blocks.
MISTAKE(blocks_collide) {
    if (!Mended || i / 32 == static_cast<int>(blockIdx.x)) out.store(i, in.load(i));
}

#undef MISTAKE

}  // namespace bft::cuda
