#include "tests/cuda/emulation/memory.h"

#include <map>
#include <utility>

namespace bft::emulation {

static constexpr uint32_t kBefore = 1;

static std::map<uintptr_t, Range>& ranges() {
    static std::map<uintptr_t, Range> all;
    return all;
}

Buffer::Buffer(const void* pointer, size_t bytes, Rights rights, std::string name,
               Contents contents)
    : begin_(bytes == 0 ? 0 : reinterpret_cast<uintptr_t>(pointer)) {
    if (begin_ == 0) return;
    auto next = ranges().upper_bound(begin_);
    const bool follows = next != ranges().end() && next->first < begin_ + bytes;
    const bool precedes = next != ranges().begin() && std::prev(next)->second.end > begin_;
    if (follows || precedes) {
        throw Error(Kind::kLaunch, "buffer " + name + " overlaps buffer " +
                                       (follows ? next : std::prev(next))->second.name);
    }
    Range range{begin_, begin_ + bytes, rights, std::move(name)};
    if (rights == Rights::kReadWrite) {
        range.cells.reset(static_cast<GlobalCell*>(std::calloc(bytes, sizeof(GlobalCell))));
        if (contents == Contents::kInitialised) {
            for (size_t i = 0; i < bytes; ++i) range.cells.get()[i].serial = kBefore;
        }
    }
    ranges().emplace(begin_, std::move(range));
}

Buffer::~Buffer() {
    if (begin_ != 0) ranges().erase(begin_);
}

Range* find_range(const void* address) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    auto next = ranges().upper_bound(at);
    if (next == ranges().begin()) return nullptr;
    Range& range = std::prev(next)->second;
    return at <= range.end ? &range : nullptr;
}

void host_access(const char* who, const void* address, size_t bytes, bool write) {
    if (bytes == 0) return;
    const auto at = reinterpret_cast<uintptr_t>(address);
    Range* range = find_range(address);
    if (range == nullptr || at + bytes > range->end) {
        throw Error(Kind::kOutOfBounds, std::string(who) + ": " + std::to_string(bytes) +
                                            " bytes that are not registered");
    }
    if (write && range->rights == Rights::kRead) {
        throw Error(Kind::kReadOnly, std::string(who) + ": a write to " + range->name);
    }
    for (size_t i = 0; i < bytes && range->cells; ++i) {
        GlobalCell& cell = range->cells.get()[at - range->begin + i];
        if (write) cell = {kBefore, 0, 0};
        if (cell.serial == 0) {
            throw Error(Kind::kUninitialised, std::string(who) + ": read of " + range->name +
                                                  " at byte " +
                                                  std::to_string(at - range->begin + i));
        }
    }
}

uint32_t next_serial() {
    static uint32_t serial = kBefore;
    return ++serial;
}

// What another access did to this byte that the actor's must not meet.
static std::optional<Finding> conflict(const GlobalCell& cell, Touch how,
                                       const GlobalActor& actor) {
    const bool writes = how == Touch::kWrite;
    if (cell.serial == 0 && !writes) {
        return Finding{Kind::kUninitialised, 0, "read of a byte that nobody wrote"};
    }
    if (cell.serial < actor.launch) return std::nullopt;
    if (how == Touch::kReadOnlyPath) {
        return Finding{Kind::kGlobalRace, 0, "ld.global.nc of what this very launch wrote"};
    }
    if (cell.serial != actor.block) {
        return Finding{Kind::kGlobalRace, 0,
                       writes ? "write over what another block wrote in this launch"
                              : "read of what another block wrote in this launch"};
    }
    // Lanes of one warp may have met at a __syncwarp, which is not kept for global memory.
    const bool same_warp = cell.thread / 32 == actor.thread / 32;
    if (cell.epoch == actor.epoch && !same_warp) {
        return Finding{Kind::kRace, 0,
                       std::string(writes ? "write over" : "read of") + " what thread " +
                           std::to_string(cell.thread) + " of this block wrote since the barrier"};
    }
    return std::nullopt;
}

std::optional<Finding> touch_global(Range* range, uintptr_t address, size_t bytes, Touch how,
                                    const GlobalActor& actor) {
    if (range == nullptr) {
        return Finding{Kind::kOutOfBounds, address, "memory that is not registered"};
    }
    const size_t offset = address - range->begin;
    const auto in_range = [&](Finding finding) {
        finding.text += " (byte " + std::to_string(static_cast<int64_t>(finding.offset)) + " of " +
                        range->name + ", which has " + std::to_string(range->end - range->begin) +
                        ")";
        return finding;
    };
    if (address < range->begin || address > range->end || bytes > range->end - address) {
        return in_range({Kind::kOutOfBounds, offset, std::to_string(bytes) + " bytes"});
    }
    if (address % bytes != 0) {
        return in_range({Kind::kMisaligned, offset,
                         "access of " + std::to_string(bytes) + " bytes at an address that is " +
                             std::to_string(address % bytes) + " modulo that"});
    }
    const bool writes = how == Touch::kWrite;
    if (writes && range->rights == Rights::kRead) {
        return in_range({Kind::kReadOnly, offset, "write to a buffer registered for reading"});
    }
    GlobalCell* cells = range->cells.get();
    for (size_t i = offset; cells != nullptr && i < offset + bytes; ++i) {
        if (std::optional<Finding> found = conflict(cells[i], how, actor)) {
            found->offset = i;
            return in_range(std::move(*found));
        }
        if (writes) cells[i] = {actor.block, actor.thread, actor.epoch};
    }
    return std::nullopt;
}

}  // namespace bft::emulation
