// For a Python module of emulated kernels: how it is told which memory they may touch.
//
//     with module.memory([(address, bytes, writable, name), ...], seed=1):
//         module.some_kernel(address, ...)
//
// Addresses outside of every range listed are errors. Errors are RuntimeErrors, as Error is a
// std::runtime_error, and start with the name of their kind.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/cuda/emulation/block.h"
#include "tests/cuda/emulation/memory.h"

namespace bft::emulation {

class Memory {
  public:
    using Listed = std::tuple<std::uintptr_t, size_t, bool, std::string>;

    Memory(std::vector<Listed> listed, uint64_t seed, bool unwritten, bool strict)
        : listed_(std::move(listed)), seed_(seed), unwritten_(unwritten), strict_(strict) {}

    void enter() {
        options().seed = seed_;
        options().collectives_order_memory = !strict_;
        std::vector<Buffer> buffers;  // all of them or none
        for (const auto& [address, bytes, writable, name] : listed_) {
            const bool empty = writable && unwritten_;
            buffers.emplace_back(reinterpret_cast<void*>(address), bytes,
                                 writable ? Rights::kReadWrite : Rights::kRead, name,
                                 empty ? Contents::kUninitialised : Contents::kInitialised);
        }
        buffers_ = std::move(buffers);
    }
    void exit() { buffers_.clear(); }

  private:
    std::vector<Listed> listed_;
    uint64_t seed_;
    bool unwritten_, strict_;
    std::vector<Buffer> buffers_;
};

inline void define_memory(pybind11::module_& module) {
    using pybind11::arg;
    pybind11::class_<Memory>(module, "memory",
                             "The memory that kernels may touch inside of this context: tuples of "
                             "address, bytes, writable and name. With unwritten=True, kernels may "
                             "not read what is writable before one of them has written it. With "
                             "strict=True, shuffles and votes order no memory accesses.")
        .def(pybind11::init<std::vector<Memory::Listed>, uint64_t, bool, bool>(), arg("ranges"),
             arg("seed") = 0, arg("unwritten") = false, arg("strict") = false)
        .def("__enter__", &Memory::enter)
        .def("__exit__", [](Memory& self, const pybind11::args&) { self.exit(); });
}

}  // namespace bft::emulation
