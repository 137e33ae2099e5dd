"""Targets, normaliser and settings of the training loss."""

import dataclasses

import pytest
import torch

from bft.loss import IGNORE, Head, HeadLoss, batch_targets, draw_seed, undo_rank_mean
from bft_kernels import reference

ROWS = [[IGNORE, 5, 6, 7], [IGNORE, IGNORE, 8, IGNORE], [IGNORE] * 4]


def problem(rows=3, length=8):
    """``hidden [B, T, D]``, a head with everything, ``target [B, T]`` with gaps."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, length, 6, generator=draw, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=draw, dtype=torch.float64)
    bias = torch.randn(11, generator=draw, dtype=torch.float64)
    target = torch.randint(11, (rows, length), generator=draw)
    target[:, ::3] = IGNORE
    return hidden.requires_grad_(), Head(weight.requires_grad_(), bias, 2.0, 0.7), target


# --- targets -------------------------------------------------------------------------------------


def test_labels_are_shifted_within_rows():
    target, cu_seqlens = batch_targets({"labels": torch.tensor(ROWS)})
    assert target.tolist() == [[5, 6, 7, IGNORE], [IGNORE, 8, IGNORE, IGNORE], [IGNORE] * 4]
    assert cu_seqlens is None


@pytest.mark.parametrize("key", ["position_ids", "cu_seqlens", "cu_seq_lens_q"])
def test_no_target_crosses_a_document(key):
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    boundaries = torch.tensor([0, 2, 5])
    value = torch.tensor([[0, 1, 0, 1, 2]]) if key == "position_ids" else boundaries
    target, cu_seqlens = batch_targets({"labels": labels, key: value})
    assert target.tolist() == [[2, IGNORE, 4, 5, IGNORE]]
    assert cu_seqlens is not None
    assert cu_seqlens.tolist() == boundaries.tolist()


def test_what_comes_first():
    """Shifted labels, as they are; cu_seqlens, beside position_ids that may have one row."""
    rows = torch.tensor(ROWS)
    target, _ = batch_targets({"shift_labels": rows, "labels": torch.zeros_like(rows)})
    assert target is rows
    batch = {"labels": torch.tensor(ROWS), "position_ids": torch.arange(4)[None]}
    assert batch_targets(batch)[1].tolist() == [0, 4, 8, 12]
    assert batch_targets(batch | {"cu_seqlens": torch.tensor([0, 12])})[1].tolist() == [0, 12]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"position_ids": torch.arange(4)[None]}, r"position_ids: got shape \(1, 4\), expected"),
        ({"position_ids": torch.zeros(2, 2, 3)}, r"got shape \(2, 2, 3\), expected .* 3 or 4"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: ends at 5, expected .* 6"),
        ({"labels": None, "shift_labels": None}, "the batch holds neither labels nor shift_labels"),
        ({"labels": torch.zeros(6).long(), "shift_labels": None}, r"labels: got \(6,\) torch"),
        ({"shift_labels": torch.zeros(2, 3)}, r"shift_labels: got \(2, 3\) torch.float"),
    ],
)
@pytest.mark.parametrize("key", ["labels", "shift_labels"])
def test_bad_batches_are_refused(key, extra, message):
    with pytest.raises((ValueError, TypeError), match=message):
        batch_targets({key: torch.zeros(2, 3, dtype=torch.int64), **extra})


# --- normaliser ----------------------------------------------------------------------------------


def test_items_are_labelled_documents_or_labelled_tokens():
    target, _ = batch_targets({"labels": torch.tensor(ROWS)})
    cu_seqlens = torch.tensor([0, 2, 2, 4, 9, 12])
    assert int(HeadLoss().count_items(target)) == 2
    assert int(HeadLoss().count_items(target, cu_seqlens)) == 3
    assert int(HeadLoss(normalize="token").count_items(target, cu_seqlens)) == 4
    nothing = torch.full((2, 0), IGNORE)
    assert int(HeadLoss().count_items(nothing, torch.tensor([0]))) == 0


def test_equals_the_reference_over_packed_documents():
    hidden, head, target = problem()
    cu_seqlens = torch.tensor([0, 3, 3, 14, 24])
    got, stats = HeadLoss(window=4)(hidden, head, target, cu_seqlens)
    args = (hidden.flatten(0, 1), head.weight, target.flatten(), cu_seqlens)
    options = {"softcap": head.softcap, "temperature": head.temperature, "window": 4}
    want = reference.balanced_linear_cross_entropy(*args, bias=head.bias, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert stats.token_weight.shape == target.shape
    leaves = [hidden, head.weight]
    grads, expected = torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)])
def test_a_step_of_no_items_with_a_label_is_refused(num_items):
    hidden, head, target = problem()
    with pytest.raises(ValueError, match=r"^num_items: got 0 with 15 labelled tokens"):
        HeadLoss()(hidden, head, target, num_items=num_items)
    with pytest.raises(ValueError, match=r"^num_items: got -1.*at least 0"):
        HeadLoss()(hidden, head, target, num_items=num_items - 1)


# --- settings ------------------------------------------------------------------------------------


def test_settings_are_frozen_and_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HeadLoss().window = 3
    with pytest.raises(ValueError, match="normalize: got 'row'"):
        HeadLoss(normalize="row")


def test_sampled_draws_anew_unless_seeded_and_exact_draws_nothing():
    hidden, head, target = problem()

    def gradient(loss):
        return torch.autograd.grad(loss(hidden, head, target)[0], hidden)[0]

    sampled = HeadLoss(scheme="sft", gradient="sampled", eps=0.25)
    torch.manual_seed(1)
    first, second = gradient(sampled), gradient(sampled)
    torch.manual_seed(1)
    assert torch.equal(gradient(sampled), first)
    assert not torch.equal(first, second)
    fixed = dataclasses.replace(sampled, seed=3)
    assert torch.equal(gradient(fixed), gradient(fixed))
    before = torch.get_rng_state()
    gradient(HeadLoss())
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_draw_different_seeds_and_add_up_their_losses(monkeypatch):
    assert undo_rank_mean(torch.tensor(2.0)) == 2
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    seeds = []
    for rank in range(64):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        seeds.append(draw_seed(2**31 - 1))
    assert len(set(seeds)) == 64
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert undo_rank_mean(torch.tensor(2.0)) == 8
