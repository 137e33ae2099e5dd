#include "csrc/cpu/kernels.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace bft::cpu {

namespace portable {
const Kernels& table();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
#endif

namespace {

// The tables that this processor runs, the best first.
std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> tables;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && fma) tables.push_back(&avx512::table());
    if (fma) tables.push_back(&avx2::table());
#endif
    tables.push_back(&portable::table());
    return tables;
}

std::atomic<const Kernels*>& selected() {
    static std::atomic<const Kernels*> kernels{runnable().front()};
    return kernels;
}

}  // namespace

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

std::vector<const char*> available_kernels() {
    std::vector<const char*> names;
    for (const Kernels* table : runnable()) names.push_back(table->name);
    return names;
}

void select_kernels(const char* name) {
    std::string known;
    for (const Kernels* table : runnable()) {
        if (std::string(table->name) == name) {
            selected().store(table, std::memory_order_relaxed);
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(table->name);
    }
    throw std::invalid_argument("name: got '" + std::string(name) + "', expected one of " + known);
}

}  // namespace bft::cpu
