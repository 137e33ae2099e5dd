// What kernels use beyond plain CUDA C++, and the only file with PTX in it: memory through typed
// accessors, asynchronous copies, ldmatrix and mma. Needs sm_80.
//
// Kernels reach memory through Global<T> and Shared<T> only. For nvcc these are a pointer and an
// offset. With BFT_EMULATION tests/cuda/emulation implements the same names and checks every
// access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace bft::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// N elements that are loaded and stored in one access of 4, 8 or 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

enum class Cache {
    kDefault,
    kReadOnly,   // memory that nothing writes during the launch (ld.global.nc)
    kStreaming,  // not needed again: evicted first
};

}  // namespace bft::cuda

#ifdef BFT_EMULATION
#include "tests/cuda/emulation/device.h"
#else

namespace bft::cuda {

// The word that holds a T, for the intrinsics, which know no other types.
template <typename T, size_t Bytes = sizeof(T)>
using WordOf = std::conditional_t<
    Bytes == 16, uint4,
    std::conditional_t<
        Bytes == 8, uint2,
        std::conditional_t<Bytes == 4, unsigned,
                           std::conditional_t<Bytes == 2, unsigned short, unsigned char> > > >;

template <typename To, typename From>
__device__ __forceinline__ To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <typename T>
class Global {
  public:
    // A pointer converts, so that a launch can be given one.
    __host__ __device__ __forceinline__ Global(T* pointer) : pointer_(pointer) {}
    __host__ __device__ __forceinline__ Global operator+(int64_t elements) const {
        return pointer_ + elements;
    }
    template <typename U, typename = std::enable_if_t<!std::is_same_v<U, T> > >
    __host__ __device__ __forceinline__ Global(Global<U> other) : pointer_(other.pointer()) {}
    __host__ __device__ __forceinline__ T* pointer() const { return pointer_; }
    __host__ __device__ __forceinline__ explicit operator bool() const {
        return pointer_ != nullptr;
    }

    template <Cache C = Cache::kDefault>
    __device__ __forceinline__ std::remove_const_t<T> load(int64_t i) const {
        return load_as<std::remove_const_t<T>, C>(i);
    }
    template <Cache C = Cache::kDefault>
    __device__ __forceinline__ void store(int64_t i, T value) const {
        store_as<C>(i, value);
    }
    // N elements from element i on; their address must be a multiple of their size in bytes.
    template <int N, Cache C = Cache::kDefault>
    __device__ __forceinline__ Vector<std::remove_const_t<T>, N> load_vector(int64_t i) const {
        return load_as<Vector<std::remove_const_t<T>, N>, C>(i);
    }
    template <Cache C = Cache::kDefault, int N>
    __device__ __forceinline__ void store_vector(int64_t i, Vector<T, N> value) const {
        store_as<C>(i, value);
    }

  private:
    template <typename V, Cache C>
    __device__ __forceinline__ V load_as(int64_t i) const {
        using Word = WordOf<V>;
        const Word* at = reinterpret_cast<const Word*>(pointer_ + i);
        if constexpr (C == Cache::kReadOnly) return bits_as<V>(__ldg(at));
        if constexpr (C == Cache::kStreaming) return bits_as<V>(__ldcs(at));
        return bits_as<V>(*at);
    }
    template <Cache C, typename V>
    __device__ __forceinline__ void store_as(int64_t i, V value) const {
        using Word = WordOf<V>;
        Word* at = reinterpret_cast<Word*>(pointer_ + i);
        if constexpr (C == Cache::kStreaming) {
            __stcs(at, bits_as<Word>(value));
        } else {
            *at = bits_as<Word>(value);
        }
    }

    T* pointer_;
};

extern __shared__ __align__(128) unsigned char dynamic_shared[];

// An array in the dynamic shared memory, from a byte offset on. The number of elements is not used
// here: the emulation checks it.
template <typename T>
class Shared {
  public:
    __device__ __forceinline__ Shared(uint32_t byte_offset, uint32_t) : offset_(byte_offset) {}
    __device__ __forceinline__ Shared operator+(int elements) const {
        return Shared(offset_ + elements * static_cast<int>(sizeof(T)), 0);
    }

    __device__ __forceinline__ T load(int i) const { return *at<T>(i); }
    __device__ __forceinline__ void store(int i, T value) const { *at<T>(i) = value; }
    template <int N>
    __device__ __forceinline__ Vector<T, N> load_vector(int i) const {
        using Word = WordOf<Vector<T, N> >;
        return bits_as<Vector<T, N> >(*at<Word>(i));
    }
    template <int N>
    __device__ __forceinline__ void store_vector(int i, Vector<T, N> value) const {
        using Word = WordOf<Vector<T, N> >;
        *at<Word>(i) = bits_as<Word>(value);
    }
    // The address as PTX takes it.
    __device__ __forceinline__ uint32_t address() const {
        return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared)) + offset_;
    }

  private:
    template <typename U>
    __device__ __forceinline__ U* at(int i) const {
        return reinterpret_cast<U*>(dynamic_shared + offset_ + i * static_cast<int>(sizeof(T)));
    }

    uint32_t offset_;
};

// Starts to copy Bytes (4, 8 or 16; both addresses are multiples of it), of which only the first
// `valid` are read; the rest is zero. The issuing thread sees them when it has waited, and other
// threads see them after a barrier that follows.
template <int Bytes, typename T, typename U>
__device__ __forceinline__ void cp_async(Shared<T> to, Global<U> from, int valid = Bytes) {
    static_assert(std::is_same_v<T, std::remove_const_t<U> >);
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
    const size_t source = __cvta_generic_to_global(from.pointer());
    if constexpr (Bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()),
                     "l"(source), "r"(valid)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to.address()),
                     "l"(source), "n"(Bytes), "r"(valid)
                     : "memory");
    }
}
// Closes the group of the copies that this thread has issued since the last commit.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until all but the last N groups of this thread have arrived.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Loads 8 x 8 matrices of 2-byte elements into fragments: lane 8 m + r gives the address of row r
// of matrix m. All lanes of the warp must call it; it orders no memory accesses.
template <typename T>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], Shared<T> row) {
    static_assert(sizeof(T) == 2);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row.address())
                 : "memory");
}
template <typename T>
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], Shared<T> row) {
    static_assert(sizeof(T) == 2);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row.address())
                 : "memory");
}
// d += a b for a [16, 16] row by row and b [16, 8] column by column, of T = bf16 or fp16.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
    if constexpr (std::is_same_v<T, bf16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// 2^x, to about 2^-22 of relative error.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace bft::cuda
#endif

namespace bft::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
    if constexpr (std::is_same_v<T, fp16>) return __float2half_rn(x);
    if constexpr (std::is_same_v<T, float>) return x;
}

// Two elements as a register of a fragment; the first is its low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
#ifdef __CUDACC__  // one instruction converts both
    if constexpr (std::is_same_v<T, bf16>) {
        return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
    } else {
        return bits_as<uint32_t>(__floats2half2_rn(low, high));
    }
#else
    return bits_as<uint32_t>(Vector<T, 2>{{from_float<T>(low), from_float<T>(high)}});
#endif
}

}  // namespace bft::cuda
