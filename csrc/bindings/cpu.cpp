// bft_kernels._cpu: arrays come as addresses and sizes, so that no torch header is needed.
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
using py::arg;
using Address = std::uintptr_t;  // 0 where an array is not given

namespace {

constexpr int64_t kMaxCount = int64_t{1} << 48;

constexpr int kMaxThreads = 1 << 16;

int checked_threads(int threads) {
    bft::check_range("threads", threads, 1, kMaxThreads);
    return threads;
}

// --- arrays --------------------------------------------------------------------------------------

template <typename T>
T* optional_array(const char* name, Address address, int64_t elements) {
    return address == 0 ? nullptr : bft::checked_pointer<T>(name, address, elements);
}

template <typename T>
const T* array(const char* name, Address address, int64_t elements) {
    return bft::checked_pointer<const T>(name, address, elements);
}

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

// Where a block of logits lies: (data_ptr, stride, first_row, rows, first_column, columns).
using BlockArguments = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int64_t>;

bft::cpu::Block checked_block(const BlockArguments& arguments, int64_t vocabulary) {
    const auto& [address, stride, first_row, rows, first_column, columns] = arguments;
    bft::check_range("first_row", first_row, 0, kMaxCount);
    bft::check_range("rows", rows, 0, kMaxCount);
    bft::check_range("first_column", first_column, 0, vocabulary);
    bft::check_range("columns", columns, 1, vocabulary - first_column);
    bft::check_range("stride", stride, columns, kMaxCount);
    return {bft::checked_pointer<float>("logits", address, rows),
            stride,
            first_row,
            rows,
            first_column,
            columns};
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
    OnlineSoftmax(const bft::cpu::SoftmaxSettings& settings, int64_t rows, Address targets,
                  Address positions, Address lse_bounds)
        : vocabulary_(settings.vocabulary),
          rows_(rows),
          workers_(settings.workers),
          softmax_(settings, rows, array<int64_t>("targets", targets, rows),
                   array<int64_t>("positions", positions, settings.sample ? rows : 0),
                   optional_array<float>("lse_bounds", lse_bounds, rows)) {}

    void add(const BlockArguments& arguments, Address keep, int threads, int worker) {
        const bft::cpu::Block block = checked(arguments);
        softmax_.add(block, optional_array<float>("keep", keep, block.rows * block.columns),
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
        const auto address = [&](const char* name) {
            return out.contains(name) ? out[name].cast<Address>() : Address{0};
        };
        const auto floats = [&](const char* name) {
            return optional_array<float>(name, address(name), rows);
        };
        const bft::cpu::SoftmaxResults results{
            floats("loss"),
            floats("nll"),
            floats("lse"),
            floats("lse_low"),
            floats("entropy"),
            optional_array<bool>("correct", address("correct"), rows),
            floats("variance"),
            floats("hidden_variance"),
            optional_array<int64_t>("counts", address("counts"), rows)};
        const py::gil_scoped_release unlocked;
        softmax_.finish(first_row, rows, results, checked_threads(threads));
    }

    void entries(Address offsets, Address columns, Address values, int threads) {
        const int64_t* first = array<int64_t>("offsets", offsets, rows_ + 1);
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
    bft::cpu::Block checked(const BlockArguments& arguments) const {
        const bft::cpu::Block block = checked_block(arguments, vocabulary_);
        check_rows(block.first_row, block.rows);
        return block;
    }

    void check_rows(int64_t first_row, int64_t rows) const {
        bft::check_range("first_row", first_row, 0, rows_);
        bft::check_range("rows", rows, 0, rows_ - first_row);
    }

    // With more than one thread a block has the softmax to itself.
    bft::cpu::Team checked_team(int threads, int worker) const {
        bft::check_range("worker", worker, 0, workers_ - 1);
        if (worker > 0) bft::check_range("threads", threads, 1, 1);
        return {checked_threads(threads), worker};
    }

    int64_t vocabulary_, rows_;
    int workers_;
    bft::cpu::OnlineSoftmax softmax_;
};

bft::cpu::Transform checked_transform(Address bias, float softcap, float temperature,
                                      int64_t vocabulary) {
    bft::check_range("vocabulary", vocabulary, 1, (int64_t{1} << 31) - 1);
    return {optional_array<const float>("bias", bias, vocabulary), softcap, temperature};
}

void define_softmax(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    py::class_<OnlineSoftmax>(
        module, "OnlineSoftmax",
        "The forward of some rows; blocks come in ascending order of columns. The "
        "arrays of bias and norms must outlive it.")
        .def(py::init([](int64_t rows, int64_t vocabulary, Address targets, Address positions,
                         Address lse_bounds, Address bias, float softcap, float temperature,
                         Address norms, float eps, int64_t seed, bool sample, bool certificate,
                         float label_smoothing, float z_loss, int workers) {
                 bft::check_range("rows", rows, 0, kMaxCount);
                 bft::check_range("workers", workers, 1, kMaxThreads);
                 bft::cpu::SoftmaxSettings settings;
                 settings.workers = workers;
                 settings.vocabulary = vocabulary;
                 settings.transform = checked_transform(bias, softcap, temperature, vocabulary);
                 settings.norms = optional_array<const float>("norms", norms, vocabulary);
                 settings.eps = eps;
                 settings.seed = static_cast<uint64_t>(seed);
                 settings.sample = sample;
                 settings.certificate = certificate;
                 settings.label_smoothing = label_smoothing;
                 settings.z_loss = z_loss;
                 return new OnlineSoftmax(settings, rows, targets, positions, lse_bounds);
             }),
             py::kw_only(), arg("rows"), arg("vocabulary"), arg("targets"), arg("positions") = 0,
             arg("lse_bounds") = 0, arg("bias") = 0, arg("softcap") = 0.0f,
             arg("temperature") = 1.0f, arg("norms") = 0, arg("eps") = 1.0f, arg("seed") = 0,
             arg("sample") = false, arg("certificate") = false, arg("label_smoothing") = 0.0f,
             arg("z_loss") = 0.0f, arg("workers") = 1)
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
        [](const BlockArguments& block, int64_t vocabulary, Address kept, Address targets,
           Address lse, Address lse_low, Address nll, Address upstream, Address bias, float softcap,
           float temperature, float label_smoothing, float z_loss, int threads) {
            const bft::cpu::Transform transform =
                checked_transform(bias, softcap, temperature, vocabulary);
            const bft::cpu::Block checked = checked_block(block, vocabulary);
            const int64_t rows = checked.rows;
            bft::cpu::gradient_block(
                {transform, optional_array<const float>("kept", kept, rows * checked.columns),
                 vocabulary, label_smoothing, z_loss, array<int64_t>("targets", targets, rows),
                 array<float>("lse", lse, rows), array<float>("lse_low", lse_low, rows),
                 array<float>("nll", nll, rows), array<float>("upstream", upstream, rows)},
                checked, checked_threads(threads));
        },
        py::kw_only(), arg("block"), arg("vocabulary"), arg("kept") = 0, arg("targets"), arg("lse"),
        arg("lse_low"), arg("nll"), arg("upstream"), arg("bias") = 0, arg("softcap") = 0.0f,
        arg("temperature") = 1.0f, arg("label_smoothing") = 0.0f, arg("z_loss") = 0.0f,
        arg("threads"), Release(),
        "Overwrite a block of raw products with upstream * dy; given the logits kept [rows, "
        "columns], whatever the block holds.");
}

// --- the backward --------------------------------------------------------------------------------

bft::cpu::Entries checked_entries(int64_t rows, Address offsets, Address columns, Address values,
                                  Address upstream) {
    bft::check_range("rows", rows, 0, kMaxCount);
    const int64_t* first = array<int64_t>("offsets", offsets, rows + 1);
    const int64_t count = first[rows];
    return {rows, first, array<int32_t>("columns", columns, count),
            array<float>("values", values, count), array<float>("upstream", upstream, rows)};
}

void define_backward(py::module_& module) {
    using Release = py::call_guard<py::gil_scoped_release>;
    module.def(
        "spmm_hidden",
        [](int64_t rows, Address offsets, Address columns, Address values, Address upstream,
           const MatrixArguments& weight, const MatrixArguments& grad_hidden, int threads) {
            bft::cpu::spmm_hidden(checked_entries(rows, offsets, columns, values, upstream),
                                  checked_matrix("weight", weight),
                                  checked_matrix("grad_hidden", grad_hidden),
                                  checked_threads(threads));
        },
        py::kw_only(), arg("rows"), arg("offsets"), arg("columns"), arg("values"), arg("upstream"),
        arg("weight"), arg("grad_hidden"), arg("threads"), Release(),
        "dH [rows, D] from the entries of dy and the rows of weight.");
    module.def(
        "spmm_weight",
        [](int64_t rows, Address offsets, Address columns, Address values, Address upstream,
           const MatrixArguments& hidden, const std::optional<MatrixArguments>& grad_weight,
           bool add, Address grad_bias, int64_t vocabulary, int64_t slice, int threads) {
            bft::check_range("vocabulary", vocabulary, 1, (int64_t{1} << 31) - 1);
            bft::check_range("slice", slice, 1, kMaxCount);
            std::optional<bft::cpu::Matrix> out;
            if (grad_weight) out = checked_matrix("grad_weight", *grad_weight);
            bft::cpu::spmm_weight(checked_entries(rows, offsets, columns, values, upstream),
                                  checked_matrix("hidden", hidden), out ? &*out : nullptr, add,
                                  optional_array<float>("grad_bias", grad_bias, vocabulary),
                                  vocabulary, slice, checked_threads(threads));
        },
        py::kw_only(), arg("rows"), arg("offsets"), arg("columns"), arg("values"), arg("upstream"),
        arg("hidden"), arg("grad_weight"), arg("add"), arg("grad_bias"), arg("vocabulary"),
        arg("slice"), arg("threads"), Release(),
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
