// bft_kernels._cpu: arrays come as addresses and sizes, so that no torch header is needed.
// Functions release the GIL. Those with many arguments take them by name; the headers of csrc/cpu
// describe them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "csrc/bindings/checks.h"
#include "csrc/cpu/backward.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/online_softmax.h"
#include "csrc/cpu/parallel.h"

namespace py = pybind11;
using bft::Given;
using py::arg;
using Address = std::uintptr_t;  // 0 where an array is not given

namespace {

constexpr int64_t kMaxCount = int64_t{1} << 48;
constexpr int64_t kMaxVocabulary = (int64_t{1} << 31) - 1;
constexpr int kMaxThreads = 1 << 16;

int checked_threads(int threads) {
    bft::check_range("threads", threads, 1, kMaxThreads);
    return threads;
}
int threads_of(Given& given) { return checked_threads(given.get<int>("threads")); }

// --- arrays --------------------------------------------------------------------------------------

bft::cpu::DType checked_type(const std::string& name) {
    if (name == "float32") return bft::cpu::DType::kFloat32;
    if (name == "bfloat16") return bft::cpu::DType::kBFloat16;
    if (name == "float16") return bft::cpu::DType::kFloat16;
    throw std::invalid_argument("type: got '" + name +
                                "', expected 'float32', 'bfloat16' or 'float16'");
}

// Address, type and stride of a matrix: (data_ptr, "float32", rows, width, stride).
using MatrixArguments = std::tuple<Address, std::string, int64_t, int64_t, int64_t>;

bft::cpu::Matrix checked_matrix(const char* name, const MatrixArguments& arguments) {
    const auto& [address, type, rows, width, stride] = arguments;
    bft::check_range("rows", rows, 0, kMaxCount);
    bft::check_range("width", width, 1, kMaxCount);
    bft::check_range("stride", stride, rows > 1 ? width : 0, kMaxCount);
    void* data = bft::checked_pointer<uint16_t>(name, address, rows * width);
    return {data, checked_type(type), rows, width, stride};
}
bft::cpu::Matrix matrix_of(Given& given, const char* name) {
    return checked_matrix(name, given.get<MatrixArguments>(name));
}

// Where a block of logits lies: (data_ptr, stride, first_row, rows, first_column, columns).
using BlockArguments = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int64_t>;

bft::cpu::Block checked_block(const BlockArguments& arguments, int64_t vocabulary) {
    const auto& [address, stride, first_row, rows, first_column, columns] = arguments;
    bft::check_range("first_row", first_row, 0, kMaxCount);
    bft::check_range("rows", rows, 0, kMaxCount);
    bft::check_range("first_column", first_column, 0, vocabulary);
    bft::check_range("columns", columns, 1, vocabulary - first_column);
    bft::check_range("stride", stride, columns, kMaxCount);
    float* logits = bft::checked_pointer<float>("logits", address, rows);
    return {logits, stride, first_row, rows, first_column, columns};
}

bft::cpu::Transform transform_of(Given& given) {
    return {given.floats("bias"), given.get("softcap", 0.0f), given.get("temperature", 1.0f)};
}

// Entries of dy, row by row.
bft::cpu::Entries entries_of(Given& given) {
    const int64_t rows = given.number("rows", 0, kMaxCount);
    const int64_t* offsets = given.longs("offsets", rows + 1);
    const int64_t count = offsets[rows];
    return {rows, offsets, given.array<int32_t>("columns", count), given.floats("values", count),
            given.floats("upstream", rows)};
}

// --- threads -------------------------------------------------------------------------------------

void define_team(py::module_& module) {
    module.def(
        "run_team",
        [](const py::function& body, int threads) {
            checked_threads(threads);
            const py::gil_scoped_release unlocked;
            bft::cpu::run_threads(
                threads,
                [](void* context, int thread, int) {
                    const py::gil_scoped_acquire locked;
                    (*static_cast<const py::function*>(context))(thread);
                },
                const_cast<py::function*>(&body));
        },
        arg("body"), arg("threads"),
        "Call body(thread) on the threads that loops run on, all at once: as many as are asked "
        "for, or what the runtime gives. Loops and products within it have one thread each.");
}

// --- the forward ---------------------------------------------------------------------------------

class OnlineSoftmax {
  public:
    explicit OnlineSoftmax(Given given)
        : settings_(settings_of(given)),
          rows_(given.number("rows", 0, kMaxCount)),
          softmax_(settings_, rows_, given.longs("targets", rows_),
                   given.longs("positions", settings_.sample ? rows_ : 0),
                   given.floats("lse_bounds")) {
        given.finish();
    }

