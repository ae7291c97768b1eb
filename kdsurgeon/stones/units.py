"""Share out what is trained: FSDP2 on the blocks of the student and on the adapters.

torch's FSDP2 gathers the weights of a module while that module is called. The training graph calls
no block of the student as a module, so each block's part of the graph becomes a program, and one
module for each block runs it and holds the block's weights: the user's own modules see them come
and go, as they share the place where a module keeps them. Gradients and what an optimiser remembers
lie shared out as the weights do.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdsurgeon.errors import UsageError
from kdsurgeon.ranks import Ranks

_VIEWS = "FSDP2-wrapped module .* returned a view tensor"
"""Harmless here: a block that would overwrite what it is given works on a copy."""


class Unit(nn.Module):
    """Runs programs that read the weights of one place, which are here meanwhile."""

    def __init__(self, owners: Iterable[nn.Module]) -> None:
        super().__init__()
        self.owners = nn.ModuleList(_seen_through(owner) for owner in owners)

    def forward(self, program: fx.GraphModule, *values: Any) -> tuple[Any, ...]:
        return program.forward(*values)


class Units:
    """One unit for each place; made once, and used by all graphs.

    Args:
        read: the weights that each place reads.
        model: whose weights they are; what no place reads is shared out, too, and never gathered.

    Raises:
        UsageError: a weight is read at two places, or is of a kind that FSDP2 does not take.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Mapping[Hashable, Sequence[nn.Parameter]],
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        warnings.filterwarnings("ignore", _VIEWS, UserWarning)
        names = {parameter: name for name, parameter in model.named_parameters()}
        places = _one_place_for_each(names, read)
        self._homes = {
            parameter: (module, name)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        self._units: dict[Hashable, Unit] = {}
        for place in dict.fromkeys(places.values()):
            own = {parameter for parameter, at in places.items() if at == place}
            self._units[place] = _sharded(model, own, names, ranks, device)
        for parameter in places:  # a trace may know it, still
            parameter.data = parameter.data.new_empty(0)
        for value in model.buffers():
            value.data = value.data.to(device)

    def __str__(self) -> str:
        weights = [weight for unit in self._units.values() for weight in unit.parameters()]
        whole = sum(weight.nbytes for weight in weights)
        here = sum(weight.to_local().nbytes for weight in weights)  # pyright: ignore
        return f"{here / 1e6:.3g} of {whole / 1e6:.3g} MB of weights on each process, by FSDP2"

    def program(self, place: Hashable, program: fx.GraphModule) -> nn.Module:
        """What runs a program of the nodes of a place."""
        if place not in self._units:  # it reads no weights
            return program
        return _InUnit(self._units[place], self._fetching(program))

    def _fetching(self, program: fx.GraphModule) -> fx.GraphModule:
        """The program with its weights fetched when it runs; those that it holds are gone."""
        for index, node in enumerate(program.graph.find_nodes(op="get_attr")):
            value = attrgetter(str(node.target))(program)
            if value not in self._homes:
                continue
            program.add_submodule(f"weight_{index}", _Weight(*self._homes[value]))
            with program.graph.inserting_before(node):
                node.replace_all_uses_with(program.graph.call_module(f"weight_{index}"))
            program.graph.erase_node(node)
        program.recompile()
        return program


class _InUnit(nn.Module):
    def __init__(self, unit: Unit, program: fx.GraphModule) -> None:
        super().__init__()
        self._hidden = (unit, program)  # the unit is not this module's own

    def forward(self, *values: Any) -> tuple[Any, ...]:
        unit, program = self._hidden
        if not torch.is_inference_mode_enabled():
            return unit(program, *values)
        with torch.inference_mode(False), torch.no_grad():  # FSDP2 writes into what it has
            return unit(program, *values)


def _one_place_for_each(
    names: Mapping[nn.Parameter, str], read: Mapping[Hashable, Sequence[nn.Parameter]]
) -> dict[nn.Parameter, Hashable]:
    places: dict[nn.Parameter, Hashable] = {}
    for place, parameters in read.items():
        for parameter in parameters:
            if places.setdefault(parameter, place) != place:
                raise UsageError(
                    "--shard all cannot share out a weight that two blocks of the student read.",
                    where=names[parameter],
                    fix="--shard teacher",
                )
    return places | {each: None for each in names if each not in places}


def _sharded(
    model: nn.Module,
    own: set[nn.Parameter],
    names: Mapping[nn.Parameter, str],
    ranks: Ranks,
    device: torch.device,
) -> Unit:
    from torch.distributed.device_mesh import init_device_mesh  # half a second to import
    from torch.distributed.fsdp import fully_shard

    owners = [
        module
        for module in model.modules()
        if any(parameter in own for parameter in module._parameters.values())
    ]
    others = {
        parameter
        for owner in owners
        for parameter in owner._parameters.values()
        if parameter is not None and parameter not in own
    }
    unit = Unit(owners)
    try:
        mesh = init_device_mesh(device.type, (ranks.world,))
        return fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=others)  # pyright: ignore[reportReturnType]
    except (ValueError, NotImplementedError) as error:
        raise UsageError(
            "FSDP2 does not take a weight of the student.",
            where=", ".join(sorted(names[each] for each in own)[:5]),
            why=str(error).splitlines()[0][:200],
            fix="--shard teacher",
        ) from error


def _seen_through(owner: nn.Module) -> nn.Module:
    """A module with the same weights, which are the owner's whoever sets them, and no others."""
    if type(owner).__setattr__ is not nn.Module.__setattr__:  # it wants to know, as an LSTM does
        return owner
    shell = nn.Module()
    vars(shell)["_parameters"] = owner._parameters
    return shell


class _Weight(nn.Module):
    """The weight that a module has at this moment."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._hidden = (owner, name)

    def forward(self) -> Tensor:
        owner, name = self._hidden
        return owner._parameters[name]  # pyright: ignore[reportReturnType]
