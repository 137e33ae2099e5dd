"""Passes over rows of logits that lie in a buffer, where a GEMM left them: a block a row.

The buffer holds raw products in float32. The rows are those of ``order`` from ``first_row`` on, of
which ``count``, on the device, count; or rows as they come. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bft_kernels.backends.common.csr import offsets_of
from bft_kernels.backends.cuda.native import TYPES, _cuda, out, ptr, stream


@dataclass(frozen=True)
class LogitRows:
    """Raw products, and the rows that they are of."""

    logits: Tensor  # [n, V] float32, a row contiguous
    target: Tensor  # [N] int64, by position
    bias: Tensor | None = None  # [V] float32
    first_row: int = 0  # the place of the buffer's first row among all
    order: Tensor | None = None  # [N] int64, positions of the rows; as they come without it
    count: Tensor | None = None  # [1] int64, how many of order count
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def native(self) -> _cuda.LogitRows:
        """What kernels take. It keeps no tensor alive."""
        return _cuda.LogitRows(
            logits_ptr=out(self.logits),
            stride_ln=self.logits.stride(0),
            bias_ptr=ptr(self.bias),
            target_ptr=ptr(self.target),
            order_ptr=ptr(self.order),
            count_ptr=ptr(self.count),
            first_row=self.first_row,
            rows=self.logits.shape[0],
            N=self.target.shape[0],
            V=self.logits.shape[1],
            softcap=self.softcap or 0.0,
            temperature=self.temperature,
        )


def softmax_rows(
    rows: LogitRows,
    results: dict[str, Tensor],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    seed: Tensor | None = None,
    popular: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1.0,
) -> None:
    """Losses and statistics of the rows, and the bits of what may be kept of them.

    Args:
        rows: of the buffer.
        results: ``nll``, ``loss``, ``lse``, ``lse_low``, ``entropy``, ``correct``; ``[N]`` each,
            or ``[0]``, of which the first three are wanted.
        label_smoothing, z_loss: of the loss.
        seed: ``[]`` int64, for ``mask``.
        popular: ``[K]`` int64, for ``mask``: ascending columns that bound lse from below.
        mask: ``[n, ceil(V / 32)]`` int32.
        eps: for ``mask``.
    """
    _cuda.softmax_rows(
        rows=rows.native,
        loss_ptr=out(results["loss"]),
        nll_ptr=out(results["nll"]),
        lse_ptr=out(results["lse"]),
        lse_low_ptr=out(results["lse_low"]),
        entropy_ptr=out(results["entropy"]),
        correct_ptr=out(results["correct"]),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        seed_ptr=ptr(seed),
        popular_ptr=ptr(popular),
        K=0 if popular is None else popular.numel(),
        mask_ptr=out(mask),
        eps=eps,
        stream=stream(),
    )


def certificate_rows(
    rows: LogitRows,
    lse: Tensor,  # [N]
    norms: Tensor | None,  # [V]
    variance: Tensor,  # [N] or [0]
    hidden_variance: Tensor,  # [N] or [0]
    *,
    eps: float,
) -> None:
    """The certificate of the rows, once their lse is known."""
    _cuda.certificate_rows(
        rows=rows.native,
        lse_ptr=ptr(lse),
        eps=eps,
        variance_ptr=out(variance),
        norms_ptr=ptr(norms),
        hidden_variance_ptr=out(hidden_variance),
        stream=stream(),
    )


def list_rows(
    rows: LogitRows,
    mask: Tensor,  # [n, ceil(V / 32)] int32
    seed: Tensor,  # []
    lse: Tensor,  # [N]
    nll: Tensor,  # [N]
    counts: Tensor,  # [N] int64
    columns: Tensor,  # [capacity] int32
    values: Tensor,  # [capacity] float32
    *,
    eps: float,
) -> None:
    """Appends what is kept of the set bits to ``columns`` and ``values``, and to ``counts``.

    Rows that end past the capacity have no list; ``counts`` tells how many entries they have.
    """
    _cuda.thin_rows(
        rows=rows.native,
        lse_ptr=ptr(lse),
        nll_ptr=ptr(nll),
        seed_ptr=ptr(seed),
        eps=eps,
        mask_ptr=out(mask),
        counts_ptr=out(counts),
        stream=stream(),
    )
    offsets = offsets_of(counts)
    _cuda.list_rows(
        rows=rows.native,
        lse_ptr=ptr(lse),
        nll_ptr=ptr(nll),
        seed_ptr=ptr(seed),
        eps=eps,
        mask_ptr=ptr(mask),
        offsets_ptr=ptr(offsets),
        columns_ptr=out(columns),
        values_ptr=out(values),
        capacity=columns.numel(),
        stream=stream(),
    )


def gradient_rows(
    rows: LogitRows,
    dy: Tensor,  # [n, V], in the memory of the logits; a row begins where its logits do
    lse: Tensor,  # [N]
    lse_low: Tensor,  # [N] or [0]
    nll: Tensor,  # [N]
    coefficient: Tensor,  # [N] float32
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """``coefficient * dy`` of the rows takes the place of their logits, in the type of ``dy``."""
    _cuda.gradient_rows(
        rows=rows.native,
        dy_ptr=out(dy),
        stride_dy=dy.stride(0),
        dtype=TYPES[dy.dtype],
        lse_ptr=ptr(lse),
        lse_low_ptr=ptr(lse_low),
        nll_ptr=ptr(nll),
        grad_ptr=ptr(coefficient),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        stream=stream(),
    )
