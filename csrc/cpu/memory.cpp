#include "csrc/cpu/memory.h"

#include <sys/mman.h>

namespace bft::cpu {

void advise_huge_pages(std::uintptr_t address, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr std::uintptr_t kHuge = std::uintptr_t{2} << 20;
    const std::uintptr_t first = (address + kHuge - 1) / kHuge * kHuge;
    const std::uintptr_t stop = (address + bytes) / kHuge * kHuge;
    if (stop > first && stop - first >= 2 * kHuge) {
        madvise(reinterpret_cast<void*>(first), stop - first, MADV_HUGEPAGE);
    }
#else
    (void)address;
    (void)bytes;
#endif
}

}  // namespace bft::cpu
