"""One dataclass is the flags, the YAML file and the help of a command; :mod:`bft.usage` reads them.

Settings are checked where they are made.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
import yaml

from bft_kernels.settings import LOCAL_SCHEMES, SCHEMES, TrainingSettings
from bft_kernels.values import check_int, check_number

if TYPE_CHECKING:
    from bft.loss import HeadLoss


class SettingError(ValueError):
    """A setting that cannot be: its name, what came, and what was expected."""

    exit_status = 2


class _Checked:
    """Settings whose numbers are looked at where they are made."""

    def __post_init__(self) -> None:
        settings: Any = self
        for option in fields(settings):
            name, value = option.name, getattr(self, option.name)
            if value is None:
                continue
            if option.type in ("int", "int | None"):
                check_int(name, value, _LOWEST.get(name, 1), _HIGHEST.get(name, 2**63 - 1))
            elif option.type in ("float", "float | None"):
                check_number(name, value, 0.0, _HIGHEST.get(name, math.inf))
            if name in _ABOVE_0 and value == 0:
                raise ValueError(f"{name}: got {value}, expected a number above 0")


def _setting(name: str, more: str = "") -> Any:
    """The loss's option of this name, with its default, its choices and its help, and ``more``."""
    (option,) = (option for option in fields(TrainingSettings) if option.name == name)
    metadata = {**option.metadata, "help": option.metadata["help"] + more}
    return field(default=option.default, metadata=metadata)


def _check_loss(**options: Any) -> None:
    """Raises what ``HeadLoss`` raises for these options."""
    from bft.loss import HeadLoss  # and torch, without which --help is quick

    HeadLoss(**options)


@dataclass(frozen=True)
class _Files(_Checked):
    """What a run reads, and where it writes."""

    train_file: Path
    """JSONL with `messages`, or `prompt` and `completion`."""
    eval_file: Path | None = None
    """JSONL to evaluate on; an `answer`, with which the completion starts, adds constrained exact
    match."""
    output_dir: Path = Path("runs/bft")
    """Gets the model, checkpoints, metrics.jsonl, trackers' files and this configuration."""
    model: str = "smollm2-135m"
    """A built-in name, a checkpoint folder or a hub id."""


@dataclass(frozen=True)
class LossOptions(TrainingSettings):
    """The options of the loss; ``bft_kernels`` says what they mean and which values they take."""

    scheme: str = _setting("scheme")  # a file of settings holds no function
    max_buffer_mib: int | None = None
    """Memory of the loss's logit blocks; 64 on a CPU, 528 or 2048 on a GPU if not given."""

    def loss(self) -> HeadLoss:
        """The loss that these options describe; raises what ``HeadLoss`` raises."""
        from bft.loss import HeadLoss  # and torch, without which --help is quick

        options = {field.name: getattr(self, field.name) for field in fields(TrainingSettings)}
        mib = self.max_buffer_mib
        return HeadLoss(**options, max_buffer_bytes=None if mib is None else mib * 2**20)


