// bft_kernels._cuda: arrays come as device addresses and sizes, the stream as an integer, so that
// no torch header is needed. The CUDA runtime is linked statically: importing works without a
// driver.
#include <pybind11/pybind11.h>

#include "csrc/bindings/checks.h"
#include "csrc/cuda/sampling.h"

#ifdef BFT_EMULATION  // built by csrc/emulation/build.py, for tests
#include "csrc/emulation/binding.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
void fill_draws(int64_t seed, int64_t row0, int64_t rows, int64_t col0, int64_t cols,
                std::uintptr_t out_ptr, std::uintptr_t stream) {
    const bft::Region region = bft::checked_region(row0, rows, col0, cols);
    T* out = bft::checked_pointer<T>("out_ptr", out_ptr, rows * cols);
    bft::cuda::fill_draws(static_cast<uint64_t>(seed), region, out,
                          reinterpret_cast<void*>(stream));
}

template <typename T>
void define_draws(py::module_& module, const char* name, const char* doc) {
    using py::arg;
    module.def(name, &fill_draws<T>, doc, arg("seed"), arg("row0"), arg("rows"), arg("col0"),
               arg("cols"), arg("out_ptr"), arg("stream"),
               py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    module.doc() =
        "CUDA kernels. Raw device addresses: the caller owns and sizes the memory, has made the "
        "device current, and keeps the memory alive until the stream is done with it.";
    define_draws<float>(module, "sampling_uniforms",
                        "Write u of every entry as float32 [rows, cols] to out_ptr.");
    define_draws<uint32_t>(module, "sampling_bits",
                           "Write the 32 hashed bits of every entry as uint32 [rows, cols].");
#ifdef BFT_EMULATION
    bft::emulation::define_memory(module);
#endif
}
