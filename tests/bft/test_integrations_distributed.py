"""BFTTrainer on two processes takes the step of one, and Trainer's own where it is asked to."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers as hf

from bft.integrations.transformers import BFTTrainer
from tests.bft.test_integrations import assert_close, make, weights

TOKEN = {"scheme": "sft", "normalize": "token"}
APART = {"average_tokens_across_devices": False}
RUNS = {
    "sequence": (BFTTrainer, {"window": 4}, {}),
    "token": (BFTTrainer, {"window": 4, "normalize": "token"}, {}),
    "apart": (BFTTrainer, TOKEN, APART),
    "trainer": (hf.Trainer, {}, {}),
    "trainer-apart": (hf.Trainer, {}, APART),
}


def run(folder, kind, **cut):
    trainer, options, settings = RUNS[kind]
    cut |= {"per_device_eval_batch_size": 1}  # no rank repeats a row to fill its last batch
    trainer = make(folder, trainer, options=options, **settings, **cut)
    trainer.train()
    return weights(trainer), trainer.state.log_history[0], trainer.evaluate()


def worker(rank, folder, port):
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in ranks.items()}}
    for kind in RUNS:
        cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
        torch.save(run(folder, kind, **cut, ddp_backend="gloo"), folder / f"{kind}-{rank}")
    dist.destroy_process_group()
    os._exit(0)  # as in test_patch_distributed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What became of each run on each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (folder, port), nprocs=2)
    return {k: [torch.load(folder / f"{k}-{rank}") for rank in range(2)] for k in RUNS}


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_two_processes_take_the_step_of_one(results, kind, tmp_path):
    want, logged, evaluated = run(tmp_path, kind, per_device_train_batch_size=6)
    for got, log, metrics in results[kind]:
        assert_close(got, want)
        for name in ("loss", "nll", "confidence", "token_weight", "sequence_weight"):
            assert log[name] == pytest.approx(logged[name], rel=1e-4)
        for name in ("nll", "confidence", "token_weight"):
            assert metrics[f"eval_{name}"] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_ranks_may_be_averaged_as_the_unpatched_trainer_does(results):
    for (got, log, metrics), (want, logged, expected) in zip(
        results["apart"], results["trainer-apart"], strict=True
    ):
        assert_close(got, want)
        assert log["loss"] == pytest.approx(logged["loss"], rel=1e-4)
        assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    apart, whole = (results[kind][0][0]["lm_head.weight"] for kind in ("trainer-apart", "trainer"))
    assert not torch.allclose(apart, whole, rtol=1e-4, atol=1e-5)
