// A launch: the blocks of a grid one after the other, in an order drawn from the seed.
#pragma once

#include <algorithm>
#include <functional>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "tests/cuda/emulation/block.h"

namespace bft::emulation {

inline void check_launchable(const std::string& kernel, dim3 grid, dim3 block,
                             size_t shared_bytes) {
    const bool blocks_fit = block.count() >= 1 && block.count() <= 1024 && block.z <= 64;
    const bool grid_fits =
        grid.count() >= 1 && grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16;
    if (!blocks_fit || !grid_fits || shared_bytes > options().shared_limit) {
        throw Error(Kind::kLaunch, kernel + ": a grid of " + std::to_string(grid.count()) +
                                       " blocks of " + std::to_string(block.count()) +
                                       " threads and " + std::to_string(shared_bytes) +
                                       " bytes of shared memory");
    }
}

inline void run(const std::string& kernel, dim3 grid, dim3 block, size_t shared_bytes,
                const std::function<void()>& body) {
    static std::mutex one_at_a_time;  // threadIdx and its like are plain variables
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    check_launchable(kernel, grid, block, shared_bytes);
    std::vector<uint64_t> order(grid.count());
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 generator(options().seed);
    std::shuffle(order.begin(), order.end(), generator);

    Block runner(kernel, grid, block, shared_bytes);
    struct Running {
        explicit Running(Block* block) { running_block = block; }
        ~Running() { running_block = nullptr; }
    } running(&runner);
    const uint32_t serial = next_serial();
    for (const uint64_t i : order) {
        runner.run({static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y)},
                   serial, body);
    }
}

}  // namespace bft::emulation