@dataclass(frozen=True)
class StepOptions(_Checked):
    """How a step is taken, whatever its loss and its rate are."""

    batch_size: int = 8
    """Documents in a micro-batch, per process."""
    accumulation: int = 1
    """Micro-batches in an optimizer step."""
    warmup_ratio: float = 0.1
    """Fraction of the steps that warm up; the first step has a rate above 0."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 leaves them alone."""
    max_length: int | None = 1024
    """Documents are cut to this many tokens."""
    packing: bool = False
    """Put a micro-batch's documents in one row instead of padding them."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank instead of all parameters; 0 is full fine-tuning."""
    lora_alpha: float | None = None
    """LoRA's scale; twice the rank if not given."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Modules with adapters, by PEFT's rules; `all-linear` has all but the head (add its name)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type; parameters stay in `dtype`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters."""
    save_every: int | None = None
    """Steps between resumable checkpoints; then there is one after the last step, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lora_targets:
            raise SettingError("lora_targets: got no name, expected some, or all-linear")
        for name, needed in _NEEDS.items():
            value = getattr(self, name, None)
            if value != getattr(type(self), name, None) and not getattr(self, needed):
                got = f"got {' '.join(value) if isinstance(value, tuple) else value}"
                raise SettingError(
                    f"{name}: {got}, which does nothing without {needed}; expected both or none"
                )


@dataclass(frozen=True)
class TrainConfig(StepOptions, LossOptions, _Files):
    """Fine-tune a Hugging Face causal LM with BFT, DFT or SFT."""

    # What a caller hands to the loss is a number: `auto` becomes one when the records are known.
    window: int | Literal["auto"] = _setting(  # type: ignore[assignment]
        "window", "; `auto`: an eighth of the training file's median answer"
    )
    steps: int | None = None
    """Optimizer steps, instead of `epochs`."""
    epochs: float | None = None
    """Passes over the training file; one if neither this nor `steps` is given."""
    learning_rate: float = 2e-5
    """Peak of the schedule: linear warm-up, then cosine to zero."""
    seed: int = 0
    """Seeds the order of records, new parameters and draws; from 0 below 2**32."""

    eval_every: int | None = None
    """Steps between evaluations; always after the last one too."""
    eval_first: bool = True
    """Evaluate before the first step, too."""
    eval_limit: int | None = None
    """Evaluate on this many records of the file."""
    keep_checkpoints: int = 2
    """Resumable checkpoints that are kept."""
    save_model: bool = True
    """Write the trained model; without it a run leaves its numbers, and checkpoints if any."""
    resume: bool = False
    """Go on from the newest checkpoint in `output_dir`, with the settings of its run."""
    overwrite: bool = False
    """Remove the older run that `output_dir` holds: its checkpoints, model, metrics.jsonl,
    config.yaml and trackers' files."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is infinite or NaN: stop, or leave that step's update out. The
    learning rate's schedule moves on, and metrics.jsonl counts such steps as `skipped`."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    trackers: tuple[Literal["wandb", "trackio"], ...] = ()
    """More trackers, which have to be installed; wandb is offline unless WANDB_MODE says more."""
    histogram_every: int = 10
    """Steps between histograms of the confidences and document weights of a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise SettingError("resume, overwrite: got both, expected one of them")
        if self.window == "auto":
            replace(self, window=1)  # checks the others
        else:
            self.loss()  # checks its own options
        if self.steps is not None and self.epochs is not None:
            both = f"got {self.steps} with epochs={self.epochs}"
            raise SettingError(f"steps: {both}, expected one of them")

    def check_device(self, device_type: str) -> None:
        """Raises SettingError if these settings cannot run on a device of this type."""
        if self.mixed_precision == "fp16" and device_type == "cpu":
            raise SettingError(
                "mixed_precision: got fp16 on a CPU, where the run would be one without it; "
                "expected bf16 or no"
            )

    def to_yaml(self) -> str:
        """The settings as :func:`bft.usage.yaml_flags` reads them back."""
        return yaml.safe_dump(plain(self), sort_keys=False)


@dataclass(frozen=True)
class _Compared(_Checked):
    """What a comparison reads, and where it writes."""

    data: Path
    """Folder with train.jsonl, test.jsonl and the file to tune on, as `bft data` writes it."""
    output_dir: Path = Path("runs/compare")
    """Gets plan.json, a folder for each run, compare.json, items.parquet, table.md and figures."""
    model: str = "smollm2-135m"
    """A built-in name, a checkpoint folder or a hub id."""


@dataclass(frozen=True)
class CompareConfig(StepOptions, _Compared):
    """Train with several schemes, same data and budget, and say which of them differ."""

    schemes: tuple[str, ...] = ("sft", "dft", "bft")
    """Schemes to compare, or functions' import paths; sft, which the others are held against, is
    one."""
    control: tuple[Literal["shuffled", "token-only", "document-only"], ...] = ()
    """Controls of bft: its token weights shuffled in each document, or one of its two weights."""
    windows: tuple[int | Literal["auto"], ...] = ("auto",)
    """Windows of each scheme that has one, in labelled tokens; auto is an eighth of the median
    answer."""
    start: str | None = None
    """Every scheme from one SFT checkpoint, too: its number of steps, or its folder."""
    tune_on: str = "validation"
    """Name of the file in `data`, without .jsonl, on which each arm's learning rate is chosen."""
    tune_limit: int = 64
    """Tune on this many of its records."""
    learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    """Peak rates to try, ascending, with half the steps, until the validation NLL rises."""
    seeds: int = 3
    """Runs of each arm; run k of every arm reads the records in the same order."""
    steps: int | None = None
    """Optimizer steps of each run, instead of `budget`."""
    budget: str | None = None
    """Time for all of it, as 2h or 1h30m; measured first, it becomes a number of steps."""
    test_limit: int | None = None
    """Test on this many records."""
    forgetting_file: Path | None = None
    """JSONL of another field: its NLL shows what a run has forgotten."""
    launcher: str | None = None
    """Starts each training run as a process: accelerate launch or torchrun, with flags."""
    bootstrap: int = 10_000
    """Draws of the bootstrap."""
    gradient: str = _setting("gradient")
    eps: float = _setting("eps")
    normalize: str = _setting("normalize")
    backend: str = _setting("backend")
    resume: bool = False
    """Go on with the comparison in `output_dir`, with the same settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("schemes", "windows", "learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise SettingError(f"{name}: got {list(values)}, expected some, each once")
        if "sft" not in self.schemes:
            raise SettingError(
                f"schemes: got {' '.join(self.schemes)}, expected sft among them: the others are "
                "held against it"
            )
        if len(self.schemes) == 1 and not self.control:
            raise SettingError("schemes, control: got sft alone, expected more to compare")
        for window in self.windows:
            if window != "auto":
                check_int("windows", window, 1)
        for rate in self.learning_rates:
            check_number("learning_rates", rate, 0.0, math.inf)
        if 0 in self.learning_rates or list(self.learning_rates) != sorted(self.learning_rates):
            rates = list(self.learning_rates)
            raise SettingError(f"learning_rates: got {rates}, expected them above 0 and ascending")
        if (self.steps is None) == (self.budget is None):
            got = "neither" if self.steps is None else "both"
            raise SettingError(f"steps, budget: got {got}, expected one of them")
        if self.budget is not None:
            seconds_of(self.budget)
        if self.tune_on in ("train", "test"):
            raise SettingError(
                f"tune_on: got {self.tune_on}, which is for {self.tune_on}ing alone; expected "
                "another file of data, as validation"
            )
        for scheme in self.schemes:
            LossOptions(
                scheme=scheme,
                gradient=self.gradient,
                eps=self.eps,
                normalize=self.normalize,
                backend=self.backend,
            ).loss()  # checks its options

    def file(self, name: str) -> Path:
        """The file of ``data`` with this name."""
        return self.data / f"{name}.jsonl"


def seconds_of(duration: str) -> float:
    """The seconds of a duration as 2h, 1h30m or 45s. Raises SettingError."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+)m)?(?:(\d+)s)?", duration)
    hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise SettingError(f"budget: got {duration!r}, expected a duration as 2h, 1h30m or 45s")
    return total


