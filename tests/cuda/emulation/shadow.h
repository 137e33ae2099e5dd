// What is known of every byte of a block's shared memory: who wrote it, who read it since, and
// whether a barrier orders that before the access at hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tests/cuda/emulation/error.h"

namespace bft::emulation {

// A thread at the moment of an access. `epoch` counts the block's barriers, `stamp` the warp's.
// seen[lane] is the latest stamp of that lane's accesses which are ordered before this thread's.
struct Actor {
    uint32_t epoch, stamp;
    uint16_t warp;
    uint8_t lane;
    const uint32_t* seen;
};

struct Finding {
    Kind kind;
    size_t offset;
    std::string text;
};

class Shadow {
  public:
    void reset(size_t bytes) { cells_.assign(bytes, Cell{}); }

    // Records the access, or says what is wrong with it.
    std::optional<Finding> read(size_t offset, size_t bytes, const Actor& actor);
    std::optional<Finding> write(size_t offset, size_t bytes, const Actor& actor, bool async);
    // The bytes of an asynchronous copy are there, and its owner has waited for them.
    void deliver(size_t offset, size_t bytes, const Actor& owner);

  private:
    enum class State : uint8_t { kUninitialised, kWritten, kPending, kDelivered };

    // Accesses of one kind, since the last one that is ordered before the others. Lanes of one
    // warp are told apart, warps are not.
    struct Access {
        uint32_t epoch = 0;  // 0: there was none
        uint32_t stamp = 0;
        uint32_t lanes = 0;
        uint16_t warp = 0;
        State state = State::kUninitialised;  // of the byte; used in Cell::write only
        uint8_t unused = 0;

        bool ordered_before(const Actor& actor) const;
        void replace(const Actor& actor);
        void add(const Actor& actor);
        std::string who() const;
    };
    struct Cell {
        Access write, read;
    };

    template <typename Check>
    std::optional<Finding> each(size_t offset, size_t bytes, Check check);

    std::vector<Cell> cells_;
};

}  // namespace bft::emulation
