"""docs/recipes: each recipe's numbers beside those of plain torch or of the library itself."""

import contextlib
import importlib
import math
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
import trl
from torch.nn.functional import cross_entropy, linear

import bft_kernels
from bft import HeadLoss
from tests.support.models import tiny

LORA = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
FOLDER = Path(__file__).resolve().parents[2] / "docs" / "recipes"


@pytest.fixture
def recipe(monkeypatch, fresh_accelerator):
    """Imports a recipe by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    torch.manual_seed(0)
    return importlib.import_module


def merged(data):
    """Batches, two made one."""
    pairs = zip(data[::2], data[1::2], strict=True)
    return [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in pairs]


def by_hand(model, data, loss):
    """The losses of SGD steps, one a batch, with ``loss(hidden, weight, labels)``."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for batch in data:
        value = loss(model(batch["input_ids"]), model.head.weight, batch["labels"])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.cell("pytorch_loop.py", "loss", "gradient", "accumulation")
def test_plain_pytorch_divides_by_the_steps_tokens(recipe):
    def eager(hidden, weight, labels):
        return cross_entropy(linear(hidden, weight)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    loop = recipe("pytorch_loop")
    model = loop.Model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    got = loop.train(model, loop.batches(8))
    model.load_state_dict(state)
    assert got == pytest.approx(by_hand(model, merged(loop.batches(8)), eager), rel=1e-5)
    assert got[0] == pytest.approx(math.log(512), rel=0.1)


@pytest.mark.cell("multi_token.py", "loss", "gradient", "packing")
@pytest.mark.parametrize("cuts", [None, [5, 7, 2, 14]], ids=["rows", "documents"])
def test_depths_of_multi_token_prediction_add_up(recipe, cuts):
    hidden = torch.randn(3, 2, 14, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    labels, factors = torch.randint(40, (2, 14)), [1.0, 0.3, -0.1]
    labels[0, :3] = -100
    bounds = None if cuts is None else torch.tensor([0, *cuts]).cumsum(0)
    got = recipe("multi_token").multi_token_loss(hidden, weight, labels, factors, bounds)
    documents = [14, 14] if cuts is None else cuts
    want = 0.0
    for depth, factor in enumerate(factors, 1):
        rows, targets = hidden[depth - 1].flatten(0, 1).split(documents), labels.flatten()
        pairs = zip(rows, targets.split(documents), strict=True)
        rows, targets = zip(*[(h[:-depth], t[depth:]) for h, t in pairs], strict=True)
        want += factor * cross_entropy(linear(torch.cat(rows), weight), torch.cat(targets))
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.cell("accelerate_loop.py", "loss", "gradient", "accumulation")
def test_accelerate_divides_by_the_steps_documents(recipe):
    loop, loss = recipe("accelerate_loop"), HeadLoss(window=4)
    data = loop.rows(32)
    got = loop.train(loop.small_model(), data, loss)
    want = loop.train(loop.small_model(), data, loss, batch_size=8, accumulation=1)
    assert len(got) == 4
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.cell("lightning_loop.py", "loss", "gradient")
def test_lightning_takes_the_steps_of_a_loop(recipe):
    pytest.importorskip("lightning")
    loop, lightning = recipe("pytorch_loop"), recipe("lightning_loop")
    model, data = loop.Model(), loop.batches(4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    got = lightning.train(model, data)
    model.load_state_dict(state)
    balanced = bft_kernels.BalancedLinearCrossEntropyLoss(window=4, shift=True)
    assert got == pytest.approx(by_hand(model, data, balanced), rel=1e-5)


@pytest.mark.cell("torchtune_recipe.py", "loss", "gradient")
def test_torchtune_has_its_own_loss_step(recipe, monkeypatch):
    torchtune = pytest.importorskip("torchtune")
    llama2 = recipe("torchtune.models.llama2").llama2
    chunked = recipe("torchtune.modules.loss").CEWithChunkedOutputLoss()
    monkeypatch.syspath_prepend(str(Path(torchtune.__file__).parents[1] / "recipes"))
    fused = recipe("torchtune_recipe").FusedRecipe
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
    model, results = llama2(vocab_size=512, max_seq_len=32, **sizes), []
    for kind in (fused, fused.__base__):
        step = object.__new__(kind)
        step._model, step._loss_fn = model, chunked
        step.ignore_labels_cache = torch.full((4, 1), -100)
        step.activations_handling_ctx = contextlib.nullcontext()
        batch = recipe("pytorch_loop").batches(1)[0]
        model.zero_grad()
        if kind is not fused:
            model.set_num_output_chunks(8)
        loss = step._loss_step({"tokens": batch["input_ids"], "labels": batch["labels"]})
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*results)
    assert list(model.state_dict()) == list(llama2(512, max_seq_len=32, **sizes).state_dict())


RL = {
    "dpo": ({}, {}),
    "dpo precomputed": ({"precompute_ref_log_probs": True}, {}),
    "dpo lora": ({}, {"peft_config": LORA}),
    "dpo cut": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}),
    "grpo bonus": ({"entropy_coef": 0.1}, {"options": {"differentiable": ("entropy",)}}),
    "grpo": ({"temperature": 0.7, "top_entropy_quantile": 0.5}, {}),
    "grpo cut": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, {}),
}


