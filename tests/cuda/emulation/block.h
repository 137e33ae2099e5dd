// One thread block: its threads as fibers, its shared memory, its barriers.
//
// Threads run one at a time and give way only where they wait. Each round resumes all that can run,
// in an order drawn from the seed. A barrier opens when nothing else can run, which is also when
// it shows who is missing.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "tests/cuda/emulation/error.h"
#include "tests/cuda/emulation/fiber.h"
#include "tests/cuda/emulation/memory.h"
#include "tests/cuda/emulation/shadow.h"
#include "tests/cuda/emulation/types.h"

namespace bft::emulation {

struct Options {
    uint64_t seed = 0;  // of the order of blocks and threads
    // CUDA promises an order of memory accesses within a warp only for __syncwarp. If true,
    // shuffles, votes and reductions are taken to order them too.
    bool collectives_order_memory = true;
    size_t shared_limit = 163 << 10;  // bytes a block may have; sm_80's
};

inline Options& options() {
    static Options current;
    return current;
}

// A cp.async in flight: its bytes were read when it was issued, and are not in shared memory yet.
struct Copy {
    uint32_t group, offset, bytes;
    unsigned char data[16];
};

struct Thread {
    enum class State { kNew, kReady, kAtBarrier, kAtCollective, kExited };

    Fiber fiber;
    State state = State::kNew;
    uint3 index{};
    uint32_t number = 0, warp = 0, lane = 0;
    std::array<uint32_t, 32> seen{};  // see Actor
    std::vector<Copy> copies;
    uint32_t group = 0;  // number of the group that is open
    // Where it waits.
    const char* operation = nullptr;
    uint32_t mask = 0;
    Site site;
    void* operands = nullptr;
    int vote = 0;
};

// The lanes of a collective: their operands lie on their stacks, null for a lane outside the mask.
using Lanes = std::array<void*, 32>;
enum class Orders { kNothing, kIfOptions, kMemory };

class Block {
  public:
    Block(std::string kernel, dim3 grid, dim3 block, size_t shared_bytes);

    // Runs `body` once in each thread. Throws what a thread threw, or what it did wrong.
    void run(uint3 index, uint32_t launch_serial, const std::function<void()>& body);

    // Of the running thread.
    // Returns the number of threads that voted.
    int barrier(const char* operation, int vote, Site site);
    // Waits for all lanes of the mask; the last to arrive calls fire(lanes) for all.
    template <typename Fire>
    void collective(const char* operation, uint32_t mask, Orders orders, bool same_line, Site site,
                    void* operands, Fire fire);
    void read(uint32_t lane, size_t offset, size_t bytes, Site site);
    void write(size_t offset, size_t bytes, bool async, Site site);
    unsigned char* shared() { return shared_.data(); }
    size_t shared_bytes() const { return shared_bytes_; }
    void global(Range* range, const void* address, size_t bytes, Touch how, Site site);
    void issue(uint32_t offset, const unsigned char* data, uint32_t bytes, Site site);
    void commit() { ++running_->group; }
    void wait(uint32_t groups_left);
    void yield();
    uint32_t lane() const { return running_->lane; }

    [[noreturn]] void fail(Kind kind, const Thread& thread, Site site,
                           const std::string& what) const;
    [[noreturn]] void fail(Kind kind, Site site, const std::string& what) const {
        fail(kind, *running_, site, what);
    }
    [[noreturn]] void fail_lane(Kind kind, uint32_t lane, Site site,
                                const std::string& what) const {
        fail(kind, threads_[running_->warp * 32 + lane], site, what);
    }

  private:
    struct Cancelled {};

    static void enter(void* thread);
    void suspend();
    void settle();
    void cancel();
    bool arrive(const char* operation, uint32_t mask, bool same_line, Site site, void* operands,
                Lanes& lanes);
    void release(uint32_t mask, Orders orders);
    Actor actor(const Thread& thread) const;
    std::string describe(const Thread& thread) const;

    std::string kernel_;
    dim3 grid_, block_;
    size_t shared_bytes_;
    std::vector<unsigned char> shared_;
    Shadow shadow_;
    std::deque<Thread> threads_;  // in place: a fiber cannot move
    std::vector<uint32_t> warp_stamps_;
    std::vector<Thread*> ready_;
    Thread* running_ = nullptr;
    const std::function<void()>* body_ = nullptr;
    std::exception_ptr failure_;
    bool cancelled_ = false;
    uint32_t epoch_ = 1, votes_ = 0, launch_serial_ = 0, serial_ = 0;
    uint3 index_{};
    std::mt19937_64 generator_;
};

// The block that runs. Device code outside of a launch is an error.
inline Block* running_block = nullptr;
inline Block& block() {
    if (running_block == nullptr) throw Error(Kind::kLaunch, "device code outside of a kernel");
    return *running_block;
}

template <typename Fire>
void Block::collective(const char* operation, uint32_t mask, Orders orders, bool same_line,
                       Site site, void* operands, Fire fire) {
    Lanes lanes{};
    if (!arrive(operation, mask, same_line, site, operands, lanes)) {
        suspend();
        return;
    }
    fire(lanes);
    release(mask, orders);
}

}  // namespace bft::emulation
