#include "csrc/cpu/parallel.h"

#include <dlfcn.h>

#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace bft::cpu {
namespace {

// libgomp's ABI, which LLVM's and Intel's runtimes offer as well.
struct OpenMP {
    using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
    using Number = int (*)();
    Fork fork = nullptr;
    Number thread = nullptr;
    Number team = nullptr;

    OpenMP() {
        fork = reinterpret_cast<Fork>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        thread = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
        team = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
        if (thread == nullptr || team == nullptr) fork = nullptr;
    }
};

// Looked up at the first loop: by then any library that brings a runtime is loaded.
const OpenMP& openmp() {
    static const OpenMP runtime;
    return runtime;
}

// A body's exception may not leave the runtime's threads.
struct Guarded {
    ThreadBody body;
    void* context;
    std::mutex mutex;
    std::exception_ptr error;

    void run(int thread, int team) {
        try {
            body(context, thread, team);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
        }
    }
};

}  // namespace

bool has_openmp() { return openmp().fork != nullptr; }

void run_threads(int threads, ThreadBody body, void* context) {
    if (threads <= 1) {
        body(context, 0, 1);
        return;
    }
    Guarded guarded{body, context, {}, nullptr};
    if (has_openmp()) {
        const auto enter = [](void* pointer) {
            static_cast<Guarded*>(pointer)->run(openmp().thread(), openmp().team());
        };
        openmp().fork(enter, &guarded, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int thread = 1; thread < threads; ++thread) {
            others.emplace_back([&guarded, thread, threads] { guarded.run(thread, threads); });
        }
        guarded.run(0, threads);
        for (std::thread& other : others) other.join();
    }
    if (guarded.error) std::rethrow_exception(guarded.error);
}

}  // namespace bft::cpu
