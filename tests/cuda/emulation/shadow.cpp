#include "tests/cuda/emulation/shadow.h"

#include <cstring>

namespace bft::emulation {

static constexpr uint16_t kSeveralWarps = 0xFFFF;

bool Shadow::Access::ordered_before(const Actor& actor) const {
    if (epoch < actor.epoch) return true;
    if (warp != actor.warp) return false;
    for (uint32_t others = lanes & ~(1u << actor.lane); others != 0; others &= others - 1) {
        if (actor.seen[__builtin_ctz(others)] < stamp) return false;
    }
    return true;
}

void Shadow::Access::replace(const Actor& actor) {
    epoch = actor.epoch;
    stamp = actor.stamp;
    lanes = 1u << actor.lane;
    warp = actor.warp;
}

void Shadow::Access::add(const Actor& actor) {
    if (ordered_before(actor)) {
        replace(actor);
        return;
    }
    if (warp != actor.warp) warp = kSeveralWarps;
    lanes |= 1u << actor.lane;
    stamp = actor.stamp;
}

std::string Shadow::Access::who() const {
    if (warp == kSeveralWarps) return "threads of several warps";
    std::string text = "warp " + std::to_string(warp) + " lanes";
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        text += " " + std::to_string(__builtin_ctz(rest));
    }
    return text;
}

// check(cell) updates one cell. Most accesses find the same in all their bytes, which is then
// looked at once.
template <typename Check>
std::optional<Finding> Shadow::each(size_t offset, size_t bytes, Check check) {
    Cell* cells = cells_.data() + offset;
    Cell before, after;
    for (size_t i = 0; i < bytes; ++i) {
        if (i > 0 && std::memcmp(&cells[i], &before, sizeof before) == 0) {
            cells[i] = after;
            continue;
        }
        before = cells[i];
        if (std::optional<Finding> found = check(cells[i])) {
            found->offset = offset + i;
            return found;
        }
        after = cells[i];
    }
    return std::nullopt;
}

std::optional<Finding> Shadow::read(size_t offset, size_t bytes, const Actor& actor) {
    return each(offset, bytes, [&](Cell& cell) -> std::optional<Finding> {
        const State state = cell.write.state;
        if (state == State::kUninitialised) {
            return Finding{Kind::kUninitialised, 0, "read of a byte that nobody wrote"};
        }
        if (state == State::kPending) {
            return Finding{Kind::kAsyncPending, 0,
                           "read of a cp.async in flight, issued by " + cell.write.who()};
        }
        if (!cell.write.ordered_before(actor)) {
            return state == State::kDelivered
                       ? Finding{Kind::kAsyncUnordered, 0,
                                 "read of a cp.async that only " + cell.write.who() +
                                     " waited for: a barrier is missing after the wait"}
                       : Finding{Kind::kRace, 0,
                                 "read of what " + cell.write.who() + " wrote since the barrier"};
        }
        cell.read.add(actor);
        return std::nullopt;
    });
}

std::optional<Finding> Shadow::write(size_t offset, size_t bytes, const Actor& actor, bool async) {
    return each(offset, bytes, [&](Cell& cell) -> std::optional<Finding> {
        const State state = cell.write.state;
        if (state == State::kPending) {
            return Finding{Kind::kAsyncPending, 0,
                           "write over a cp.async in flight, issued by " + cell.write.who()};
        }
        if (!cell.write.ordered_before(actor)) {
            return Finding{state == State::kDelivered ? Kind::kAsyncUnordered : Kind::kRace, 0,
                           "write over what " + cell.write.who() + " wrote since the barrier"};
        }
        if (!cell.read.ordered_before(actor)) {
            return Finding{Kind::kRace, 0,
                           "write over what " + cell.read.who() + " read since the barrier"};
        }
        cell.write.replace(actor);
        cell.write.state = async ? State::kPending : State::kWritten;
        cell.read = Access{};
        return std::nullopt;
    });
}

void Shadow::deliver(size_t offset, size_t bytes, const Actor& owner) {
    for (size_t i = offset; i < offset + bytes; ++i) {
        cells_[i].write.replace(owner);
        cells_[i].write.state = State::kDelivered;
    }
}

}  // namespace bft::emulation
