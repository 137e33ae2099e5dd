// bft_kernels._cuda: arrays come as device addresses and sizes, the stream as an integer, so that
// no torch header is needed. The CUDA runtime is linked statically: importing works without a
// driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <utility>

#include "csrc/bindings/checks.h"
#include "csrc/cuda/kernels.h"

#ifdef BFT_EMULATION  // built by tests/cuda/emulation/build.py, for tests
#include "tests/cuda/emulation/binding.h"
#endif

namespace py = pybind11;
using bft::check_number, bft::check_range, bft::checked_pointer;
using py::arg;
using Address = std::uintptr_t;  // 0 where an array is not given
using namespace bft::cuda;

namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();  // also what a grid counts
// Numbers of rows and columns are 32-bit in kernels, those of the last tile included.
constexpr int64_t kMaxRows = kMaxInt - 1024, kMaxVocabulary = kMaxRows;
constexpr int64_t kMaxStride = int64_t{1} << 48;
constexpr float kSmallest = std::numeric_limits<float>::min();
constexpr float kLargest = std::numeric_limits<float>::max();

// A launch: its arguments have names, the last is the stream, and it does not hold the GIL.
template <typename Function, typename... Arguments>
void launches(py::module_& module, const char* name, const char* doc, Function function,
              const Arguments&... arguments) {
    module.def(name, function, doc, py::kw_only(), arguments..., arg("stream"),
               py::call_guard<py::gil_scoped_release>());
}

// --- checks that several launches share ----------------------------------------------------------

void* stream_of(Address stream) { return reinterpret_cast<void*>(stream); }

// Without a number of elements the array may be missing.
float* floats(const char* name, Address address, int64_t elements = 0) {
    return checked_pointer<float>(name, address, elements);
}
int64_t* longs(const char* name, Address address, int64_t elements = 0) {
    return checked_pointer<int64_t>(name, address, elements);
}

// An array of the operands' type, or, if is_float32, of float32.
Output output(const char* name, Address address, int64_t elements, Type type, bool is_float32) {
    if (is_float32 || type == Type::kFloat32) return {floats(name, address, elements), true};
    return {checked_pointer<uint16_t>(name, address, elements), false};
}

void check_eps(float eps) { check_number("eps", eps, 0x1p-30f, 1); }

void check_transform(float softcap, float temperature) {
    check_number("softcap", softcap, 0, kLargest);
    check_number("temperature", temperature, kSmallest, kLargest);
}

RowRange row_range(const Problem& problem, int64_t first_row, int64_t rows) {
    check_range("first_row", first_row, 0, problem.rows);
    check_range("rows", rows, 0, problem.rows - first_row);
    return {first_row, rows};
}

RowResults row_results(int64_t rows, Address loss, Address nll, Address lse, Address lse_low,
                       Address entropy, Address correct) {
    if ((entropy != 0) != (correct != 0)) {
        throw std::invalid_argument("entropy_ptr and correct_ptr: got one of them");
    }
    return {floats("loss_ptr", loss, rows), floats("nll_ptr", nll, rows),
            floats("lse_ptr", lse, rows),   floats("lse_low_ptr", lse_low),
            floats("entropy_ptr", entropy), checked_pointer<bool>("correct_ptr", correct, 0)};
}

// norms and hidden_variance come together.
Certified certified(int64_t rows, Address lse, Address norms, Address hidden_variance, float eps) {
    check_eps(eps);
    if (rows > 0 && (norms != 0) != (hidden_variance != 0)) {
        throw std::invalid_argument("norms_ptr and hidden_variance_ptr: got one of them");
    }
    return {floats("lse_ptr", lse, rows), floats("norms_ptr", norms), eps};
}

// Without values the address is 0.
Lists lists(int64_t rows, Address offsets, Address columns, Address values, int64_t capacity) {
    check_range("capacity", capacity, 0, kMaxStride);
    return {longs("offsets_ptr", offsets, rows + 1),
            checked_pointer<int32_t>("columns_ptr", columns, capacity),
            floats("values_ptr", values), capacity};
}

int64_t words_of(int64_t vocabulary) { return (vocabulary + 31) / 32; }

int64_t tiles_of(int64_t count) { return (count + kTileN - 1) / kTileN; }
static_assert(kTileN == kTileV);

Splits splits(const Problem& problem, int count, int columns, int64_t rows) {
    check_range("split_columns", columns, 1, kMaxInt);
    check_range("split_columns % 128", columns % kTileV, 0, 0);
    const int64_t needed = (problem.vocabulary + columns - 1) / columns;
    check_range("splits", count, needed, needed);
    check_range("splits * row blocks", count * tiles_of(rows), 0, kMaxInt);
    return {count, columns};
}

