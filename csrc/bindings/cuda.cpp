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
using bft::check_range, bft::Given;
using py::arg;
using namespace bft::cuda;

namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();  // also the largest grid
// Numbers of rows and columns are 32-bit in kernels, those of the last tile included.
constexpr int64_t kMaxRows = kMaxInt - 1024, kMaxVocabulary = kMaxRows;
constexpr int64_t kMaxStride = int64_t{1} << 48;
constexpr float kSmallest = std::numeric_limits<float>::min();
constexpr float kLargest = std::numeric_limits<float>::max();

// Binds a launch that kernels.h describes: take_and_launch(Given&). Names of arrays are those of
// kernels.h and _ptr; an array that is not wanted may be 0 or left out.
template <typename Launch>
void launches(py::module_& module, const char* name, Launch take_and_launch) {
    module.def(
        name,
        [take_and_launch](const py::kwargs& named) {
            Given given(named);
            take_and_launch(given);
        },
        "See csrc/cuda/kernels.h. All by name, and the stream as a number.");
}

// Binds a launch whose first argument is a `problem` or `rows`: take_and_launch(Given&, const Of&).
template <typename Of, typename Launch>
void launches_of(py::module_& module, const char* name, Launch take_and_launch) {
    launches(module, name, [take_and_launch](Given& given) {
        const char* of = std::is_same_v<Of, Problem> ? "problem" : "rows";
        take_and_launch(given, given.get<const Of&>(of));
    });
}

// Binds a class of kernels.h that launches take as that argument: take(Given&) makes one.
template <typename Take>
void takes(py::module_& module, const char* name, Take take) {
    using Made = decltype(take(std::declval<Given&>()));
    // The emulated module may be loaded beside this one.
    py::class_<Made>(module, name, "See csrc/cuda/kernels.h.", py::module_local())
        .def(py::init([take](const py::kwargs& named) {
            Given given(named);
            Made made = take(given);
            given.finish();
            return made;
        }));
}

// --- what several launches take ------------------------------------------------------------------

Type type_of(Given& given) { return static_cast<Type>(given.number("dtype", 0, 2)); }

// An array of the operands' type, or, if is_float32, of float32.
Output output(Given& given, const char* name, int64_t elements, Type type, bool is_float32) {
    if (is_float32 || type == Type::kFloat32) return {given.floats(name, elements), true};
    return {given.array<uint16_t>(name, elements), false};
}
Output gradient(Given& given, const char* name, int64_t elements, Type type) {
    return output(given, name, elements, type, given.get("is_float32", false));
}

// It is read only if something is sampled.
float eps_of(Given& given, bool sampled = true) {
    return sampled ? given.real("eps", 0x1p-30f, 1, 0) : given.get("eps", 1.0f);
}

float softcap_of(Given& given) { return given.real("softcap", 0, kLargest, 0); }
float temperature_of(Given& given) { return given.real("temperature", kSmallest, kLargest, 1); }

LossKind loss_of(Given& given) {
    return {given.real("label_smoothing", 0, 1, 0), given.get("z_loss", 0.0f)};
}

RowRange range_of(Given& given, const Problem& problem) {
    const int64_t first = given.number("first_row", 0, problem.rows);
    return {first, given.number("rows", 0, problem.rows - first)};
}

RowResults results_of(Given& given, int64_t rows) {
    const RowResults results{given.floats("loss_ptr", rows), given.floats("nll_ptr", rows),
                             given.floats("lse_ptr", rows),  given.floats("lse_low_ptr"),
                             given.floats("entropy_ptr"),    given.array<bool>("correct_ptr")};
    if ((results.entropy != nullptr) != (results.correct != nullptr)) {
        throw std::invalid_argument("entropy_ptr and correct_ptr: got one of them");
    }
    return results;
}

// What the forward stored for each row, and the upstream gradient.
KnownRows known_of(Given& given, int64_t rows, bool with_grad = true) {
    return {given.floats("lse_ptr", rows), given.floats("lse_low_ptr"),
            given.floats("nll_ptr", rows), given.floats("grad_ptr", with_grad ? rows : 0)};
}

