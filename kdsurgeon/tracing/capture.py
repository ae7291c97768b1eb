"""Capture a model as a graph: the rungs of the ladder, from the finest to refusal."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import operator
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from keyword import iskeyword
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from kdsurgeon.errors import TraceError, nearest
from kdsurgeon.tracing.outputs import (
    Inputs,
    call_model,
    describe,
    find_logits,
    in_mode,
    logits_in,
    lost_beside,
)
from kdsurgeon.tracing.recording import DataDependent, Recorder, Unsupported, unchanged
from kdsurgeon.tracing.values import BATCH, batch_axis, example_without_data
from kdsurgeon.tracing.writes import connect_writes

MAX_LEAF_SHARE = 0.3  # of the parameters: a larger leaf hides what is to be cut
MAX_LEAVES = 8


@dataclass(frozen=True)
class Trace:
    """A model as a graph; every node's ``meta["val"]`` is its value for the example input.

    Those values have no data, and :data:`kdsurgeon.tracing.BATCH` samples. ``meta["qualname"]`` is
    the node's name in torchvision's ``create_feature_extractor`` spelling. ``rung`` says how the
    graph was captured and ``lost`` what the capture could not keep.
    """

    name: str
    model: nn.Module
    graph_module: fx.GraphModule
    example: Inputs
    training: bool
    rung: str = "fx"
    lost: tuple[str, ...] = ()
    nodes: dict[str, fx.Node] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        nodes = {node.meta["qualname"]: node for node in self.graph_module.graph.nodes}
        assert len(nodes) == len(self.graph_module.graph.nodes), "two nodes share a name"
        object.__setattr__(self, "nodes", nodes)

    def __repr__(self) -> str:
        mode = "training" if self.training else "evaluation"
        return f"Trace({self.name}, {len(self.nodes)} nodes, {mode} mode)"

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The example by placeholder name; a lone tensor is called "input"."""
        return _by_name(self.example)

    @property
    def takes(self) -> str:
        """The shapes of the inputs without the batch, for people."""
        return _shapes(self.example)

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph_module.graph.nodes if node.op == "placeholder"]

    @property
    def logits(self) -> fx.Node:
        """The node whose value the model returns."""
        return self.graph_module.graph.output_node().args[0]  # pyright: ignore[reportReturnType]

    @property
    def num_classes(self) -> int:
        """The size of the class axis: the second, or the last of (batch, position, class)."""
        shape = self.logits.meta["val"].shape
        return shape[-1] if len(shape) == 3 else shape[1]


def trace(
    model: nn.Module, example: Inputs, *, name: str = "model", training: bool = False
) -> Trace:
    """Capture ``model`` as a graph.

    The finest rung records every operation between the layers of ``torch.nn``. Where a module does
    what a graph cannot hold, it stays whole, a leaf. Where that does not help either,
    ``torch.export`` is asked. Nothing is computed for real and nothing of the model changes: not
    its mode, buffers, hooks, caches or the random state.

    Args:
        model: maps a batch to logits, alone or in a tuple, dict or dataclass.
        example: one input batch, or several by the name of their parameter of ``forward``; their
            values do not matter, their shapes, dtypes and device do.
        name: what errors call the model.
        training: capture the training-mode graph instead of the evaluation-mode one.

    Raises:
        TraceError: the model rejects the example, branches on the values of a tensor, or does not
            return logits. Names the operation and the source line.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> captured = trace(model, torch.zeros(2, 3, 8, 8))
    >>> [node.name for node in captured.graph_module.graph.nodes]
    ['input_1', '_0', '_1', '_2', '_3', 'output']
    >>> captured.num_classes
    4
    """
    _check_names(model, name)
    _check_inputs(model, example, name)
    leaves: set[nn.Module] = set()
    first: _Failure | None = None
    for _ in range(MAX_LEAVES + 1):
        outcome = _record(model, example, training=training, leaves=leaves)
        if isinstance(outcome, _Recorded):
            return _finish(outcome, model, example, name, training=training, leaves=leaves)
        first = first or outcome
        if isinstance(outcome.error, Unsupported):
            break
        culprit = _smallest_leaf(model, outcome.failed_in, leaves)
        if culprit is None:
            break
        leaves.add(culprit)
    assert first is not None
    is_final = isinstance(first.error, (_NoLogits, Unsupported))
    if not is_final and _refusal(model, example) is None:
        exported = _record_exported(model, example, training=training)
        if isinstance(exported, _Recorded):
            return _finish(exported, model, example, name, training=training, leaves=set())
    raise _explain(first, model, example, name) from first.error