// --- what a call is about ------------------------------------------------------------------------

void define_problem(py::module_& module) {
    py::class_<Problem>(
        module, "Problem",
        "What kernels that make logits read. target, order [N] and count [1] are int64: order "
        "lists the rows that take part, count of them, first. bias is float32 or address 0. dtype "
        "is 0 for float32, 1 for bfloat16, 2 for float16; softcap 0 is none.",
        py::module_local())  // the emulated module may be loaded beside this one
        .def(
            py::init([](Address hidden, Address weight, Address bias, Address target, Address order,
                        Address count, int64_t n, int64_t v, int64_t d, int64_t stride_hn,
                        int64_t stride_wv, int dtype, float softcap, float temperature) {
                check_range("N", n, 0, kMaxRows);
                check_range("V", v, 1, kMaxVocabulary);
                check_range("D", d, 1, int64_t{1} << 30);
                check_range("stride_hn", stride_hn, -kMaxStride, kMaxStride);
                check_range("stride_wv", stride_wv, -kMaxStride, kMaxStride);
                check_range("dtype", dtype, 0, 2);
                check_transform(softcap, temperature);
                const auto type = static_cast<Type>(dtype);
                // Operands are read by rows: the address is one of elements, whatever their
                // number.
                return Problem{type,
                               output("hidden_ptr", hidden, n, type, false).at,
                               output("weight_ptr", weight, v, type, false).at,
                               floats("bias_ptr", bias),
                               longs("target_ptr", target, n),
                               longs("order_ptr", order, n),
                               longs("count_ptr", count, 1),
                               n,
                               v,
                               d,
                               stride_hn,
                               stride_wv,
                               softcap,
                               temperature};
            }),
            py::kw_only(), arg("hidden_ptr"), arg("weight_ptr"), arg("bias_ptr"), arg("target_ptr"),
            arg("order_ptr"), arg("count_ptr"), arg("N"), arg("V"), arg("D"), arg("stride_hn"),
            arg("stride_wv"), arg("dtype"), arg("softcap") = 0.0f, arg("temperature") = 1.0f);
}

// --- forward.cu, certificate.cu ------------------------------------------------------------------

void define_forward(py::module_& module) {
    module.attr("FORWARD_SUMS") = kSums;
    module.def(
        "forward_splits",
        [](int64_t rows, int64_t v, int processors) {
            check_range("rows", rows, 0, kMaxRows);
            check_range("V", v, 1, kMaxVocabulary);
            check_range("processors", processors, 1, 1 << 20);
            const Splits found = splits_for(rows, v, processors);
            return std::pair(found.count, found.columns);
        },
        "Number of splits, and columns of each, for a forward of so many rows.", arg("rows"),
        arg("V"), arg("processors"));
    launches(
        module, "linear_nll_forward",
        "Losses and statistics [N], by position, of R rows from first_row on, among those that "
        "take part. sums [FORWARD_SUMS, splits, R] float32 is room to work in. With mask "
        "[R, ceil(V / 32)] also a bit for each entry that may be kept. Addresses of 0: not wanted.",
        [](const Problem& problem, int64_t first_row, int64_t rows, int count, int split_columns,
           Address sums, Address loss, Address nll, Address lse, Address lse_low, Address entropy,
           Address correct, float label_smoothing, float z_loss, Address seed, Address lse_bound,
           Address mask, float eps, Address stream) {
            const int64_t n = problem.rows;
            const RowRange range = row_range(problem, first_row, rows);
            const Splits parts = splits(problem, count, split_columns, rows);
            check_number("label_smoothing", label_smoothing, 0, 1);
            const bool sampled = mask != 0;
            if (sampled) check_eps(eps);
            const int64_t words = words_of(problem.vocabulary);
            const Candidates candidates{
                longs("seed_ptr", seed, sampled),
                floats("lse_bound_ptr", lse_bound, sampled ? n : 0), sampled ? eps : 1.0f,
                checked_pointer<uint32_t>("mask_ptr", mask, sampled ? rows * words : 0)};
            const RowResults results = row_results(n, loss, nll, lse, lse_low, entropy, correct);
            linear_nll_forward(problem, range, parts,
                               floats("sums_ptr", sums, kSums * parts.count * rows), candidates,
                               {label_smoothing, z_loss}, results, stream_of(stream));
        },
        arg("problem"), arg("first_row"), arg("rows"), arg("splits"), arg("split_columns"),
        arg("sums_ptr"), arg("loss_ptr"), arg("nll_ptr"), arg("lse_ptr"), arg("lse_low_ptr") = 0,
        arg("entropy_ptr") = 0, arg("correct_ptr") = 0, arg("label_smoothing") = 0.0f,
        arg("z_loss") = 0.0f, arg("seed_ptr") = 0, arg("lse_bound_ptr") = 0, arg("mask_ptr") = 0,
        arg("eps") = 1.0f);
    launches(
        module, "target_bound",
        "lse_bound [N] float32, where rows take part: a lower bound of lse, from the target.",
        [](const Problem& problem, Address lse_bound, Address stream) {
            target_bound(problem, floats("lse_bound_ptr", lse_bound, problem.rows),
                         stream_of(stream));
        },
        arg("problem"), arg("lse_bound_ptr"));
}

