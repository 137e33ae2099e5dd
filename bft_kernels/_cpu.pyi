from collections.abc import Callable

_Matrix = tuple[int, str, int, int, int]
_Block = tuple[int, int, int, int, int, int]

class OnlineSoftmax:
    def __init__(
        self,
        *,
        rows: int,
        vocabulary: int,
        targets: int,
        positions: int = 0,
        lse_bounds: int = 0,
        bias: int = 0,
        softcap: float = 0.0,
        temperature: float = 1.0,
        norms: int = 0,
        eps: float = 1.0,
        seed: int = 0,
        sample: bool = False,
        certificate: bool = False,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        workers: int = 1,
    ) -> None: ...
    def add(self, block: _Block, keep: int = 0, *, threads: int, worker: int = 0) -> None: ...
    def add_exponentials(
        self, block: _Block, sums: int, width: int, threads: int, worker: int = 0
    ) -> None: ...
    def finish(self, first_row: int, rows: int, out: dict[str, int], threads: int) -> None: ...
    def entries(self, offsets: int, columns: int, values: int, threads: int) -> None: ...
    def unit_factors(self, first_row: int, rows: int, factors: int, target_values: int) -> None: ...

def gradient_block(
    *,
    block: _Block,
    vocabulary: int,
    kept: int = 0,
    targets: int,
    lse: int,
    lse_low: int,
    nll: int,
    upstream: int,
    bias: int = 0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    threads: int,
) -> None: ...
def spmm_hidden(
    *,
    rows: int,
    offsets: int,
    columns: int,
    values: int,
    upstream: int,
    weight: _Matrix,
    grad_hidden: _Matrix,
    threads: int,
) -> None: ...
def spmm_weight(
    *,
    rows: int,
    offsets: int,
    columns: int,
    values: int,
    upstream: int,
    hidden: _Matrix,
    grad_weight: _Matrix | None,
    add: bool,
    grad_bias: int,
    vocabulary: int,
    slice: int,
    threads: int,
) -> None: ...
def has_openmp() -> bool: ...
def run_team(body: Callable[[int], None], threads: int) -> None: ...
def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
