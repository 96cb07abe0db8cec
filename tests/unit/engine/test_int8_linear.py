from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from server.adapters.assembly import Adapter
from server.adapters.injection import inject, linear_sizes
from server.engine.config import EngineConfig
from server.engine.int8_digits import LARGEST, OFFSET, CompiledDigits, TorchDigits
from server.engine.int8_linear import Int8Linear, check_int8_works, int8_linears
from server.engine.int8_product import (
    Int8Product,
    Int8Weight,
    OneDnnProduct,
    TileProduct,
    make_product,
    plain_product,
    quantise_weights,
)
from server.engine.runner import Runner
from server.errors import InvalidInput
from server.native.library import Library
from tests.support.int8 import needs_int8
from tests.unit.engine.driver import CONTEXT, Driver, make_model, random_prompt, reference_tokens
from tests.unit.native.libraries import INSTRUCTIONS, LIBRARIES

each_arithmetic = pytest.mark.parametrize("library", [None, *LIBRARIES], ids=["torch", *INSTRUCTIONS])
INT8 = EngineConfig(max_batch=8, max_context=CONTEXT, prefill_chunk=16, quantization="int8")


class PlainInt8(nn.Module):
    """The same arithmetic step by step in plain torch, with an adapter in floating point beside it."""

    def __init__(self, linear: nn.Module, adapter: Adapter | None, name: str) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.quantised = quantise_weights([weight.T if isinstance(linear, Conv1D) else weight])
        self.bias = linear.bias
        self.low_rank = None if adapter is None else adapter.weights.get(name)
        self.scaling = 0.0 if adapter is None else adapter.scaling

    def forward(self, x: Tensor) -> Tensor:
        y = plain_product(x.reshape(-1, x.shape[-1]), self.quantised).view(*x.shape[:-1], -1)
        if self.low_rank is not None:
            y = y + self.scaling * (x @ self.low_rank.A) @ self.low_rank.B
        return y if self.bias is None else y + self.bias


def plain_int8(model: PreTrainedModel, adapter: Adapter | None = None) -> PreTrainedModel:
    """A copy of a model with plain 8-bit linears, head included: the independent truth."""
    plain = copy.deepcopy(model)
    for name in linear_sizes(plain):
        parent, _, child = name.rpartition(".")
        owner = plain.get_submodule(parent)
        setattr(owner, child, PlainInt8(getattr(owner, child), adapter, name))
    plain.set_output_embeddings(PlainInt8(plain.get_output_embeddings(), None, ""))
    return plain


def every_product(weight: Int8Weight) -> list[Int8Product]:
    """Each way that this machine has to compute the product."""
    digits = [TorchDigits(), *map(CompiledDigits, LIBRARIES)]
    tiles = [TileProduct(weight, library) for library in LIBRARIES if library.has_tiles]
    return [*(OneDnnProduct(weight, each) for each in digits), *tiles]


@needs_int8
@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 40), d_in=st.integers(1, 130), d_out=st.integers(1, 130), size=st.sampled_from([1e-6, 1.0, 1e4])
)
def test_the_product_is_the_plain_one(rows: int, d_in: int, d_out: int, size: float) -> None:
    torch.manual_seed(rows + d_in)
    x, weight = size * torch.randn(rows, d_in), quantise_weights([torch.randn(d_out, d_in)])
    expected = plain_product(x, weight)
    for product in every_product(weight):
        torch.testing.assert_close(product(x), expected, rtol=1e-6, atol=1e-6 * expected.abs().max())


def test_two_digits_of_an_activation_are_off_by_half_a_small_step_at_most() -> None:
    x = torch.randn(20, 50)
    digits, scales = TorchDigits().quantise(x)
    digits = digits.double() - OFFSET
    assert digits[0].abs().amax(1).eq(127).all()
    assert digits[1].abs().max() <= 127
    first, second = digits
    assert ((scales * (first + second / 254) - x).abs() <= 0.51 / 254 * scales).all()