void define_certificate(py::module_& module) {
    launches(
        module, "certificate",
        "variance [N] of the sampled gradient, by position, of R rows from first_row on, among "
        "those that take part, from lse [N]. With norms [V] float32 of the rows of weight also "
        "hidden_variance [N]. sums [1, splits, R] float32, or [2, splits, R] with norms, is room "
        "to work in.",
        [](const Problem& problem, int64_t first_row, int64_t rows, int count, int split_columns,
           Address sums, Address lse, float eps, Address variance, Address norms,
           Address hidden_variance, Address stream) {
            const int64_t n = problem.rows;
            const RowRange range = row_range(problem, first_row, rows);
            const Splits parts = splits(problem, count, split_columns, rows);
            const Certified known = certified(n, lse, norms, hidden_variance, eps);
            const int64_t planes = norms != 0 ? 2 : 1;
            certificate(problem, range, parts, known,
                        floats("sums_ptr", sums, planes * parts.count * rows),
                        floats("variance_ptr", variance, n),
                        floats("hidden_variance_ptr", hidden_variance), stream_of(stream));
        },
        arg("problem"), arg("first_row"), arg("rows"), arg("splits"), arg("split_columns"),
        arg("sums_ptr"), arg("lse_ptr"), arg("eps"), arg("variance_ptr"), arg("norms_ptr") = 0,
        arg("hidden_variance_ptr") = 0);
    launches(
        module, "squared_norms",
        "|W_v|^2 of each row of weight, as stored, into norms [V] float32.",
        [](const Problem& problem, Address norms, Address stream) {
            squared_norms(problem, floats("norms_ptr", norms, problem.vocabulary),
                          stream_of(stream));
        },
        arg("problem"), arg("norms_ptr"));
}

// --- recompute.cu --------------------------------------------------------------------------------

// `other`: how many rows of tiles the grid has beside those of the block's columns.
GradientBlock gradient_block(const Problem& problem, int first_column, int columns, Address dy,
                             int64_t stride, int64_t other) {
    check_range("first_column", first_column, 0, problem.vocabulary - 1);
    check_range("columns", columns, 1, problem.vocabulary - first_column);
    check_range("stride_dy", stride, columns, kMaxInt);
    check_range("stride_dy % 128", stride % kTileV, 0, 0);
    check_range("dy_ptr % 16", static_cast<int64_t>(dy % 16), 0, 0);
    check_range("blocks", tiles_of(columns) * tiles_of(other), 0, kMaxInt);
    return {first_column, columns, checked_pointer<uint16_t>("dy_ptr", dy, problem.rows * stride),
            stride};
}

