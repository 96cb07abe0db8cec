"""How a step computes what its rows' adapters add. No torch here."""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.config import Path
from server.engine.request import AdapterHandle, Sequence


def choose_path(sequences: Iterable[Sequence], *, has_merged: bool, has_skill_rows: bool) -> Path:
    """The cheapest exact way for a step of these sequences. `has_merged`: the merged copy for all of them is there;
    `has_skill_rows`: enough of them mix the skills of one inventory.

    - "bare" where no sequence has an adapter: there is nothing to add.
    - "merged" where all sequences have one and the same adapter and its merged copy is there: this costs what the bare
      model costs. Slots by torch cost 10 % more with one row and 7 % with 32 (fp32, r = 8, all linears, one core).
    - "inventory" where enough of them are mixtures of one inventory's skills: these rows are computed from the skills,
      which are read once for all; other rows, and prompts, as with slots. With 32 tasks in 32 rows this costs 12 %
      more than the bare model (20 % in int8; two threads, decoding alone).
    - "slots" else: beside the model's own product each row multiplies with its own low-rank pair. With 32 different
      adapters in 32 rows this costs 21 % more than the bare model (28 % in int8).

    `EngineConfig.adapter_path` and `merged_tasks` override it by what copies there are and what rows are enough.
    """
    if all(s.request.adapter is None for s in sequences):
        return "bare"
    if has_merged:
        return "merged"
    return "inventory" if has_skill_rows else "slots"


def shared_adapter(sequences: Iterable[Sequence]) -> AdapterHandle | None:
    """The adapter that all sequences of a step have; None when they have several, or one of them has none."""
    handles = {None if s.request.adapter is None else s.request.adapter.key: s.request.adapter for s in sequences}
    return next(iter(handles.values())) if len(handles) == 1 else None
