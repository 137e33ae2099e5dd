// CUDA's barriers, shuffles, votes and reductions, under their own names. Every one of them takes
// the line of its call as a last argument that kernels do not write.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "tests/cuda/emulation/block.h"

namespace bft::emulation {

// Calls fire(lanes) once for the warp; lanes[i] points to the operand that lane i passed.
template <typename T, typename Fire>
void meet(const char* operation, uint32_t mask, Orders orders, bool same_line, Site site,
          T& operand, Fire fire) {
    block().collective(operation, mask, orders, same_line, site, &operand, [&](Lanes& lanes) {
        std::array<T*, 32> typed;
        for (int i = 0; i < 32; ++i) typed[i] = static_cast<T*>(lanes[i]);
        fire(typed);
    });
}

template <typename T>
struct Shuffled {
    T value, result;
    int source;  // lane it reads; its own where CUDA says so
};

template <typename T>
T shuffle(const char* operation, uint32_t mask, T value, int source, Site site) {
    Shuffled<T> own{value, value, source};
    meet(operation, mask, Orders::kIfOptions, false, site, own, [&](auto& lanes) {
        for (uint32_t i = 0; i < 32; ++i) {
            if (lanes[i] == nullptr) continue;
            if (lanes[lanes[i]->source] == nullptr) {
                block().fail_lane(Kind::kMissingLane, i, site,
                                  std::string(operation) + " reads lane " +
                                      std::to_string(lanes[i]->source) +
                                      ", which is not in the mask");
            }
            lanes[i]->result = lanes[lanes[i]->source]->value;
        }
    });
    return own.result;
}

// Every lane gets combine over the values of all.
template <typename T, typename Combine>
T reduce(const char* operation, uint32_t mask, T value, Site site, Combine combine) {
    meet(operation, mask, Orders::kIfOptions, false, site, value, [&](auto& lanes) {
        T total = value;
        bool first = true;
        for (T* lane : lanes) {
            if (lane == nullptr) continue;
            total = first ? *lane : combine(total, *lane);
            first = false;
        }
        for (T* lane : lanes) {
            if (lane != nullptr) *lane = total;
        }
    });
    return value;
}

inline uint32_t ballot(const char* operation, uint32_t mask, bool vote, Site site) {
    const uint32_t own = vote ? 1u << block().lane() : 0;
    return reduce(operation, mask, own, site, [](uint32_t a, uint32_t b) { return a | b; });
}

}  // namespace bft::emulation

#define BFT_SITE ::bft::emulation::Site site = ::bft::emulation::Site::here()

inline void __syncthreads(BFT_SITE) { ::bft::emulation::block().barrier("__syncthreads", 0, site); }
inline int __syncthreads_count(int vote, BFT_SITE) {
    return ::bft::emulation::block().barrier("__syncthreads_count", vote, site);
}
inline void __syncwarp(uint32_t mask = 0xFFFFFFFF, BFT_SITE) {
    using namespace ::bft::emulation;
    int nothing = 0;
    meet("__syncwarp", mask, Orders::kMemory, false, site, nothing, [](auto&) {});
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, BFT_SITE) {
    return ::bft::emulation::shuffle("__shfl_sync", mask, value, lane % 32, site);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, BFT_SITE) {
    const int own = static_cast<int>(::bft::emulation::block().lane());
    return ::bft::emulation::shuffle("__shfl_xor_sync", mask, value, own ^ lanes, site);
}
// The first lanes read themselves.
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int delta, BFT_SITE) {
    const int own = static_cast<int>(::bft::emulation::block().lane());
    const int source = own < delta ? own : own - delta;
    return ::bft::emulation::shuffle("__shfl_up_sync", mask, value, source, site);
}

inline uint32_t __ballot_sync(uint32_t mask, int vote, BFT_SITE) {
    return ::bft::emulation::ballot("__ballot_sync", mask, vote != 0, site);
}
inline int __any_sync(uint32_t mask, int vote, BFT_SITE) {
    return ::bft::emulation::ballot("__any_sync", mask, vote != 0, site) != 0;
}
template <typename T>
T __reduce_add_sync(uint32_t mask, T value, BFT_SITE) {
    return ::bft::emulation::reduce("__reduce_add_sync", mask, value, site,
                                    [](T a, T b) -> T { return a + b; });
}

// Blocks run in turn, and a thread's accesses take place in order. A kernel that spins must yield.
inline void __nanosleep(unsigned) { ::bft::emulation::block().yield(); }