void define_gradients(py::module_& module) {
    launches(
        module, "logit_gradient",
        "Write dy [N, stride_dy], of the operands' type, of a block of columns: by row that takes "
        "part, times grad [N]; sampled with a seed. stride_dy is a multiple of 128. With grad_bias "
        "[V] float32 add its sums over rows, over scale [1], to the block's columns; bias_sums "
        "[ceil(N / 128), stride_dy] float32 is room to work in.",
        [](const Problem& problem, int first_column, int columns, Address dy, int64_t stride_dy,
           Address lse, Address lse_low, Address nll, Address grad, float label_smoothing,
           float z_loss, Address seed, float eps, Address bias_sums, Address grad_bias,
           Address scale, Address stream) {
            const int64_t n = problem.rows;
            const auto block = gradient_block(problem, first_column, columns, dy, stride_dy, n);
            check_number("label_smoothing", label_smoothing, 0, 1);
            if (seed != 0) check_eps(eps);
            const KnownRows known{floats("lse_ptr", lse, n), floats("lse_low_ptr", lse_low),
                                  floats("nll_ptr", nll, n), floats("grad_ptr", grad, n)};
            const int64_t sums = grad_bias == 0 ? 0 : tiles_of(n) * stride_dy;
            logit_gradient(
                problem, known, {{label_smoothing, z_loss}, longs("seed_ptr", seed), eps}, block,
                floats("bias_sums_ptr", bias_sums, sums), floats("grad_bias_ptr", grad_bias),
                floats("scale_ptr", scale), stream_of(stream));
        },
        arg("problem"), arg("first_column"), arg("columns"), arg("dy_ptr"), arg("stride_dy"),
        arg("lse_ptr"), arg("lse_low_ptr") = 0, arg("nll_ptr"), arg("grad_ptr"),
        arg("label_smoothing") = 0.0f, arg("z_loss") = 0.0f, arg("seed_ptr") = 0, arg("eps") = 1.0f,
        arg("bias_sums_ptr") = 0, arg("grad_bias_ptr") = 0, arg("scale_ptr") = 0);
    launches(
        module, "hidden_gradient",
        "dy @ W over scale [1] into rows of grad_hidden [N, D], of the operands' type or float32. "
        "Blocks come in order: all but the last write sums [N, D] float32, all but the first add "
        "what is there.",
        [](const Problem& problem, int first_column, int columns, Address dy, int64_t stride_dy,
           Address sums, Address grad_hidden, bool is_float32, Address scale, Address stream) {
            const auto block =
                gradient_block(problem, first_column, columns, dy, stride_dy, problem.depth);
            const int64_t elements = problem.rows * problem.depth;
            const bool whole = columns == problem.vocabulary;
            hidden_gradient(
                problem, block, floats("sums_ptr", sums, whole ? 0 : elements),
                output("grad_hidden_ptr", grad_hidden, elements, problem.type, is_float32),
                floats("scale_ptr", scale), stream_of(stream));
        },
        arg("problem"), arg("first_column"), arg("columns"), arg("dy_ptr"), arg("stride_dy"),
        arg("sums_ptr") = 0, arg("grad_hidden_ptr"), arg("is_float32") = false,
        arg("scale_ptr") = 0);
    launches(
        module, "weight_gradient",
        "dy.T @ H over scale [1] into the block's rows of grad_weight [V, D], of the operands' "
        "type or float32; with adds to what is there.",
        [](const Problem& problem, int first_column, int columns, Address dy, int64_t stride_dy,
           Address grad_weight, int64_t stride_gv, bool is_float32, bool adds, Address scale,
           Address stream) {
            const auto block =
                gradient_block(problem, first_column, columns, dy, stride_dy, problem.depth);
            check_range("stride_gv", stride_gv, problem.depth, kMaxStride);
            const int64_t rows = problem.vocabulary;
            weight_gradient(problem, block,
                            output("grad_weight_ptr", grad_weight, rows, problem.type, is_float32),
                            stride_gv, adds, floats("scale_ptr", scale), stream_of(stream));
        },
        arg("problem"), arg("first_column"), arg("columns"), arg("dy_ptr"), arg("stride_dy"),
        arg("grad_weight_ptr"), arg("stride_gv"), arg("is_float32") = false, arg("adds"),
        arg("scale_ptr") = 0);
}

// --- lists.cu, gather.cu -------------------------------------------------------------------------

// Storage for CUB, which takes an address of 0 for a question.
Temporary temporary(Address address, int64_t bytes, bool wanted) {
    check_range("temporary_bytes", bytes, wanted, kMaxStride);
    return {checked_pointer<char>("temporary_ptr", address, wanted ? bytes : 0),
            static_cast<size_t>(bytes)};
}

const uint32_t* mask_of(const Problem& problem, Address mask, int64_t rows) {
    return checked_pointer<uint32_t>("mask_ptr", mask, rows * words_of(problem.vocabulary));
}

// CUB numbers what it sorts with 32 bits.
void check_entries(int64_t entries, int64_t vocabulary) {
    check_range("E", entries, 0, kMaxInt);
    check_range("V", vocabulary, 1, kMaxVocabulary);
}