@pytest.mark.parametrize("library", LIBRARIES, ids=INSTRUCTIONS)
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (3, 15), (40, 576), (5, 1537)])
def test_compiled_digits_are_those_of_torch(library: Library, rows: int, d: int) -> None:
    torch.manual_seed(d)
    x = torch.randn(rows, d) * torch.logspace(-6, 6, rows)[:, None]
    x[0, :2] = torch.tensor([127.0, 0.5])[:d]  # ties between two whole numbers
    digits, scales = CompiledDigits(library).quantise(x)
    expected_digits, expected_scales = TorchDigits().quantise(x)
    assert torch.equal(digits, expected_digits)
    assert torch.equal(scales, expected_scales)
    products = torch.randn(2, rows, d)
    torch.testing.assert_close(CompiledDigits(library).join(products, scales), TorchDigits().join(products, scales))


def test_a_weight_is_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(20, 50)
    quantised = quantise_weights([weight])
    assert quantised.values.abs().amax(1).eq(127).all()
    steps = weight / quantised.scales[:, None]
    assert ((quantised.values - steps).abs() <= 0.5001).all()


def test_two_digits_lose_less_than_the_weights() -> None:
    x, weight = torch.randn(8, 400), torch.randn(64, 400)
    x[:, 7] *= 300  # one channel far above the others, as decoders have
    quantised = quantise_weights([weight])
    only_weight = x.double() @ (quantised.values * quantised.scales[:, None]).double().T
    both = plain_product(x, quantised)
    assert (both - only_weight).norm() < 0.05 * (only_weight - x.double() @ weight.double().T).norm()


def test_a_large_weight_is_quantised_in_blocks_like_at_once() -> None:
    weights = [torch.randn(5000, 3), torch.randn(2, 3)]
    blocks, whole = quantise_weights(weights), [quantise_weights([row[None]]) for row in torch.cat(weights)]
    assert torch.equal(blocks.values, torch.cat([w.values for w in whole]))
    assert torch.equal(blocks.scales, torch.cat([w.scales for w in whole]))


@each_arithmetic
def test_a_rows_product_does_not_depend_on_its_neighbours(library: Library | None) -> None:
    linear = int8_linears([nn.Linear(96, 70)], library)[0]
    x = torch.randn(33, 96) * torch.logspace(-3, 3, 33)[:, None]
    with torch.inference_mode():
        together = linear(x)
        for rows in (slice(0, 1), slice(7, 9), slice(32, 33)):
            assert torch.equal(linear(x[rows]), together[rows])


@each_arithmetic
def test_a_row_of_zeros_gives_zeros_and_one_that_is_not_finite_spoils_itself_alone(library: Library | None) -> None:
    linear = int8_linears([nn.Linear(16, 8, bias=False)], library)[0]
    x = torch.randn(4, 16)
    x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
    with torch.inference_mode():
        y = linear(x)
        assert torch.equal(y[0], torch.zeros(8))
        assert not y[1].isfinite().any()
        assert not y[2].isfinite().any()
        assert torch.equal(y[3], linear(x[3]))


@needs_int8
@each_arithmetic
def test_linears_of_one_input_share_a_product_and_can_be_called_in_any_order_and_twice(library: Library | None) -> None:
    plain = [nn.Linear(24, 10), nn.Linear(24, 6, bias=False), Conv1D(7, 24)]
    linears = int8_linears(plain, library)
    x, other = torch.randn(1, 5, 24), torch.randn(1, 3, 24)
    with torch.inference_mode():
        expected = [PlainInt8(p, None, "")(x) for p in plain]
        for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0, 2]):
            for place in order:
                torch.testing.assert_close(linears[place](x), expected[place])
        linears[0](x)  # its product is never used up
        torch.testing.assert_close(linears[1](other), PlainInt8(plain[1], None, "")(other))
        torch.testing.assert_close(linears[2](x), expected[2])