Sample sample_of(Given& given, int64_t rows) {
    return {given.longs("seed_ptr", rows > 0), eps_of(given)};
}

// norms and hidden_variance are given together, or neither is.
std::pair<Certified, float*> certified(Given& given, int64_t rows) {
    const Certified known{given.floats("lse_ptr", rows), given.floats("norms_ptr"), eps_of(given)};
    float* hidden_variance = given.floats("hidden_variance_ptr");
    if (rows > 0 && (known.norms != nullptr) != (hidden_variance != nullptr)) {
        throw std::invalid_argument("norms_ptr and hidden_variance_ptr: got one of them");
    }
    return {known, hidden_variance};
}

Lists lists_of(Given& given, int64_t rows, bool with_values = false) {
    const int64_t capacity = given.number("capacity", 0, kMaxStride);
    return {given.longs("offsets_ptr", rows + 1), given.array<int32_t>("columns_ptr", capacity),
            given.floats("values_ptr", with_values ? capacity : 0), capacity};
}

uint32_t* mask_of(Given& given, const Problem& problem, int64_t rows) {
    return given.array<uint32_t>("mask_ptr", rows * ((problem.vocabulary + 31) / 32));
}

int64_t tiles_of(int64_t count) { return (count + kTileN - 1) / kTileN; }
static_assert(kTileN == kTileV);

Splits splits_of(Given& given, const Problem& problem, int64_t rows) {
    const auto columns = static_cast<int>(given.number("split_columns", 1, kMaxInt));
    check_range("split_columns % 128", columns % kTileV, 0, 0);
    const int64_t needed = (problem.vocabulary + columns - 1) / columns;
    const auto count = static_cast<int>(given.number("splits", needed, needed));
    check_range("splits * row blocks", count * tiles_of(rows), 0, kMaxInt);
    return {count, columns};
}

// `other`: the size of the grid's other axis, in rows of the problem or elements of the width.
GradientBlock block_of(Given& given, const Problem& problem, int64_t other) {
    const auto first = static_cast<int>(given.number("first_column", 0, problem.vocabulary - 1));
    const auto columns = static_cast<int>(given.number("columns", 1, problem.vocabulary - first));
    const int64_t stride = given.number("stride_dy", columns, kMaxInt);
    check_range("stride_dy % 128", stride % kTileV, 0, 0);
    check_range("blocks", tiles_of(columns) * tiles_of(other), 0, kMaxInt);
    void* dy = given.array<uint16_t>("dy_ptr", problem.rows * stride);
    check_range("dy_ptr % 16", static_cast<int64_t>(reinterpret_cast<uintptr_t>(dy) % 16), 0, 0);
    return {first, columns, dy, stride};
}

// --- the forward ---------------------------------------------------------------------------------

void define_forward(py::module_& module) {
    takes(module, "Problem", [](Given& given) {
        const int64_t n = given.number("N", 0, kMaxRows);
        const int64_t v = given.number("V", 1, kMaxVocabulary);
        const Type type = type_of(given);
        // Rows have strides: their number says only whether there must be an address.
        return Problem{type,
                       output(given, "hidden_ptr", n, type, false).at,
                       output(given, "weight_ptr", v, type, false).at,
                       given.floats("bias_ptr"),
                       given.longs("target_ptr", n),
                       given.longs("order_ptr", n),
                       given.longs("count_ptr", 1),
                       n,
                       v,
                       given.number("D", 1, int64_t{1} << 30),
                       given.number("stride_hn", -kMaxStride, kMaxStride),
                       given.number("stride_wv", -kMaxStride, kMaxStride),
                       softcap_of(given),
                       temperature_of(given)};
    });

    module.attr("ROUNDING") = kRounding;
    module.attr("EXP_MARGIN") = kExpMargin;
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
    launches_of<Problem>(module, "linear_nll_forward", [](Given& given, const Problem& problem) {
        const RowRange range = range_of(given, problem);
        const Splits splits = splits_of(given, problem, range.count);
        uint32_t* mask = given.array<uint32_t>("mask_ptr");
        const bool sampled = mask != nullptr;
        const Candidates candidates{given.longs("seed_ptr", sampled),
                                    given.floats("lse_bound_ptr", sampled ? problem.rows : 0),
                                    eps_of(given, sampled), mask};
        given.launch(linear_nll_forward, problem, range, splits,
                     given.floats("sums_ptr", kSums * splits.count * range.count), candidates,
                     loss_of(given), results_of(given, problem.rows));
    });
    launches_of<Problem>(module, "target_bound", [](Given& given, const Problem& problem) {
        given.launch(target_bound, problem, given.floats("lse_bound_ptr", problem.rows));
    });
    launches_of<Problem>(module, "certificate", [](Given& given, const Problem& problem) {
        const RowRange range = range_of(given, problem);
        const Splits splits = splits_of(given, problem, range.count);
        const auto [known, hidden_variance] = certified(given, problem.rows);
        const int64_t planes = known.norms != nullptr ? 2 : 1;
        given.launch(certificate, problem, range, splits, known,
                     given.floats("sums_ptr", planes * splits.count * range.count),
                     given.floats("variance_ptr", problem.rows), hidden_variance);
    });
    launches_of<Problem>(module, "squared_norms", [](Given& given, const Problem& problem) {
        given.launch(squared_norms, problem, given.floats("norms_ptr", problem.vocabulary));
    });
}

