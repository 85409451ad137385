"""What trains: every trainable tensor with its group, read from the model that will be trained, not from a config."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.table import Table
from torch import nn

from octavo.integrations.targets import GROUPS, Group, find_weights, group_of
from octavo.train.routing import experts_layers, num_experts

# peft keeps a factor at `<module>.lora_A.<adapter>.weight`, or without `.weight` for embeddings.
_FACTOR = re.compile(r"^(?P<module>.*)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])\.(?P<adapter>[^.]+)(\.weight)?$")


@dataclass(frozen=True, slots=True)
class TrainableTensor:
    """One trainable tensor. ``side`` is None for a tensor that is trained in full."""

    name: str
    group: Group
    parameter: nn.Parameter
    module: str
    adapter: str | None
    side: Literal["A", "B"] | None
    # Adapters of embeddings begin with A at zero, all others with B.
    embedding: bool
    # The experts layer it belongs to (routed experts only) and its number of experts; 1 elsewhere.
    layer: str | None
    num_experts: int

    @property
    def rank(self) -> int | None:
        """Rank of a factor, of one expert's share for routed experts."""
        if self.side is None:
            return None
        return self.parameter.shape[0 if self.side == "A" else 1] // self.num_experts

    @property
    def begins_at_zero(self) -> bool:
        """Whether this is the factor that peft initialises with zeros."""
        return self.side == ("A" if self.embedding else "B")

    @property
    def pair(self) -> str:
        """What identifies the product B·A that this factor belongs to."""
        return f"{self.module}/{self.adapter}"


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One line of the table."""

    group: Group
    tensors: int
    parameters: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainableTable:
    """What trains, by group, and how much of the model that is."""

    rows: tuple[GroupRow, ...]
    total_parameters: int

    @property
    def tensors(self) -> int:
        """Trainable tensors."""
        return sum(row.tensors for row in self.rows)

    @property
    def parameters(self) -> int:
        """Trainable parameters."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'group':<15} {'tensors':>8} {'parameters':>13}  rank"]
        lines += [f"{row.group:<15} {row.tensors:>8} {row.parameters:>13,}  {_ranks(row)}" for row in self.rows]
        return "\n".join([*lines, f"{'total':<15} {self.tensors:>8} {self.parameters:>13,}  {self._share()}"])

    def rich(self) -> Table:
        """The same as a rich table."""
        table = Table("trains", box=box.SIMPLE_HEAD)
        for heading in ("tensors", "parameters"):
            table.add_column(heading, justify="right")
        table.add_column("rank")
        for row in self.rows:
            table.add_row(row.group, f"{row.tensors:,}", f"{row.parameters:,}", _ranks(row))
        table.add_section()
        table.add_row("total", f"{self.tensors:,}", f"{self.parameters:,}", self._share())
        return table

    def _share(self) -> str:
        return f"{100 * self.parameters / self.total_parameters:.2f} % of the model"


def trainable_table(model: nn.Module) -> TrainableTable:
    """Group the trainable tensors of ``model``; groups without one are left out."""
    tensors = list(trainable_tensors(model))
    rows = []
    for group in GROUPS:
        members = [tensor for tensor in tensors if tensor.group == group]
        if members:
            ranks = tuple(sorted({tensor.rank for tensor in members if tensor.rank is not None}))
            rows.append(GroupRow(group, len(members), sum(tensor.parameter.numel() for tensor in members), ranks))
    return TrainableTable(tuple(rows), sum(parameter.numel() for parameter in model.parameters()))


def trainable_tensors(model: nn.Module) -> Iterator[TrainableTensor]:
    """Every parameter of ``model`` that requires a gradient."""
    experts = {name: num_experts(own) for name, _, own in experts_layers(model)}
    weights = find_weights(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = _FACTOR.match(name)
        layer = next((layer for layer in experts if name.startswith(f"{layer}.")), None)
        yield TrainableTensor(
            name=name,
            group=group_of(name, weights),
            parameter=parameter,
            module=factor["module"] if factor else name.rpartition(".")[0],
            adapter=factor["adapter"] if factor else None,
            side=("A" if factor["side"] == "A" else "B") if factor else None,
            embedding=factor is not None and factor["embedding"] is not None,
            layer=layer,
            num_experts=experts[layer] if layer is not None else 1,
        )


def _ranks(row: GroupRow) -> str:
    return ", ".join(map(str, row.ranks)) or "full"
