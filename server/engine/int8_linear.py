"""Linears with 8-bit weights on CPU, and activations quantised as they come.

A weight has one scale per output channel. A row of activations has one scale and two 8-bit digits per number, which
go through the product as two rows: the weight is read once for both, and nothing worth mentioning is lost. A row's
scale depends on that row alone, and the sums are sums of integers, so that a row's product is the same whatever else
is in the batch. docs/decisions/0009-int8.md has the reasons and the figures.

Letters: N rows, d_in and d_out of one linear, D the sum of d_out over linears that read the same input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.adapters.adapted_linear import AdaptedLinear
from server.engine.int8_digits import BASE, LARGEST, OFFSET, CompiledDigits, Digits, TorchDigits, to_steps
from server.errors import InvalidInput
from server.native.library import Library

_BLOCK = 4096  # rows of a weight quantised at once, which bounds the memory that it takes


@dataclass(frozen=True)
class Int8Weight:
    """A weight as `values * scales[:, None]`."""

    values: Tensor  # (d_out, d_in) int8, -127 … 127
    scales: Tensor  # (d_out,) fp32


def quantise_weights(weights: Iterable[Tensor]) -> Int8Weight:
    """Weights (d_out, d_in) of one d_in as one, below each other, with a scale for each output channel."""
    blocks = [to_steps(block) for weight in weights for block in torch.split(weight.detach(), _BLOCK)]
    return Int8Weight(
        torch.cat([steps.round_().to(torch.int8) for steps, _ in blocks]),
        torch.cat([scales[:, 0] for _, scales in blocks]),
    )


def plain_product(x: Tensor, weight: Int8Weight) -> Tensor:
    """x (N, d_in) -> (N, d_out) in fp32, step by step in plain torch: what the 8-bit linears compute."""
    digits, scales = TorchDigits().quantise(x)
    sums = (digits.double() - OFFSET) @ weight.values.double().T  # (2, N, d_out) whole numbers, exact in this type
    products = sums.float() * weight.scales
    return (products[0] + products[1] / BASE) * scales


class Int8Product:
    """The same product by oneDNN, with the weight packed once in the processor's own layout."""

    def __init__(self, weight: Int8Weight) -> None:
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.values, None)
        self._scales = weight.scales
        self._zero_points = torch.zeros(len(weight.scales), dtype=torch.int32)

    def __call__(self, digits: Tensor) -> Tensor:
        """Activations' digits (2, N, d_in), OFFSET more than they are -> their products (2, N, d_out)."""
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            digits.flatten(0, 1),
            1.0,
            OFFSET,
            self._packed,
            self._scales,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return product.view(2, digits.shape[1], len(self._scales))


class SharedInput:
    """One product for linears that the model calls one after another on the same input tensor.

    The first call computes it, the others take their columns; it is forgotten when all were taken.
    """

    def __init__(self, weights: Sequence[Tensor], digits: Digits) -> None:
        self.d_in = weights[0].shape[1]
        self.sizes = [len(w) for w in weights]
        self._firsts = [sum(self.sizes[:place]) for place in range(len(weights))]
        self._digits = digits
        self._product = Int8Product(quantise_weights(weights))
        self._x: Tensor | None = None
        self._computed: tuple[Tensor, Tensor] | None = None  # the digits' products (2, N, D) and scales (N, 1) of _x
        self._left: set[int] = set()  # places whose columns were not taken yet

    def product(self, x: Tensor) -> Tensor:
        """x (N, d_in) -> all linears' columns (N, D) in fp32, without their biases."""
        digits, scales = self._digits.quantise(x)
        return self._digits.join(self._product(digits), scales, 0, sum(self.sizes))

    def columns(self, place: int, x: Tensor) -> Tensor:
        """x (..., d_in) -> the part (..., d_out) of the linear at `place`, in a tensor of its own, without its bias."""
        if self._x is not x or place not in self._left:
            digits, scales = self._digits.quantise(x.reshape(-1, x.shape[-1]))
            self._x, self._computed = x, (self._product(digits), scales)
            self._left = set(range(len(self.sizes)))
        assert self._computed is not None
        y = self._digits.join(*self._computed, self._firsts[place], self.sizes[place])
        self._left.remove(place)
        if not self._left:
            self._x = self._computed = None
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


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


def int8_linears(linears: Sequence[nn.Linear | Conv1D], digits: Digits) -> list[Int8Linear]:
    """8-bit linears that compute one product together; the given ones read the same input."""
    shared = SharedInput([_weight(linear) for linear in linears], digits)
    return [Int8Linear(shared, place, linear.bias, linear.weight.dtype) for place, linear in enumerate(linears)]


def quantise_model(
    model: PreTrainedModel, input_groups: Iterable[Sequence[str]], library: Library | None = None
) -> None:
    """Put 8-bit linears in the place of an injected model's linears, group by group, and of its output head.

    The arithmetic around their products is the library's where one is given, else torch's.

    The full weights are let go, except those that the input embedding shares. Raises InvalidInput where 8-bit
    products cannot be computed exactly.
    """
    check_int8_works(model.device)
    digits = TorchDigits() if library is None else CompiledDigits(library)
    for group in input_groups:
        adapted = [_adapted(model, name) for name in group]
        for linear, base in zip(adapted, int8_linears([_plain(a.base) for a in adapted], digits), strict=True):
            linear.base = base
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    if type(head) is nn.Linear:
        model.set_output_embeddings(int8_linears([head], digits)[0])  # type: ignore[no-untyped-call]
    # Weights loaded from a file may be parts of one mapping of it, which goes when none of them is left.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def check_int8_works(device: torch.device) -> None:
    """Raise InvalidInput, with the remedy, where 8-bit products are missing or not exact."""
    remedy = "set MHR_QUANTIZATION=none"
    if device.type != "cpu":
        raise InvalidInput(f"int8 is computed on the CPU only, the device is {device}; {remedy}", param="quantization")
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise InvalidInput(f"this build of torch has no 8-bit products (oneDNN); {remedy}", param="quantization")
    # The largest numbers that occur: processors without 8-bit instructions for them saturate on the way.
    weight = Int8Weight(torch.full((64, 64), LARGEST, dtype=torch.int8), torch.ones(64))
    x, torchs = torch.ones(3, 64), TorchDigits()
    digits, scales = torchs.quantise(x)
    if not torch.equal(torchs.join(Int8Product(weight)(digits), scales, 0, 64), plain_product(x, weight)):
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