@each_arithmetic
def test_sixteen_bit_input_gives_sixteen_bit_output(library: Library | None) -> None:
    linear = int8_linears([nn.Linear(24, 10, dtype=torch.bfloat16)], library)[0]
    with torch.inference_mode():
        assert linear(torch.randn(3, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert linear.weight.dtype == torch.bfloat16


@needs_int8
@pytest.mark.parametrize("operators", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "gpt2", "mistral_sliding"])
def test_greedy_tokens_are_those_of_the_plain_8_bit_model(family: str, operators: bool) -> None:
    model = make_model(family)
    driver = Driver(model, replace(INT8, operators=operators))
    adapters = [None, driver.handle(1), driver.handle(2, rank=3)]
    asked = [(random_prompt(n, 3 + 4 * n), adapters[n % 3]) for n in range(6)]
    ids = [driver.add(prompt, adapter=handle, max_new_tokens=8) for prompt, handle in asked]
    driver.run()
    for request_id, (prompt, handle) in zip(ids, asked, strict=True):
        reference = plain_int8(model, None if handle is None else handle.adapter)
        assert driver.tokens(request_id) == reference_tokens(reference, prompt, 8)


@needs_int8
def test_a_request_alone_gets_the_tokens_it_gets_in_a_batch() -> None:
    model = make_model()
    together = Driver(model, INT8)
    ids = [together.add(random_prompt(n, 5 + n), adapter=together.handle(n)) for n in range(8)]
    together.run()
    alone = Driver(model, INT8)
    for n, request_id in enumerate(ids):
        own = alone.add(random_prompt(n, 5 + n), adapter=alone.handle(n))
        alone.run()
        assert alone.tokens(own) == together.tokens(request_id)


@needs_int8
def test_a_quantised_model_keeps_no_full_weight_but_its_embedding_and_has_the_same_linears() -> None:
    model = make_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    sizes = linear_sizes(model)
    Runner(model, inject(model), INT8)
    assert linear_sizes(model) == sizes
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert {name for name, p in model.named_parameters() if p.ndim > 1} == {"model.embed_tokens.weight"}
    assert not any(isinstance(m, nn.Linear) for m in model.modules())


def test_a_model_without_quantization_keeps_its_linears() -> None:
    model = make_model()
    Runner(model, inject(model), EngineConfig(max_batch=2, max_context=CONTEXT))
    assert not any(isinstance(m, Int8Linear) for m in model.modules())


def test_other_devices_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"int8 is computed on the CPU only.*cuda:0; set MHR_QUANTIZATION=none"):
        check_int8_works(torch.device("cuda:0"), None)


def test_a_torch_without_the_operator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match=r"has no 8-bit products.*set MHR_QUANTIZATION=none"):
        check_int8_works(torch.device("cpu"), None)


@each_arithmetic
def test_a_processor_that_saturates_on_the_way_is_refused(
    library: Library | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = type(make_product(Int8Weight(torch.ones(1, 1, dtype=torch.int8), torch.ones(1)), library))
    exact = product.__call__
    monkeypatch.setattr(product, "__call__", lambda self, x: exact(self, x).clamp(max=(2**15 - 1) / LARGEST))
    with pytest.raises(InvalidInput, match="inexactly; set MHR_QUANTIZATION=none"):
        check_int8_works(torch.device("cpu"), library)


@needs_int8
@each_arithmetic
def test_the_largest_numbers_are_exact(library: Library | None) -> None:
    check_int8_works(torch.device("cpu"), library)
    weight = Int8Weight(torch.full((5, 1536), -127, dtype=torch.int8), torch.ones(5))
    for product in every_product(weight):
        torch.testing.assert_close(product(torch.ones(3, 1536)), torch.full((3, 5), -127.0 * 1536), rtol=1e-6, atol=0)
