"""``bft check``: is what the fused loss computes what this model computes, on this batch?

What a run stands on is tried on the user's own model and records, with the model's logits and
without: loss, gradients, weights, padding, packing, a saved model that is loaded again.
"""

import inspect
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from bft.checkpoint import save_model
from bft.config import CheckConfig
from bft.data import AnswerDataset, Collator, collate_packed
from bft.encode import Example
from bft.head import UnsupportedModel, causal_lm
from bft.isolation import evaluation_mode, other_tokens
from bft.limits import check_fits
from bft.load import EVERYWHERE, add_adapters, load_pretrained
from bft.loss import IGNORE, HeadLoss, aligned, batch_targets
from bft.metrics import write_json
from bft.patch import fused_loss, patch_model, unpatch_model
from bft.records import read_jsonl
from bft.schemes import load_scheme
from bft_kernels import reference

SFT = HeadLoss(scheme="sft", normalize="token")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    what: str
    got: str
    expected: str
    verdict: str  # "ok", "WRONG", "refused" (as by training) or "not compared" (with nothing)
    limit: float | None = None  # relative error up to which it is ok


def told(
    what: str, got: str, expected: str, right: bool = True, limit: float | None = None
) -> Finding:
    """A row that is right or wrong."""
    return Finding(what, got, expected, "ok" if right else "WRONG", limit)


def check(config: CheckConfig) -> list[Finding]:
    """All findings, printed as a table; see the functions below for what each one tries.

    Raises:
        DataError, PretrainedError: the records or the model cannot be read, or do not fit.
    """
    torch.manual_seed(config.seed)
    model, tokenizer = load_pretrained(config.model, getattr(torch, config.dtype))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    records = read_jsonl(config.file, limit=config.limit)
    dataset = AnswerDataset(records, tokenizer, max_length=config.max_length)
    check_fits(dataset.examples, model, tokenizer)
    trial = _Trial(model, tokenizer, dataset.examples, device, config)
    with evaluation_mode(model):
        findings = list(trial.run())
        if not any(finding.what == "patch" for finding in findings):
            findings += _saved(trial)
    _show(config, findings)
    return findings


