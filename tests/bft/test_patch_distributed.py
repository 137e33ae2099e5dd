"""Two processes on the CPU give the gradients of one: DDP, and FSDP2 with a sharded head."""

import os
from datetime import timedelta

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from bft.head import UnsupportedModel, causal_lm
from bft.loss import HeadLoss, batch_targets, undo_rank_mean
from bft.patch import patch_model
from tests.support.batches import assert_gradients, gradients_of
from tests.support.models import tiny

LOSS = HeadLoss(window=4)
RANKS = 2
KINDS = ("ddp", "patch-fsdp", "fsdp-patch")
LORA_KINDS = ("ddp-lora", "fsdp-lora")  # with an adapter on the head


def build(lora=False):
    model = tiny("LlamaForCausalLM", num_attention_heads=2).double()
    if not lora:
        return model
    torch.manual_seed(2)
    targets = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    config = peft.LoraConfig(r=2, **targets)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def batch():
    """Four rows with different numbers of labels, of which one has none, and with weights."""
    ids = torch.randint(61, (4, 10), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row, first in enumerate((1, 4, 10, 6)):
        labels[row, :first] = -100
    weight = torch.linspace(-1, 2, 40).view(4, 10)
    return {"input_ids": ids, "labels": labels, "token_weight": weight}


def step(model, rows, micro_batches):
    """One optimizer step's backward over ``rows``; the loss is this rank's part of the whole."""
    items = LOSS.count_items(batch_targets(batch())[0])
    total = 0.0
    for part in range(micro_batches):
        some = {k: v[part::micro_batches] for k, v in rows.items()}
        loss = model(**some, num_items=items).loss
        undo_rank_mean(loss).backward()
        total += loss.item()
    return total


def shard(model, reshard):
    """FSDP2 with the head in a group of its own: its weight is only there inside its hooks."""
    from torch.distributed.fsdp import fully_shard

    mesh, inner = dist.init_device_mesh("cpu", (RANKS,)), causal_lm(model)
    for module in (*inner.model.layers, inner.lm_head, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    return model


def prepare(kind):
    if kind.startswith("ddp"):
        return torch.nn.parallel.DistributedDataParallel(patch_model(build("lora" in kind), LOSS))
    if kind == "fsdp-lora":
        return shard(patch_model(build(lora=True), LOSS), reshard=True)
    if kind == "patch-fsdp":
        return shard(patch_model(build(), LOSS), reshard=True)
    return patch_model(shard(build(), reshard=False), LOSS)


def packed(rank):
    """Two documents in the row of the first rank, and one, which tells nothing, in the other's."""
    ids = torch.arange(3, 13)[None]
    return {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.arange(10)[None] % (10 if rank else 4),
    }


def packed_calls(model, rank):
    """What became of packed calls that keep documents apart, and of ones that do not."""
    results = []
    for extra in ({}, {}, {"attention_mask": torch.ones(1, 10, dtype=torch.long)}):
        try:
            model(**packed(rank), **extra).loss.backward()
            results.append("trained")
        except UnsupportedModel:
            results.append("refused")
    return results


def worker(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    ranks = {"rank": rank, "world_size": RANKS, "timeout": timedelta(minutes=3)}
    dist.init_process_group("gloo", init_method=store, **ranks)
    for kind in (*KINDS, *LORA_KINDS):
        model = prepare(kind)
        total = torch.tensor(step(model, {k: v[rank::RANKS] for k, v in batch().items()}, 2))
        dist.all_reduce(total)
        grads = {
            name.removeprefix("module."): p.grad.full_tensor() if "fsdp" in kind else p.grad
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        if rank == 0:
            torch.save((float(total), grads), folder / kind)
        if kind in KINDS and "fsdp" in kind:
            results = packed_calls(prepare(kind), rank)
            (folder / f"{kind}-packed-{rank}").write_text(" ".join(results))
    dist.destroy_process_group()
    # All is saved. Leaving in order aborts now and then, where a thread of gloo's still runs.
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with the gradients of each kind, made by two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (folder,), nprocs=RANKS)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", KINDS + LORA_KINDS)
def test_two_processes_are_one(kind, results):
    total, grads = torch.load(results / kind)
    model = patch_model(build("lora" in kind), LOSS)
    assert total == pytest.approx(step(model, batch(), 1), rel=1e-6)
    assert_gradients(grads, gradients_of(model))


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "fsdp" in kind])
def test_ranks_of_a_sharded_model_try_packed_documents_together(kind, results):
    for rank in range(RANKS):
        assert (results / f"{kind}-packed-{rank}").read_text() == "trained trained refused"