def trace_whole(model: nn.Module, example: Inputs, *, name: str = "model") -> Trace:
    """A graph that only calls ``model``: without cut points, but enough for plain distillation.

    For models that :func:`trace` refuses. The model is run once on the example.

    Raises:
        TraceError: the model rejects the example, or does not return logits.
    """
    inputs = _by_name(example)
    refusal = _refusal(model, example)
    if refusal is not None:
        raise _rejected(name, model, example, refusal, "the whole model") from refusal
    lost = ["everything inside: the model is called as a whole"]
    try:
        with in_mode(model, training=False), torch.no_grad(), unchanged(model):
            logits = _logits(model, example, lost)
    except _NoLogits as error:
        raise _no_logits(name, str(error)) from error
    graph = fx.Graph()
    given: dict[str, Any] = {key: graph.placeholder(key) for key in inputs}
    alone = isinstance(example, Tensor)
    called = graph.call_module(
        "model", tuple(given.values()) if alone else (), {} if alone else given
    )
    result = graph.call_function(logits_in, (called,))
    graph.output(result)
    value = torch.empty((BATCH, *logits.shape[1:]), dtype=logits.dtype, device="meta")
    stand_ins = _without_data(inputs)
    values = {node: stand_ins[key] for key, node in given.items()}
    for node in graph.nodes:
        node.meta = {"qualname": node.name, "val": values.get(node, value), "whole": True}
    graph.output_node().meta["qualname"] = "output"
    root = nn.Module()
    root.add_module("model", model)
    graph_module = fx.GraphModule(root, graph, class_name=type(model).__name__)
    graph_module.training = False
    return Trace(name, model, graph_module, example, False, "whole", tuple(lost))


@dataclass(frozen=True)
class _Recorded:
    graph: fx.Graph
    constants: dict[str, Tensor]
    layers: set[nn.Module]
    lost: tuple[str, ...]
    rung: str = "fx"


@dataclass(frozen=True)
class _Failure:
    error: Exception
    last: str
    failed_in: str | None