class _Trial:
    """One model and one batch, with and without the patch."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: list[Example],
        device: torch.device,
        config: CheckConfig,
    ) -> None:
        self.model, self.tokenizer, self.examples = model, tokenizer, examples
        self.device, self.config = device, config
        self.batch = self._padded(examples)
        self.token_weight = self.batch.pop("token_weight", None)  # unknown to the model's own loss
        narrow = torch.finfo(next(model.parameters()).dtype).eps > 1e-4
        self.loss_error, self.gradient_error = (2e-2, 1e-1) if narrow else (1e-4, 1e-3)

    def run(self) -> Iterable[Finding]:
        """Everything that needs no second model."""
        labelled = int((batch_targets(self.batch).target != IGNORE).sum())
        tokens = sum(len(example.input_ids) for example in self.examples)
        yield told("records", f"{len(self.examples)}, {labelled} of {tokens} tokens labelled", "")
        own = self._own_loss()
        want = None if own is None else self._with_gradients(own)
        with torch.no_grad():
            logits = self._logits()
        try:
            patch_model(self.model, SFT)
            fused = self.model(**self.batch).loss
        except UnsupportedModel as error:
            unpatch_model(self.model)
            yield told("patch", str(error), "a model that the fused loss can express", False)
            return
        state = causal_lm(self.model).__dict__["_fused_head"]
        softcap, temperature = state.transform
        shift = "shifted by one" if state.shift else "not shifted"
        yield told("labels", shift, "as in its own loss")
        transform = f"softcap {softcap}, temperature {temperature:g}"
        yield told("logits", transform, "a transform of the op")
        got = self._with_gradients(fused)
        unpatch_model(self.model)
        if want is None:
            name, seen = "loss, beside the model's own", "the model returns no loss for labels"
            yield Finding(name, seen, "a loss", "not compared")
        else:
            yield from self._same("", "beside the model's own", got, want)
        yield from self.weighted()
        yield from self._looks_ahead()
        yield from self._rows_alone()
        with torch.no_grad():
            same = torch.equal(self._logits(), logits)
        got_bits = "the same bits" if same else "changed"
        yield told("logits after unpatching", got_bits, "the same bits", same)

    def nll(self) -> Tensor:
        """The fused loss's nll ``[N]`` of each labelled token of the batch."""
        return self._nll(self.batch)

    def weighted(self, what: str = "") -> Iterable[Finding]:
        """The weighted loss, beside the reference formula on the model's own logits."""
        loss = HeadLoss(scheme=self.config.scheme, window=self.config.window)
        batch = aligned({**self.batch, "token_weight": self.token_weight})
        got = self._with_gradients(fused_loss(self.model, batch, loss)[0])
        target, _, token_weight = batch["targets"]
        labelled = target != IGNORE
        log_p = self._logits()[labelled].double().log_softmax(-1)
        nll = -log_p.gather(1, target[labelled].unsqueeze(1)).squeeze(1)
        bounds = nn.functional.pad(labelled.sum(1).cumsum(0), (1, 0))
        coefficients = reference.token_coefficients(
            torch.exp(-nll.detach()),
            bounds,
            scheme=load_scheme(loss.scheme, loss.window),
            window=loss.window,
        )
        if token_weight is not None:
            coefficients = coefficients * token_weight[labelled]
        want = self._with_gradients((coefficients * nll).sum())
        yield from self._same(
            f"{what}{loss.scheme} ", "beside the formula on its logits", got, want
        )

    def _looks_ahead(self) -> Iterable[Finding]:
        """Whether a hidden state knows the tokens that it is to predict."""
        with torch.no_grad():
            before = self._logits()
            ids = self.batch["input_ids"]
            half = ids.shape[1] // 2
            later = torch.zeros_like(ids, dtype=torch.bool)
            later[:, half:] = True
            after = self._logits(**(other_tokens(self.batch, later) or {}))
        change = float((after - before)[:, :half].abs().amax() / before.abs().amax())
        sees = change > self.loss_error
        seen = f"change of {change:.1e}" if sees else "no"
        yield told("later tokens seen by earlier positions", seen, "no", not sees)

    def _rows_alone(self) -> Iterable[Finding]:
        """Documents padded, and packed into one row, beside each document by itself."""
        alone = [self._nll(self._padded([example])) for example in self.examples]
        yield self._close_all("padded rows, beside each by itself", self.nll(), torch.cat(alone))
        name = "packed rows, beside each by itself"
        times = 2 if len(alone) == 1 else 1  # one document has none before it to see
        packed = send_to_device(collate_packed(self.examples * times), self.device)
        try:
            yield self._close_all(name, self._nll(packed), torch.cat(alone * times))
        except UnsupportedModel as error:
            yield Finding(name, str(error).partition(":")[2].strip(), "the same nll", "refused")

    def _padded(self, examples: list[Example]) -> Batch:
        batch: Batch = send_to_device(Collator.of(self.tokenizer)(examples), self.device)
        return batch

    def _own_loss(self) -> Tensor | None:
        """The model's own loss of the batch; None if it computes none."""
        taken = inspect.signature(causal_lm(self.model).forward).parameters.values()
        if not any(p.name == "labels" or p.kind is p.VAR_KEYWORD for p in taken):
            return None
        return getattr(self.model(**self.batch), "loss", None)

    def _logits(self, **instead: Tensor) -> Tensor:
        inputs = {k: v for k, v in self.batch.items() if k != "labels"} | instead
        return self.model(**inputs, use_cache=False).logits

    def _nll(self, batch: Batch) -> Tensor:
        known = aligned(batch)
        with torch.no_grad():
            stats = fused_loss(self.model, known, SFT)[1]
        return stats.nll[known["targets"].target != IGNORE]

    def _with_gradients(self, loss: Tensor) -> tuple[float, Batch]:
        """The value of a loss, and its gradients by the names of the parameters."""
        self.model.zero_grad()
        loss.backward()
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return loss.item(), found

    def _close_all(self, what: str, got: Tensor, want: Tensor) -> Finding:
        error = float((got - want).abs().amax() / want.abs().amax().clamp_min(1e-30))
        limit, how = self.loss_error, f"largest error of a token {error:.1e}"
        return told(what, how, "the same nll", error <= limit, limit)

    def _same(
        self, scheme: str, beside: str, got: tuple[float, Batch], want: tuple[float, Batch]
    ) -> Iterable[Finding]:
        """A loss and its gradients, beside those of another way to it."""
        error = abs(got[0] - want[0]) / max(abs(want[0]), 1e-30)
        limit, how = self.loss_error, f"{got[0]:.6f}, error {error:.1e}"
        yield told(f"{scheme}loss, {beside}", how, f"{want[0]:.6f}", error <= limit, limit)
        what, (given, wanted) = f"{scheme}gradients, {beside}", (got[1], want[1])
        if given.keys() != wanted.keys():
            odd = min(given.keys() ^ wanted.keys())
            yield told(what, f"{odd} has one gradient of two", "both", False)
            return
        # Some gradients are nothing but rounding (a bias of keys): those need another measure.
        floor = 1e-3 * max(float(value.norm()) for value in wanted.values())
        error, worst = max(
            (float((given[name] - value).norm()) / max(float(value.norm()), floor), name)
            for name, value in wanted.items()
        )
        limit, how = self.gradient_error, f"largest error {error:.1e} ({worst})"
        yield told(what, how, "the same", error <= limit, limit)


