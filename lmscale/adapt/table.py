"""Many adaptations of one frozen base, of which each row of a batch names its own; for inference.

A table has slots, into which adaptations are read from their files when a batch first names them; the one that was named
longest ago makes room. What adaptations of one method and shape have in common is a bank: the method's own modules, built
with an entry for each slot. LoRA of one rank is one bank, whatever its targets (a pair that an adaptation has not is 0), so
that a batch costs one product for each rank in it, not for each adaptation; prefixes and prompts are banked by their length,
bottlenecks by their shape. What is trained of the base itself (biases, norms) is kept by tensor, for each slot.

While a batch is computed, the banks that it needs stand in the slots of the model's layers, each for its rows; a row without
an adaptation passes by them, and so does every row of other banks: nothing of a row is read by another.

Memory: of each bank slots x the size of one adaptation, whether or not all slots are taken.

Shapes: b rows, s tokens, h hidden, p the longest prefix of the batch.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from deepspeed.runtime.pipe.module import TiedLayerSpec
from torch import nn

from lmscale.adapt.registry import adapted_specs
from lmscale.adapt.table_config import bank_config, bank_key, folded_scale, grown
from lmscale.adapt.table_slots import Added, BaseRows, Behind, Beside, Part, Prefixes, Prompts, RowNorm
from lmscale.config.adapt import AdaptConfig, prefix_length, prompt_length
from lmscale.errors import ConfigError
from lmscale.models.build import TIED_MODULES, SequentialModel, logical_name, model_specs
from lmscale.models.context import ModelContext
from lmscale.models.norm import Norm
from lmscale.plan.adaptation import Adaptation, own_shapes

Place = tuple[nn.Module, str]
"""A module of the base, and the name of a slot in it."""
SLOTS = ("lora", "prefix", "prompt", "attention_adapter", "mlp_adapter", "parallel_adapter")


class Stored(Protocol):
    """An adaptation whose tensors can be read, whole, by logical name."""

    @property
    def adaptation(self) -> Adaptation:
        """What it does to its base."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its tensors."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Read one."""
        ...


@dataclass
class _Bank:
    """Modules of one method and shape, with an entry for each slot.

    Attributes:
        config: the method, of as many entries.
        modules: by the place that each stands in.
        parameters: by logical name.
    """

    config: AdaptConfig
    modules: dict[Place, nn.Module] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """An adaptation in a slot: which bank it has, if any, and what of the base it has its own values of."""

    slot: int
    bank: str | None
    own_values: frozenset[str]
    prefix_length: int
    prompt_length: int


class AdapterTable:
    """Adaptations by name, over a built base.

    Args:
        module: the base, in eval mode, on its device; its slots must be free.
        context: what its layers share.
        open: opens an adaptation by its name.
        check: raises where there is none of a name.
        slots: adaptations that are in memory at a time.
    """

    def __init__(
        self,
        module: SequentialModel,
        context: ModelContext,
        open: Callable[[str], Stored],
        check: Callable[[str], None],
        slots: int,
    ):
        if slots < 1:
            raise ConfigError("must be at least 1", field="slots", value=slots)
        self._module, self._context, self._open, self.slots = module, context, open, slots
        self.check = check
        self._base = {logical_name(module, name): parameter for name, parameter in module.named_parameters()}
        self._owners = {logical_name(module, f"{name}.x")[:-2]: owner for name, owner in _named_owners(module)}
        self._banks: dict[str, _Bank] = {}
        self._values: dict[str, BaseRows] = {}
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._rows: list[_Entry | None] | None = None

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the adaptations in memory, the one that was named longest ago first."""
        return tuple(self._entries)

    @property
    def is_in_use(self) -> bool:
        """Whether a batch is being computed."""
        return self._rows is not None

    @property
    def prefix_lengths(self) -> list[int]:
        """Of the rows of the batch."""
        return [0 if entry is None else entry.prefix_length for entry in self._rows or []]

    @property
    def prompt_lengths(self) -> list[int]:
        """Of the rows of the batch."""
        return [0 if entry is None else entry.prompt_length for entry in self._rows or []]

    # -- a batch ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, names: Sequence[str | None]) -> Iterator[None]:
        """Have each row of a batch computed with the adaptation that it names; None is the base.

        Raises:
            ConfigError: if the batch names more adaptations than there are slots.
        """
        assert self._rows is None, "a batch is being computed"
        self._rows = self._entries_of(names)
        rows, put = self._context.rows, self._put()
        lengths = self.prefix_lengths
        former = rows.shift
        if any(lengths):
            rows.shift = lengths[0] if len(set(lengths)) == 1 else self._tensor(lengths)[:, None]
        for (owner, slot), module in put.items():
            setattr(owner, slot, module)
        try:
            yield
        finally:
            self._rows, rows.shift, rows.ids = None, former, None
            for (owner, slot), module in put.items():
                setattr(owner, slot, module.inner if isinstance(module, RowNorm) else None)

    def _entries_of(self, names: Sequence[str | None]) -> list[_Entry | None]:
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        if len(wanted) > self.slots:
            raise ConfigError(
                f"the batch names {len(wanted)} adaptations",
                field="slots",
                value=self.slots,
                remedy="give the table more slots, or cut the batch",
            )
        for name in wanted:
            if name in self._entries:
                self._entries.move_to_end(name)
        for name in wanted:
            if name not in self._entries:
                self._load(name, wanted)
        return [None if name is None else self._entries[name] for name in names]

    def _put(self) -> dict[Place, nn.Module]:
        """Make what stands in the slots, and in the places of norms, while the batch is computed."""
        assert self._rows is not None
        parts: dict[Place, list[Part]] = {}
        for key, bank in self._banks.items():
            found = [
                (row, entry.slot) for row, entry in enumerate(self._rows) if entry is not None and entry.bank == key
            ]
            if found:
                rows = None if len(found) == len(self._rows) else self._tensor([row for row, _ in found])
                ids = self._tensor([slot for _, slot in found])
                for place, module in bank.modules.items():
                    parts.setdefault(place, []).append(Part(module, rows, ids))
        put = self._of_base()
        put |= {place: self._made(place[1], own, put.get(place)) for place, own in parts.items()}
        return put

    def _made(self, slot: str, parts: list[Part], biases: nn.Module | None) -> nn.Module:
        rows, size = self._context.rows, len(self._rows or [])
        if slot == "lora":
            return Added(rows, parts, size, biases.bias if isinstance(biases, Added) else None)
        if slot == "prefix":
            return Prefixes(rows, parts, self._is_there(), size)
        if slot == "prompt":
            return Prompts(rows, parts)
        return Beside(rows, parts, size) if slot == "parallel_adapter" else Behind(rows, parts)

    def _is_there(self) -> torch.Tensor | None:
        """Tell which prefix keys each row has, bool [b, p]; None where each has as many."""
        lengths = self.prefix_lengths
        if len(set(lengths)) == 1:
            return None
        if getattr(self, "_known_lengths", None) != lengths or self._known.device != self._device:
            places = torch.arange(max(lengths), device=self._device)
            self._known_lengths, self._known = lengths, places[None] < self._tensor(lengths)[:, None]
        return self._known

    def _of_base(self) -> dict[Place, nn.Module]:
        """Make what gives rows their own biases and norms."""
        assert self._rows is not None
        put: dict[Place, nn.Module] = {}
        owners: dict[str, dict[str, BaseRows]] = {}
        for name, values in self._values.items():
            owner, _, kind = name.rpartition(".")
            owners.setdefault(owner, {})[kind] = values
        for owner, kinds in owners.items():
            names = {f"{owner}.{kind}" for kind in kinds}
            found = [
                (row, entry.slot)
                for row, entry in enumerate(self._rows)
                if entry is not None and names & entry.own_values
            ]
            if not found:
                continue
            rows, ids = self._tensor([row for row, _ in found]), self._tensor([slot for _, slot in found])
            chosen = {kind: values.of_rows(rows, ids) for kind, values in kinds.items()}
            module = self._owners[owner]
            if isinstance(module, Norm):
                parent, _, name = owner.rpartition(".")
                put[self._owners[parent], name] = RowNorm(module, chosen, rows)
            else:
                put[module, "lora"] = Added(self._context.rows, [], len(self._rows), chosen["bias"])
        return put

    # -- loading ---------------------------------------------------------------------------------------------------

    def _load(self, name: str, wanted: Sequence[str]) -> None:
        """Read an adaptation into a slot: a free one, or that of the adaptation named longest ago."""
        stored = self._open(name)
        adapt = stored.adaptation.adapt
        assert adapt is not None
        key = bank_key(adapt)
        own = own_shapes(stored.adaptation.model, adapt)
        for one in sorted(stored.shapes.keys() - own.keys()):
            self._check_can_hold(name, one)
        slot = self._free_slot(wanted)
        if key is not None:
            self._fill(self._bank(key, adapt), slot, stored, list(own))
        values = frozenset(stored.shapes.keys() - own.keys())
        for one in self._values.keys() - values:
            self._values[one].set(slot, self._base[one])
        for one in sorted(values):
            self._values.setdefault(one, BaseRows(self._base[one], self.slots))
            self._values[one].set(slot, self._local(stored.read(one), self._base[one], 0))
        self._entries[name] = _Entry(slot, key, values, prefix_length(adapt), prompt_length(adapt))

    def _check_can_hold(self, name: str, tensor: str) -> None:
        """Check that a tensor of an adaptation can be a row's own: a bias of a linear layer, or of a norm.

        Raises:
            ConfigError: if it is another, such as a task's head.
        """
        owner, _, kind = tensor.rpartition(".")
        is_norm = isinstance(self._owners.get(owner), Norm)
        if tensor not in self._base or not (is_norm or (kind == "bias" and hasattr(self._owners[owner], "lora"))):
            raise ConfigError(
                f"its {tensor} cannot differ between the rows of a batch",
                field="adapter",
                value=name,
                remedy="load it alone",
            )

    def _free_slot(self, wanted: Sequence[str]) -> int:
        used = {entry.slot for entry in self._entries.values()}
        if len(used) == self.slots:
            oldest = next(name for name in self._entries if name not in wanted)
            return self._entries.pop(oldest).slot
        return next(slot for slot in range(self.slots) if slot not in used)

    def _bank(self, key: str, adapt: AdaptConfig) -> _Bank:
        """Return a bank that has room for what the adaptation adds, built or widened."""
        bank = self._banks.get(key)
        config = bank_config(adapt, self.slots) if bank is None else grown(bank.config, adapt)
        if bank is None or config != bank.config:
            widened = self._build(config)
            for name, parameter in ({} if bank is None else bank.parameters).items():
                widened.parameters[name].data.copy_(parameter.data)
            bank = self._banks[key] = widened
        return bank

    @torch.no_grad()
    def _build(self, config: AdaptConfig) -> _Bank:
        """Build the method's modules for every place of the base: they are put there, and taken out."""
        bank = _Bank(config)
        specs = adapted_specs(model_specs(self._context), self._context, config)
        done: set[int] = set()
        for index, (name, spec) in enumerate(specs):
            edit = spec.module_kwargs.get("edit")
            is_tied = isinstance(spec, TiedLayerSpec)
            layer = self._module.get_submodule(f"{TIED_MODULES}.{spec.key}" if is_tied else str(index))
            if edit is None or id(layer) in done:
                continue
            done.add(id(layer))
            edit(layer)
            self._take(bank, layer, spec.key if is_tied else name)
        like = next(self._module.parameters())
        for module in bank.modules.values():
            module.to(like.device, like.dtype).eval().requires_grad_(False)
        for parameter in bank.parameters.values():
            parameter.zero_()
        return bank

    def _take(self, bank: _Bank, layer: nn.Module, key: str) -> None:
        """Take what was put into a layer's slots out of it, and into a bank."""
        for path, owner in list(layer.named_modules()):
            for slot in SLOTS:
                module = owner._modules.get(slot)
                if module is None:
                    continue
                setattr(owner, slot, None)
                bank.modules[owner, slot] = module
                prefix = ".".join(part for part in (key, path, slot) if part)
                bank.parameters |= {f"{prefix}.{name}": own for name, own in module.named_parameters()}

    @torch.no_grad()
    def _fill(self, bank: _Bank, slot: int, stored: Stored, own: list[str]) -> None:
        """Copy an adaptation's own tensors to its slot; what it has not is 0."""
        adapt = stored.adaptation.adapt
        assert adapt is not None
        mine = set(own)
        for name, parameter in bank.parameters.items():
            if name in mine:
                parameter[slot].copy_(self._local(stored.read(name), parameter, 1).double() * folded_scale(adapt, name))
            else:
                parameter[slot].zero_()
        missing = sorted(mine - bank.parameters.keys())
        if missing:
            rule = f"{missing[0]} has no place in a table of adaptations"
            raise ConfigError(rule, field="adapt.method", value=adapt.method, remedy="load it alone")

    def _local(self, whole: torch.Tensor, parameter: nn.Parameter, leading: int) -> torch.Tensor:
        """Cut this rank's part of a whole tensor, as a parameter that has `leading` dimensions more is cut."""
        if not getattr(parameter, "tensor_model_parallel", False):
            return whole
        topology = self._context.topology
        dim, stride = int(parameter.partition_dim) - leading, int(parameter.partition_stride)  # type: ignore[attr-defined]
        blocks = whole.chunk(stride, dim=dim)
        return torch.cat([block.chunk(topology.tp_size, dim=dim)[topology.tp_rank] for block in blocks], dim=dim)

    @property
    def _device(self) -> torch.device:
        return self._context.topology.device

    def _tensor(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def _named_owners(module: SequentialModel) -> Iterator[tuple[str, Any]]:
    """List the base's modules that hold parameters or layers, by the engines' names; the containers have no logical one."""
    for name, owner in module.named_modules():
        if name and name != TIED_MODULES:
            yield name, owner