def _record(
    model: nn.Module, example: Inputs, *, training: bool, leaves: set[nn.Module]
) -> _Recorded | _Failure:
    inputs = _by_name(example)
    stand_ins = _without_data(inputs)
    device = next(iter(inputs.values())).device
    recorder = Recorder(model, stand_ins, device, leaves)
    lost: list[str] = []
    arguments = stand_ins if isinstance(example, Mapping) else stand_ins["input"]
    try:
        with in_mode(model, training=training), unchanged(model), torch.enable_grad():
            buffers = _persistent_buffers(model)
            graph = recorder.record(partial(_logits, model, arguments, lost))
            _refuse_new_buffers(buffers, _persistent_buffers(model))
    except Exception as error:
        return _Failure(error, recorder.last, recorder.failed_in)
    return _Recorded(graph, recorder.constants, recorder.seen_leaves, tuple(lost))


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """Every buffer that belongs to the model's state, by name; the others are caches."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in module._buffers.items()
        if name not in module._non_persistent_buffers_set
    }


def _refuse_new_buffers(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """A graph writes into tensors; it cannot put another one into their place."""
    for name, value in after.items():
        if value is not before.get(name):
            raise Unsupported(
                f"the model puts another tensor into the place of its buffer {name} while it runs "
                "(write into it instead: .copy_, .mul_, .add_)"
            )


def _record_exported(model: nn.Module, example: Inputs, *, training: bool) -> _Recorded | _Failure:
    """The same of the program that ``torch.export`` makes, which sees below functions of functions.

    Its operations are the smallest that there are: modules are gone, and with them their names.
    """
    inputs = _by_name(example)
    batch = _batch_of(inputs)
    stand_ins = _without_data(inputs)
    device = next(iter(inputs.values())).device
    lost: list[str] = ["modules: the graph calls functions of their weights"]
    free = {
        key: {0: torch.export.Dim.AUTO} if value.ndim and len(value) == batch else None
        for key, value in inputs.items()
    }
    try:
        with in_mode(model, training=training), unchanged(model), _silence():
            wrapped = _LogitsAlone(model, list(inputs), lost, alone=isinstance(example, Tensor))
            program = torch.export.export(
                wrapped,
                tuple(inputs.values()),
                dynamic_shapes=(tuple(free.values()),),
                strict=False,
            )
            plain = program.run_decompositions({})  # no functions of functions are left in it
            program_module = plain.module(check_guards=False)
            recorder = Recorder(program_module, stand_ins, device, owner=model)
            graph = recorder.record(partial(program_module, *stand_ins.values()))
            _read_copies_of_state(graph)
    except Exception as error:
        return _Failure(error, "", None)
    return _Recorded(graph, recorder.constants, set(), tuple(lost), "torch.export")


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing is printed: torch.export shows pages of its graph when it gives up."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(before)


def _read_copies_of_state(graph: fx.Graph) -> None:
    """Such a program writes new statistics at its end over those that its backward pass reads."""
    for node in list(graph.nodes):
        for state in node.meta.get("writes", ()):
            readers = [user for user in state.users if user is not node]
            if state.op == "get_attr" and readers:
                with graph.inserting_after(state):
                    kept = graph.call_method("clone", (state,))
                kept.meta = {
                    "val": state.meta["val"].clone(),
                    "qualname": f"{state.meta['qualname']}.clone",
                }
                for reader in readers:
                    reader.replace_input_with(state, kept)


class _LogitsAlone(nn.Module):
    """A model that takes its inputs by position and returns the logits alone."""

    def __init__(self, model: nn.Module, names: list[str], lost: list[str], *, alone: bool) -> None:
        super().__init__()
        self.model, self.names, self.lost, self.alone = model, names, lost, alone

    def forward(self, *values: Tensor) -> Tensor:
        inputs = values[0] if self.alone else dict(zip(self.names, values, strict=True))
        return _logits(self.model, inputs, self.lost)


def _logits(model: nn.Module, inputs: Inputs, lost: list[str]) -> Tensor:
    result = call_model(model, inputs)
    if isinstance(result, Tensor):
        return result
    found = find_logits(result)
    if found is None:
        raise _NoLogits(describe(result))
    lost += lost_beside(result, found[0])
    return found[1]


class _NoLogits(Exception):
    """What the model returned instead, in words."""


def _finish(
    recorded: _Recorded,
    model: nn.Module,
    example: Inputs,
    name: str,
    *,
    training: bool,
    leaves: set[nn.Module],
) -> Trace:
    graph = recorded.graph
    value = graph.output_node().args[0].meta["val"]  # pyright: ignore
    if value.ndim < 2 or not value.is_floating_point() or batch_axis(value) != 0:
        raise _no_logits(name, describe(value))
    connect_writes(graph)
    _detach_where_gradients_stop(graph)
    _drop_unread(graph, training=training)
    graph.lint()
    root = copy.copy(model)
    root._buffers = {**model._buffers, **recorded.constants}
    graph_module = fx.GraphModule(root, graph, class_name=type(model).__name__)
    for module in graph_module.modules():  # containers only: leaves are the model's own
        if module not in recorded.layers:
            module.training = training
    lost = [*recorded.lost, *_unread_weights(graph_module, model)]
    paths = sorted(path for path, module in model.named_modules() if module in leaves)
    rung = f"{recorded.rung}, whole: {', '.join(paths)}" if paths else recorded.rung
    return Trace(name, model, graph_module, example, training, rung, tuple(lost))


def _by_name(example: Inputs) -> dict[str, Tensor]:
    return dict(example) if isinstance(example, Mapping) else {"input": example}


def _without_data(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    batch = _batch_of(inputs)
    return {key: example_without_data(value, batch) for key, value in inputs.items()}


def _batch_of(inputs: Mapping[str, Tensor]) -> int:
    return max((len(value) for value in inputs.values() if value.ndim), default=0)


def _detach_where_gradients_stop(graph: fx.Graph) -> None:
    """What was computed under ``torch.no_grad`` passes no gradient in the graph either."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        is_result = node.meta.get("no_grad") and isinstance(value, Tensor)
        if not is_result or not value.is_floating_point():
            continue
        outside = [
            user for user in node.users if user.op != "output" and not user.meta.get("no_grad")
        ]
        if outside:
            with graph.inserting_after(node):
                stopped = graph.call_method("detach", (node,))
            stopped.meta = {"val": value, "qualname": f"{node.meta['qualname']}.detach"}
            for user in outside:
                user.replace_input_with(node, stopped)


