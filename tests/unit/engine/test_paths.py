from __future__ import annotations

from server.adapters.assembly import Adapter
from server.engine.paths import choose_path, shared_adapter
from server.engine.request import AdapterHandle, EngineRequest, Sequence

ADAPTER = Adapter(weights={}, alpha=1.0, rank=1)


def sequences(*keys: str | None) -> list[Sequence]:
    handles = [None if key is None else AdapterHandle(key, ADAPTER) for key in keys]
    return [Sequence(EngineRequest(f"{n}", "t", (5,), adapter=h), arrival_s=0.0) for n, h in enumerate(handles)]


def test_an_adapter_is_shared_when_every_row_has_it() -> None:
    shared = shared_adapter(sequences("a", "a"))
    assert shared is not None
    assert shared.key == "a"
    for mixed in (("a", "b"), ("a", None), (None,), ()):
        assert shared_adapter(sequences(*mixed)) is None


def test_the_cheapest_exact_path_is_chosen() -> None:
    assert choose_path(sequences(None, None), has_merged=False, has_skill_rows=False) == "bare"
    assert choose_path(sequences("a", "a"), has_merged=True, has_skill_rows=False) == "merged"
    assert choose_path(sequences("a", "a"), has_merged=True, has_skill_rows=True) == "merged"
    assert choose_path(sequences("a", None), has_merged=False, has_skill_rows=False) == "slots"
    assert choose_path(sequences("a", "b"), has_merged=False, has_skill_rows=True) == "inventory"
