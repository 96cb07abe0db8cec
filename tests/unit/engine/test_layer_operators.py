"""The compiled operators of a layer against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from server.engine.layer_operators import LayerOperators
from tests.unit.native.libraries import INSTRUCTIONS, LIBRARIES

each_operator = pytest.mark.parametrize("operators", [LayerOperators(found) for found in LIBRARIES], ids=INSTRUCTIONS)
SIZES = [(1, 1), (3, 16), (5, 23), (2, 576), (40, 600)]  # the last are shared out over threads


@each_operator
@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_norms(operators: LayerOperators, rows: int, d: int) -> None:
    states, more, weight = torch.randn(rows, d) * 3, torch.randn(rows, d), torch.randn(d)
    before = states.clone()
    torch.testing.assert_close(operators.norm(states, None, weight, 1e-5), F.rms_norm(before, (d,), weight, 1e-5))
    assert torch.equal(states, before)
    torch.testing.assert_close(
        operators.norm(states, more, weight, 1e-5), F.rms_norm(before + more, (d,), weight, 1e-5)
    )
    torch.testing.assert_close(states, before + more)


@each_operator
def test_a_norm_of_zeros_is_zero_and_of_nan_is_nan(operators: LayerOperators) -> None:
    states = torch.zeros(2, 20)
    states[1, 3] = float("nan")
    normed = operators.norm(states, None, torch.ones(20), 1e-6)
    assert not normed[0].any()
    assert normed[1].isnan().all()


@each_operator
@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_rotations(operators: LayerOperators, head_dim: int) -> None:
    rows, rotated, others = 7, 5, 2
    heads = torch.randn(rows, (rotated + others) * head_dim)
    angles = torch.randn(rows, head_dim)  # not the same in both halves, as with some models
    cosines, sines = angles.cos() * 1.5, angles.sin() * 1.5
    before = heads.clone().view(rows, -1, head_dim).transpose(0, 1)[None]
    expected, _ = apply_rotary_pos_emb(before, before, cosines[None], sines[None])
    operators.rotate(heads, cosines, sines, rotated)
    found = heads.view(rows, -1, head_dim).transpose(0, 1)[None]
    torch.testing.assert_close(found[:, :rotated], expected[:, :rotated])
    assert torch.equal(found[:, rotated:], before[:, rotated:])


@each_operator
@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_gates(operators: LayerOperators, rows: int, d: int) -> None:
    gate_up = torch.randn(rows, 2 * d) * 4
    torch.testing.assert_close(operators.gate(gate_up), gated(gate_up))


@each_operator
def test_gates_far_from_zero(operators: LayerOperators) -> None:
    gates = torch.tensor([-1e30, -200.0, -90.0, -87.3, -20.0, -0.0, 20.0, 90.0, 1e30, float("nan")])
    gate_up = torch.cat([gates, torch.ones_like(gates)])[None]
    torch.testing.assert_close(operators.gate(gate_up), gated(gate_up), equal_nan=True)


@each_operator
def test_a_rows_numbers_do_not_depend_on_the_batch(operators: LayerOperators) -> None:
    gate_up, weight = torch.randn(64, 600), torch.randn(600)
    together, alone = operators.gate(gate_up), [operators.gate(row[None]) for row in gate_up]
    assert torch.equal(together, torch.cat(alone))
    normed = operators.norm(gate_up, None, weight, 1e-5)
    assert torch.equal(normed, torch.cat([operators.norm(row[None], None, weight, 1e-5) for row in gate_up]))


def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up
