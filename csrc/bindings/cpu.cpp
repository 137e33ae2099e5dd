// bft_kernels._cpu: arrays come as addresses and sizes, so that no torch header is needed.
#include <pybind11/pybind11.h>

#include "csrc/bindings/checks.h"
#include "csrc/cpu/sampling.h"

namespace py = pybind11;

namespace {

template <typename T>
void fill_draws(int64_t seed, int64_t row0, int64_t rows, int64_t col0, int64_t cols,
                std::uintptr_t out_ptr) {
    const bft::Region region = bft::checked_region(row0, rows, col0, cols);
    T* out = bft::checked_pointer<T>("out_ptr", out_ptr, rows * cols);
    bft::cpu::fill_draws(static_cast<uint64_t>(seed), region, out);
}

template <typename T>
void define_draws(py::module_& module, const char* name, const char* doc) {
    using py::arg;
    module.def(name, &fill_draws<T>, doc, arg("seed"), arg("row0"), arg("rows"), arg("col0"),
               arg("cols"), arg("out_ptr"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
    module.doc() = "C++ kernels for the CPU. Raw addresses: the caller owns and sizes the memory.";
#ifdef _OPENMP
    module.attr("openmp") = true;
#else
    module.attr("openmp") = false;
#endif
    define_draws<float>(module, "sampling_uniforms",
                        "Write u of every entry as float32 [rows, cols] to out_ptr.");
    define_draws<uint32_t>(module, "sampling_bits",
                           "Write the 32 hashed bits of every entry as uint32 [rows, cols].");
}
