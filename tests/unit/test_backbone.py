from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.backbone import load_backbone, training_dtype
from server.errors import InvalidInput
from tests.support.tiny_server import write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    write_tiny_model(target)
    return target


def test_loads_a_folder_frozen(folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(folder), tmp_path / "cache", dtype=torch.bfloat16)
    assert (backbone.name, backbone.context_length, backbone.eos_token_ids) == ("model", 256, frozenset({2}))
    assert backbone.model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_the_fingerprint_is_of_the_weights_and_the_tokenizer_alone(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load_backbone(str(folder), cache).fingerprint
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors, weights, metadata={"format": "pt", "another": "header"})
    assert load_backbone(str(folder), cache, dtype=torch.bfloat16).fingerprint == first
    name = next(iter(tensors))
    tensors[name][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = load_backbone(str(folder), cache).fingerprint
    assert changed != first
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"<pad>"', '"<nil>"'))
    assert load_backbone(str(folder), cache).fingerprint not in (first, changed)


def test_an_unknown_source_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'nowhere/at-all' is neither a local directory nor"):
        load_backbone("nowhere/at-all", tmp_path)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match="no safetensors weights"):
        load_backbone(str(folder), tmp_path)


@pytest.mark.parametrize(
    ("device", "tiles", "pairs", "dtype"),
    [
        ("cpu", False, False, torch.float32),
        ("cpu", True, False, torch.bfloat16),
        ("cpu", False, True, torch.bfloat16),
        ("cuda", False, False, torch.bfloat16),
    ],
)
def test_learns_in_bf16_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch, device: str, tiles: bool, pairs: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: pairs)
    assert training_dtype(device) == dtype
