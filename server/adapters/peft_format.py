"""PEFT checkpoints: Poly and LoRA directories come in, any adapter goes out as a LoRA directory.

Only `adapter_config.json` and `adapter_model.safetensors` are read; pickled weights are refused unread.
A PEFT weight is stored transposed to ours: `lora_A.weight` (r, d_in), `lora_B.weight` (d_out, r).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.adapters.assembly import Adapter, LowRank
from server.adapters.injection import check_sizes
from server.adapters.inventory import Inventory, InventoryTask, check_heads
from server.adapters.routing import one_hot_routing
from server.errors import InvalidInput

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_POLY_PARTS = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")
_LORA_PARTS = ("lora_A.weight", "lora_B.weight")
# Settings of a LoRA checkpoint that change what its weights mean; each is refused when set.
_REFUSED_SETTINGS = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules saved beside the adapter",
    "lora_bias": "biases",
    "rank_pattern": "a rank per linear",
    "alpha_pattern": "an alpha per linear",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapted bare parameters",
    "megatron_config": "Megatron linears",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
}
# Other initialisations also change the backbone's weights, so that the adapter alone is not the whole model.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class TargetBackbone:
    """The backbone that an imported checkpoint is meant for."""

    name: str
    fingerprint: str
    prompt_format: str  # how a served prompt is rendered
    linear_sizes: Mapping[str, tuple[int, int]]  # linear -> (d_in, d_out), see injection.linear_sizes


def peft_type(directory: Path) -> str:
    """What a checkpoint directory holds, as PEFT names it: "POLY", "LORA" … Raises InvalidInput if it is none."""
    return str(_read_config(directory).get("peft_type"))


def read_poly(
    directory: Path, backbone: TargetBackbone, *, name: str, task_names: Sequence[str] | None = None
) -> Inventory:
    """A PEFT Poly checkpoint as an inventory, weights in the dtype they are stored in.

    Row i of its routing becomes the task `task_names[i]`, by default `<name>-<i>`.
    Raises InvalidInput when the checkpoint is no Poly checkpoint for this backbone, or when its number of
    heads (`n_splits`) does not divide a linear's size, naming the linear.
    """
    config = _read_config(directory, "POLY")
    if config.get("poly_type", "poly") != "poly":
        raise InvalidInput(f"{directory}: poly_type {config['poly_type']!r} is unknown; only 'poly' can be read")
    if config.get("modules_to_save"):
        raise InvalidInput(f"{directory}: it holds {_REFUSED_SETTINGS['modules_to_save']}, which cannot be served")
    num_tasks, num_skills, num_heads, rank = (
        _positive(directory, config, key) for key in ("n_tasks", "n_skills", "n_splits", "r")
    )
    by_linear = _by_linear(directory, _read_tensors(directory), _POLY_PARTS)
    for linear, (A, B, logits) in by_linear.items():
        d_in, d_out = _backbone_sizes(backbone, linear)
        check_heads(linear, d_in, d_out, num_heads)
        _check_shape(directory, linear, A, (num_heads, num_skills, d_in // num_heads, rank))
        _check_shape(directory, linear, B, (num_heads, num_skills, rank, d_out // num_heads))
        _check_shape(directory, linear, logits, (num_tasks, num_heads * num_skills))
    logits = torch.stack([parts[2] for parts in by_linear.values()], dim=1)  # (T, L, h * K)
    logits = logits.reshape(num_tasks, -1, num_heads, num_skills)  # (T, L, h, K)
    tasks = _task_names(name, num_tasks, task_names)
    return Inventory(
        A={linear: parts[0] for linear, parts in by_linear.items()},
        B={linear: parts[1] for linear, parts in by_linear.items()},
        alpha=1.0,  # PEFT Poly scales by 1 / r
        backbone_fingerprint=backbone.fingerprint,
        backbone_name=backbone.name,
        prompt_format=backbone.prompt_format,
        routings={task: logits[row] for row, task in enumerate(tasks)},
        tasks={task: InventoryTask(instruction="") for task in tasks},
        training={"imported_from": "PEFT Poly checkpoint"},
    )


def read_lora(directory: Path, linear_sizes: Mapping[str, tuple[int, int]]) -> Adapter:
    """A PEFT LoRA checkpoint as a plain adapter in fp32; linear_sizes {linear: (d_in, d_out)} are the backbone's.

    Raises InvalidInput for anything that a plain LoRA over these linears cannot express.
    """
    config = _read_config(directory, "LORA")
    _refuse_unsupported_lora(directory, config)
    rank, alpha = _positive(directory, config, "r"), config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0:
        raise InvalidInput(f"{directory}: lora_alpha in {CONFIG_FILE} must be a number above 0, not {alpha!r}")
    weights: dict[str, LowRank] = {}
    for linear, (lora_A, lora_B) in _by_linear(directory, _read_tensors(directory), _LORA_PARTS).items():
        if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != rank or lora_B.shape[1] != rank:
            raise InvalidInput(
                f"{directory}: linear {linear!r} has lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}, "
                f"expected (r, d_in) and (d_out, r) with r = {rank}"
            )
        weights[linear] = LowRank(A=lora_A.float().T.contiguous(), B=lora_B.float().T.contiguous())
    check_sizes(linear_sizes, {linear: (w.A.shape[0], w.B.shape[1]) for linear, w in weights.items()})
    # rslora scales by alpha / sqrt(r), ours by alpha / r
    return Adapter(weights, alpha=alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha), rank=rank)


def inventory_from_loras(adapters: Mapping[str, Adapter], backbone: TargetBackbone) -> Inventory:
    """Named LoRAs as one inventory (h = 1, K = the number of LoRAs) whose tasks are the LoRAs themselves.

    Each task's routing is one-hot, so it serves exactly its LoRA, and new tasks can be routed over all of them.
    Raises InvalidInput, naming the LoRA, when ranks or adapted linears differ.
    """
    if not adapters:
        raise InvalidInput("no LoRA was given; name at least one checkpoint directory")
    first_name, first = next(iter(adapters.items()))
    for name, adapter in adapters.items():
        if adapter.rank != first.rank:
            raise InvalidInput(
                f"LoRA {name!r} has rank {adapter.rank}, {first_name!r} has rank {first.rank}; "
                "import LoRAs of one rank together, others under a name of their own"
            )
        different = sorted(adapter.weights.keys() ^ first.weights.keys())
        if different:
            raise InvalidInput(f"LoRAs {name!r} and {first_name!r} do not both adapt the linear {different[0]!r}")
    num_linears, num_skills = len(first.weights), len(adapters)
    scales = {name: adapter.alpha / first.alpha for name, adapter in adapters.items()}
    return Inventory(
        A={linear: torch.stack([a.weights[linear].A for a in adapters.values()])[None] for linear in first.weights},
        B={
            linear: torch.stack([a.weights[linear].B * scales[name] for name, a in adapters.items()])[None]
            for linear in first.weights
        },
        alpha=first.alpha,
        backbone_fingerprint=backbone.fingerprint,
        backbone_name=backbone.name,
        prompt_format=backbone.prompt_format,
        routings={name: one_hot_routing(num_linears, 1, num_skills, skill) for skill, name in enumerate(adapters)},
        tasks={name: InventoryTask(instruction="") for name in adapters},
        training={"imported_from": "PEFT LoRA checkpoints"},
    )


def lora_files(
    adapter: Adapter, *, base_model: str, fan_in_fan_out: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, bytes]:
    """The files {name: content} of a PEFT LoRA checkpoint that `PeftModel.from_pretrained` loads.

    `base_model` is the Hugging Face id or path written down as the model it belongs to; `fan_in_fan_out` says
    that the model's linears are GPT-2's Conv1D (see `uses_conv1d`).
    """
    alpha = int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": list(adapter.weights),
    }
    tensors: dict[str, Tensor] = {}
    for linear, pair in adapter.weights.items():
        tensors[f"{_PREFIX}{linear}.lora_A.weight"] = pair.A.T.to("cpu", dtype).contiguous()
        tensors[f"{_PREFIX}{linear}.lora_B.weight"] = pair.B.T.to("cpu", dtype).contiguous()
    return {
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS_FILE: safetensors.torch.save(tensors, metadata={"format": "pt"}),
    }


def write_lora(
    adapter: Adapter,
    directory: Path,
    *,
    base_model: str,
    fan_in_fan_out: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `lora_files` into `directory`, which is made if need be."""
    files = lora_files(adapter, base_model=base_model, fan_in_fan_out=fan_in_fan_out, dtype=dtype)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def uses_conv1d(model: nn.Module) -> bool:
    """Whether the model's linears store their weights as (d_in, d_out), as GPT-2's do."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _read_config(directory: Path, wanted: str | None = None) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{directory} is no PEFT checkpoint directory: it has no readable {CONFIG_FILE}") from error
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"{path} must hold a JSON object")
    if wanted is not None and config.get("peft_type") != wanted:
        raise InvalidInput(f"{directory} is a PEFT checkpoint of type {config.get('peft_type')!r}, not {wanted!r}")
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickled = " It has pickled weights, which are never read: load and save it again with PEFT."
        hint = pickled if (directory / "adapter_model.bin").exists() else ""
        raise InvalidInput(f"{directory} has no {WEIGHTS_FILE}.{hint}")
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{path} is damaged or no safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InvalidInput(f"{path}: the tensor {key!r} holds values that are not finite numbers")
    return tensors


def _by_linear(directory: Path, tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """{linear: its tensors in the order of `parts`}, linears in natural order (layer 2 before layer 10)."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part = next((part for part in parts if key.endswith(f".{part}")), None)
        if part is None or not key.startswith(_PREFIX):
            raise InvalidInput(f"{directory}: the tensor {key!r} cannot be served; only {', '.join(parts)} can")
        found.setdefault(key.removeprefix(_PREFIX).removesuffix(f".{part}"), {})[part] = tensor
    if not found:
        raise InvalidInput(f"{directory}: {WEIGHTS_FILE} holds no weights")
    for linear, by_part in found.items():
        missing = [part for part in parts if part not in by_part]
        if missing:
            raise InvalidInput(f"{directory}: linear {linear!r} lacks {missing[0]}")
    return {linear: [found[linear][part] for part in parts] for linear in sorted(found, key=_natural)}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _refuse_unsupported_lora(directory: Path, config: Mapping[str, Any]) -> None:
    remedy = "which a plain LoRA cannot express; merge or retrain it as a plain LoRA"
    for setting, what in _REFUSED_SETTINGS.items():
        if config.get(setting):
            raise InvalidInput(f"{directory}: the checkpoint uses {what} ({setting}), {remedy}")
    if config.get("bias", "none") != "none":
        raise InvalidInput(f"{directory}: the checkpoint trains biases (bias = {config['bias']!r}), {remedy}")
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in _PLAIN_INITIALISATIONS:
        raise InvalidInput(
            f"{directory}: init_lora_weights = {initialisation!r} changes the backbone's weights too; convert the "
            "checkpoint with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) first"
        )


def _positive(directory: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidInput(f"{directory}: {key} in {CONFIG_FILE} must be a whole number of at least 1, not {value!r}")
    return value


def _backbone_sizes(backbone: TargetBackbone, linear: str) -> tuple[int, int]:
    sizes = backbone.linear_sizes.get(linear)
    if sizes is None:
        raise InvalidInput(f"the backbone {backbone.name} has no linear named {linear!r}")
    return sizes


def _check_shape(directory: Path, linear: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise InvalidInput(
            f"{directory}: a tensor of linear {linear!r} has shape {tuple(tensor.shape)}; "
            f"{CONFIG_FILE} and the backbone's sizes ask for {expected}"
        )


def _task_names(name: str, num_tasks: int, given: Sequence[str] | None) -> list[str]:
    names = [f"{name}-{row}" for row in range(num_tasks)] if given is None else list(given)
    if len(names) != num_tasks:
        raise InvalidInput(f"{len(names)} task names were given for {num_tasks} tasks; give one for each row")
    repeated = sorted({task for task in names if names.count(task) > 1})
    if repeated:
        raise InvalidInput(f"the task name {repeated[0]!r} is given twice; task names must differ")
    return names
