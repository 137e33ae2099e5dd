// csrc/cuda/device.h for the host's compiler: the same names, with every access checked. Included
// by that file only, which documents them. The last argument of each function is the line of the
// call.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "tests/cuda/emulation/matrix.h"
#include "tests/cuda/emulation/memory.h"

namespace bft::cuda {

using emulation::bits_as;
using emulation::Kind;
using emulation::Site;
using emulation::Touch;

// Keeps the buffer that its pointer came from, so that an index cannot stray into the next one.
template <typename T>
class Global {
    using Value = std::remove_const_t<T>;

  public:
    Global(T* pointer) : pointer_(pointer), range_(emulation::find_range(pointer)) {}
    Global operator+(int64_t elements) const { return {moved(elements), range_}; }
    template <typename U, typename = std::enable_if_t<!std::is_same_v<U, T>>>
    Global(Global<U> other) : pointer_(other.pointer_), range_(other.range_) {}
    T* pointer() const { return pointer_; }
    explicit operator bool() const { return pointer_ != nullptr; }

    template <Cache C = Cache::kDefault>
    Value load(int64_t i, Site site = Site::here()) const {
        return load_as<Value, C>(i, site);
    }
    template <Cache C = Cache::kDefault>
    void store(int64_t i, T value, Site site = Site::here()) const {
        store_as(i, value, site);
    }
    template <int N, Cache C = Cache::kDefault>
    Vector<Value, N> load_vector(int64_t i, Site site = Site::here()) const {
        static_assert(sizeof(T) * N == 4 || sizeof(T) * N == 8 || sizeof(T) * N == 16);
        return load_as<Vector<Value, N>, C>(i, site);
    }
    template <Cache C = Cache::kDefault, int N>
    void store_vector(int64_t i, Vector<T, N> value, Site site = Site::here()) const {
        static_assert(sizeof(T) * N == 4 || sizeof(T) * N == 8 || sizeof(T) * N == 16);
        store_as(i, value, site);
    }
    // For cp_async: that so many bytes may be read.
    void check(int64_t bytes, Touch how, Site site) const {
        emulation::block().global(range_, pointer_, bytes, how, site);
    }

  private:
    template <typename U>
    friend class Global;

    Global(T* pointer, emulation::Range* range) : pointer_(pointer), range_(range) {}
    // In integers: a pointer outside of its array, which is an error only if it is used, would be
    // undefined behaviour here.
    T* moved(int64_t i) const {
        const auto address = reinterpret_cast<uintptr_t>(pointer_);
        return reinterpret_cast<T*>(address + static_cast<uintptr_t>(i) * sizeof(T));
    }
    template <typename V, Cache C>
    V load_as(int64_t i, Site site) const {
        constexpr Touch how = C == Cache::kReadOnly ? Touch::kReadOnlyPath : Touch::kRead;
        emulation::block().global(range_, moved(i), sizeof(V), how, site);
        V value;
        std::memcpy(&value, moved(i), sizeof value);
        return value;
    }
    template <typename V>
    void store_as(int64_t i, V value, Site site) const {
        emulation::block().global(range_, moved(i), sizeof(V), Touch::kWrite, site);
        std::memcpy(moved(i), &value, sizeof value);
    }
    T* pointer_;
    emulation::Range* range_;
};

// Keeps the ends of its array, so that an index cannot stray into the next one.
template <typename T>
class Shared {
  public:
    Shared(uint32_t byte_offset, uint32_t elements)
        : offset_(byte_offset),
          begin_(byte_offset),
          end_(byte_offset + static_cast<int64_t>(elements) * static_cast<int64_t>(sizeof(T))) {}
    Shared operator+(int elements) const {
        return {offset_ + elements * static_cast<int64_t>(sizeof(T)), begin_, end_};
    }