def cells(cases, *properties):
    """Cases whose first word names a trainer of TRL; those cut in micro-batches show that, too."""
    for case in cases:
        shown = (*properties, *(["accumulation"] if case.endswith("cut") else []))
        yield pytest.param(case, marks=pytest.mark.cell(f"trl_{case.split()[0]}.py", *shown))


@pytest.mark.parametrize("case", list(cells(RL, "loss", "gradient")))
def test_trl_has_its_own_numbers(recipe, tmp_path, case):
    """Logs and weights of two steps. In DPO's first all rewards are 0, so accuracies are noise."""
    name = case.split()[0]
    module, head = recipe(f"trl_{name}"), recipe("trl_head")
    fused = getattr(module, f"Fused{name.upper()}Trainer")
    own, runs = getattr(trl, f"{name.upper()}Trainer"), []
    settings, options = RL[case]
    for kind in (fused, own):
        if kind is own:
            options = {name: value for name, value in options.items() if name != "options"}
        torch.manual_seed(0)
        trainer = module.build(kind, str(tmp_path), {"learning_rate": 1e-2, **settings}, **options)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        before = torch.cat([p.detach().flatten() for p in trained])
        with mock.patch.object(head, "linear_nll", wraps=bft_kernels.linear_nll) as called:
            trainer.train()
        assert called.called == (kind is fused)
        after = torch.cat([p.detach().flatten() for p in trained])
        runs.append((trainer.state.log_history, after - before))
    (ours, moved), (theirs, way) = runs
    torch.testing.assert_close(moved, way, rtol=0, atol=1e-2 * float(way.abs().max()))
    for mine, want in zip(ours, theirs, strict=True):
        for key, value in want.items():
            if not key.endswith(("runtime", "per_second", "time", "accuracies")):
                assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_an_adapter_on_the_head_reaches_trls_log_probabilities(recipe):
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("LlamaForCausalLM"), config).double()
    ids = torch.randint(61, (2, 9))
    logits = model(input_ids=ids).logits[:, :-1]
    recipe("trl_head").add_fused_lm_head(model.get_base_model(), outputs=("mean_logits",))
    got = model(input_ids=ids, labels=ids, fused_lm_head=True)
    want = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(got.log_probs, want)
    torch.testing.assert_close(got.mean_logits.double(), logits.mean(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(cells(["dpo", "grpo"], "evaluation", "save", "resume")))
def test_trl_evaluates_saves_and_resumes(recipe, tmp_path, name):
    """The evaluation is TRL's own; a run that goes on from its first step ends where it ended."""
    module, folder = recipe(f"trl_{name}"), str(tmp_path)
    fused, own = (
        getattr(module, f"Fused{name.upper()}Trainer"),
        getattr(trl, f"{name.upper()}Trainer"),
    )
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_eval_batch_size": 4}
    settings |= {"learning_rate": 1e-2, "seed": 3}

    def build(kind):
        made = module.build(kind, folder, settings)
        made.eval_dataset = made.train_dataset
        return made

    def weights(trainer):
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    evaluations = []
    for kind in (fused, own):
        trainer = build(kind)
        torch.manual_seed(0)
        evaluations.append(trainer.evaluate())
    ours, theirs = evaluations
    for key, value in theirs.items():
        if not key.endswith(("runtime", "per_second", "time", "accuracies")):
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key

    whole = build(fused)
    whole.train()
    want = weights(whole)
    resumed = build(fused)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
    torch.testing.assert_close(weights(resumed), want, rtol=0, atol=0)
    loaded = type(whole.model).from_pretrained(f"{folder}/checkpoint-2")
    torch.testing.assert_close(dict(loaded.named_parameters()), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("DPO", {"use_weighting": True}, r"^outputs: got log_sum_sq_probs"),
        ("GRPO", {"entropy_coef": 0.1}, r"^options: expected differentiable"),
    ],
)
def test_what_the_head_lacks_is_refused(recipe, tmp_path, name, settings, said):
    module = recipe(f"trl_{name.lower()}")
    with pytest.raises(ValueError, match=said):
        module.build(getattr(module, f"Fused{name}Trainer"), str(tmp_path), settings)


@pytest.mark.cell("head_precision.py", "loss")
def test_bfloat16_operands_give_float32_log_probabilities(recipe):
    hidden, weight = torch.randn(300, 64), torch.randn(2000, 64) / 2
    target = torch.randint(2000, (300,))
    found = recipe("head_precision").errors(hidden.bfloat16(), weight.bfloat16(), target)
    narrow, wide, ours = (
        found[way][1] for way in ("bfloat16 logits", "float32 head", "linear_nll")
    )
    assert ours < 2 * wide < 1e-4
    assert narrow > 1000 * ours


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_page_names_each_recipe(path):
    assert f"]({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")