def _saved(trial: _Trial) -> Iterable[Finding]:
    """The model as a run writes it, loaded again: with all parameters trained, and with LoRA.

    Also the loss with LoRA on the head, which then goes to the op as two thin matrices.
    """
    yield _reloaded(trial, "saved and loaded again")
    base = trial.model
    _adapt(trial, EVERYWHERE)
    yield _reloaded(trial, "LoRA merged, saved and loaded again")
    trial.model.unload()
    trial.model, outer = base, causal_lm(base).get_output_embeddings()
    if not isinstance(outer, nn.Linear):
        got = f"the head is a {type(outer).__name__}"
        yield Finding("LoRA on the head", got, "a Linear, which PEFT adapts", "not compared")
        return
    _adapt(trial, tuple(name for name, module in base.named_modules() if module is outer))
    yield from trial.weighted("LoRA on the head, ")
    yield _reloaded(trial, "LoRA on the head merged, saved and loaded again")


def _adapt(trial: _Trial, targets: tuple[str, ...]) -> None:
    trial.model = add_adapters(trial.model, rank=4, targets=targets).eval()
    for name, parameter in trial.model.named_parameters():
        if "lora_B" in name:  # zero until it is trained
            nn.init.normal_(parameter, std=0.02)


def _reloaded(trial: _Trial, what: str) -> Finding:
    want, model = trial.nll(), trial.model
    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(cpu=trial.device.type == "cpu")
        save_model(accelerator, model, trial.tokenizer, Path(folder) / "model")
        loaded, _ = load_pretrained(Path(folder) / "model", next(model.parameters()).dtype)
    trial.model = loaded.to(trial.device).eval()
    try:
        return trial._close_all(what, trial.nll(), want)
    finally:
        trial.model = model


def _show(config: CheckConfig, findings: list[Finding]) -> None:
    names = ("checked", "got", "limit", "expected", "")
    columns = [Column(name, overflow="fold") for name in names]
    table = Table(*columns, title=f"{config.model} on {config.file}")
    for finding in findings:
        got = finding.got.partition(";")[0]  # the file has it whole
        limit = "" if finding.limit is None else f"{finding.limit:.0e}"
        table.add_row(finding.what, got, limit, finding.expected, finding.verdict)
    Console().print(table)
    if config.output is not None:
        write_json(config.output, [asdict(finding) for finding in findings])