@dataclass(frozen=True)
class DemoConfig(_Checked):
    """Fine-tune a small model on biomedical questions, in under five minutes on two CPU cores."""

    output_dir: Path = Path("runs/demo")
    """Gets the model, the metrics, table.md and figure.png."""
    model: Literal["smollm2-135m", "gemma3-270m"] = "smollm2-135m"
    """gemma3-270m is under the Gemma Terms of Use and has to be installed first."""
    scheme: str = _setting("scheme")
    gradient: str = _setting("gradient")
    steps: int = 20
    eval_limit: int = 128
    """Held-out questions."""
    seed: int = 0
    overwrite: bool = False
    """Remove the older run that `output_dir` holds; in runs/demo that needs no asking."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_loss(scheme=self.scheme, gradient=self.gradient)


@dataclass(frozen=True)
class EvalConfig(_Checked):
    """Evaluate a model on held-out records."""

    model: str
    """A built-in name, a checkpoint folder or a hub id."""
    file: Path
    """JSONL; an `answer`, with which the completion starts, adds constrained exact match."""
    train_file: Path | None = None
    """Whose most frequent answer is the baseline, and whose answers are possible too."""
    limit: int | None = None
    """Evaluate on this many records."""
    max_length: int | None = 1024
    """Documents are cut to this many tokens."""
    output: Path | None = None
    """Write the numbers here as JSON, too."""


@dataclass(frozen=True)
class ScoreConfig(_Checked):
    """Write what a model makes of each labelled token: for a filter, or a teacher's cache."""

    model: str
    """A built-in name, a checkpoint folder or a hub id."""
    file: Path
    """JSONL; only answers are scored."""
    output: Path
    """Gets positions, ids, log-probabilities and entropies: a name.jsonl or name.safetensors."""
    top_k: int = 0
    """Also the ids and log-probabilities of this many most probable tokens."""
    limit: int | None = None
    """Score this many records."""
    max_length: int | None = 1024
    """Documents are cut to this many tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.suffix not in (".jsonl", ".safetensors"):
            raise SettingError(
                f"output: got {self.output}, expected a name ending in .jsonl or .safetensors"
            )


@dataclass(frozen=True)
class CheckConfig(_Checked):
    """Compare the fused loss with a model's own, on your model and records."""

    model: str
    """A built-in name, a checkpoint folder or a hub id."""
    file: Path
    """JSONL; the first records are tried."""
    limit: int = 4
    """Records to try; their logits are held, [tokens, vocabulary]."""
    max_length: int | None = 256
    """Documents are cut to this many tokens."""
    scheme: str = _setting("scheme")
    window: int = _setting("window")
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters."""
    seed: int = 0
    output: Path | None = None
    """Write the table here as JSON, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_loss(scheme=self.scheme, window=self.window)


