from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from server.adapters.adapted_linear import AdaptedLinear, AdapterContext, AddedMix


class AddOne(AddedMix):
    def add(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        assert linear == "q"
        return y + 1


def make() -> tuple[AdaptedLinear, AdapterContext]:
    context = AdapterContext()
    return AdaptedLinear(nn.Linear(8, 12), "q", context), context


def test_the_mix_in_force_adds_to_the_frozen_linear() -> None:
    linear, context = make()
    x = torch.randn(2, 5, 8)
    with context.use(AddOne()):
        assert torch.equal(linear(x), linear.base(x) + 1)
    assert linear.weight is linear.base.weight


def test_without_a_mix_it_is_the_bare_linear() -> None:
    linear, context = make()
    x = torch.randn(2, 8)
    assert torch.equal(linear(x), linear.base(x))
    with context.use(None):
        assert torch.equal(linear(x), linear.base(x))


def test_mixes_nest_and_end_with_their_block_also_after_an_error() -> None:
    context = AdapterContext()
    outer, inner = AddOne(), AddOne()
    with context.use(outer):
        try:
            with context.use(inner):
                assert context.mix is inner
                raise RuntimeError
        except RuntimeError:
            pass
        assert context.mix is outer
    assert context.mix is None


def test_every_thread_has_its_own_mix_in_force() -> None:
    linear, context = make()
    x = torch.randn(2, 8)
    with ThreadPoolExecutor(1) as other, context.use(AddOne()):
        assert torch.equal(other.submit(linear, x).result(), linear.base(x))
        assert torch.equal(linear(x), linear.base(x) + 1)