void define_lists(py::module_& module) {
    launches(
        module, "count_entries",
        "counts [N] int64, by position, of R rows from first_row on, among those that take part: "
        "how many bits of mask [R, ceil(V / 32)] are set.",
        [](const Problem& problem, int64_t first_row, int64_t rows, Address mask, Address counts,
           Address stream) {
            count_entries(problem, row_range(problem, first_row, rows),
                          mask_of(problem, mask, rows), longs("counts_ptr", counts, problem.rows),
                          stream_of(stream));
        },
        arg("problem"), arg("first_row"), arg("rows"), arg("mask_ptr"), arg("counts_ptr"));
    launches(
        module, "list_entries",
        "columns [capacity] int32 of the bits of mask, ascending, each row's from its offset on. A "
        "row that ends past the capacity has none.",
        [](const Problem& problem, int64_t first_row, int64_t rows, Address mask, Address offsets,
           Address columns, int64_t capacity, Address stream) {
            list_entries(problem, row_range(problem, first_row, rows), mask_of(problem, mask, rows),
                         lists(problem.rows, offsets, columns, 0, capacity), stream_of(stream));
        },
        arg("problem"), arg("first_row"), arg("rows"), arg("mask_ptr"), arg("offsets_ptr"),
        arg("columns_ptr"), arg("capacity"));
    module.def(
        "sort_bytes",
        [](int64_t entries, int64_t v) {
            check_entries(entries, v);
            return sort_bytes(entries, v);
        },
        "Bytes that sort_entries works in.", arg("E"), arg("V"));
    launches(
        module, "sort_entries",
        "keys [E] int32 and packed [E] int64 by key, V where there is no entry; those of one "
        "column stay in order.",
        [](Address keys, Address packed, int64_t entries, int64_t v, Address sorted_keys,
           Address sorted_packed, Address storage, int64_t temporary_bytes, Address stream) {
            check_entries(entries, v);
            sort_entries(checked_pointer<int32_t>("keys_ptr", keys, entries),
                         checked_pointer<uint64_t>("packed_ptr", packed, entries), entries, v,
                         checked_pointer<int32_t>("sorted_keys_ptr", sorted_keys, entries),
                         checked_pointer<uint64_t>("sorted_packed_ptr", sorted_packed, entries),
                         temporary(storage, temporary_bytes, entries > 0), stream_of(stream));
        },
        arg("keys_ptr"), arg("packed_ptr"), arg("E"), arg("V"), arg("sorted_keys_ptr"),
        arg("sorted_packed_ptr"), arg("temporary_ptr"), arg("temporary_bytes"));
    launches(
        module, "column_starts",
        "starts [V + 1] int64: the first of each column among sorted keys [E] int32, and the "
        "number of those that are columns.",
        [](Address sorted_keys, int64_t entries, int64_t v, Address starts, Address stream) {
            check_entries(entries, v);
            column_starts(checked_pointer<int32_t>("sorted_keys_ptr", sorted_keys, entries),
                          entries, v, longs("starts_ptr", starts, v + 1), stream_of(stream));
        },
        arg("sorted_keys_ptr"), arg("E"), arg("V"), arg("starts_ptr"));
}

void define_gathers(py::module_& module) {
    module.attr("MAX_GATHERED") = kMaxGathered;
    launches(
        module, "spmm_hidden",
        "Of the listed entries those of the sampled gradient, by lse and nll [N]; with values "
        "[capacity], dy for unit upstream gradient, all of them. Rows of grad_hidden [N, D], of "
        "the operands' type or float32, times grad [N]; ignored ones, and "
        "those without a list, are left alone. keys [capacity] int32 and packed [capacity] int64, "
        "row and float32 value, where an entry is kept. Addresses of 0: not wanted.",
        [](const Problem& problem, Address lse, Address nll, Address grad, Address seed, float eps,
           Address offsets, Address columns, Address values, int64_t capacity, Address keys,
           Address packed, Address grad_hidden, bool is_float32, Address stream) {
            const int64_t n = problem.rows;
            check_range("D", problem.depth, 1, kMaxGathered);
            check_eps(eps);
            const KnownRows known{floats("lse_ptr", lse, n), nullptr, floats("nll_ptr", nll, n),
                                  floats("grad_ptr", grad, n)};
            const KeptEntries kept{
                checked_pointer<int32_t>("keys_ptr", keys, packed == 0 ? 0 : capacity),
                checked_pointer<uint64_t>("packed_ptr", packed, keys == 0 ? 0 : capacity)};
            spmm_hidden(problem, known, {longs("seed_ptr", seed, n > 0), eps},
                        lists(problem.rows, offsets, columns, values, capacity), kept,
                        output("grad_hidden_ptr", grad_hidden, 0, problem.type, is_float32),
                        stream_of(stream));
        },
        arg("problem"), arg("lse_ptr"), arg("nll_ptr"), arg("grad_ptr"), arg("seed_ptr"),
        arg("eps"), arg("offsets_ptr"), arg("columns_ptr"), arg("values_ptr") = 0, arg("capacity"),
        arg("keys_ptr") = 0, arg("packed_ptr") = 0, arg("grad_hidden_ptr") = 0,
        arg("is_float32") = false);
    launches(
        module, "spmm_weight",
        "grad_weight [V, D] of sorted entries, of the operands' type or with is_float32 of "
        "float32: "
        "written, or with adds added to. grad_bias [V] float32 is added to. Addresses of 0: not "
        "wanted.",
        [](const Problem& problem, Address starts, Address packed, Address grad_weight,
           int64_t stride_gv, bool is_float32, bool adds, Address grad_bias, Address stream) {
            check_range("D", problem.depth, 1, kMaxGathered);
            if (grad_weight != 0) check_range("stride_gv", stride_gv, problem.depth, kMaxStride);
            spmm_weight(problem, longs("starts_ptr", starts, problem.vocabulary + 1),
                        checked_pointer<uint64_t>("packed_ptr", packed, 0),
                        {output("grad_weight_ptr", grad_weight, 0, problem.type, is_float32),
                         stride_gv, adds, floats("grad_bias_ptr", grad_bias)},
                        stream_of(stream));
        },
        arg("problem"), arg("starts_ptr"), arg("packed_ptr"), arg("grad_weight_ptr") = 0,
        arg("stride_gv") = 0, arg("is_float32") = false, arg("adds") = false,
        arg("grad_bias_ptr") = 0);
}

