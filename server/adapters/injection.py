"""Finding a transformers model's linears and wrapping them, once, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.adapters.adapted_linear import AdaptedLinear, AdapterContext
from server.errors import InvalidInput


def linear_sizes(
    model: PreTrainedModel, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, tuple[int, int]]:
    """{name: (d_in, d_out)} of the model's adaptable linears: all but its output embedding, wrapped or not."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    bases = {m.base for m in model.modules() if isinstance(m, AdaptedLinear)}
    sizes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            module = module.base
        elif not isinstance(module, nn.Linear | Conv1D) or module is head or module in bases:
            continue
        if wanted(name):
            sizes[name] = _sizes(module)
    return sizes


def inject(model: PreTrainedModel) -> AdapterContext:
    """Freeze the model and wrap each of its adaptable linears; a second call returns the first one's context."""
    wrapped = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    if wrapped:
        return wrapped[0].context
    model.requires_grad_(False)
    context = AdapterContext()
    for name in linear_sizes(model):
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, AdaptedLinear(getattr(owner, child), name, context))
    return context


def check_fits(model: PreTrainedModel, needed: Mapping[str, tuple[int, int]]) -> None:
    """Raise InvalidInput when a needed linear {name: (d_in, d_out)} is missing in the model or of another size."""
    check_sizes(linear_sizes(model), needed)


def check_sizes(sizes: Mapping[str, tuple[int, int]], needed: Mapping[str, tuple[int, int]]) -> None:
    """As `check_fits`, for a backbone of which only the `linear_sizes` are at hand."""
    for name, size in needed.items():
        if name not in sizes:
            raise InvalidInput(f"the backbone has no linear named {name!r}")
        if sizes[name] != size:
            raise InvalidInput(f"the linear {name!r} has sizes {sizes[name]} in the backbone, {size} in the adapter")


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Of a linear of torch or one with the same attributes, or of a Conv1D."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    d_in, d_out = module.in_features, module.out_features
    assert isinstance(d_in, int)
    assert isinstance(d_out, int)
    return d_in, d_out
