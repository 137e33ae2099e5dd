"""Passes over rows of logits that lie in a buffer, where a GEMM left them: a block a row.

The buffer holds raw products in float32. Nothing waits for the device. For the arguments see
:class:`bft_kernels.backends.common.logit_rows.RowFunctions`.
"""

from __future__ import annotations

from torch import Tensor

from bft_kernels.backends.common.csr import offsets_of
from bft_kernels.backends.common.logit_rows import LogitRows
from bft_kernels.backends.common.rows import ROW_RESULTS
from bft_kernels.backends.cuda.native import TYPES, _cuda, launch, out, ptr


def _native(rows: LogitRows) -> _cuda.LogitRows:
    """What kernels take. It keeps no tensor alive."""
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
    """Losses and statistics of the rows, and the bits of what may be kept of them."""
    launch(
        _cuda.softmax_rows,
        {"seed": seed, "popular": popular},
        {"mask": mask, **{name: results[name] for name in ROW_RESULTS}},
        rows=_native(rows),
        label_smoothing=rows.settings.label_smoothing,
        z_loss=rows.settings.z_loss,
        K=0 if popular is None else popular.numel(),
        eps=rows.settings.eps,
    )


def certificate_rows(rows: LogitRows, norms: Tensor | None, results: dict[str, Tensor]) -> None:
    """The certificate of the rows, once their lse is known."""
    reads = {"lse": results["lse"], "norms": norms}
    writes = {name: results[name] for name in ("variance", "hidden_variance")}
    launch(_cuda.certificate_rows, reads, writes, rows=_native(rows), eps=rows.settings.eps)


def list_rows(rows: LogitRows, mask: Tensor, seed: Tensor, results: dict[str, Tensor]) -> None:
    """Appends what is kept of the set bits to ``columns`` and ``values``."""
    of = {"rows": _native(rows), "eps": rows.settings.eps}
    known = {"lse": results["lse"], "nll": results["nll"], "seed": seed}
    launch(_cuda.thin_rows, known, {"mask": mask, "counts": results["counts"]}, **of)
    offsets_of(results["counts"], out=results["offsets"])
    reads = {**known, "mask": mask, "offsets": results["offsets"]}
    writes = {name: results[name] for name in ("columns", "values")}
    launch(_cuda.list_rows, reads, writes, capacity=results["columns"].numel(), **of)


def gradient_rows(
    rows: LogitRows,
    dy: Tensor,  # [n, V], in the memory of the logits; a row begins where its logits do
    lse: Tensor,  # [N]
    lse_low: Tensor,  # [N] or [0]
    nll: Tensor,  # [N]
    coefficient: Tensor,  # [N] float32
) -> None:
    """``coefficient * dy`` of the rows takes the place of their logits, in the type of ``dy``."""
    launch(
        _cuda.gradient_rows,
        {"lse": lse, "lse_low": lse_low, "nll": nll, "grad": coefficient},
        {"dy": dy},
        rows=_native(rows),
        stride_dy=dy.stride(0),
        dtype=TYPES[dy.dtype],
        label_smoothing=rows.settings.label_smoothing,
        z_loss=rows.settings.z_loss,
    )
