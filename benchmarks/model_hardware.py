"""Ceilings of GPUs, and the few constants that every prediction shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# The one rate of the vendor's products that is published for a shape of this kind: three products
# of N 8192, D 4096, V 151,936 in 42 ms on an H100.
PUBLISHED_PRODUCTS = 3 * 2 * 8192 * 4096 * 151_936 / 42e-3
H100_PEAK = 989.4e12
VENDOR_FRACTION = PUBLISHED_PRODUCTS / H100_PEAK

# Share of the memory's peak that a pass over large tensors gets: STREAM-like copies, all of them.
BANDWIDTH_FRACTION = 0.9
# From the start of a kernel to that of the next that depends on it, seconds, the queue being full.
LAUNCH = 3e-6
# A load that misses the first-level cache, seconds; and a program that finds it has nothing to do.
LATENCY = 0.7e-6
EMPTY_PROGRAM = 1e-6
# Bytes a multiprocessor takes from the second-level cache in a cycle.
PORT = 64


@dataclass(frozen=True)
class Gpu:
    """What one GPU cannot exceed. Rates are per second, sizes in bytes."""

    name: str
    target: str  # of the compiler
    peak: float  # dense bfloat16 flop/s
    memory: float  # bandwidth
    cache: float  # size of the second-level cache
    cache_bandwidth: float
    processors: int  # multiprocessors
    multiply_adds: int  # dense bfloat16, of a multiprocessor and cycle
    # Rate of a Triton loop of products, of the vendor's; see docs/triton.md.
    triton: float
    # Multiprocessors that share an operand of the vendor's products: clusters, since Hopper.
    cluster: int
    sources: dict[str, str] = field(default_factory=dict)
    schedulers: int = 4

    @property
    def vendor(self) -> float:
        """Flop/s that the vendor's products reach."""
        return self.peak * VENDOR_FRACTION

    @property
    def clock(self) -> float:
        """Hz, of the cycles in which the peak is counted."""
        return self.peak / (2 * self.multiply_adds * self.processors)

    @property
    def issue(self) -> float:
        """Warp instructions a second."""
        return self.schedulers * self.clock * self.processors

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a pass over large tensors moves."""
        return self.memory * BANDWIDTH_FRACTION

    def row(self) -> dict[str, Any]:
        """For the table of ceilings."""
        return {
            "GPU": self.name,
            "peak TF/s": self.peak / 1e12,
            "vendor TF/s": self.vendor / 1e12,
            "Triton": self.triton,
            "TB/s": self.memory / 1e12,
            "L2 MB": self.cache / 1e6,
            "L2 TB/s": self.cache_bandwidth / 1e12,
            "SMs": self.processors,
            "GHz": self.clock / 1e9,
            "issue T/s": self.issue / 1e12,
        }


_WHITEPAPER = "NVIDIA datasheet and architecture whitepaper"
_ASSUMED_RATE = "assumed, same fraction of peak as H100"
# Pointers instead of descriptors, on an H100: 665.9 Tflop/s of a persistent kernel with descriptors
# (meta-pytorch/tritonbench#894, 8192 x 8192 x 4096), less the 13.4% that they are worth
# (triton-lang/triton#5461), over the vendor's rate above.
HOPPER_TRITON = 665.9e12 / 1.134 / PUBLISHED_PRODUCTS
# Ampere: 170.1 of 176.1 Tflop/s (triton-lang/triton#6523, the largest shape quoted there).
AMPERE_TRITON = 170.1 / 176.1
# Bytes the second-level cache gives a multiprocessor in a cycle while all of them ask: assumed, no
# datasheet has it.
_CACHE = 28

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "A100",
            "sm_80",
            peak=312e12,
            memory=2.039e12,
            cache=40e6,
            cache_bandwidth=_CACHE * 108 * 1.41e9,
            processors=108,
            multiply_adds=1024,
            triton=AMPERE_TRITON,
            cluster=1,
            sources={"vendor": _ASSUMED_RATE, "ceilings": f"{_WHITEPAPER}, SXM 80 GB"},
        ),
        Gpu(
            "H100",
            "sm_90",
            peak=H100_PEAK,
            memory=3.35e12,
            cache=50e6,
            cache_bandwidth=_CACHE * 132 * 1.83e9,
            processors=132,
            multiply_adds=2048,
            triton=HOPPER_TRITON,
            cluster=2,
            sources={
                "vendor": "published: 3G of N 8192, D 4096, V 151,936 in 42 ms",
                "ceilings": f"{_WHITEPAPER}, SXM",
            },
        ),
        Gpu(
            "H200",
            "sm_90",
            peak=H100_PEAK,
            memory=4.8e12,
            cache=50e6,
            cache_bandwidth=_CACHE * 132 * 1.83e9,
            processors=132,
            multiply_adds=2048,
            triton=HOPPER_TRITON,
            cluster=2,
            sources={"vendor": _ASSUMED_RATE, "ceilings": f"{_WHITEPAPER}, SXM"},
        ),
        Gpu(
            "B200",
            "sm_100",
            peak=2250e12,
            memory=8e12,
            cache=126e6,
            cache_bandwidth=_CACHE * 148 * 1.85e9,
            processors=148,
            multiply_adds=4096,
            triton=HOPPER_TRITON,
            cluster=2,
            sources={"vendor": _ASSUMED_RATE, "ceilings": f"{_WHITEPAPER}, HGX"},
        ),
    )
}
