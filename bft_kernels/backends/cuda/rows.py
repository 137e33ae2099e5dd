"""Passes over rows of logits that a GEMM left in a buffer; a thread block takes a row.

The buffer holds raw products in float32. Nothing waits for the device. For the arguments see
:class:`bft_kernels.backends.common.logit_rows.RowFunctions`.
"""

from __future__ import annotations

from torch import Tensor

from bft_kernels.backends.common.csr import offsets_of
from bft_kernels.backends.common.logit_rows import LogitRows
from bft_kernels.backends.cuda.native import TYPES, _cuda, out, ptr, stream


def _native(rows: LogitRows) -> _cuda.LogitRows:
    """The rows as an argument of kernels. It keeps no tensor alive."""
    return _cuda.LogitRows(
        logits_ptr=out(rows.logits),
        stride_ln=rows.logits.stride(0),
        bias_ptr=ptr(rows.bias),
        target_ptr=ptr(rows.target),
        order_ptr=ptr(rows.order),
        count_ptr=ptr(rows.count),
        first_row=rows.first_row,
        rows=rows.logits.shape[0],
        N=rows.target.shape[0],
        V=rows.logits.shape[1],
        softcap=rows.settings.softcap or 0.0,
        temperature=rows.settings.temperature,
    )


def softmax_rows(
    rows: LogitRows,
    results: dict[str, Tensor],
    *,
    seed: Tensor | None = None,
    popular: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Losses and statistics of the rows, and a bit for each entry that may be kept."""
    _cuda.softmax_rows(
        rows=_native(rows),
        loss_ptr=out(results["loss"]),
        nll_ptr=out(results["nll"]),
        lse_ptr=out(results["lse"]),
        lse_low_ptr=out(results["lse_low"]),
        entropy_ptr=out(results["entropy"]),
        correct_ptr=out(results["correct"]),
        label_smoothing=rows.settings.label_smoothing,
        z_loss=rows.settings.z_loss,
        seed_ptr=ptr(seed),
        popular_ptr=ptr(popular),
        K=0 if popular is None else popular.numel(),
        mask_ptr=out(mask),
        eps=rows.settings.eps,
        stream=stream(),
    )


def certificate_rows(rows: LogitRows, norms: Tensor | None, results: dict[str, Tensor]) -> None:
    """The certificate of the rows, once their lse is known."""
    _cuda.certificate_rows(
        rows=_native(rows),
        lse_ptr=ptr(results["lse"]),
        eps=rows.settings.eps,
        variance_ptr=out(results["variance"]),
        norms_ptr=ptr(norms),
        hidden_variance_ptr=out(results["hidden_variance"]),
        stream=stream(),
    )


def list_rows(rows: LogitRows, mask: Tensor, seed: Tensor, results: dict[str, Tensor]) -> None:
    """Appends the kept entries among the set bits to ``columns`` and ``values``."""
    native, eps = _native(rows), rows.settings.eps
    lse, nll, counts = results["lse"], results["nll"], results["counts"]
    _cuda.thin_rows(
        rows=native,
        lse_ptr=ptr(lse),
        nll_ptr=ptr(nll),
        seed_ptr=ptr(seed),
        eps=eps,
        mask_ptr=out(mask),
        counts_ptr=out(counts),
        stream=stream(),
    )
    offsets_of(counts, out=results["offsets"])
    _cuda.list_rows(
        rows=native,
        lse_ptr=ptr(lse),
        nll_ptr=ptr(nll),
        seed_ptr=ptr(seed),
        eps=eps,
        mask_ptr=ptr(mask),
        offsets_ptr=ptr(results["offsets"]),
        columns_ptr=out(results["columns"]),
        values_ptr=out(results["values"]),
        capacity=results["columns"].numel(),
        stream=stream(),
    )


def gradient_rows(
    rows: LogitRows,
    dy: Tensor,  # [n, V], in the memory of the logits; a row begins where its logits do
    lse: Tensor,  # [n]
    lse_low: Tensor,  # [n]
    nll: Tensor,  # [n]
    coefficient: Tensor,  # [n] float32
) -> None:
    """``coefficient * dy`` of the rows takes the place of their logits, in the type of ``dy``."""
    _cuda.gradient_rows(
        rows=_native(rows),
        dy_ptr=out(dy),
        stride_dy=dy.stride(0),
        dtype=TYPES[dy.dtype],
        lse_ptr=ptr(lse),
        lse_low_ptr=ptr(lse_low),
        nll_ptr=ptr(nll),
        grad_ptr=ptr(coefficient),
        label_smoothing=rows.settings.label_smoothing,
        z_loss=rows.settings.z_loss,
        stream=stream(),
    )
