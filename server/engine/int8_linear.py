"""Linears with 8-bit weights on CPU, and activations quantised as they come.

A weight has one scale per output channel. A row of activations has one scale and two 8-bit digits per number, which
go through the product as two rows: the weight is read once for both, and nothing worth mentioning is lost. A row's
scale depends on that row alone, and the sums are sums of integers, so that a row's product is the same whatever else
is in the batch. docs/decisions/0009-int8.md has the reasons and the figures.

Letters: N rows, d_in and d_out of one linear, D the sum of d_out over linears that read the same input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.adapters.adapted_linear import AdaptedLinear
from server.engine.int8_digits import LARGEST
from server.engine.int8_product import Int8Weight, make_product, plain_product, quantise_weights
from server.errors import InvalidInput
from server.native.library import Library


class SharedInput:
    """One product for linears that the model calls one after another on the same input tensor.

    The first call computes it, the others take their columns; it is forgotten when all were taken.
    """

    def __init__(self, weights: Sequence[Tensor], library: Library | None) -> None:
        self.d_in = weights[0].shape[1]
        self.sizes = [len(w) for w in weights]
        self._product = make_product(quantise_weights(weights), library)
        self._x: Tensor | None = None
        self._columns: dict[int, Tensor] = {}  # of the product with _x, each (N, d_out), by those yet to be taken

    def product(self, x: Tensor) -> Tensor:
        """x (N, d_in) in fp32 -> all linears' columns (N, D) in fp32, without their biases."""
        return self._product(x)

    def columns(self, place: int, x: Tensor) -> Tensor:
        """x (..., d_in) -> the part (..., d_out) of the linear at `place`, in a tensor of its own, without its bias."""
        if self._x is not x or place not in self._columns:
            y = self._product(x.reshape(-1, x.shape[-1]).float())
            self._x, self._columns = x, dict(enumerate(torch.split(y, self.sizes, dim=1)))
        y = self._columns.pop(place)
        if not self._columns:
            self._x = None
        return y.to(x.dtype, copy=len(self.sizes) > 1).reshape(*x.shape[:-1], y.shape[1])


class Int8Linear(nn.Module):
    """Takes the place of a frozen linear, without gradients."""

    def __init__(self, shared: SharedInput, place: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.shared = shared
        self._place = place
        self.in_features = shared.d_in
        self.out_features = shared.sizes[place]
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # Some models ask a linear's weight for its type.
        self.register_buffer("weight", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        y = self.shared.columns(self._place, x)
        return y if self.bias is None else y.add_(self.bias)


def int8_linears(linears: Sequence[nn.Linear | Conv1D], library: Library | None) -> list[Int8Linear]:
    """8-bit linears that compute one product together; the given ones read the same input."""
    shared = SharedInput([_weight(linear) for linear in linears], library)
    return [Int8Linear(shared, place, linear.bias, linear.weight.dtype) for place, linear in enumerate(linears)]


def quantise_model(
    model: PreTrainedModel, input_groups: Iterable[Sequence[str]], library: Library | None = None
) -> None:
    """Put 8-bit linears in the place of an injected model's linears, group by group, and of its output head.

    Their products are the library's where it has them, else torch's. The full weights are let go, except those that
    the input embedding shares. Raises InvalidInput where 8-bit products cannot be computed exactly.
    """
    check_int8_works(model.device, library)
    for group in input_groups:
        adapted = [_adapted(model, name) for name in group]
        for linear, base in zip(adapted, int8_linears([_plain(a.base) for a in adapted], library), strict=True):
            linear.base = base
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    if type(head) is nn.Linear:
        model.set_output_embeddings(int8_linears([head], library)[0])  # type: ignore[no-untyped-call]
    # Weights loaded from a file may be parts of one mapping of it, which goes when none of them is left.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def check_int8_works(device: torch.device, library: Library | None) -> None:
    """Raise InvalidInput, with the remedy, where 8-bit products are missing or not exact."""
    remedy = "set MHR_QUANTIZATION=none"
    if device.type != "cpu":
        raise InvalidInput(f"int8 is computed on the CPU only, the device is {device}; {remedy}", param="quantization")
    # The largest numbers that occur: processors without 8-bit instructions for them saturate on the way.
    weight, x = Int8Weight(torch.full((64, 64), LARGEST, dtype=torch.int8), torch.ones(64)), torch.ones(3, 64)
    try:
        product = make_product(weight, library)
    except NotImplementedError as error:
        raise InvalidInput(f"{error}; {remedy}", param="quantization") from error
    if not torch.allclose(product(x), plain_product(x, weight), rtol=1e-6):
        raise InvalidInput(f"this processor computes 8-bit products inexactly; {remedy}", param="quantization")


def _adapted(model: PreTrainedModel, name: str) -> AdaptedLinear:
    module = model.get_submodule(name)
    assert isinstance(module, AdaptedLinear), f"{name} was not injected"
    return module


def _plain(base: nn.Module) -> nn.Linear | Conv1D:
    assert isinstance(base, nn.Linear | Conv1D), f"the model was quantised before: it has a {type(base).__name__}"
    return base


def _weight(linear: nn.Linear | Conv1D) -> Tensor:
    """(d_out, d_in)."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
