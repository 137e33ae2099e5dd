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

FORWARD_SUMS: int

def forward_splits(rows: int, V: int, processors: int) -> tuple[int, int]: ...
def linear_nll_forward(
    *,
    problem: Problem,
    first_row: int,
    rows: int,
    splits: int,
    split_columns: int,
    sums_ptr: int,
    loss_ptr: int,
    nll_ptr: int,
    lse_ptr: int,
    lse_low_ptr: int = 0,
    entropy_ptr: int = 0,
    correct_ptr: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    seed_ptr: int = 0,
    floor_ptr: int = 0,
    mask_ptr: int = 0,
    eps: float = 1.0,
    stream: int,
) -> None: ...
def target_floor(*, problem: Problem, floor_ptr: int, stream: int) -> None: ...
def logit_gradient(
    *,
    problem: Problem,
    first_column: int,
    columns: int,
    dy_ptr: int,
    stride_dy: int,
    lse_ptr: int,
    lse_low_ptr: int = 0,
    nll_ptr: int,
    grad_ptr: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    seed_ptr: int = 0,
    eps: float = 1.0,
    bias_sums_ptr: int = 0,
    grad_bias_ptr: int = 0,
    scale_ptr: int = 0,
    stream: int,
) -> None: ...
def hidden_gradient(
    *,
    problem: Problem,
    first_column: int,
    columns: int,
    dy_ptr: int,
    stride_dy: int,
    sums_ptr: int = 0,
    grad_hidden_ptr: int,
    wide: bool = False,
    scale_ptr: int = 0,
    stream: int,
) -> None: ...
def weight_gradient(
    *,
    problem: Problem,
    first_column: int,
    columns: int,
    dy_ptr: int,
    stride_dy: int,
    grad_weight_ptr: int,
    stride_gv: int,
    wide: bool = False,
    adds: bool,
    scale_ptr: int = 0,
    stream: int,
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

MAX_GATHERED: int

def count_entries(
    *,
    problem: Problem,
    first_row: int,
    rows: int,
    mask_ptr: int,
    counts_ptr: int,
    stream: int,
) -> None: ...
def scan_bytes(N: int) -> int: ...
def scan_counts(
    *,
    counts_ptr: int,
    N: int,
    offsets_ptr: int,
    temporary_ptr: int,
    temporary_bytes: int,
    stream: int,
) -> None: ...
def list_entries(
    *,
    problem: Problem,
    first_row: int,
    rows: int,
    mask_ptr: int,
    offsets_ptr: int,
    columns_ptr: int,
    capacity: int,
    stream: int,
) -> None: ...
def sort_bytes(E: int, V: int) -> int: ...
def sort_entries(
    *,
    keys_ptr: int,
    packed_ptr: int,
    E: int,
    V: int,
    sorted_keys_ptr: int,
    sorted_packed_ptr: int,
    temporary_ptr: int,
    temporary_bytes: int,
    stream: int,
) -> None: ...
def column_starts(
    *, sorted_keys_ptr: int, E: int, V: int, starts_ptr: int, stream: int
) -> None: ...
def gather_hidden(
    *,
    problem: Problem,
    lse_ptr: int,
    nll_ptr: int,
    grad_ptr: int,
    seed_ptr: int,
    eps: float,
    offsets_ptr: int,
    columns_ptr: int,
    capacity: int,
    keys_ptr: int = 0,
    packed_ptr: int = 0,
    grad_hidden_ptr: int = 0,
    wide: bool = False,
    stream: int,
) -> None: ...
def gather_weight(
    *,
    problem: Problem,
    starts_ptr: int,
    packed_ptr: int,
    grad_weight_ptr: int = 0,
    stride_gv: int = 0,
    wide: bool = False,
    adds: bool = False,
    grad_bias_ptr: int = 0,
    stream: int,
) -> None: ...
