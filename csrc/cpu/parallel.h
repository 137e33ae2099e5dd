// Parallel loops on the OpenMP runtime that the process already has.
//
// PyTorch's wheels bring a libgomp of their own. A module linked to the system's would run a second
// pool of threads beside it, and each pool spins between its loops on the cores that the other
// needs. So nothing is linked: the runtime's entry is looked up among the loaded symbols, and if
// there is none, std::thread takes over.
#pragma once

#include <atomic>
#include <cstdint>

namespace bft::cpu {

using ThreadBody = void (*)(void* context, int thread, int team);

// Calls body(context, thread, team) on `team` threads, numbered from 0: as many as were asked for,
// or as the runtime gives. What a body throws is thrown here when all have ended.
void run_threads(int threads, ThreadBody body, void* context);

// Whether an OpenMP runtime was found.
bool has_openmp();

// Calls body(thread, first, stop) for pieces of 0..count of at most `grain`, in any order.
template <typename Body>
void parallel_for(int threads, int64_t count, int64_t grain, Body body) {
    if (threads <= 1 || count <= grain) {
        for (int64_t first = 0; first < count; first += grain) {
            body(0, first, first + grain < count ? first + grain : count);
        }
        return;
    }
    struct Context {
        Body* body;
        int64_t count, grain;
        std::atomic<int64_t> next{0};
    } context{&body, count, grain};
    run_threads(
        threads,
        [](void* pointer, int thread, int) {
            Context& c = *static_cast<Context*>(pointer);
            for (;;) {
                const int64_t first = c.next.fetch_add(c.grain, std::memory_order_relaxed);
                if (first >= c.count) return;
                (*c.body)(thread, first, first + c.grain < c.count ? first + c.grain : c.count);
            }
        },
        &context);
}

// Calls body(thread, first, stop) for one piece of 0..count a thread, the same one every time. So a
// thread finds in its core's cache the rows that the vendor's GEMM left there, and the next GEMM
// finds the lines of its output where it left them. Dynamic pieces made the GEMM 15% slower.
template <typename Body>
void parallel_static(int threads, int64_t count, Body body) {
    struct Context {
        Body* body;
        int64_t count;
    } context{&body, count};
    run_threads(
        threads,
        [](void* pointer, int thread, int team) {
            const Context& c = *static_cast<Context*>(pointer);
            const int64_t first = c.count * thread / team;
            const int64_t stop = c.count * (thread + 1) / team;
            if (first < stop) (*c.body)(thread, first, stop);
        },
        &context);
}

}  // namespace bft::cpu
