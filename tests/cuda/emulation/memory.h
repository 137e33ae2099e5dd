// Global memory: the ranges of host memory that kernels may touch, and how.
//
// Whoever launches registers them, for as long as the launch lasts: a test through Array or Buffer,
// a Python binding through a list of Buffers that a context manager holds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tests/cuda/emulation/error.h"
#include "tests/cuda/emulation/shadow.h"

namespace bft::emulation {

enum class Rights { kRead, kReadWrite };
enum class Contents { kInitialised, kUninitialised };  // uninitialised: to be written before read

enum class Touch { kRead, kReadOnlyPath, kWrite };

// The last write to a byte. `serial` is 0 if a kernel or the host has yet to write it, 1 if it was
// written before this launch, and else names the block: a new number for each block that runs.
struct GlobalCell {
    uint32_t serial;
    uint16_t thread, epoch;
};

struct Range {
    uintptr_t begin, end;
    Rights rights;
    std::string name;
    // One for each byte, of writable ranges only.
    std::unique_ptr<GlobalCell, decltype(&std::free)> cells{nullptr, &std::free};
};

// Lists memory while it lives. Ranges must not overlap.
class Buffer {
  public:
    Buffer(const void* pointer, size_t bytes, Rights rights, std::string name,
           Contents contents = Contents::kInitialised);
    Buffer(Buffer&& other) noexcept : begin_(std::exchange(other.begin_, 0)) {}
    Buffer& operator=(Buffer&&) = delete;
    ~Buffer();

  private:
    uintptr_t begin_;  // 0 if nothing is registered
};

// A registered vector.
template <typename T>
class Array {
  public:
    Array(std::string name, std::vector<T> values, Rights rights = Rights::kReadWrite,
          Contents contents = Contents::kInitialised)
        : values_(std::move(values)),
          buffer_(values_.data(), values_.size() * sizeof(T), rights, std::move(name), contents) {}
    T* data() { return values_.data(); }
    const std::vector<T>& values() const { return values_; }

  private:
    std::vector<T> values_;
    Buffer buffer_;
};

// The range that holds this address; null if none does. It may be one past the end.
Range* find_range(const void* address);

// For what the host does between kernels, such as the stand-ins of CUB: throws unless the bytes
// are registered, and marks them as written if `write`.
void host_access(const char* who, const void* address, size_t bytes, bool write);

// A new serial for the launch, or for a block of it.
uint32_t next_serial();

// What is wrong with an access of the running thread, by block barriers since its start.
struct GlobalActor {
    uint32_t launch, block;  // serials
    uint16_t thread, epoch;
};
std::optional<Finding> touch_global(Range* range, uintptr_t address, size_t bytes, Touch how,
                                    const GlobalActor& actor);

}  // namespace bft::emulation