    void add(const BlockArguments& arguments, Address keep, int threads, int worker) {
        const bft::cpu::Block block = checked(arguments);
        softmax_.add(block, bft::checked_pointer<float>("keep", keep, 0),
                     checked_team(threads, worker));
    }

    void add_exponentials(const BlockArguments& block, Address sums, int64_t width, int threads,
                          int worker) {
        softmax_.add_exponentials(checked(block),
                                  bft::checked_pointer<float>("sums", sums, rows_ * width), width,
                                  checked_team(threads, worker));
    }

    void finish(int64_t first_row, int64_t rows, const py::dict& out, int threads) {
        check_rows(first_row, rows);
        Given given(out);
        const bft::cpu::SoftmaxResults results{
            given.floats("loss"),     given.floats("nll"),
            given.floats("lse"),      given.floats("lse_low"),
            given.floats("entropy"),  given.array<bool>("correct"),
            given.floats("variance"), given.floats("hidden_variance"),
            given.longs("counts")};
        given.finish();
        const py::gil_scoped_release unlocked;
        softmax_.finish(first_row, rows, results, checked_threads(threads));
    }

    void entries(Address offsets, Address columns, Address values, int threads) {
        const auto* first = bft::checked_pointer<const int64_t>("offsets", offsets, rows_ + 1);
        const int64_t count = first[rows_];
        softmax_.entries(first, bft::checked_pointer<int32_t>("columns", columns, count),
                         bft::checked_pointer<float>("values", values, count),
                         checked_threads(threads));
    }

    void unit_factors(int64_t first_row, int64_t rows, Address factors, Address values) {
        check_rows(first_row, rows);
        softmax_.unit_factors(first_row, rows,
                              bft::checked_pointer<float>("factors", factors, rows),
                              bft::checked_pointer<float>("target_values", values, rows));
    }

  private:
    static bft::cpu::SoftmaxSettings settings_of(Given& given) {
        return {
            given.number("vocabulary", 1, kMaxVocabulary),
            transform_of(given),
            given.floats("norms"),
            given.get("eps", 1.0f),
            static_cast<uint64_t>(given.get<int64_t>("seed", 0)),
            given.get("sample", false),
            given.get("certificate", false),
            given.get("label_smoothing", 0.0f),
            given.get("z_loss", 0.0f),
            static_cast<int>(bft::check_range("workers", given.get("workers", 1), 1, kMaxThreads))};
    }
    bft::cpu::Block checked(const BlockArguments& arguments) const {
        const bft::cpu::Block block = checked_block(arguments, settings_.vocabulary);
        check_rows(block.first_row, block.rows);
        return block;
    }

    void check_rows(int64_t first_row, int64_t rows) const {
        bft::check_range("first_row", first_row, 0, rows_);
        bft::check_range("rows", rows, 0, rows_ - first_row);
    }

    // While a block is taken by several threads, no other block is.
    bft::cpu::Team checked_team(int threads, int worker) const {
        bft::check_range("worker", worker, 0, settings_.workers - 1);
        if (worker > 0) bft::check_range("threads", threads, 1, 1);
        return {checked_threads(threads), worker};
    }