    T load(int i, Site site = Site::here()) const { return load_as<T>(i, site); }
    void store(int i, T value, Site site = Site::here()) const { store_as(i, value, site); }
    template <int N>
    Vector<T, N> load_vector(int i, Site site = Site::here()) const {
        static_assert(sizeof(T) * N == 4 || sizeof(T) * N == 8 || sizeof(T) * N == 16);
        return load_as<Vector<T, N>>(i, site);
    }
    template <int N>
    void store_vector(int i, Vector<T, N> value, Site site = Site::here()) const {
        static_assert(sizeof(T) * N == 4 || sizeof(T) * N == 8 || sizeof(T) * N == 16);
        store_as(i, value, site);
    }
    // The offset of element i, if `bytes` from there on are inside and aligned to their size.
    uint32_t checked(int64_t i, int64_t bytes, Site site) const {
        const int64_t at = offset_ + i * static_cast<int64_t>(sizeof(T));
        emulation::Block& block = emulation::block();
        const int64_t end = std::min(end_, static_cast<int64_t>(block.shared_bytes()));
        if (at < begin_ || at + bytes > end) {
            block.fail(Kind::kOutOfBounds, site,
                       std::to_string(bytes) + " bytes at shared byte " + std::to_string(at) +
                           " of an array from " + std::to_string(begin_) + " to " +
                           std::to_string(end));
        }
        if (at % bytes != 0) {
            block.fail(Kind::kMisaligned, site,
                       std::to_string(bytes) + " bytes at shared byte " + std::to_string(at));
        }
        return static_cast<uint32_t>(at);
    }
    emulation::MatrixLoad matrix_row(uint32_t* out) const {
        const int64_t end = static_cast<int64_t>(emulation::block().shared_bytes());
        return {offset_, begin_, std::min(end_, end), out};
    }

  private:
    Shared(int64_t offset, int64_t begin, int64_t end)
        : offset_(offset), begin_(begin), end_(end) {}
    template <typename V>
    V load_as(int i, Site site) const {
        const uint32_t at = checked(i, sizeof(V), site);
        emulation::Block& block = emulation::block();
        block.read(block.lane(), at, sizeof(V), site);
        V value;
        std::memcpy(&value, block.shared() + at, sizeof value);
        return value;
    }
    template <typename V>
    void store_as(int i, V value, Site site) const {
        const uint32_t at = checked(i, sizeof(V), site);
        emulation::block().write(at, sizeof(V), false, site);
        std::memcpy(emulation::block().shared() + at, &value, sizeof value);
    }
    int64_t offset_, begin_, end_;  // in bytes
};

template <int Bytes, typename T, typename U>
void cp_async(Shared<T> to, Global<U> from, int valid = Bytes, Site site = Site::here()) {
    static_assert(std::is_same_v<T, std::remove_const_t<U>>);
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
    emulation::Block& block = emulation::block();
    if (valid < 0 || valid > Bytes) {
        block.fail(Kind::kOutOfBounds, site, "cp.async of " + std::to_string(valid) + " bytes");
    }
    if (reinterpret_cast<uintptr_t>(from.pointer()) % Bytes != 0) {
        block.fail(Kind::kMisaligned, site,
                   "cp.async of " + std::to_string(Bytes) +
                       " bytes from a global address that is " +
                       std::to_string(reinterpret_cast<uintptr_t>(from.pointer()) % Bytes) +
                       " modulo that");
    }
    unsigned char data[Bytes] = {};
    if (valid > 0) {
        for (int i = 0; i < valid; i += sizeof(T)) {
            (from + i / static_cast<int>(sizeof(T))).check(sizeof(T), Touch::kRead, site);
        }
        std::memcpy(data, from.pointer(), valid);
    }
    block.issue(to.checked(0, Bytes, site), data, Bytes, site);
}
inline void cp_async_commit() { emulation::block().commit(); }
template <int N>
void cp_async_wait() {
    emulation::block().wait(N);
}

// `ldmatrix` of four matrices; named apart so that different forms cannot meet.
template <bool Transposed, typename T>
void load_fragments(const char* name, uint32_t* out, Shared<T> row, Site site) {
    static_assert(sizeof(T) == 2);
    emulation::MatrixLoad own = row.matrix_row(out);
    emulation::meet(name, 0xFFFFFFFF, emulation::Orders::kNothing, true, site, own,
                    [&](auto& lanes) { emulation::load_matrices(lanes, Transposed, site); });
}
template <typename T>
void ldmatrix_x4(uint32_t (&out)[4], Shared<T> row, Site site = Site::here()) {
    load_fragments<false>("ldmatrix_x4", out, row, site);
}
template <typename T>
void ldmatrix_x4_trans(uint32_t (&out)[4], Shared<T> row, Site site = Site::here()) {
    load_fragments<true>("ldmatrix_x4_trans", out, row, site);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::here()) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
    emulation::Multiply own{a, b, d, d};
    emulation::meet("mma_m16n8k16", 0xFFFFFFFF, emulation::Orders::kNothing, true, site, own,
                    [](auto& lanes) { emulation::multiply<T>(lanes); });
}

// Of the device's instructions only the flushing of subnormals is kept, not the last bits.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }

}  // namespace bft::cuda