@dataclass(frozen=True)
class DataConfig(_Checked):
    """Build a task's records from public data; without a name the demo's questions."""

    task: Annotated[str, tyro.conf.Positional] = ""
    """hpo, hpo-path, or the import path of a task of yours; gets a report of its floors, too."""
    output_dir: Path | None = None
    """Gets train.jsonl, validation.jsonl, test.jsonl, NOTICE and, with a name, leak.json; `data/`
    and the task's name if not given."""
    seed: int = 0
    """Seeds the splits."""


@dataclass(frozen=True)
class InfoConfig:
    """Show versions, devices, backends, and why a backend does not run."""

    json: bool = False
    """Machine-readable."""


# Whole numbers are 1 or more, others 0 or more, except these.
_LOWEST = {"max_length": 2, "seed": 0, "lora_rank": 0, "top_k": 0}
_HIGHEST = {"warmup_ratio": 1, "seed": 2**32 - 1}  # numpy's generator takes no more
_ABOVE_0 = ("epochs", "lora_alpha")
# Settings that do nothing without another one, or beside some of its values.
_NEEDS = {
    "lora_alpha": "lora_rank",
    "lora_targets": "lora_rank",
    "eval_every": "eval_file",
    "eval_first": "eval_file",
    "eval_limit": "eval_file",
}
ONLY_WITH = {
    "window": ("scheme", tuple(name for name in SCHEMES if name not in LOCAL_SCHEMES)),
    "gamma": ("scheme", ("bft-v1-code",)),
    "eps": ("gradient", ("sampled",)),
}


def plain(config: Any) -> dict[str, Any]:
    """A configuration as a dictionary of what YAML and JSON can hold."""

    def convert(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return {field.name: convert(getattr(config, field.name)) for field in fields(config)}