// --- rows.cu -------------------------------------------------------------------------------------

void define_logit_rows(py::module_& module) {
    py::class_<LogitRows>(
        module, "LogitRows",
        "Rows of raw products in a buffer [rows, V], float32: those from first_row on of order "
        "[N], of which count [1] count, or of all without it. target [N], order and count are "
        "int64, bias is float32; addresses of 0: not there. softcap 0 is none.",
        py::module_local())
        .def(py::init([](Address logits, int64_t stride, Address bias, Address target,
                         Address order, Address count, int64_t first_row, int64_t rows, int64_t n,
                         int64_t v, float softcap, float temperature) {
                 check_range("N", n, 0, kMaxRows);
                 check_range("V", v, 1, kMaxVocabulary);
                 check_range("first_row", first_row, 0, n);
                 check_range("rows", rows, 0, n - first_row);
                 if (rows > 1) check_range("stride_ln", stride, v, kMaxStride);
                 check_transform(softcap, temperature);
                 return LogitRows{floats("logits_ptr", logits, rows),
                                  stride,
                                  floats("bias_ptr", bias),
                                  longs("target_ptr", target, n),
                                  longs("order_ptr", order),
                                  longs("count_ptr", count, order != 0),
                                  first_row,
                                  rows,
                                  v,
                                  softcap,
                                  temperature};
             }),
             py::kw_only(), arg("logits_ptr"), arg("stride_ln"), arg("bias_ptr"), arg("target_ptr"),
             arg("order_ptr") = 0, arg("count_ptr") = 0, arg("first_row"), arg("rows"), arg("N"),
             arg("V"), arg("softcap") = 0.0f, arg("temperature") = 1.0f);
}

KnownRows kept_by(const LogitRows& rows, Address lse, Address nll) {
    return {floats("lse_ptr", lse, rows.count), nullptr, floats("nll_ptr", nll, rows.count),
            nullptr};
}