    bft::cpu::SoftmaxSettings settings_;
    int64_t rows_;
    bft::cpu::OnlineSoftmax softmax_;
};

void define_softmax(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    py::class_<OnlineSoftmax>(
        module, "OnlineSoftmax",
        "The forward of some rows; blocks come in ascending order of columns. The "
        "arrays of bias and norms must outlive it.")
        .def(py::init(
            [](const py::kwargs& named) { return std::make_unique<OnlineSoftmax>(Given(named)); }))
        .def("add", &OnlineSoftmax::add, arg("block"), arg("keep") = 0, py::kw_only(),
             arg("threads"), arg("worker") = 0, Release(),
             "Take a block of raw products; leaves its logits in place, and in keep [rows, "
             "columns]. Several workers may add blocks of different rows at once.")
        .def("add_exponentials", &OnlineSoftmax::add_exponentials, arg("block"), arg("sums"),
             arg("width"), arg("threads"), arg("worker") = 0, Release(),
             "Take a block; leaves slope * exp(z - maximum) in place, 0 at the target, and scales "
             "sums [rows, width] when the maximum rises.")
        .def("finish", &OnlineSoftmax::finish, arg("first_row"), arg("rows"), arg("out"),
             arg("threads"), "Write results [rows] to the addresses in out, by name.")
        .def("entries", &OnlineSoftmax::entries, arg("offsets"), arg("columns"), arg("values"),
             arg("threads"), Release(), "Write the sampled entries of all rows.")
        .def("unit_factors", &OnlineSoftmax::unit_factors, arg("first_row"), arg("rows"),
             arg("factors"), arg("target_values"), Release(),
             "Write what the sums of exponentials are to be multiplied by, and the target's dy.");

    module.def(
        "gradient_block",
        [](const py::kwargs& named) {
            Given given(named);
            const int64_t vocabulary = given.number("vocabulary", 1, kMaxVocabulary);
            const auto block = checked_block(given.get<BlockArguments>("block"), vocabulary);
            const int64_t rows = block.rows;
            const bft::cpu::GradientSettings settings{transform_of(given),
                                                      given.floats("kept"),
                                                      vocabulary,
                                                      given.get("label_smoothing", 0.0f),
                                                      given.get("z_loss", 0.0f),
                                                      given.longs("targets", rows),
                                                      given.floats("lse", rows),
                                                      given.floats("lse_low", rows),
                                                      given.floats("nll", rows),
                                                      given.floats("upstream", rows)};
            given.call(bft::cpu::gradient_block, settings, block, threads_of(given));
        },
        "Overwrite a block of raw products with upstream * dy; given the logits kept [rows, "
        "columns], whatever the block holds.");
}

// --- the backward --------------------------------------------------------------------------------

void define_backward(py::module_& module) {
    module.def(
        "spmm_hidden",
        [](const py::kwargs& named) {
            Given given(named);
            given.call(bft::cpu::spmm_hidden, entries_of(given), matrix_of(given, "weight"),
                       matrix_of(given, "grad_hidden"), threads_of(given));
        },
        "dH [rows, D] from the entries of dy and the rows of weight.");
    module.def(
        "spmm_weight",
        [](const py::kwargs& named) {
            Given given(named);
            const auto into = given.get<std::optional<MatrixArguments>>("grad_weight");
            std::optional<bft::cpu::Matrix> out;
            if (into) out = checked_matrix("grad_weight", *into);
            given.call(bft::cpu::spmm_weight, entries_of(given), matrix_of(given, "hidden"),
                       out ? &*out : nullptr, given.get<bool>("add"), given.floats("grad_bias"),
                       given.number("vocabulary", 1, kMaxVocabulary),
                       given.number("slice", 1, kMaxCount), threads_of(given));
        },
        "dW [V, D], added or stored, and db [V] from the entries of dy and the rows of hidden.");
}

}  // namespace

PYBIND11_MODULE(_cpu, module, py::mod_gil_not_used()) {
    module.doc() = "C++ kernels for the CPU. Raw addresses: the caller owns and sizes the memory.";
    module.def("has_openmp", &bft::cpu::has_openmp,
               "Whether loops run on an OpenMP runtime of this process, else on std::thread.");
    module.def("instruction_sets", &bft::cpu::available_kernels,
               "What was compiled and this processor runs, best first.");
    module.def("instruction_set", [] { return bft::cpu::kernels().name; }, "What is used.");
    module.def("use_instruction_set", &bft::cpu::select_kernels, arg("name"),
               "Use another of instruction_sets() from now on.");
    define_team(module);
    define_softmax(module);
    define_backward(module);
}
