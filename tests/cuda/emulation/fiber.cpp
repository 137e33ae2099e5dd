#include "tests/cuda/emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define BFT_ASAN(...) __VA_ARGS__
#else
#define BFT_ASAN(...)
#endif

#ifndef BFT_EMULATION_UCONTEXT
// Saves the registers that a callee must keep on the stack, stores the stack pointer in *save,
// takes `load` for a stack pointer, and restores from there.
extern "C" void bft_emulation_switch(void** save, void* load) __asm__("bft_emulation_switch");

__asm__(R"(
    .text
bft_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
// Six registers, the address that `ret` jumps to, and the return address of that function: none.
static constexpr size_t kFrameWords = 8, kEntryWord = 6;
#endif

namespace bft::emulation {

// Hands `this` to run(), which takes no argument on any of the platforms.
static Fiber* starting = nullptr;

static size_t page_bytes() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

Fiber::~Fiber() {
    if (stack_ != nullptr) munmap(stack_, page_bytes() + kStackBytes);
}

void Fiber::start(void (*entry)(void*), void* argument) {
    if (stack_ == nullptr) {
        void* memory = mmap(nullptr, page_bytes() + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        mprotect(memory, page_bytes(), PROT_NONE);
        stack_ = static_cast<char*>(memory);
    }
    entry_ = entry;
    argument_ = argument;
    own_fake_ = nullptr;
#ifdef BFT_EMULATION_UCONTEXT
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_ + page_bytes();
    own_.uc_stack.ss_size = kStackBytes;
    own_.uc_link = nullptr;
    makecontext(&own_, &Fiber::run, 0);
#else
    BFT_ASAN(__asan_unpoison_memory_region(stack_ + page_bytes(), kStackBytes);)
    void* frame[kFrameWords] = {};
    frame[kEntryWord] = reinterpret_cast<void*>(&Fiber::run);
    own_ = stack_ + page_bytes() + kStackBytes - sizeof frame;
    std::memcpy(own_, frame, sizeof frame);
#endif
}

void Fiber::resume() {
    starting = this;
    BFT_ASAN(__sanitizer_start_switch_fiber(&caller_fake_, stack_ + page_bytes(), kStackBytes);)
#ifdef BFT_EMULATION_UCONTEXT
    swapcontext(&caller_, &own_);
#else
    bft_emulation_switch(&caller_, own_);
#endif
    BFT_ASAN(__sanitizer_finish_switch_fiber(caller_fake_, nullptr, nullptr);)
}

void Fiber::leave(bool for_good) {
    (void)for_good;
    BFT_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &own_fake_, caller_bottom_,
                                            caller_bytes_);)
#ifdef BFT_EMULATION_UCONTEXT
    swapcontext(&own_, &caller_);
#else
    bft_emulation_switch(&own_, caller_);
#endif
    BFT_ASAN(__sanitizer_finish_switch_fiber(own_fake_, &caller_bottom_, &caller_bytes_);)
}

void Fiber::suspend() { leave(false); }

void Fiber::run() {
    Fiber* fiber = starting;
    BFT_ASAN(
        __sanitizer_finish_switch_fiber(nullptr, &fiber->caller_bottom_, &fiber->caller_bytes_);)
    fiber->entry_(fiber->argument_);
    fiber->leave(true);
    std::abort();  // an entry that has returned was resumed
}

}  // namespace bft::emulation
