"""All tensor work of a step on one transformers model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.adapters.adapted_linear import AdaptedLinear, AdapterContext
from server.adapters.injection import linear_sizes
from server.adapters.mixture_slots import MixtureSlots
from server.adapters.skill_operator import SkillOperator
from server.adapters.slot_operator import SlotOperator
from server.adapters.slots import AdapterSlots, InputGroupFinder
from server.engine.attention import CachedAttention
from server.engine.attention_operator import AttentionOperator
from server.engine.batch import Batch, build_batch
from server.engine.compiled_forward import CompiledForward, is_compilable
from server.engine.config import EngineConfig
from server.engine.forward import Forward, ModelForward
from server.engine.int8_linear import quantise_model
from server.engine.merged import MergedCopies, MergedStats, copy_bytes
from server.engine.packed_head import pack_head
from server.engine.paths import shared_adapter
from server.engine.prefix_blocks import PrefixBlocks
from server.engine.prefix_cache import NewBlocks
from server.engine.request import EngineRequest, Sequence, Status
from server.engine.scheduler import PrefillChunk, StepPlan
from server.engine.servable import check_config
from server.errors import InvalidInput
from server.native.library import Library, load_library

_SMALL_COPY_BYTES = 2**30  # a merged copy up to this size is kept unasked
_LEAST_MIXTURES = {torch.float32: 8, torch.float16: 16}  # from which on slots of these numbers take longer
_PROBE_LENGTH = 8
_PROBE_TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}  # of the largest logit; other types below
_PROBE_TOLERANCE_16_BIT = 5e-2


class Runner:
    """Runs steps on a model whose linears were injected with `context`.

    The model stays usable by others between steps, in the same thread; one runner at a time owns it.
    Raises InvalidInput when the model cannot be served exactly.
    """

    def __init__(self, model: PreTrainedModel, context: AdapterContext, config: EngineConfig) -> None:
        check_config(model.config, config.max_context)
        model.train(False)
        self._model = model
        self._context = context
        self._config = config
        self._device = model.device
        self._library = self._find_library()
        attention = None if self._library is None else AttentionOperator(self._library)
        self._attention = CachedAttention(config.max_batch, config.max_context, attention)
        self.vocab_size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        groups = self._find_input_groups()
        self._slots = self._make_slots(groups)
        if config.quantization == "int8":
            quantise_model(model, groups, self._library)
        elif config.packed_head:
            pack_head(model)
        self._merged = self._make_merged()
        self._forward = self._choose_forward()
        self._probe()
        self.prefixes = PrefixBlocks(self._attention.layers, config.prefix_cache_bytes)

    def bring_adapter(self, sequence: Sequence) -> None:
        """Bring the sequence's adapter into a slot. Raises AdapterUnavailable when it does not fit the model."""
        handle = sequence.request.adapter
        if handle is not None:
            with torch.inference_mode():
                sequence.adapter_slot = self._slots.acquire(handle.key, handle.adapter)

    @torch.inference_mode()
    def load_prefix(self, sequence: Sequence) -> None:
        """Copy the kept prefix that a sequence begins with to its cache slot."""
        if sequence.prefix.num_tokens:
            assert sequence.kv_slot is not None
            self.prefixes.load(sequence.kv_slot, sequence.prefix)

    @torch.inference_mode()
    def save_prefix(self, sequence: Sequence, new: NewBlocks) -> None:
        """Fill new blocks from a sequence's cache slot."""
        assert sequence.kv_slot is not None
        self.prefixes.save(sequence.kv_slot, new)

    def release(self, sequence: Sequence) -> None:
        """Give up what the sequence holds here; call it before its cache slot is freed."""
        handle = sequence.request.adapter
        if handle is not None and sequence.adapter_slot is not None:
            self._slots.release(handle.key)
            sequence.adapter_slot = None
        if sequence.kv_slot is not None and not sequence.values_checked:
            with torch.inference_mode():
                self._attention.clear(sequence.kv_slot, len(sequence.token_ids))

    def prepare(self, plan: StepPlan) -> Batch:
        """The tensors of a step."""
        merged = self._merged.take(shared_adapter(plan.sequences))
        return build_batch(plan, self._slots, self._config.max_context, self._device, merged)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """One forward pass -> logits (S, vocabulary) in fp32 of the batch's logit rows."""
        return self._forward(batch).float()

    def check_integrity(self) -> None:
        """Assert that the adapters' slots are accounted for."""
        self._slots.check_integrity()
        self._merged.check_integrity()

    def merged_stats(self) -> MergedStats:
        """Of the merged copies; safe in any thread."""
        return self._merged.stats()

    def _find_library(self) -> Library | None:
        """The compiled operators, where they can be used."""
        in_fp32_on_cpu = self._device.type == "cpu" and self._model.dtype == torch.float32
        return load_library() if in_fp32_on_cpu and self._config.operators else None

    @torch.inference_mode()
    def _find_input_groups(self) -> list[list[str]]:
        finder = InputGroupFinder()
        with self._context.use(finder):
            self._model(input_ids=self._probe_tokens()[:, :1], use_cache=False)
        return finder.groups

    @torch.inference_mode()
    def _make_slots(self, groups: list[list[str]]) -> AdapterSlots:
        dtype: torch.dtype = self._model.dtype
        operator = None if self._library is None else SlotOperator(self._library)
        if operator is not None and self._config.quantization == "int8":
            dtype = torch.float16  # half the memory to read, and rounded far less than the weights are
        sizes = linear_sizes(self._model)
        return AdapterSlots(
            sizes,
            self._config.num_adapter_slots,
            dtype=dtype,
            device=self._device,
            input_groups=groups,
            operator=operator,
            mixtures=self._make_mixtures(sizes, dtype),
        )

    def _make_mixtures(self, sizes: dict[str, tuple[int, int]], dtype: torch.dtype) -> MixtureSlots | None:
        """For rows to be computed from an inventory's skills; `dtype` is that of the tables that this saves reading."""
        if self._library is None or not self._library.has_tiles or self._config.adapter_path == "slots":
            return None
        least = 1 if self._config.adapter_path == "inventory" else _LEAST_MIXTURES[dtype]
        return MixtureSlots(SkillOperator(self._library), sizes, self._config.num_adapter_slots, least)

    def _make_merged(self) -> MergedCopies:
        config = self._config
        linears = {m.linear: m.base for m in self._model.modules() if isinstance(m, AdaptedLinear)}
        copies = config.merged_tasks
        if config.quantization == "int8" or config.adapter_path in ("slots", "inventory"):
            copies = 0
        elif copies is None:
            copies = 1 if copy_bytes(linears) <= _SMALL_COPY_BYTES or config.adapter_path == "merged" else 0
        return MergedCopies(
            linears,
            budget_bytes=copies * copy_bytes(linears) if copies else 0,
            after_steps=config.merge_after_steps,
            wait=config.adapter_path == "merged",
        )

    def _choose_forward(self) -> Forward:
        if self._library is not None and is_compilable(self._model):
            return CompiledForward(self._model, self._attention, self._library)
        return ModelForward(self._model, self._context, self._attention)

    def _probe_tokens(self) -> Tensor:
        """Tokens (1, T) spread over the vocabulary."""
        length = min(_PROBE_LENGTH, self._config.max_context)
        return torch.linspace(1, self.vocab_size - 1, length, device=self._device).long()[None]

    @torch.inference_mode()
    def _probe(self) -> None:
        """Compare the cached path (two chunks, then one token) with the model's own forward pass."""
        tokens = self._probe_tokens()
        expected = self._model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        length = tokens.shape[1]
        sequence = Sequence(EngineRequest("probe", "probe", tuple(tokens[0].tolist())), arrival_s=0.0, kv_slot=0)
        for start, stop in ((0, length // 2), (length // 2, length - 1)):
            if start < stop:
                self.run(self.prepare(StepPlan((), (PrefillChunk(sequence, start, stop),))))
        sequence.num_computed_tokens, sequence.status = length - 1, Status.RUNNING
        actual = self.run(self.prepare(StepPlan((sequence,), ())))[0]
        self._attention.clear(0, length)
        tolerance = _PROBE_TOLERANCE.get(self._model.dtype, _PROBE_TOLERANCE_16_BIT)
        difference = (actual - expected).abs().max().item()
        if not difference <= tolerance * max(1.0, expected.abs().max().item()):
            raise InvalidInput(
                f"the backbone {type(self._model).__name__} cannot be served exactly: with a key-value cache its "
                f"logits differ by {difference:.3g} from its own forward pass; choose another backbone"
            )
