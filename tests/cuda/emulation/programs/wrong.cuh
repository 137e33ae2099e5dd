// Each kernel has one mistake, which `Mended` takes away. They run as one block of 64 threads with
// 1024 bytes of shared memory, on 64 floats to read and 64 to write.
#pragma once

#include "csrc/cuda/device.h"

namespace bft::cuda {

using In = Global<const float>;
using Out = Global<float>;

template <bool Mended>
__global__ void past_the_end_kernel(In in, Out out) {
    const int i = threadIdx.x;
    if (!Mended || i < 63) out.store(i, in.load(i + 1));
}

// Element 64 of the first array is inside of shared memory, where the second array starts.
template <bool Mended>
__global__ void into_the_next_array_kernel(In in, Out) {
    const Shared<float> first(0, 64), second(256, 64);
    const int i = threadIdx.x;
    first.store(Mended ? i : i + 1, in.load(i));
    second.store(i, 0);
}

template <bool Mended>
__global__ void unwritten_kernel(In in, Out out) {
    const Shared<float> values(0, 64);
    const int i = threadIdx.x;
    if (Mended || i != 5) values.store(i, in.load(i));
    __syncthreads();
    out.store(i, values.load(63 - i));
}

template <bool Mended>
__global__ void two_write_kernel(In in, Out) {
    const Shared<float> values(0, 64);
    const int i = threadIdx.x;
    values.store(Mended ? i : i / 2, in.load(i));
}

template <bool Mended>
__global__ void read_before_barrier_kernel(In in, Out out) {
    const Shared<float> values(0, 64);
    const int i = threadIdx.x;
    values.store(i, in.load(i));
    if (Mended) __syncthreads();
    __nanosleep(100);  // by now all are written, without a promise
    out.store(i, values.load(63 - i));
}

template <bool Mended>
__global__ void write_after_read_kernel(In in, Out out) {
    const Shared<float> values(0, 64);
    const int i = threadIdx.x;
    values.store(i, in.load(i));
    __syncthreads();
    out.store(i, values.load((i + 32) % 64));
    if (Mended) __syncthreads();
    values.store(i, 0);
}

template <bool Mended>
__global__ void warp_without_barrier_kernel(In in, Out out) {
    const Shared<float> values(0, 64);
    const int i = threadIdx.x;
    values.store(i, 0);
    __syncthreads();
    values.store(i, in.load(i));
    if (Mended) __syncwarp();
    out.store(i, values.load(i ^ 1));
}

template <bool Mended>
__global__ void shuffle_for_a_barrier_kernel(In in, Out out) {
    const Shared<float> values(0, 64);
    const int i = threadIdx.x;
    values.store(i, in.load(i));
    if (Mended) __syncwarp();
    if (__any_sync(0xFFFFFFFF, 1)) out.store(i, values.load(i ^ 1));
}

template <bool Mended>
__global__ void atomic_and_plain_kernel(In, Out) {
    const Shared<int> count(0, 1);
    if (threadIdx.x == 0) count.store(0, 0);
    __syncthreads();
    count.atomic_add(0, 1);
    if (Mended) __syncthreads();
    if (threadIdx.x == 33) count.store(0, 0);
}

template <bool Mended>
__global__ void early_read_kernel(In in, Out out) {
    const Shared<float> values(0, 64);
    const int i = threadIdx.x;
    cp_async<4>(values + i, in + i);
    cp_async_commit();
    cp_async_wait<Mended ? 0 : 1>();
    out.store(i, values.load(i));
}

template <bool Mended>
__global__ void uncommitted_copy_kernel(In in, Out out) {
    const Shared<float> values(0, 64);
    const int i = threadIdx.x;
    cp_async<4>(values + i, in + i);
    if (Mended) cp_async_commit();
    cp_async_wait<0>();
    out.store(i, values.load(i));
}

// The barrier comes before the wait: each thread then knows its own copies only.
template <bool Mended>
__global__ void wait_without_barrier_kernel(In in, Out out) {
    const Shared<float> values(0, 64);
    const int i = threadIdx.x;
    cp_async<4>(values + i, in + i);
    cp_async_commit();
    if (!Mended) __syncthreads();
    cp_async_wait<0>();
    if (Mended) __syncthreads();
    __nanosleep(100);  // by now all have waited: the elements are there, without a promise
    out.store(i, values.load(63 - i));
}

template <bool Mended>
__global__ void overtaken_stage_kernel(In in, Out out) {
    const Shared<float> values(0, 64);
    const int i = threadIdx.x;
    values.store(i, in.load(i));
    __syncthreads();
    out.store(i, values.load((i + 32) % 64));
    Mended ? __syncthreads() : __nanosleep(100);  // all have read, or the error differs by order
    cp_async<4>(values + i, in + i);
    cp_async_commit();
    cp_async_wait<0>();
}

template <bool Mended>
__global__ void barrier_in_a_branch_kernel(In, Out) {
    if (Mended || threadIdx.x < 32) __syncthreads();
}

template <bool Mended>
__global__ void two_barriers_kernel(In, Out) {
    if (threadIdx.x < 32 || Mended) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

template <bool Mended>
__global__ void missing_lane_kernel(In in, Out out) {
    const int i = threadIdx.x;
    if (i % 32 == 7 && !Mended) return;
    out.store(i, __shfl_xor_sync(0xFFFFFFFF, in.load(i), 1));
}

// The instruction is the same, but one half of the warp executes another copy of it.
template <bool Mended>
__global__ void mma_in_a_branch_kernel(In, Out) {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (Mended || threadIdx.x % 2 == 0) {
        mma_m16n8k16<bf16>(d, a, b);
    } else {
        mma_m16n8k16<bf16>(d, a, b);
    }
}

// Lane i writes row i of a 16 x 16 tile, and ldmatrix hands it to other lanes.
template <bool Mended>
__global__ void ldmatrix_without_barrier_kernel(In, Out) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Shared<bf16> tile(512 * warp, 256);
    const Shared<bf16> row = tile + (lane % 16 * 16 + lane / 16 * 8);
    row.store_vector(0, Vector<bf16, 8>{});
    if (Mended) __syncwarp();
    uint32_t fragment[4];
    ldmatrix_x4(fragment, row);
}

template <bool Mended>
__global__ void ldmatrix_off_by_one_kernel(In, Out) {
    const Shared<bf16> tile(0, 512);
    for (int i = threadIdx.x; i < 512; i += 64) tile.store(i, bf16{});
    __syncthreads();
    uint32_t fragment[2];
    ldmatrix_x2(fragment, tile + (threadIdx.x % 16 * 16 + (Mended ? 8 : 1)));
}

template <bool Mended>
__global__ void lane_outside_the_mask_kernel(In in, Out out) {
    const int i = threadIdx.x;
    if (i % 32 < 16) out.store(i, __shfl_sync(0xFFFF, in.load(i), Mended ? 3 : 20));
}

template <bool Mended>
__global__ void misaligned_global_kernel(In in, Out out) {
    const int i = threadIdx.x;
    if (i < 8) out.store_vector(4 * i, in.load_vector<4>(Mended ? 4 * i : 4 * i + 1));
}

template <bool Mended>
__global__ void misaligned_shared_kernel(In in, Out) {
    const Shared<float> values(0, 128);
    const int i = threadIdx.x;
    if (i < 8) values.store_vector(8 * i + (Mended ? 4 : 2), in.load_vector<4>(4 * i));
}

template <bool Mended>
__global__ void misaligned_copy_kernel(In in, Out) {
    const Shared<float> values(0, 128);
    if (threadIdx.x == 0) cp_async<16>(values, in + (Mended ? 4 : 2));
    cp_async_commit();
    cp_async_wait<0>();
}

// The launch gives it a buffer registered for reading, as writable.
template <bool Mended>
__global__ void write_to_input_kernel(In in, Out out) {
    const Out writable(const_cast<float*>(in.pointer()));
    (Mended ? out : writable).store(threadIdx.x, 0);
}

template <bool Mended>
__global__ void unwritten_output_kernel(In in, Out out) {
    const int i = threadIdx.x;
    if (Mended) out.store(i, in.load(i));
    out.store(i, out.load(i) + 1);
}

// Of two blocks.
template <bool Mended>
__global__ void blocks_collide_kernel(In in, Out out) {
    const int i = threadIdx.x;
    if (!Mended || i / 32 == static_cast<int>(blockIdx.x)) out.store(i, in.load(i));
}

}  // namespace bft::cuda
