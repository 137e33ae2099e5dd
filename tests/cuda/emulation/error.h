// What the emulator throws, out of the launch and on the host's side of it.
#pragma once

#include <stdexcept>
#include <string>

namespace bft::emulation {

enum class Kind {
    kOutOfBounds,       // outside a registered buffer, or outside a Shared<T>
    kReadOnly,          // a write to a buffer registered for reading
    kMisaligned,        // an address that is no multiple of the access's size
    kUninitialised,     // a read of bytes that nobody wrote
    kRace,              // two threads of a block, a write among them, no barrier between
    kGlobalRace,        // the same between blocks, which nothing orders
    kAsyncPending,      // bytes that a cp.async may still be writing
    kAsyncUnordered,    // a copy that another thread waited for, without a barrier since
    kDivergentBarrier,  // __syncthreads that not all threads of the block reach
    kMissingLane,       // a warp collective that not all lanes of its mask reach
    kLaunch,            // a launch or a registration that CUDA would refuse too
};

inline const char* name(Kind kind) {
    constexpr const char* kNames[] = {
        "out of bounds", "read only",     "misaligned",      "uninitialised",     "race",
        "global race",   "async pending", "async unordered", "divergent barrier", "missing lane",
        "launch",
    };
    return kNames[static_cast<int>(kind)];
}

// A line of a kernel. As the default value of a function's last parameter, Site::here() is the
// line of the call: kernels never name it.
struct Site {
    const char* file = nullptr;
    int line = 0;

    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator==(const Site& other) const {
        return line == other.line && std::string(file) == other.file;
    }
    std::string text() const {
        return file ? std::string(file) + ":" + std::to_string(line) : "an unknown line";
    }
};

class Error : public std::runtime_error {
  public:
    Error(Kind kind, const std::string& what)
        : std::runtime_error(std::string(name(kind)) + ": " + what), kind(kind) {}
    const Kind kind;
};

}  // namespace bft::emulation