void define_rows(py::module_& module) {
    launches(
        module, "softmax_rows",
        "Losses and statistics [N], by position, of a buffer's rows. With mask [rows, "
        "ceil(V / 32)] also a bit for each entry that may be kept; columns popular [K] int64, "
        "ascending, then bound lse from below. Addresses of 0: not wanted.",
        [](const LogitRows& rows, Address loss, Address nll, Address lse, Address lse_low,
           Address entropy, Address correct, float label_smoothing, float z_loss, Address seed,
           Address popular, int popular_count, Address mask, float eps, Address stream) {
            check_number("label_smoothing", label_smoothing, 0, 1);
            check_range("K", popular_count, 0, kMaxInt - kTileN * kTileV);
            const bool sampled = mask != 0;
            if (sampled) check_eps(eps);
            const RowCandidates candidates{longs("seed_ptr", seed, sampled),
                                           longs("popular_ptr", popular, popular_count),
                                           popular_count, sampled ? eps : 1.0f,
                                           checked_pointer<uint32_t>("mask_ptr", mask, 0)};
            softmax_rows(rows, {label_smoothing, z_loss}, candidates,
                         row_results(rows.count, loss, nll, lse, lse_low, entropy, correct),
                         stream_of(stream));
        },
        arg("rows"), arg("loss_ptr"), arg("nll_ptr"), arg("lse_ptr"), arg("lse_low_ptr") = 0,
        arg("entropy_ptr") = 0, arg("correct_ptr") = 0, arg("label_smoothing") = 0.0f,
        arg("z_loss") = 0.0f, arg("seed_ptr") = 0, arg("popular_ptr") = 0, arg("K") = 0,
        arg("mask_ptr") = 0, arg("eps") = 1.0f);
    launches(
        module, "certificate_rows",
        "variance [N] of the sampled gradient of a buffer's rows, from lse [N]; with norms [V] of "
        "the rows of weight also hidden_variance [N]. Addresses of 0: not wanted.",
        [](const LogitRows& rows, Address lse, float eps, Address variance, Address norms,
           Address hidden_variance, Address stream) {
            certificate_rows(rows, certified(rows.count, lse, norms, hidden_variance, eps),
                             floats("variance_ptr", variance),
                             floats("hidden_variance_ptr", hidden_variance), stream_of(stream));
        },
        arg("rows"), arg("lse_ptr"), arg("eps"), arg("variance_ptr"), arg("norms_ptr") = 0,
        arg("hidden_variance_ptr") = 0);
    launches(
        module, "thin_rows",
        "Of the bits of mask leaves those of entries that are kept, by lse and nll [N], and counts "
        "them: counts [N] int64.",
        [](const LogitRows& rows, Address lse, Address nll, Address seed, float eps, Address mask,
           Address counts, Address stream) {
            check_eps(eps);
            thin_rows(rows, kept_by(rows, lse, nll), {longs("seed_ptr", seed, rows.count > 0), eps},
                      checked_pointer<uint32_t>("mask_ptr", mask, rows.count),
                      longs("counts_ptr", counts, rows.count), stream_of(stream));
        },
        arg("rows"), arg("lse_ptr"), arg("nll_ptr"), arg("seed_ptr"), arg("eps"), arg("mask_ptr"),
        arg("counts_ptr"));
    launches(
        module, "list_rows",
        "columns [capacity] int32 of the bits of mask, ascending, each row's from its offset on, "
        "and values [capacity]: dy for unit upstream gradient. A row that ends past the capacity "
        "has none.",
        [](const LogitRows& rows, Address lse, Address nll, Address seed, float eps, Address mask,
           Address offsets, Address columns, Address values, int64_t capacity, Address stream) {
            check_eps(eps);
            floats("values_ptr", values, capacity);
            list_rows(rows, kept_by(rows, lse, nll), {longs("seed_ptr", seed, rows.count > 0), eps},
                      checked_pointer<uint32_t>("mask_ptr", mask, rows.count),
                      lists(rows.count, offsets, columns, values, capacity), stream_of(stream));
        },
        arg("rows"), arg("lse_ptr"), arg("nll_ptr"), arg("seed_ptr"), arg("eps"), arg("mask_ptr"),
        arg("offsets_ptr"), arg("columns_ptr"), arg("values_ptr"), arg("capacity"));
    launches(
        module, "gradient_rows",
        "grad [N] times dy of a buffer's rows, of a type by number, into rows that are stride_dy "
        "elements apart, in the memory of their logits: a row begins where its logits do.",
        [](const LogitRows& rows, Address dy, int64_t stride_dy, int dtype, Address lse,
           Address lse_low, Address nll, Address grad, float label_smoothing, float z_loss,
           Address stream) {
            check_range("dtype", dtype, 0, 2);
            const auto type = static_cast<Type>(dtype);
            check_number("label_smoothing", label_smoothing, 0, 1);
            if (rows.count > 1) {
                const int64_t stride = rows.stride * (type == Type::kFloat32 ? 1 : 2);
                check_range("stride_dy", stride_dy, stride, stride);
            }
            void* into = output("dy_ptr", dy, rows.count, type, false).at;
            if (into != rows.logits) throw std::invalid_argument("dy_ptr: expected the logits'");
            KnownRows known = kept_by(rows, lse, nll);
            known.lse_low = floats("lse_low_ptr", lse_low);
            known.grad = floats("grad_ptr", grad, rows.count);
            gradient_rows(rows, known, {label_smoothing, z_loss}, type, into, stride_dy,
                          stream_of(stream));
        },
        arg("rows"), arg("dy_ptr"), arg("stride_dy"), arg("dtype"), arg("lse_ptr"),
        arg("lse_low_ptr") = 0, arg("nll_ptr"), arg("grad_ptr"), arg("label_smoothing") = 0.0f,
        arg("z_loss") = 0.0f);
}