// --- recompute.cu --------------------------------------------------------------------------------

void define_gradients(py::module_& module) {
    launches_of<Problem>(module, "logit_gradient", [](Given& given, const Problem& problem) {
        const auto block = block_of(given, problem, problem.rows);
        const int64_t* seed = given.longs("seed_ptr");
        float* grad_bias = given.floats("grad_bias_ptr");
        const int64_t sums = grad_bias == nullptr ? 0 : tiles_of(problem.rows) * block.stride;
        given.launch(logit_gradient, problem, known_of(given, problem.rows),
                     GradientKind{loss_of(given), seed, eps_of(given, seed != nullptr)}, block,
                     given.floats("bias_sums_ptr", sums), grad_bias, given.floats("scale_ptr"));
    });
    launches_of<Problem>(module, "hidden_gradient", [](Given& given, const Problem& problem) {
        const auto block = block_of(given, problem, problem.depth);
        const int64_t elements = problem.rows * problem.depth;
        const bool whole = block.columns == problem.vocabulary;
        given.launch(
            hidden_gradient, problem, block, given.floats("sums_ptr", whole ? 0 : elements),
            gradient(given, "grad_hidden_ptr", elements, problem.type), given.floats("scale_ptr"));
    });
    launches_of<Problem>(module, "weight_gradient", [](Given& given, const Problem& problem) {
        const auto block = block_of(given, problem, problem.depth);
        const int64_t stride = given.number("stride_gv", problem.depth, kMaxStride);
        given.launch(weight_gradient, problem, block,
                     gradient(given, "grad_weight_ptr", problem.vocabulary, problem.type), stride,
                     given.get<bool>("adds"), given.floats("scale_ptr"));
    });
}

// --- lists.cu, spmm.cu ---------------------------------------------------------------------------

// CUB numbers the entries that it sorts with 32 bits.
int64_t entries_of(Given& given) { return given.number("E", 0, kMaxInt); }
int64_t vocabulary_of(Given& given) { return given.number("V", 1, kMaxVocabulary); }