def _drop_unread(graph: fx.Graph, *, training: bool) -> None:
    """Remove what nothing reads, unless it changes the model's state.

    In training mode layers and random operations stay: they move statistics, and the random state.
    """
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output") or node.meta.get("keeps_state"):
            continue
        may_draw = node.op != "get_attr" and node.target is not operator.getitem
        if training and may_draw and isinstance(node.meta["val"], Tensor):
            continue
        graph.erase_node(node)


def _unread_weights(graph_module: fx.GraphModule, model: nn.Module) -> Iterator[str]:
    """How many parameters have no part in the logits."""
    read: set[int] = set()
    for node in graph_module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            found = operator.attrgetter(str(node.target))(graph_module)
            read.update(map(id, found.parameters() if isinstance(found, nn.Module) else [found]))
    unread = [(name, own) for name, own in model.named_parameters() if id(own) not in read]
    if unread:
        count = sum(own.numel() for _, own in unread)
        yield f"{count:,} parameters, which the logits do not need, from {unread[0][0]} on"


def _smallest_leaf(model: nn.Module, path: str | None, leaves: set[nn.Module]) -> nn.Module | None:
    """The module to keep whole next: where it failed, unless that hides too much."""
    if not path:
        return None
    module = model.get_submodule(path)
    whole = sum(parameter.numel() for parameter in model.parameters())
    own = sum(parameter.numel() for parameter in module.parameters())
    holds_blocks = any(isinstance(child, nn.ModuleList) for child in module.modules())
    if module in leaves or holds_blocks or own > MAX_LEAF_SHARE * whole:
        return None
    return module


def _check_names(model: nn.Module, name: str) -> None:
    """torch.fx writes module names into generated source, so they must be plain text."""
    if not isinstance(model, nn.Module):
        raise TraceError(f"{name} is {describe(model)}, not a torch.nn.Module.")
    state = [*model.named_parameters(), *model.named_buffers()]
    lazy = [path for path, value in state if is_lazy(value)]
    if lazy:
        raise TraceError(
            f"{name} has weights without a shape yet.",
            where=lazy[0],
            fix="run the model once on real inputs first: lazy layers take their shape from them",
        )
    for path, _ in [*model.named_modules(), *state]:
        word = next((part for part in path.split(".") if iskeyword(part)), None)
        if word:
            raise TraceError(
                f'{name} has a module called "{word}", a word of Python\'s own.',
                where=path,
                fix="rename that module",
            )
        if not path.isprintable() or set(path) & set('"\\'):
            raise TraceError(
                f"{name} has a module with quotes or control characters in its name.",
                where=repr(path),
                fix="rename that module",
            )


def _check_inputs(model: nn.Module, example: Inputs, name: str) -> None:
    """Several inputs are named after the parameters of ``forward``."""
    if isinstance(example, Tensor):
        return
    if not isinstance(example, Mapping) or not example:
        kind = "empty" if isinstance(example, Mapping) else describe(example)
        raise TraceError(
            f"the example input of {name} is {kind}, not a tensor nor tensors by name.",
            takes=", ".join(inspect.signature(model.forward).parameters),
            fix="give one batch as a tensor, or several as {name: tensor}",
        )
    for key, value in example.items():
        if not isinstance(value, Tensor):
            raise TraceError(
                f"{key} in the example input of {name} is {describe(value)}, not a tensor.",
                fix="give tensors only; other parameters of forward keep their defaults",
            )
    known = inspect.signature(model.forward).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
    for key in example:
        if key not in known and not takes_any:
            raise TraceError(
                f"{name} takes no input called {key}.",
                takes=", ".join(known),
                fix=nearest(key, known) or "name the inputs as the parameters of its forward",
            )


def _no_logits(name: str, returned: str) -> TraceError:
    return TraceError(
        f"{name} does not return one tensor of logits (batch, classes).",
        returned=returned,
        fix="wrap it in a module whose forward returns the logits alone",
    )


def _explain(failure: _Failure, model: nn.Module, example: Inputs, name: str) -> TraceError:
    """The foreign failure as one of ours, with the operation and the user's source line."""
    error = failure.error
    if isinstance(error, _NoLogits):
        return _no_logits(name, str(error))
    place = f"{failure.last}, {_source_line(error)}"
    reason = _first_line(error)
    if _is_data_dependent(error):
        words = str(error) if isinstance(error, DataDependent) else _in_words(error)
        return TraceError(
            f"{name} cannot be captured as a graph: {words}.",
            where=place,
            fix="move the decision out of forward, or hand kdsurgeon the part without it",
        )
    refusal = _refusal(model, example)
    if refusal is not None:
        return _rejected(name, model, example, refusal, failure.last)
    refusal = _refusal(model, _with_one_more(example))
    if refusal is not None:
        count = _batch_of(_by_name(example)) + 1
        return TraceError(
            f"{name} does not take {count} samples of {_shapes(example)}.",
            where=f"{failure.last}, {_source_line(refusal)}",
            why=_first_line(refusal),
            fix="the batch size must stay free: read it from the input",
        )
    return TraceError(
        f"{name} cannot be captured as a graph: {reason}",
        where=place,
        fix="rewrite that line with torch operations",
    )


