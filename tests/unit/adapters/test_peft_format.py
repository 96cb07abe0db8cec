from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from server.adapters.assembly import Adapter, LowRank, assemble
from server.adapters.inventory import Inventory
from server.adapters.peft_format import (
    TargetBackbone,
    inventory_from_loras,
    lora_files,
    peft_type,
    read_lora,
    read_poly,
    uses_conv1d,
    write_lora,
)
from server.errors import InvalidInput

SIZES = {"layers.2.q": (8, 12), "layers.2.v": (8, 4), "layers.10.q": (8, 12)}
BACKBONE = TargetBackbone(name="tiny", fingerprint="f" * 64, prompt_format="plain", linear_sizes=SIZES)
TASKS, SKILLS, HEADS, RANK = 3, 5, 2, 3

WriteCheckpoint = Callable[..., Path]


def poly_config(**changes: Any) -> dict[str, Any]:
    sizes = {"n_tasks": TASKS, "n_skills": SKILLS, "n_splits": HEADS, "r": RANK}
    return {"peft_type": "POLY", "poly_type": "poly", **sizes} | changes


def poly_tensors(heads: int = HEADS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for linear, (d_in, d_out) in SIZES.items():
        prefix = f"base_model.model.{linear}"
        tensors[f"{prefix}.poly_lora_A"] = torch.randn(heads, SKILLS, d_in // heads, RANK, generator=random)
        tensors[f"{prefix}.poly_lora_B"] = torch.randn(heads, SKILLS, RANK, d_out // heads, generator=random)
        tensors[f"{prefix}.poly_router.module_logits"] = torch.randn(TASKS, heads * SKILLS, generator=random)
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def lora_config(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none"} | changes


def lora_tensors(seed: int = 0, rank: int = RANK, linears: tuple[str, ...] = tuple(SIZES)) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for linear in linears:
        d_in, d_out = SIZES[linear]
        tensors[f"base_model.model.{linear}.lora_A.weight"] = torch.randn(rank, d_in, generator=random)
        tensors[f"base_model.model.{linear}.lora_B.weight"] = torch.randn(d_out, rank, generator=random)
    return tensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> WriteCheckpoint:
    """Writes a checkpoint directory from a configuration and tensors."""

    def write(config: dict[str, Any], tensors: dict[str, Tensor], name: str = "checkpoint") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "adapter_config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
        return directory

    return write


def read(directory: Path, **options: Any) -> Inventory:
    return read_poly(directory, BACKBONE, name="shop", **options)


def test_poly_checkpoint_becomes_an_inventory(checkpoint: WriteCheckpoint) -> None:
    tensors = poly_tensors()
    directory = checkpoint(poly_config(), tensors)
    assert peft_type(directory) == "POLY"
    inventory = read(directory)
    assert inventory.linears == ("layers.2.q", "layers.2.v", "layers.10.q")  # natural order
    assert (inventory.num_heads, inventory.num_skills, inventory.rank) == (HEADS, SKILLS, RANK)
    assert inventory.scaling == 1 / RANK
    assert (inventory.backbone_name, inventory.backbone_fingerprint) == ("tiny", "f" * 64)
    assert inventory.prompt_format == "plain"
    assert list(inventory.routings) == list(inventory.tasks) == ["shop-0", "shop-1", "shop-2"]
    for row, linear in enumerate(inventory.linears):
        assert torch.equal(inventory.A[linear], tensors[f"base_model.model.{linear}.poly_lora_A"])
        assert torch.equal(inventory.B[linear], tensors[f"base_model.model.{linear}.poly_lora_B"])
        logits = tensors[f"base_model.model.{linear}.poly_router.module_logits"]
        for task in range(TASKS):
            assert torch.equal(inventory.routings[f"shop-{task}"][row], logits[task].view(HEADS, SKILLS))


def test_poly_tasks_take_the_given_names(checkpoint: WriteCheckpoint) -> None:
    directory = checkpoint(poly_config(), poly_tensors())
    assert list(read(directory, task_names=["tag", "sort", "ask"]).routings) == ["tag", "sort", "ask"]
    with pytest.raises(InvalidInput, match="2 task names were given for 3 tasks"):
        read(directory, task_names=["tag", "sort"])
    with pytest.raises(InvalidInput, match="'tag' is given twice"):
        read(directory, task_names=["tag", "sort", "tag"])


def test_poly_weights_keep_their_stored_dtype(checkpoint: WriteCheckpoint) -> None:
    inventory = read(checkpoint(poly_config(), poly_tensors(dtype=torch.bfloat16)))
    assert inventory.A["layers.2.q"].dtype == torch.bfloat16
    assert assemble(inventory, inventory.routings["shop-0"]).weights["layers.2.q"].A.dtype == torch.float32


def test_heads_that_do_not_divide_a_linear_name_it(checkpoint: WriteCheckpoint) -> None:
    directory = checkpoint(poly_config(n_splits=8), poly_tensors(heads=8))  # PEFT cuts the sizes down silently
    with pytest.raises(InvalidInput, match=r"8 heads do not divide the linear 'layers\.2\.q'"):
        read(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "of type 'LORA', not 'POLY'"),
        ({"peft_type": None}, "of type None"),
        ({"poly_type": "perceiver"}, "poly_type 'perceiver'"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"n_tasks": 0}, "n_tasks"),
        ({"n_skills": "four"}, "n_skills"),
        ({"r": 2.5}, "r in adapter_config"),
        ({"n_splits": True}, "n_splits"),
        ({"n_tasks": 4}, r"layers\.2\.q.*\(3, 10\).*\(4, 10\)"),
        ({"r": 2}, r"layers\.2\.q"),
        ({"n_splits": 4}, r"layers\.2\.q"),
    ],
)
def test_poly_configuration_that_cannot_be_used_is_refused(
    checkpoint: WriteCheckpoint, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        read(checkpoint(poly_config(**changes), poly_tensors()))


def test_poly_of_another_backbone_names_the_linear(checkpoint: WriteCheckpoint) -> None:
    directory = checkpoint(poly_config(), poly_tensors())
    for sizes, linear in (
        ({"layers.2.q": (8, 12)}, r"layers\.2\.v"),
        (SIZES | {"layers.10.q": (8, 8)}, r"layers\.10\.q"),
    ):
        other = TargetBackbone(name="other", fingerprint="0" * 64, prompt_format="plain", linear_sizes=sizes)
        with pytest.raises(InvalidInput, match=linear):
            read_poly(directory, other, name="shop")


def test_poly_with_tensors_missing_or_unknown_is_refused(checkpoint: WriteCheckpoint) -> None:
    tensors = poly_tensors()
    unknown = tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}
    with pytest.raises(InvalidInput, match=r"lm_head\.weight"):
        read(checkpoint(poly_config(), unknown, "unknown"))
    del tensors["base_model.model.layers.2.v.poly_lora_B"]
    with pytest.raises(InvalidInput, match=r"'layers\.2\.v' lacks poly_lora_B"):
        read(checkpoint(poly_config(), tensors, "missing"))
    with pytest.raises(InvalidInput, match="holds no weights"):
        read(checkpoint(poly_config(), {}, "empty"))


def test_weights_that_are_not_finite_are_refused(checkpoint: WriteCheckpoint) -> None:
    tensors = poly_tensors()
    tensors["base_model.model.layers.2.v.poly_lora_B"][0, 0, 0, 0] = math.nan
    with pytest.raises(InvalidInput, match=r"layers\.2\.v\.poly_lora_B.*not finite"):
        read(checkpoint(poly_config(), tensors))


def test_damaged_directories_are_refused(tmp_path: Path, checkpoint: WriteCheckpoint) -> None:
    with pytest.raises(InvalidInput, match=r"no readable adapter_config\.json"):
        read(tmp_path / "absent")
    directory = checkpoint(poly_config(), poly_tensors())
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(InvalidInput, match="damaged"):
        read(directory)
    weights.unlink()
    with pytest.raises(InvalidInput, match=r"has no adapter_model\.safetensors"):
        read(directory)
    for text in ("{", "[]"):
        (directory / "adapter_config.json").write_text(text)
        with pytest.raises(InvalidInput, match="JSON"):
            read(directory)


def test_pickled_weights_are_never_read(checkpoint: WriteCheckpoint) -> None:
    directory = checkpoint(lora_config(), lora_tensors())
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(InvalidInput, match="pickled"):
        read_lora(directory, SIZES)


def test_lora_checkpoint_becomes_an_adapter(checkpoint: WriteCheckpoint) -> None:
    tensors = {key: tensor.half() for key, tensor in lora_tensors().items()}
    adapter = read_lora(checkpoint(lora_config(), tensors), SIZES)
    assert tuple(adapter.weights) == ("layers.2.q", "layers.2.v", "layers.10.q")
    assert (adapter.rank, adapter.alpha, adapter.scaling) == (RANK, 6.0, 2.0)
    for linear, pair in adapter.weights.items():
        assert torch.equal(pair.A, tensors[f"base_model.model.{linear}.lora_A.weight"].float().T)
        assert torch.equal(pair.B, tensors[f"base_model.model.{linear}.lora_B.weight"].float().T)


def test_rank_stabilised_lora_keeps_its_scaling(checkpoint: WriteCheckpoint) -> None:
    adapter = read_lora(checkpoint(lora_config(use_rslora=True), lora_tensors()), SIZES)
    assert adapter.scaling == pytest.approx(6 / math.sqrt(RANK))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "POLY"}, "of type 'POLY'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"rank_pattern": {"q": 8}}, "rank per linear"),
        ({"alpha_pattern": {"q": 8}}, "alpha per linear"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": "6"}, "lora_alpha"),
        ({"r": 2}, r"layers\.2\.q.*r = 2"),
    ],
)
def test_lora_that_a_plain_adapter_cannot_express_is_refused(
    checkpoint: WriteCheckpoint, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_lora(checkpoint(lora_config(**changes), lora_tensors()), SIZES)


@pytest.mark.parametrize("value", [True, False, "gaussian", "eva"])
def test_initialisations_that_leave_the_backbone_alone_are_read(checkpoint: WriteCheckpoint, value: object) -> None:
    read_lora(checkpoint(lora_config(init_lora_weights=value), lora_tensors()), SIZES)


def test_lora_with_other_tensors_or_sizes_is_refused(checkpoint: WriteCheckpoint) -> None:
    tensors = lora_tensors()
    magnitude = tensors | {"base_model.model.layers.2.q.lora_magnitude_vector": torch.ones(12)}
    with pytest.raises(InvalidInput, match="lora_magnitude_vector"):
        read_lora(checkpoint(lora_config(), magnitude, "magnitude"), SIZES)
    directory = checkpoint(lora_config(), tensors)
    with pytest.raises(InvalidInput, match=r"layers\.2\.v"):
        read_lora(directory, {"layers.2.q": (8, 12), "layers.10.q": (8, 12)})
    with pytest.raises(InvalidInput, match=r"layers\.2\.v.*\(8, 8\) in the backbone, \(8, 4\) in the adapter"):
        read_lora(directory, SIZES | {"layers.2.v": (8, 8)})


def make_adapter(
    seed: int = 0, rank: int = RANK, alpha: float = 6.0, linears: tuple[str, ...] = tuple(SIZES)
) -> Adapter:
    random = torch.Generator().manual_seed(seed)
    weights = {
        linear: LowRank(
            torch.randn(SIZES[linear][0], rank, generator=random), torch.randn(rank, SIZES[linear][1], generator=random)
        )
        for linear in linears
    }
    return Adapter(weights, alpha=alpha, rank=rank)


def test_loras_become_an_inventory_whose_tasks_are_exactly_they() -> None:
    loras = {f"lora-{seed}": make_adapter(seed) for seed in range(4)}
    inventory = inventory_from_loras(loras, BACKBONE)
    assert (inventory.num_heads, inventory.num_skills, inventory.rank) == (1, 4, RANK)
    assert list(inventory.routings) == list(inventory.tasks) == list(loras)
    read_back = Inventory.from_bytes(inventory.to_bytes(torch.float32))
    for name, lora in loras.items():
        adapter = assemble(read_back, read_back.routings[name])
        assert adapter.scaling == lora.scaling
        for linear, pair in lora.weights.items():
            assert torch.equal(adapter.weights[linear].A, pair.A)
            assert torch.equal(adapter.weights[linear].B, pair.B)


def test_loras_of_different_alpha_keep_their_own_effect() -> None:
    loras = {"weak": make_adapter(0, alpha=2.0), "strong": make_adapter(1, alpha=16.0)}
    inventory = inventory_from_loras(loras, BACKBONE)
    for name, lora in loras.items():
        adapter = assemble(inventory, inventory.routings[name])
        for linear, pair in lora.weights.items():
            ours = adapter.weights[linear]
            torch.testing.assert_close(adapter.scaling * ours.A @ ours.B, lora.scaling * pair.A @ pair.B)


def test_loras_that_do_not_match_are_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="'wide' has rank 4, 'first' has rank 3"):
        inventory_from_loras({"first": make_adapter(), "wide": make_adapter(rank=4)}, BACKBONE)
    fewer = make_adapter(linears=("layers.2.q", "layers.10.q"))
    with pytest.raises(InvalidInput, match=r"'less' and 'first' do not both adapt the linear 'layers\.2\.v'"):
        inventory_from_loras({"first": make_adapter(), "less": fewer}, BACKBONE)
    with pytest.raises(InvalidInput, match="no LoRA"):
        inventory_from_loras({}, BACKBONE)


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_written_lora_is_read_back_as_it_was(tmp_path: Path, alpha: float) -> None:
    adapter = make_adapter(alpha=alpha)
    write_lora(adapter, tmp_path / "new" / "lora", base_model="tiny-model")
    read_back = read_lora(tmp_path / "new" / "lora", SIZES)
    assert (read_back.alpha, read_back.rank) == (alpha, RANK)
    for linear, pair in adapter.weights.items():
        assert torch.equal(read_back.weights[linear].A, pair.A)
        assert torch.equal(read_back.weights[linear].B, pair.B)


def test_written_configuration_names_base_model_and_full_linears() -> None:
    files = lora_files(make_adapter(alpha=1.0), base_model="tiny-model", fan_in_fan_out=True, dtype=torch.float16)
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tiny-model"
    assert config["target_modules"] == list(SIZES)
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (RANK, 1, True)
    assert isinstance(config["lora_alpha"], int)
    tensors = safetensors.torch.load(files["adapter_model.safetensors"])
    assert tensors["base_model.model.layers.2.v.lora_A.weight"].shape == (RANK, 8)
    assert tensors["base_model.model.layers.2.v.lora_B.weight"].shape == (4, RANK)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_conv1d_models_are_recognised(small_llama: LlamaForCausalLM, small_gpt2: GPT2LMHeadModel) -> None:
    assert uses_conv1d(small_gpt2)
    assert not uses_conv1d(small_llama)
