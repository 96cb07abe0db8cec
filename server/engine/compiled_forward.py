"""The forward pass of Llama and its like, with compiled operators for all that stands between the products.

In transformers' modules a step runs more than a thousand small operations, which take about as long as its 8-bit
products. `ModelForward` computes the same by them, and the runner compares the two when it begins.

Letters: N rows of a step, S rows whose logits are needed, H query heads, d numbers of a hidden state.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from server.adapters.adapted_linear import AdaptedLinear
from server.adapters.operator_mix import OperatorMix
from server.adapters.slot_mix import SlotMix
from server.engine.attention import CachedAttention
from server.engine.batch import Batch
from server.engine.layer_operators import LayerOperators
from server.engine.linear_group import LinearGroup
from server.engine.merged import MergedMix
from server.native.library import Library

# Models whose layers are: norm, rotated attention, sum, norm, gated products, sum.
_LAYERS: dict[type[PreTrainedModel], type[nn.Module]] = {
    LlamaForCausalLM: LlamaDecoderLayer,
    MistralForCausalLM: MistralDecoderLayer,
    Qwen2ForCausalLM: Qwen2DecoderLayer,
}

Mix = OperatorMix | MergedMix | None


class CompiledForward:
    """Computes steps of an injected model that `is_compilable`, in fp32 on CPU; see `Forward`."""

    def __init__(self, model: PreTrainedModel, attention: CachedAttention, library: Library) -> None:
        operators = LayerOperators(library)
        decoder: Any = model.model
        self._attention = attention
        self._embed = decoder.embed_tokens
        self._angles = decoder.rotary_emb
        self._layers = [_Layer(layer, attention, operators) for layer in decoder.layers]
        self._norm = _Norm(decoder.norm, operators)
        self._head = model.lm_head

    def __call__(self, batch: Batch) -> Tensor:
        """See `Forward`."""
        assert not isinstance(batch.mix, SlotMix), "slots are computed by torch, the rest is not"
        states = self._embed(batch.token_ids[0])  # (N, d), a tensor of our own, changed in place
        cosines, sines = self._angles(states, batch.positions)
        with self._attention.use(batch.attention):
            more = None
            for layer in self._layers:
                more = layer(states, more, cosines[0], sines[0], batch.mix)
        rows = batch.logit_rows
        logits: Tensor = self._head(self._norm(states[rows], None if more is None else more[rows]))
        return logits


class _Layer:
    """One decoder layer. What a block adds to the hidden states is added by the norm that comes after it."""

    def __init__(self, layer: Any, attention: CachedAttention, operators: LayerOperators) -> None:
        own, mlp = layer.self_attn, layer.mlp
        self._attention = attention
        self._operators = operators
        self._layer_idx = own.layer_idx
        self._scaling = own.scaling
        self._head_dim = own.head_dim
        self._num_heads: int = own.config.num_attention_heads
        self._num_kv_heads = self._num_heads // own.num_key_value_groups
        everywhere = getattr(own.config, "sliding_window", None)
        self._window: int | None = getattr(own, "sliding_window", everywhere)  # of this layer
        self._attention_norm = _Norm(layer.input_layernorm, operators)
        self._qkv = _group(own.q_proj, own.k_proj, own.v_proj)
        self._out = _group(own.o_proj)
        self._mlp_norm = _Norm(layer.post_attention_layernorm, operators)
        self._gate_up = _group(mlp.gate_proj, mlp.up_proj)
        self._down = _group(mlp.down_proj)

    def __call__(self, states: Tensor, more: Tensor | None, cosines: Tensor, sines: Tensor, mix: Mix) -> Tensor:
        """Hidden states (N, d), to which `more` (N, d) is yet to be added -> what is to be added to them next."""
        qkv = self._qkv(self._attention_norm(states, more), mix)
        self._operators.rotate(qkv, cosines, sines, self._num_heads + self._num_kv_heads)
        attended = self._out(self._attend(qkv), mix)
        gate_up = self._gate_up(self._mlp_norm(states, attended), mix)
        return self._down(self._operators.gate(gate_up), mix)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values side by side (N, …) -> (N, H * head_dim)."""
        heads = qkv.view(len(qkv), -1, self._head_dim).transpose(0, 1)[None]  # (1, heads, N, head_dim)
        first_key, first_value = self._num_heads, self._num_heads + self._num_kv_heads
        query, key, value = heads[:, :first_key], heads[:, first_key:first_value], heads[:, first_value:]
        attended = self._attention.attend(self._layer_idx, query, key, value, self._scaling, self._window)
        return attended.reshape(len(qkv), -1)


class _Norm:
    def __init__(self, norm: Any, operators: LayerOperators) -> None:
        self._operators = operators
        self._weight = norm.weight.detach()
        self._epsilon = norm.variance_epsilon

    def __call__(self, states: Tensor, more: Tensor | None) -> Tensor:
        """See `LayerOperators.norm`."""
        return self._operators.norm(states, more, self._weight, self._epsilon)


def is_compilable(model: PreTrainedModel) -> bool:
    """Whether `CompiledForward` computes this model: of a known make, with its modules as they are, gated by SiLU."""
    known = _LAYERS.get(type(model))
    if known is None:
        return False
    decoder: Any = model.model
    return model.config.hidden_act == "silu" and all(
        type(layer) is known and _is_unchanged(layer) for layer in decoder.layers
    )


def _is_unchanged(layer: nn.Module) -> bool:
    """Whether no module of the layer has a forward pass of its own, in place of its class's."""
    return not any("forward" in vars(module) for module in layer.modules())


def _group(*linears: nn.Module) -> LinearGroup:
    adapted = [linear for linear in linears if isinstance(linear, AdaptedLinear)]
    assert len(adapted) == len(linears), "the model was not injected"
    return LinearGroup(adapted)