void define_lists(py::module_& module) {
    launches_of<Problem>(module, "count_entries", [](Given& given, const Problem& problem) {
        const RowRange range = range_of(given, problem);
        given.launch(count_entries, problem, range, mask_of(given, problem, range.count),
                     given.longs("counts_ptr", problem.rows));
    });
    launches_of<Problem>(module, "list_entries", [](Given& given, const Problem& problem) {
        const RowRange range = range_of(given, problem);
        given.launch(list_entries, problem, range, mask_of(given, problem, range.count),
                     lists_of(given, problem.rows));
    });
    module.def(
        "sort_bytes",
        [](int64_t entries, int64_t v) {
            check_range("E", entries, 0, kMaxInt);
            check_range("V", v, 1, kMaxVocabulary);
            return sort_bytes(entries, v);
        },
        "Bytes that sort_entries works in.", arg("E"), arg("V"));
    launches(module, "sort_entries", [](Given& given) {
        const int64_t entries = entries_of(given), wanted = entries > 0;
        const int64_t bytes = given.number("temporary_bytes", wanted, kMaxStride);
        const Temporary temporary{given.array<char>("temporary_ptr", wanted * bytes),
                                  static_cast<size_t>(bytes)};
        given.launch(sort_entries, given.array<int32_t>("keys_ptr", entries),
                     given.array<uint64_t>("packed_ptr", entries), entries, vocabulary_of(given),
                     given.array<int32_t>("sorted_keys_ptr", entries),
                     given.array<uint64_t>("sorted_packed_ptr", entries), temporary);
    });
    launches(module, "column_starts", [](Given& given) {
        const int64_t entries = entries_of(given), v = vocabulary_of(given);
        given.launch(column_starts, given.array<int32_t>("sorted_keys_ptr", entries), entries, v,
                     given.longs("starts_ptr", v + 1));
    });

    module.attr("SPMM_MAX_WIDTH") = kSpmmMaxWidth;
    launches_of<Problem>(module, "spmm_hidden", [](Given& given, const Problem& problem) {
        check_range("D", problem.depth, 1, kSpmmMaxWidth);
        const Lists lists = lists_of(given, problem.rows);
        const KeptEntries kept{given.array<int32_t>("keys_ptr"),
                               given.array<uint64_t>("packed_ptr")};
        if (lists.capacity > 0 && (kept.keys != nullptr) != (kept.packed != nullptr)) {
            throw std::invalid_argument("keys_ptr and packed_ptr: got one of them");
        }
        given.launch(spmm_hidden, problem, known_of(given, problem.rows),
                     sample_of(given, problem.rows), lists, kept,
                     gradient(given, "grad_hidden_ptr", 0, problem.type));
    });
    launches_of<Problem>(module, "spmm_weight", [](Given& given, const Problem& problem) {
        check_range("D", problem.depth, 1, kSpmmMaxWidth);
        const Output weight = gradient(given, "grad_weight_ptr", 0, problem.type);
        const auto stride = given.get<int64_t>("stride_gv", 0);
        if (weight.at) check_range("stride_gv", stride, problem.depth, kMaxStride);
        given.launch(spmm_weight, problem, given.longs("starts_ptr", problem.vocabulary + 1),
                     given.array<uint64_t>("packed_ptr"),
                     WeightGradient{weight, stride, given.get("adds", false),
                                    given.floats("grad_bias_ptr")});
    });
}

// --- rows.cu -------------------------------------------------------------------------------------

void define_rows(py::module_& module) {
    takes(module, "LogitRows", [](Given& given) {
        const int64_t n = given.number("N", 0, kMaxRows);
        const int64_t v = given.number("V", 1, kMaxVocabulary);
        const int64_t first = given.number("first_row", 0, n);
        const int64_t rows = given.number("rows", 0, n - first);
        const auto stride = given.get<int64_t>("stride_ln");
        if (rows > 1) check_range("stride_ln", stride, v, kMaxStride);
        const int64_t* order = given.longs("order_ptr");
        return LogitRows{given.floats("logits_ptr", rows),
                         stride,
                         given.floats("bias_ptr"),
                         given.longs("target_ptr", n),
                         order,
                         given.longs("count_ptr", order != nullptr),
                         first,
                         rows,
                         v,
                         softcap_of(given),
                         temperature_of(given)};
    });
    launches_of<LogitRows>(module, "softmax_rows", [](Given& given, const LogitRows& rows) {
        const auto count = given.get<int64_t>("K", 0);
        check_range("K", count, 0, kMaxInt - kTileN * kTileV);
        uint32_t* mask = given.array<uint32_t>("mask_ptr");
        const RowCandidates candidates{given.longs("seed_ptr", mask != nullptr),
                                       given.longs("popular_ptr", count), static_cast<int>(count),
                                       eps_of(given, mask != nullptr), mask};
        given.launch(softmax_rows, rows, loss_of(given), candidates, results_of(given, rows.count));
    });
    launches_of<LogitRows>(module, "certificate_rows", [](Given& given, const LogitRows& rows) {
        const auto [known, hidden_variance] = certified(given, rows.count);
        given.launch(certificate_rows, rows, known, given.floats("variance_ptr"), hidden_variance);
    });
    launches_of<LogitRows>(module, "thin_rows", [](Given& given, const LogitRows& rows) {
        given.launch(thin_rows, rows, known_of(given, rows.count, false),
                     sample_of(given, rows.count), given.array<uint32_t>("mask_ptr", rows.count),
                     given.longs("counts_ptr", rows.count));
    });
    launches_of<LogitRows>(module, "list_rows", [](Given& given, const LogitRows& rows) {
        given.launch(list_rows, rows, known_of(given, rows.count, false),
                     sample_of(given, rows.count), given.array<uint32_t>("mask_ptr", rows.count),
                     lists_of(given, rows.count, true));
    });
    launches_of<LogitRows>(module, "gradient_rows", [](Given& given, const LogitRows& rows) {
        const Type type = type_of(given);
        const auto stride = given.get<int64_t>("stride_dy");
        const int64_t needed = rows.stride * (type == Type::kFloat32 ? 1 : 2);
        if (rows.count > 1) check_range("stride_dy", stride, needed, needed);
        void* dy = output(given, "dy_ptr", rows.count, type, false).at;
        if (dy != rows.logits) throw std::invalid_argument("dy_ptr: expected the logits'");
        given.launch(gradient_rows, rows, known_of(given, rows.count), loss_of(given), type, dy,
                     stride);
    });
}

