"""Device functions that several kernels share.

Logits are float32 tiles here: ``y`` as the product gives them, ``z`` after bias, softcap and
temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bft_kernels.backends.common import lse_bound
from bft_kernels.backends.triton.configs import interpreted

INTERPRETED = tl.constexpr(interpreted())
LOG2E = tl.constexpr(1.4426950408889634)
ROUNDING = tl.constexpr(lse_bound.ROUNDING)
EXP_MARGIN = tl.constexpr(lse_bound.EXP_MARGIN)


@triton.jit
def dot(a, b, sums, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """``sums + a @ b``, the operands rounded to ``OPERAND``, accumulated in float32."""
    a, b = a.to(OPERAND), b.to(OPERAND)
    if INTERPRETED:  # its dot would take the bits of a bfloat16 for an integer
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def mix64(z):
    """The splitmix64 finaliser."""
    z = (z ^ (z >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def mix32_high(x):
    """``mix32`` without its last step, which leaves the upper 16 bits as they are."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    return (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)


@triton.jit
def mix32(x):
    """A bijection of 32-bit words whose every bit depends on every bit."""
    x = mix32_high(x)
    return x ^ (x >> 16)


@triton.jit
def row_key(seed, rows):
    """Multiplier and offset, uint32, of int64 positions ``rows``; see ``reference.uniforms``."""
    gamma = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    key = mix64(mix64(seed.to(tl.uint64) + gamma) + gamma * rows.to(tl.uint64))
    return (key >> 32).to(tl.uint32) | tl.full([], 1, tl.uint32), key.to(tl.uint32)


@triton.jit
def draw_bits(multiplier, offset, columns):
    """32 bits for each entry, from uint32 operands that broadcast."""
    return mix32(multiplier * columns + offset)


@triton.jit
def uniform(bits):
    """``u`` in (0, 1], exactly as ``reference.uniforms`` has it."""
    return ((bits >> 8).to(tl.float32) + 0.5) * (2.0**-24)


@triton.jit
def may_be_below(place, x, factor):
    """Whether the draw of an entry may be below ``x * factor / 2^16``: always true where it is.

    ``place`` is the entry's ``multiplier * column + offset``, uint32.

    The draw's upper 16 bits become the last digits of a float from 2^23 on. That needs neither the
    hash's last step nor a conversion. One entry in 65,536 passes whatever its ``x`` is. Rounding to
    nearest keeps the order: if ``u16 <= y``, ``2^23 + u16`` is not above the rounded ``2^23 + y``.
    """
    high = (mix32_high(place) >> 16) + 0x4B000000  # the bits of 2^23
    limit = tl.fma(x, factor, tl.full([], 8388608.0, tl.float32))
    return high.to(tl.float32, bitcast=True) <= limit


@triton.jit
def normal_exp(x):
    """``exp(x)``, 0 below the normal range: ``tl.exp`` spends three instructions more on that."""
    return tl.exp2(x * LOG2E)


@triton.jit
def exact_tanh(x):
    """``tanh(x)`` within a few ulp, near 0 too, where ``1 - 2 / (exp(2x) + 1)`` has no digits."""
    magnitude = tl.abs(x)
    e = normal_exp(-2.0 * magnitude)
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    p = square * -5.70498872745e-3 + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    near = p * square * magnitude + magnitude
    result = tl.where(magnitude < 0.625, near, far)
    return tl.where(x < 0, -result, result)


@triton.jit
def transform(y, bias, call):
    """``z`` of ``y``. ``bias`` broadcasts to ``y``, and is ignored if the call has no bias."""
    if call.bias_ptr is not None:
        y += bias
    if call.softcap is not None:
        y = call.softcap * exact_tanh(y / call.softcap)
    return y * call.inverse_temperature


