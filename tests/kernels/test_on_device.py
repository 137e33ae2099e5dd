"""What tests of a device need: one that refuses what a GPU would, and pytest alone."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself refuses")
class TestTheDeviceThatIsNone:
    """Refuses what a GPU refuses, and nothing else."""

    @pytest.fixture(autouse=True)
    def on_it(self, on_device): ...

    def test_a_mix_is_refused(self):
        here, there = torch.ones(3), torch.ones(3, device="cpu:7")
        for mix in (lambda: here + there, lambda: torch.equal(there, here)):
            with pytest.raises(RuntimeError, match="expected all tensors on the same device"):
                mix()
        with pytest.raises(RuntimeError, match="__getitem__"):
            here[torch.tensor([1]).to("cpu:7")]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()

    def test_what_torch_allows_is_allowed(self):
        there = torch.ones(3).to("cpu:7").requires_grad_()
        assert (there * torch.tensor(2.0)).device == there.device
        assert there[torch.tensor([1])].device == there.device
        assert torch.zeros(3).copy_(there.detach()).device.index is None
        (there * 2).sum().backward()
        assert there.grad.cpu().numpy().tolist() == [2, 2, 2]
        assert torch.equal(there.cpu(), torch.ones(3))

    def test_kernels_refuse_tensors_of_the_cpu(self):
        pytest.importorskip("triton", reason="triton is not installed")
        from bft_kernels.backends.triton.weighting import balanced_loss
        from bft_kernels.settings import Settings

        loss, labelled = torch.ones(3, device="cpu:7"), torch.ones(3, device="cpu:7").bool()
        bounds, settings = (
            torch.tensor([0, 3], device="cpu:7"),
            Settings(scheme="sft", normalize="token"),
        )
        items = torch.tensor(1)
        with pytest.raises(ValueError, match="a tensor of the CPU"):
            balanced_loss(loss, labelled, bounds, items, settings)
        balanced_loss(loss, labelled, bounds, items.to("cpu:7"), settings)


def test_poison_fills_and_leaves_algorithms_alone(poison):
    """Of deterministic ones cuBLAS is none, unless a variable is set."""
    assert not torch.are_deterministic_algorithms_enabled()
    x = torch.ones(2, 3)
    made = [torch.empty(4), torch.empty_like(x), x.new_empty(2), torch.empty(0, 3)]
    assert all(bool(one.isnan().all()) for one in made)
    assert torch.empty(2, dtype=torch.int64).tolist() == x.new_empty(2, dtype=torch.int64).tolist()


def test_a_gpu_without_the_module_is_no_place_for_the_emulation(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.endswith("._cuda") else find(name)
    )
    with pytest.raises(pytest.skip.Exception, match=r"bft_kernels\._cuda is not built"):
        request.getfixturevalue("cuda_backend")


def test_test_files_can_be_read_without_hypothesis():
    """A machine with a GPU may have torch, Triton, numpy and pytest only."""
    program = "import sys, pytest; sys.modules['hypothesis'] = None; sys.exit(pytest.main())"
    files = [str(HERE / f"test_{name}.py") for name in ("sampling_native", "plan", "weighting")]
    options = ["-p", "no:cacheprovider", "--collect-only", "-q"]
    program = program.replace("main()", f"main({[*options, *files]})")
    path = os.pathsep.join(map(str, [HERE.parents[1], *sys.path[1:]]))
    env = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=HERE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_cpp_equals_the_definition" in done.stdout
