"""What the CUDA module refuses before anything is launched: each wrong argument by its name."""

import math

import pytest


def at(*names):
    """Addresses, which no kernel here follows."""
    return {f"{name}_ptr": 16 for name in names}


OPERANDS = at("hidden", "weight", "target", "order", "count")
OPERANDS |= {"bias_ptr": 0, "N": 4, "V": 40, "D": 8, "dtype": 0, "stride_hn": 8, "stride_wv": 8}
ROWS = at("logits", "target", "order", "count")
ROWS |= {"bias_ptr": 0, "stride_ln": 40, "first_row": 1, "rows": 3, "N": 4, "V": 40}
KNOWN = at("lse", "nll", "seed", "mask") | {"eps": 0.5}
SORTED = at("keys", "packed", "sorted_keys", "sorted_packed", "temporary")
WEIGHTS = at("loss", "labelled", "cu_seqlens", "before", "sequence", "values", "lowest", "ended")
WEIGHTS |= at("coefficient", "token_weight", "window_confidence", "sequence_weight")
WEIGHTS |= at("sequence_confidence", "sums")
FLAGS = ["full_windows", "geometric", "confidence", "ratio", "flat", "by_sequence", "counts"]
ONE_ROW = {"first_row": 1, "rows": 3}

# Arguments that a function takes, and those that it refuses, one at a time.
CASES = {
    "Problem": (
        OPERANDS,
        {"V": 0, "D": 0, "N": -1, "dtype": 3, "temperature": 0.0, "softcap": math.nan}
        | {"weight_ptr": 3, "count_ptr": 0},
    ),
    "LogitRows": (
        ROWS,
        {"N": 3, "V": 0, "first_row": 2, "stride_ln": 39, "logits_ptr": 0, "target_ptr": 2}
        | {"count_ptr": 0, "softcap": math.nan, "temperature": 0.0, "order_ptr": 4},
    ),
    "forward_splits": ({"rows": 4, "V": 4, "processors": 1}, {"processors": 0}),
    "certificate": (
        at("sums", "lse", "variance")
        | {"problem": 0, "first_row": 0, "rows": 4, "splits": 1, "split_columns": 128, "eps": 0.5},
        {"rows": 5, "first_row": 1, "splits": 2, "split_columns": 127, "eps": 0.0, "sums_ptr": 0}
        | {"lse_ptr": 2, "variance_ptr": 0, "norms_ptr": 16, "hidden_variance_ptr": 16},
    ),
    "squared_norms": ({"problem": 0, "norms_ptr": 16}, {"norms_ptr": 0}),
    "softmax_rows": (
        {"rows": 0, "K": 2} | KNOWN | at("loss", "entropy", "correct", "popular"),
        {"loss_ptr": 0, "nll_ptr": 0, "lse_ptr": 2, "seed_ptr": 0, "eps": 0.0, "entropy_ptr": 0}
        | {"popular_ptr": 0, "K": -1, "label_smoothing": 2.0, "mask_ptr": 2},
    ),
    "thin_rows": (
        {"rows": 0} | KNOWN | at("counts"),
        {"eps": 2.0, "mask_ptr": 0, "counts_ptr": 0, "seed_ptr": 0, "lse_ptr": 0},
    ),
    "list_rows": (
        {"rows": 0, "capacity": 4} | KNOWN | at("offsets", "columns", "values"),
        {"eps": 2.0, "offsets_ptr": 0, "columns_ptr": 2, "values_ptr": 0, "capacity": -1}
        | {"nll_ptr": 0},
    ),
    "gradient_rows": (
        {"rows": 0, "stride_dy": 80, "dtype": 1} | at("dy", "grad", "lse", "nll"),
        {"dtype": 3, "stride_dy": 40, "dy_ptr": 32, "grad_ptr": 0, "lse_ptr": 0, "lse_low_ptr": 2}
        | {"label_smoothing": -1.0},
    ),
    "certificate_rows": (
        {"rows": 0, "eps": 0.5} | at("lse", "variance", "norms", "hidden_variance"),
        {"eps": 0.0, "lse_ptr": 0, "variance_ptr": 2, "norms_ptr": 0},
    ),
    "count_entries": ({"problem": 0} | ONE_ROW | at("mask", "counts"), {"rows": 4}),
    "list_entries": (
        {"problem": 0, "capacity": 4} | ONE_ROW | at("mask", "offsets", "columns"),
        {"first_row": 5},
    ),
    "sort_entries": (
        SORTED | {"E": 4, "V": 9, "temporary_bytes": 99},
        {"temporary_bytes": 0},
    ),
    "sort_bytes": ({"E": 4, "V": 40}, {"E": 2**31}),
    "spmm_hidden": (
        {"problem": 0, "capacity": 4, "eps": 0.5}
        | at("lse", "nll", "grad", "seed", "offsets", "columns", "keys", "packed"),
        {"eps": 0.0, "keys_ptr": 0},
    ),
    "spmm_weight": (
        {"problem": 0, "stride_gv": 8, "adds": False} | at("starts", "packed", "grad_weight"),
        {"stride_gv": 7},
    ),
    "balanced_weighting": (
        WEIGHTS
        | dict.fromkeys(FLAGS, False)
        | {"N": 4, "S": 2, "window": 3, "delta": 1e-8, "gamma": 1.0},
        dict.fromkeys(WEIGHTS, 0)
        | {"N": -1, "S": 2**31, "window": 0, "delta": math.nan, "gamma": 0.0, "num_items_ptr": 2},
    ),
}
LAUNCHES_NOTHING = ("Problem", "LogitRows", "forward_splits", "sort_bytes")
# The message names another argument, which does not fit this one any more.
SAID = {("LogitRows", "N"): "rows", ("LogitRows", "first_row"): "rows"}
SAID |= {("certificate", "first_row"): "rows"}


@pytest.mark.parametrize("function", CASES)
def test_wrong_arguments_are_named(emulated, function):
    good, wrong = CASES[function]
    good = good if function in LAUNCHES_NOTHING else good | {"stream": 0}
    if "problem" in good:
        good["problem"] = emulated.Problem(**OPERANDS)
    elif good.get("rows") == 0:
        good["rows"] = emulated.LogitRows(**ROWS)
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=SAID.get((function, name), name)):
            getattr(emulated, function)(**{**good, name: value})


def test_rows_wider_than_a_thread_keeps_are_refused(emulated):
    wide = OPERANDS | dict.fromkeys(("D", "stride_hn", "stride_wv"), emulated.SPMM_MAX_WIDTH + 1)
    with pytest.raises(ValueError, match="D: got"):
        emulated.spmm_weight(problem=emulated.Problem(**wide), **at("starts", "packed"), stream=0)
