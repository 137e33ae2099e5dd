def sampling_uniforms(
    seed: int, row0: int, rows: int, col0: int, cols: int, out_ptr: int, stream: int
) -> None: ...
def sampling_bits(
    seed: int, row0: int, rows: int, col0: int, cols: int, out_ptr: int, stream: int
) -> None: ...

class Problem:
    def __init__(
        self,
        *,
        hidden_ptr: int,
        weight_ptr: int,
        bias_ptr: int,
        target_ptr: int,
        order_ptr: int,
        count_ptr: int,
        N: int,
        V: int,
        D: int,
        stride_hn: int,
        stride_wv: int,
        dtype: int,
        softcap: float = 0.0,
        temperature: float = 1.0,
    ) -> None: ...

def certificate(
    *,
    problem: Problem,
    first_row: int,
    rows: int,
    splits: int,
    split_columns: int,
    sums_ptr: int,
    lse_ptr: int,
    eps: float,
    variance_ptr: int,
    norms_ptr: int = 0,
    hidden_variance_ptr: int = 0,
    stream: int,
) -> None: ...
def squared_norms(*, problem: Problem, norms_ptr: int, stream: int) -> None: ...

WEIGHT_TILE: int

def balanced_weights(
    *,
    loss_ptr: int,
    labelled_ptr: int,
    cu_seqlens_ptr: int,
    N: int,
    S: int,
    window: int,
    floor: float,
    gamma: float,
    full_windows: bool,
    geometric: bool,
    confidence: bool,
    ratio: bool,
    flat: bool,
    by_sequence: bool,
    counts: bool,
    num_items_ptr: int = 0,
    before_ptr: int,
    sequence_ptr: int,
    values_ptr: int,
    lowest_ptr: int,
    ended_ptr: int,
    coefficient_ptr: int,
    token_weight_ptr: int,
    window_confidence_ptr: int,
    sequence_weight_ptr: int,
    sequence_confidence_ptr: int,
    sums_ptr: int,
    stream: int,
) -> None: ...