// --- weights.cu ----------------------------------------------------------------------------------

void define_weights(py::module_& module) {
    module.attr("WEIGHT_TILE") = kWeightTile;
    launches(
        module, "balanced_weights",
        "Token and sequence weights, coefficients, and sums [tiles] of coefficient * loss, by "
        "tiles of WEIGHT_TILE positions; float32. loss [N] float32, labelled [N] bool, cu_seqlens "
        "[S + 1] int64. Windows are full ones, or clipped around their token; with geometric they "
        "average logarithms and documents take gamma. The token weight is 1, the confidence, or "
        "its ratio to the window's; with flat documents weigh 1. The coefficient is divided by the "
        "document's labels with by_sequence, with counts by the number of documents with labels "
        "(of labels without by_sequence), and by num_items [1] float32. Room to work in: before "
        "[N + 1], sequence [N] and ended [tiles] int32, values [N] and lowest [N] float32.",
        [](Address loss, Address labelled, Address cu_seqlens, int64_t n, int64_t s, int64_t window,
           float delta, double gamma, bool full_windows, bool geometric, bool confidence,
           bool ratio, bool flat, bool by_sequence, bool counts, Address num_items, Address before,
           Address sequence, Address values, Address lowest, Address ended, Address coefficient,
           Address token_weight, Address window_confidence, Address sequence_weight,
           Address sequence_confidence, Address sums, Address stream) {
            check_range("N", n, 0, kMaxRows);
            check_range("S", s, 0, kMaxRows);
            check_range("window", window, 1, std::numeric_limits<int64_t>::max());
            check_number("delta", delta, 0, kLargest);
            check_number("gamma", static_cast<float>(gamma), kSmallest, kLargest);
            const int64_t tiles = (n + kWeightTile - 1) / kWeightTile;
            const Documents documents{floats("loss_ptr", loss, n),
                                      checked_pointer<bool>("labelled_ptr", labelled, n),
                                      longs("cu_seqlens_ptr", cu_seqlens, s + 1), n, s};
            const WeightScheme scheme{window,    delta,      gamma, full_windows,
                                      geometric, confidence, ratio, flat};
            const WeightScratch scratch{
                checked_pointer<int>("before_ptr", before, n + 1),
                checked_pointer<int>("sequence_ptr", sequence, n), floats("values_ptr", values, n),
                floats("lowest_ptr", lowest, n), checked_pointer<int>("ended_ptr", ended, tiles)};
            const Weights weights{floats("coefficient_ptr", coefficient, n),
                                  floats("token_weight_ptr", token_weight, n),
                                  floats("window_confidence_ptr", window_confidence, n),
                                  floats("sequence_weight_ptr", sequence_weight, s),
                                  floats("sequence_confidence_ptr", sequence_confidence, s),
                                  floats("sums_ptr", sums, tiles)};
            balanced_weights(documents, scheme,
                             {by_sequence, counts, floats("num_items_ptr", num_items)}, scratch,
                             weights, stream_of(stream));
        },
        arg("loss_ptr"), arg("labelled_ptr"), arg("cu_seqlens_ptr"), arg("N"), arg("S"),
        arg("window"), arg("delta"), arg("gamma"), arg("full_windows"), arg("geometric"),
        arg("confidence"), arg("ratio"), arg("flat"), arg("by_sequence"), arg("counts"),
        arg("num_items_ptr") = 0, arg("before_ptr"), arg("sequence_ptr"), arg("values_ptr"),
        arg("lowest_ptr"), arg("ended_ptr"), arg("coefficient_ptr"), arg("token_weight_ptr"),
        arg("window_confidence_ptr"), arg("sequence_weight_ptr"), arg("sequence_confidence_ptr"),
        arg("sums_ptr"));
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    module.doc() =
        "CUDA kernels. Raw device addresses: the caller owns and sizes the memory, has made the "
        "device current, and keeps the memory alive until the stream is done with it.";
    define_problem(module);
    define_forward(module);
    define_certificate(module);
    define_gradients(module);
    define_lists(module);
    define_gathers(module);
    define_logit_rows(module);
    define_rows(module);
    define_weights(module);
#ifdef BFT_EMULATION
    bft::emulation::define_memory(module);
#endif
}