@triton.jit
def logits_at(y, column, mask, call):
    """``z`` of the raw products ``y`` of columns, where ``mask`` is true."""
    bias = 0.0
    if call.bias_ptr is not None:
        bias = tl.load(call.bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return transform(y, bias, call)


@triton.jit
def slope_of(z, call):
    """``dz/dy`` where the logit is ``z``: a tile with a softcap, else a number."""
    if call.softcap is None:
        return call.inverse_temperature
    else:
        t = z / (call.softcap * call.inverse_temperature)
        return (1.0 - t * t) * call.inverse_temperature


@triton.jit
def expm1_down(x):
    """``exp(x) - 1`` for ``x <= 0``, with all digits near 0 too."""
    series = 1.0 + x * 0.125  # Horner, of sum x^k / (k + 1)!
    for k in tl.static_range(7, 1, -1):
        series = 1.0 + x * series * (1.0 / k)
    return tl.where(x > -0.3, x * series, tl.exp(x) - 1.0)


@triton.jit
def popcount(x):
    """Bits set in each uint32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def finite_or(x, instead):
    """``x``, or ``instead`` where it is minus infinity, so that no ``-inf - (-inf)`` arises."""
    return tl.where(x == float("-inf"), instead, x)


@triton.jit
def swizzle(program, row_blocks, splits, GROUP: tl.constexpr):
    """Row block and split of a program: ``GROUP`` row blocks side by side share columns in L2."""
    per_group = GROUP * splits
    first = program // per_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    return first + program % per_group % size, program % per_group // size


@triton.jit
def logit_tile(
    x,  # Operands
    call,
    row,  # [BLOCK_N], positions, all of them valid
    offs_v,  # [BLOCK_V]; beyond V the last column is repeated, to be masked by the caller
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``z [BLOCK_N, BLOCK_V]``, its product accumulated in float32."""
    hidden_rows = x.hidden_ptr + row[:, None] * x.stride_hn
    columns = tl.minimum(offs_v, call.V - 1).to(tl.int64)
    weight_rows = x.weight_ptr + columns[None, :] * x.stride_wv
    y = tl.zeros((row.shape[0], offs_v.shape[0]), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        if D % BLOCK_D == 0:
            h = tl.load(hidden_rows + offs_d[None, :])
            w = tl.load(weight_rows + offs_d[:, None])
        else:
            h = tl.load(hidden_rows + offs_d[None, :], mask=(offs_d < D)[None, :], other=0.0)
            w = tl.load(weight_rows + offs_d[:, None], mask=(offs_d < D)[:, None], other=0.0)
        y = dot(h, w, y, OPERAND, PRECISION)
    return logits_at(y, offs_v[None, :], offs_v[None, :] < call.V, call)


@triton.jit
def number(x):
    """``x``, or 0 for an option that is not set."""
    if x is None:
        return 0.0
    else:
        return x


@triton.jit
def store_results(
    out,  # RowResults
    row,  # positions, or one
    mask,
    total,  # sum of exp(z - reference)
    reference,
    own,  # the target's z
    moment,  # sum of exp(z - reference) * (z - reference); only looked at for the entropy
    first,  # whether the target is the first column with the largest z
    shifted,  # sum of z - reference; only looked at with label smoothing
    call,
):
    """Stores the results that follow from a row's sums: losses, lse, lse_low and statistics."""
    log_total = tl.log(total)
    nll = log_total - (own - reference)
    nll = tl.where(nll < 0, 0.0, nll)  # keeps a NaN
    lse = reference + log_total
    loss = nll
    if call.label_smoothing is not None:
        loss = (1 - call.label_smoothing) * nll
        loss += call.label_smoothing * (log_total - shifted / call.V)
    if call.z_loss is not None:
        loss += call.z_loss * lse * lse
    tl.store(out.nll_ptr + row, nll, mask=mask)
    tl.store(out.lse_ptr + row, lse, mask=mask)
    tl.store(out.loss_ptr + row, loss, mask=mask)
    if out.lse_low_ptr is not None:
        high = lse - reference  # Knuth's exact sum; see Softmax.lse_low of the torch backend
        low = (reference - (lse - high)) + (log_total - high)
        tl.store(out.lse_low_ptr + row, low, mask=mask)
    if out.entropy_ptr is not None:
        entropy = log_total - moment / total
        tl.store(out.entropy_ptr + row, tl.where(entropy < 0, 0.0, entropy), mask=mask)
        tl.store(out.correct_ptr + row, first & (lse == lse), mask=mask)


@triton.jit
def exact_factors(lse, nll, call):
    """``dz = probability * p - even`` away from the target, and ``own`` there."""
    smoothing = number(call.label_smoothing)
    probability = 1.0 + 2.0 * number(call.z_loss) * lse
    even = smoothing / call.V
    own = (1.0 - smoothing) * expm1_down(-nll) - even
    own += (probability - 1.0 + smoothing) * tl.exp(-nll)
    return probability, even, own


@triton.jit
def sampled_dz(p, bits, at_target, own, eps):
    """The sampled gradient: 0 where the draw drops an entry, NaN where ``p`` is NaN."""
    kept = tl.where(uniform(bits) * eps < p, tl.maximum(p, eps), 0.0)
    return tl.where(at_target, own, tl.where(p != p, p, kept))


@triton.jit
def entry_dz(
    y,  # raw products of listed entries
    column,
    mask,
    target,
    lse,
    nll,
    key,  # multiplier and offset of the row; see row_key
    call,
):
    """The sampled ``dz`` of entries of one row, and their slope, by the final lse."""
    z = logits_at(y, column, mask, call)
    bits = draw_bits(key[0], key[1], column.to(tl.uint32))
    dz = sampled_dz(tl.exp(z - lse), bits, column == target, expm1_down(-nll), call.eps)
    return tl.where(mask, dz, 0.0), slope_of(z, call)


@triton.jit
def lowest_bit(word):
    """The lowest bit set of each uint32, as a word and as its place."""
    one = word ^ (word & (word - 1))
    return one, popcount(one - 1)
