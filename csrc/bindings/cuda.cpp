// bft_kernels._cuda: arrays come as device addresses and sizes, the stream as an integer, so that
// no torch header is needed. The CUDA runtime is linked statically: importing works without a
// driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "csrc/bindings/checks.h"
#include "csrc/bindings/cuda_certificate.h"
#include "csrc/bindings/cuda_gradient.h"
#include "csrc/bindings/cuda_problem.h"
#include "csrc/bindings/cuda_sampled.h"
#include "csrc/bindings/cuda_weights.h"
#include "csrc/cuda/kernels.h"

#ifdef BFT_EMULATION  // built by tests/cuda/emulation/build.py, for tests
#include "tests/cuda/emulation/binding.h"
#endif

namespace py = pybind11;

namespace {

std::pair<int, int> splits_for(int64_t rows, int64_t vocabulary, int processors) {
    bft::check_range("rows", rows, 0, bft::kMaxRows);
    bft::check_range("V", vocabulary, 1, bft::kMaxVocabulary);
    bft::check_range("processors", processors, 1, 1 << 20);
    const bft::cuda::Splits splits = bft::cuda::splits_for(rows, vocabulary, processors);
    return {splits.count, splits.columns};
}

struct Forward {
    int64_t first_row, rows;  // R, among those that take part
    int splits, split_columns;
    float eps, label_smoothing, z_loss;
    std::uintptr_t seed, floor, mask, sums;
    std::uintptr_t loss, nll, lse, lse_low, entropy, correct;
};

void linear_nll_forward(const bft::ProblemArguments& given, const Forward& how,
                        std::uintptr_t stream) {
    using bft::checked_pointer;
    const bft::cuda::Problem problem = bft::checked_problem(given);
    const int64_t n = problem.rows;
    bft::check_range("first_row", how.first_row, 0, n);
    bft::check_range("rows", how.rows, 0, n - how.first_row);
    const bft::cuda::Splits splits =
        bft::checked_splits(how.splits, how.split_columns, problem.vocabulary, how.rows);
    bft::check_number("label_smoothing", how.label_smoothing, 0, 1);
    const bool sampled = how.mask != 0;
    if (sampled) bft::check_number("eps", how.eps, 0x1p-30f, 1);
    const int64_t words = (problem.vocabulary + 31) / 32;
    const auto vector = [n](const char* name, std::uintptr_t address, bool wanted) {
        return checked_pointer<float>(name, address, wanted ? n : 0);
    };
    if ((how.entropy != 0) != (how.correct != 0)) {
        throw std::invalid_argument("entropy_ptr and correct_ptr: got one of them");
    }
    const bft::cuda::Candidates candidates{
        checked_pointer<int64_t>("seed_ptr", how.seed, sampled),
        vector("floor_ptr", how.floor, sampled), sampled ? how.eps : 1.0f,
        checked_pointer<uint32_t>("mask_ptr", how.mask, sampled ? how.rows * words : 0)};
    const bft::cuda::RowResults results{vector("loss_ptr", how.loss, true),
                                        vector("nll_ptr", how.nll, true),
                                        vector("lse_ptr", how.lse, true),
                                        vector("lse_low_ptr", how.lse_low, false),
                                        vector("entropy_ptr", how.entropy, false),
                                        checked_pointer<bool>("correct_ptr", how.correct, 0)};
    float* sums =
        checked_pointer<float>("sums_ptr", how.sums, bft::cuda::kSums * splits.count * how.rows);
    bft::cuda::linear_nll_forward(problem, {how.first_row, how.rows}, splits, sums, candidates,
                                  how.label_smoothing, how.z_loss, results,
                                  reinterpret_cast<void*>(stream));
}

void target_floor(const bft::ProblemArguments& given, std::uintptr_t floor, std::uintptr_t stream) {
    const bft::cuda::Problem problem = bft::checked_problem(given);
    bft::cuda::target_floor(problem, bft::checked_pointer<float>("floor_ptr", floor, problem.rows),
                            reinterpret_cast<void*>(stream));
}

void define_forward(py::module_& module) {
    using py::arg;
    module.attr("FORWARD_SUMS") = bft::cuda::kSums;
    module.def("forward_splits", &splits_for,
               "Number of splits, and columns of each, for a forward of so many rows.", arg("rows"),
               arg("V"), arg("processors"));
    py::class_<bft::ProblemArguments>(
        module, "Problem",
        "What kernels that make logits read. target, order [N] and count [1] are int64: order "
        "lists the rows that take part, count of them, first. bias is float32 or address 0. dtype "
        "is 0 for float32, 1 for bfloat16, 2 for float16; softcap 0 is none.",
        py::module_local())  // the emulated module may be loaded beside this one
        .def(py::init([](std::uintptr_t hidden, std::uintptr_t weight, std::uintptr_t bias,
                         std::uintptr_t target, std::uintptr_t order, std::uintptr_t count,
                         int64_t n, int64_t v, int64_t d, int64_t stride_hn, int64_t stride_wv,
                         int dtype, float softcap, float temperature) {
                 return bft::ProblemArguments{hidden,    weight, bias,    target,     order,
                                              count,     n,      v,       d,          stride_hn,
                                              stride_wv, dtype,  softcap, temperature};
             }),
             py::kw_only(), arg("hidden_ptr"), arg("weight_ptr"), arg("bias_ptr"),
             arg("target_ptr"), arg("order_ptr"), arg("count_ptr"), arg("N"), arg("V"), arg("D"),
             arg("stride_hn"), arg("stride_wv"), arg("dtype"), arg("softcap") = 0.0f,
             arg("temperature") = 1.0f);
    module.def(
        "linear_nll_forward",
        [](const bft::ProblemArguments& problem, int64_t first_row, int64_t rows, int splits,
           int split_columns, std::uintptr_t sums, std::uintptr_t loss, std::uintptr_t nll,
           std::uintptr_t lse, std::uintptr_t lse_low, std::uintptr_t entropy,
           std::uintptr_t correct, float label_smoothing, float z_loss, std::uintptr_t seed,
           std::uintptr_t floor, std::uintptr_t mask, float eps, std::uintptr_t stream) {
            linear_nll_forward(
                problem,
                {first_row, rows, splits, split_columns, eps, label_smoothing, z_loss, seed, floor,
                 mask, sums, loss, nll, lse, lse_low, entropy, correct},
                stream);
        },
        "Losses and statistics [N], by position, of R rows from first_row on, among those that "
        "take part. sums [FORWARD_SUMS, splits, R] float32 is room to work in. With mask "
        "[R, ceil(V / 32)] also a bit for each entry that may be kept. Addresses of 0: not wanted.",
        py::kw_only(), arg("problem"), arg("first_row"), arg("rows"), arg("splits"),
        arg("split_columns"), arg("sums_ptr"), arg("loss_ptr"), arg("nll_ptr"), arg("lse_ptr"),
        arg("lse_low_ptr") = 0, arg("entropy_ptr") = 0, arg("correct_ptr") = 0,
        arg("label_smoothing") = 0.0f, arg("z_loss") = 0.0f, arg("seed_ptr") = 0,
        arg("floor_ptr") = 0, arg("mask_ptr") = 0, arg("eps") = 1.0f, arg("stream"),
        py::call_guard<py::gil_scoped_release>());
    module.def("target_floor", &target_floor,
               "floor [N] float32, where rows take part: a lower bound of lse, from the target.",
               py::kw_only(), arg("problem"), arg("floor_ptr"), arg("stream"),
               py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    module.doc() =
        "CUDA kernels. Raw device addresses: the caller owns and sizes the memory, has made the "
        "device current, and keeps the memory alive until the stream is done with it.";
    define_forward(module);
    bft::define_gradients(module);
    bft::define_certificate(module);
    bft::define_weights(module);
    bft::define_lists(module);
    bft::define_gathers(module);
#ifdef BFT_EMULATION
    bft::emulation::define_memory(module);
#endif
}
