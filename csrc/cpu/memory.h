#pragma once

#include <cstdint>

namespace bft::cpu {

// Asks for huge pages in those parts of a range that are whole ones. A hint: nothing happens where
// the system has none, or for less than a few of them.
void advise_huge_pages(std::uintptr_t address, std::size_t bytes);

}  // namespace bft::cpu
