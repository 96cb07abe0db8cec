from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import safetensors.torch
import torch

from server.adapters.inventory import Inventory, InventoryTask, check_heads
from server.errors import InvalidInput

MakeInventory = Callable[..., Inventory]


def test_shapes_are_read_off_the_tensors(make_inventory: MakeInventory) -> None:
    inventory = make_inventory(heads=2, skills=5, rank=3, alpha=6.0)
    assert (inventory.num_heads, inventory.num_skills, inventory.rank) == (2, 5, 3)
    assert inventory.linears == ("a.q", "b.q", "a.o")
    assert inventory.routing_shape == (3, 2, 5)
    assert inventory.scaling == 2.0


def test_linears_of_one_shape_are_grouped_with_their_routing_rows(make_inventory: MakeInventory) -> None:
    inventory = make_inventory(sizes={"a.q": (4, 6), "a.o": (6, 4), "b.q": (4, 6)})
    groups = {group.linears: group for group in inventory.groups}
    assert {names: group.rows for names, group in groups.items()} == {("a.q", "b.q"): (0, 2), ("a.o",): (1,)}
    assert torch.equal(groups["a.q", "b.q"].A[1], inventory.A["b.q"])
    assert torch.equal(groups["a.o",].B[0], inventory.B["a.o"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_file_gives_back_everything(make_inventory: MakeInventory, dtype: torch.dtype) -> None:
    routings = {f"task-{n}": torch.randn(3, 2, 3) for n in (2, 10, 1)}  # not in alphabetical order
    inventory = make_inventory(
        alpha=4.0,
        routings=routings,
        tasks={name: InventoryTask(f"Do {name} naïvely", licence="MIT", source="here") for name in routings},
        training={"steps": 1000, "losses": [1.5, 0.5]},
    )
    read = Inventory.from_bytes(inventory.to_bytes(dtype))
    assert read.linears == inventory.linears
    for linear in inventory.linears:
        assert torch.equal(read.A[linear], inventory.A[linear].to(dtype))
        assert torch.equal(read.B[linear], inventory.B[linear].to(dtype))
    assert list(read.routings) == ["task-2", "task-10", "task-1"]
    for task, logits in routings.items():
        assert torch.equal(read.routings[task], logits.to(torch.float16 if dtype == torch.bfloat16 else dtype))
    about = ("alpha", "backbone_fingerprint", "backbone_name", "prompt_format", "tasks", "training")
    assert [getattr(read, name) for name in about] == [getattr(inventory, name) for name in about]


def test_file_without_tasks_is_fine(make_inventory: MakeInventory) -> None:
    assert Inventory.from_bytes(make_inventory().to_bytes()).routings == {}


def test_file_is_the_same_every_time(make_inventory: MakeInventory) -> None:
    assert make_inventory(seed=3).to_bytes() == make_inventory(seed=3).to_bytes()


def with_document(data: bytes, **changes: object) -> bytes:
    """The inventory file with fields of its document changed, or removed by None."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    document = json.loads(header["__metadata__"]["mhr"]) | changes
    document = {key: value for key, value in document.items() if value is not None}
    return safetensors.torch.save(safetensors.torch.load(data), metadata={"mhr": json.dumps(document)})


def test_bytes_that_are_no_inventory_are_refused(make_inventory: MakeInventory) -> None:
    whole = make_inventory().to_bytes()
    plain = safetensors.torch.save({"x": torch.zeros(2)})
    for data in (b"", b"hello", whole[:4], whole[:100], whole[:-1], plain, b"\xff" * 64):
        with pytest.raises(InvalidInput, match="not a file of the form"):
            Inventory.from_bytes(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": "large"},
        {"alpha": [1]},
        {"linears": 5},
        {"tasks": ["t"]},
        {"tasks": {"t": {"colour": "red"}}},
        {"routed_tasks": 1},
        {"training": 7},
    ],
)
def test_document_with_malformed_parts_is_refused(make_inventory: MakeInventory, changes: dict[str, object]) -> None:
    whole = make_inventory(routings={"t": torch.zeros(3, 2, 3)}).to_bytes()
    with pytest.raises(InvalidInput, match="incomplete"):
        Inventory.from_bytes(with_document(whole, **changes))


def test_document_that_is_no_object_is_refused() -> None:
    data = safetensors.torch.save({"x": torch.zeros(2)}, metadata={"mhr": "[1, 2]"})
    with pytest.raises(InvalidInput, match="not a file of the form"):
        Inventory.from_bytes(data)


def test_document_with_parts_missing_is_refused(make_inventory: MakeInventory) -> None:
    whole = make_inventory(routings={"t": torch.zeros(3, 2, 3)}).to_bytes()
    with pytest.raises(InvalidInput, match="mhr-inventory-9"):
        Inventory.from_bytes(with_document(whole, format="mhr-inventory-9"))
    with pytest.raises(InvalidInput, match="alpha"):
        Inventory.from_bytes(with_document(whole, alpha=None))
    with pytest.raises(InvalidInput, match=r"c\.q\.A"):
        Inventory.from_bytes(with_document(whole, linears=["c.q"]))
    with pytest.raises(InvalidInput, match="incomplete"):
        Inventory.from_bytes(with_document(whole, routed_tasks=["t", "u"]))


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((3, 3, 4, 2), (3, 3, 2, 4)),  # heads
        ((2, 4, 4, 2), (2, 4, 2, 4)),  # skills
        ((2, 3, 4, 1), (2, 3, 2, 4)),  # rank of A
        ((2, 3, 4, 2), (2, 3, 4, 2)),  # B stored like A
        ((2, 3, 4), (2, 3, 2, 4)),
    ],
)
def test_disagreeing_shapes_name_the_linear(
    make_inventory: MakeInventory, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> None:
    good = make_inventory()
    with pytest.raises(InvalidInput, match=r"'odd\.v'"):
        Inventory(
            A={**good.A, "odd.v": torch.zeros(a_shape)},
            B={**good.B, "odd.v": torch.zeros(b_shape)},
            alpha=1.0,
            backbone_fingerprint="",
            backbone_name="",
            prompt_format="",
        )


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 0)])
def test_malformed_first_linear_is_an_input_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="'only'"):
        Inventory(
            A={"only": torch.zeros(shape)},
            B={"only": torch.zeros(shape)},
            alpha=1.0,
            backbone_fingerprint="",
            backbone_name="",
            prompt_format="",
        )


def test_a_and_b_must_be_of_the_same_linears(make_inventory: MakeInventory) -> None:
    good = make_inventory()
    for A, B in (({}, {}), (good.A, {"a.q": good.B["a.q"]})):
        with pytest.raises(InvalidInput, match="same linears"):
            Inventory(A=A, B=B, alpha=1.0, backbone_fingerprint="", backbone_name="", prompt_format="")


def test_routing_of_another_shape_names_the_task(make_inventory: MakeInventory) -> None:
    with pytest.raises(InvalidInput, match="'tag-ticket'"):
        make_inventory(routings={"tag-ticket": torch.zeros(3, 3, 2)})


def test_heads_must_divide_both_sizes() -> None:
    check_heads("q", 12, 8, 4)
    for d_in, d_out, heads in ((12, 8, 3), (8, 12, 3), (12, 8, 0), (12, 8, -4)):
        with pytest.raises(InvalidInput, match=r"'layers\.0\.q'"):
            check_heads("layers.0.q", d_in, d_out, heads)
