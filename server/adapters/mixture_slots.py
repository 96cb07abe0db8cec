"""The slots whose adapters are mixtures of an inventory's skills, and which rows of a step are computed from these.

Letters: S slots, L linears, h heads, K skills.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from server.adapters.assembly import Mixture
from server.adapters.inventory import Inventory
from server.adapters.skill_operator import SkillOperator, Skills, SkillTiles, fits_tiles
from server.adapters.slot_operator import NO_SLOT


class MixtureSlots:
    """Keeps the routing weights of slots beside the adapters that were assembled of them.

    `linear_sizes` is {name: (d_in, d_out)} of the model. `least` is the number of different mixtures of one inventory
    from which on a step's rows are computed from its skills.
    """

    def __init__(
        self, operator: SkillOperator, linear_sizes: Mapping[str, tuple[int, int]], num_slots: int, least: int
    ) -> None:
        self._operator = operator
        self._linear_sizes = linear_sizes
        self._num_slots = num_slots
        self._least = least
        self._inventories: dict[int, ResidentInventory] = {}  # by the identity of the inventory
        self._inventory_of: dict[int, ResidentInventory] = {}  # by slot

    def load(self, slot: int, mixture: Mixture | None) -> None:
        """A slot has a new adapter, which is this mixture; None when it is none."""
        self._inventory_of.pop(slot, None)
        if mixture is not None and fits_tiles(mixture.inventory):
            resident = self._inventories.get(id(mixture.inventory)) or self._bring(mixture.inventory)
            resident.weights[slot] = mixture.weights
            self._inventory_of[slot] = resident

    def choose(self, slots: Sequence[int]) -> SkillRows | None:
        """Of the first rows of a step, which have these slots, those to be computed from skills: of the inventory that
        most different ones are mixtures of, if there are enough.
        """
        different = Counter(self._inventory_of[slot] for slot in set(slots) if slot in self._inventory_of)
        if not different:
            return None
        resident, count = different.most_common(1)[0]
        if count < self._least:
            return None
        own = [slot if self._inventory_of.get(slot) is resident else NO_SLOT for slot in slots]
        return SkillRows(self._operator, resident, own)

    @property
    def num_inventories(self) -> int:
        """Inventories held in the layout of tiles."""
        return len(self._inventories)

    def _bring(self, inventory: Inventory) -> ResidentInventory:
        """Bring an inventory in, and let those go that no slot needs any more."""
        used = set(self._inventory_of.values())
        self._inventories = {key: resident for key, resident in self._inventories.items() if resident in used}
        resident = ResidentInventory(inventory, self._linear_sizes, self._num_slots)
        self._inventories[id(inventory)] = resident
        return resident


class ResidentInventory:
    """An inventory's skills in tiles, and the routing weights of slots over it."""

    def __init__(self, inventory: Inventory, linear_sizes: Mapping[str, tuple[int, int]], num_slots: int) -> None:
        self.weights = torch.zeros(num_slots, *inventory.routing_shape)  # (S, L, h, K)
        self._inventory = inventory  # kept, as its identity is the key of this object
        self._tiles = SkillTiles(inventory)
        self._linear_sizes = linear_sizes
        self._described: dict[tuple[str, ...], Skills | None] = {}

    def skills(self, linears: tuple[str, ...]) -> Skills | None:
        """Those of linears that read the same input; None when it has none."""
        if linears not in self._described:
            outputs = {linear: self._linear_sizes[linear][1] for linear in linears}
            self._described[linears] = self._tiles.describe(outputs, self.weights)
        return self._described[linears]


class SkillRows:
    """The first rows of a step with these slots; those with NO_SLOT are left alone."""

    def __init__(self, operator: SkillOperator, inventory: ResidentInventory, slots: Sequence[int]) -> None:
        self.slots = tuple(slots)
        self._operator = operator
        self._inventory = inventory
        self._slots = torch.tensor(slots)
        self._rooms: dict[int, Tensor] = {}  # by the number of linears

    def add(self, linears: tuple[str, ...], x: Tensor, y: Tensor) -> None:
        """Add to y (…, N, D), in place, what the mixtures make of x (…, N, d_in), the linears' outputs side by side."""
        skills = self._inventory.skills(linears)
        if skills is None:
            return
        if skills.count not in self._rooms:
            self._rooms[skills.count] = self._operator.room(skills)
        self._operator.add_rows(skills, x, y, self._slots, self._rooms[skills.count], torch.get_num_threads())