// --- scale.cu, weighting.cu ----------------------------------------------------------------------

void define_weighting(py::module_& module) {
    module.attr("WEIGHT_TILE") = kWeightTile;
    launches(module, "scale", [](Given& given) {
        const Type type = type_of(given);
        const int64_t count = given.number("count", 0, kMaxInt * kTileN);
        given.launch(scale, type, output(given, "x_ptr", count, type, false).at, count,
                     given.floats("factor_ptr", 1));
    });
    launches(module, "balanced_weighting", [](Given& given) {
        const int64_t n = given.number("N", 0, kMaxRows), s = given.number("S", 0, kMaxRows);
        const int64_t tiles = (n + kWeightTile - 1) / kWeightTile;
        const auto flag = [&](const char* name) { return given.get<bool>(name); };
        const Documents documents{given.floats("loss_ptr", n), given.array<bool>("labelled_ptr", n),
                                  given.longs("cu_seqlens_ptr", s + 1), n, s};
        const auto gamma = given.get<double>("gamma");
        bft::check_number("gamma", static_cast<float>(gamma), kSmallest, kLargest);
        const WeightingScheme scheme{given.number("window", 1, std::numeric_limits<int64_t>::max()),
                                     given.real("delta", 0, kLargest, -1),
                                     gamma,
                                     flag("full_windows"),
                                     flag("geometric"),
                                     flag("confidence"),
                                     flag("ratio"),
                                     flag("flat")};
        const Normalizer normalizer{flag("by_sequence"), flag("counts"),
                                    given.floats("num_items_ptr")};
        const WeightingScratch scratch{given.array<int>("before_ptr", n + 1),
                                       given.array<int>("sequence_ptr", n),
                                       given.floats("values_ptr", n), given.floats("lowest_ptr", n),
                                       given.array<int>("ended_ptr", tiles)};
        const Weighting weighting{
            given.floats("coefficient_ptr", n),         given.floats("token_weight_ptr", n),
            given.floats("window_confidence_ptr", n),   given.floats("sequence_weight_ptr", s),
            given.floats("sequence_confidence_ptr", s), given.floats("sums_ptr", tiles)};
        given.launch(balanced_weighting, documents, scheme, normalizer, scratch, weighting);
    });
}

}  // namespace

PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    module.doc() =
        "CUDA kernels. Raw device addresses: the caller owns and sizes the memory, has made the "
        "device current, and keeps the memory alive until the stream is done with it.";
    define_forward(module);
    define_gradients(module);
    define_lists(module);
    define_rows(module);
    define_weighting(module);
#ifdef BFT_EMULATION
    bft::emulation::define_memory(module);
#endif
}
