// A function on a stack of its own, which runs until it suspends itself: one for each thread of the
// emulated block. All fibers share the OS thread that resumes them.
//
// Switching is a dozen instructions on x86-64. swapcontext, used elsewhere or with
// -DBFT_EMULATION_UCONTEXT, calls the kernel twice for the signal mask.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(BFT_EMULATION_UCONTEXT)
#define BFT_EMULATION_UCONTEXT
#endif
#ifdef BFT_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

namespace bft::emulation {

class Fiber {
  public:
    // Of address space: only the pages that are touched take memory. A page below is a guard.
    static constexpr size_t kStackBytes = 256 << 10;

    Fiber() = default;
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    ~Fiber();

    // The next resume() calls entry(argument), which must not throw. The fiber must not be inside
    // an earlier call: its stack is used again.
    void start(void (*entry)(void*), void* argument);
    // Returns when the fiber suspends itself, or when its entry has returned.
    void resume();
    // Called on the fiber.
    void suspend();

  private:
    static void run();
    void leave(bool for_good);

    char* stack_ = nullptr;  // the guard page is its first
    void (*entry_)(void*) = nullptr;
    void* argument_ = nullptr;
#ifdef BFT_EMULATION_UCONTEXT
    ucontext_t own_, caller_;
#else
    void* own_ = nullptr;  // stack pointer of the side that does not run
    void* caller_ = nullptr;
#endif
    // What the address sanitizer keeps about either stack.
    void* caller_fake_ = nullptr;
    void* own_fake_ = nullptr;
    const void* caller_bottom_ = nullptr;
    size_t caller_bytes_ = 0;
};

}  // namespace bft::emulation