def _in_words(error: Exception) -> str:
    if "nonzero" in str(error):
        return "the shape of a tensor depends on the values of another"
    return "the model branches on the values of a tensor"


def _is_data_dependent(error: Exception) -> bool:
    words = (
        "meta tensor",
        "Meta tensors",
        "_local_scalar_dense",
        "data-dependent",
        "nonzero",
    )
    return isinstance(error, DataDependent) or any(word in str(error) for word in words)


def _shapes(example: Inputs) -> str:
    shapes = {
        key: "×".join(map(str, value.shape[1:])) or "one number"
        for key, value in _by_name(example).items()
    }
    if not isinstance(example, Mapping):
        return shapes["input"]
    return ", ".join(f"{shape} ({key})" for key, shape in shapes.items())


def _inputs_in_words(example: Inputs) -> str:
    """``an input of shape 3×32×32 (float32)``, or all of several."""
    dtypes = sorted(
        {str(value.dtype).removeprefix("torch.") for value in _by_name(example).values()}
    )
    noun = "inputs of shapes" if isinstance(example, Mapping) else "an input of shape"
    return f"{noun} {_shapes(example)} in {' and '.join(dtypes)}"


def _input_fix(model: nn.Module, example: Inputs) -> str:
    """What to give instead: another dtype, other inputs, or another size."""
    state = list(model.parameters())
    wanted = {weight.dtype for weight in state if weight.is_floating_point()}
    values = _by_name(example).values()
    given = {value.dtype for value in values if value.is_floating_point() or value.ndim == 4}
    if given and len(wanted) == 1 and not given & wanted:
        dtype = str(wanted.pop()).removeprefix("torch.")
        return f"the model's weights are {dtype}: give inputs of {dtype}, or model.float()"
    known = list(inspect.signature(model.forward).parameters)
    if isinstance(example, Mapping):
        return f"give tensors for what its forward takes: {', '.join(known)}"
    if len(_required(model)) > 1:
        names = ", ".join(f'"{name}": …' for name in _required(model))
        return f"its forward takes several inputs; in Python, give them by name: {{{names}}}"
    if example.ndim != 4:
        return "give the shape and dtype the model was made for; the first axis counts the samples"
    return "give the size the model was made for: --input-size C,H,W"


def _required(model: nn.Module) -> list[str]:
    """The parameters of ``forward`` that have no default."""
    parameters = inspect.signature(model.forward).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    empty = inspect.Parameter.empty
    return [each.name for each in parameters if each.default is empty and each.kind not in several]


def _rejected(
    name: str, model: nn.Module, example: Inputs, refusal: Exception, last: str
) -> TraceError:
    return TraceError(
        f"{name} does not accept {_inputs_in_words(example)}.",
        where=f"{last}, {_source_line(refusal)}",
        why=_first_line(refusal),
        fix=_input_fix(model, example),
    )


def _with_one_more(example: Inputs) -> Inputs:
    """The example with one sample more than it has."""
    inputs = _by_name(example)
    batch = _batch_of(inputs)
    longer = {
        key: torch.cat([value, value[:1]]) if value.ndim and len(value) == batch else value
        for key, value in inputs.items()
    }
    return longer if isinstance(example, Mapping) else longer["input"]


def _refusal(model: nn.Module, example: Inputs) -> Exception | None:
    """What the model itself says to the example, outside of any capture."""
    try:
        with in_mode(model, training=False), torch.no_grad(), unchanged(model):
            call_model(model, example)
    except Exception as error:
        return error
    return None


def _first_line(error: Exception) -> str:
    message = next(iter(str(error).strip().splitlines()), "")
    message = message if len(message) <= 200 else f"{message[:199]}…"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _source_line(error: Exception) -> str:
    """``net.py:41 in forward``: the innermost frame that is neither torch's nor ours."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(own)]
    if not theirs:
        return "inside torch"
    frame = theirs[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
