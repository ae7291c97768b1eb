"""Capture a model as a graph whose values know their shapes.

The tracer carries values: beside every node stands what the node is for the example input (a tensor
without data, a number, a size), so control flow on shapes runs as ordinary Python while sizes used
as data stay in the graph and the batch stays dynamic. Nothing is computed for real and nothing of
the model changes: not its mode, buffers, hooks or the random state.

A graph freezes ``if self.training`` at capture. Capture a model once in each mode you need.
"""

from __future__ import annotations

import operator
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.proxy import Attribute

from kdsurgeon.errors import TraceError

_CONSTANT_ATTRIBUTES = frozenset(
    {"dtype", "ndim", "is_sparse", "is_quantized", "layout", "requires_grad"}
)
IN_PLACE_OPERATORS = frozenset(
    {
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
        operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """A model as a graph; every node's ``meta["val"]`` is its value for the example input.

    ``meta["qualname"]`` is the node's name in torchvision's ``create_feature_extractor`` spelling.
    ``rung`` says how the graph was captured and ``lost`` what the capture could not keep.
    """

    name: str
    model: nn.Module
    graph_module: fx.GraphModule
    example: Tensor
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
    def logits(self) -> fx.Node:
        """The node whose value the model returns."""
        return self.graph_module.graph.output_node().args[0]  # pyright: ignore[reportReturnType]

    @property
    def num_classes(self) -> int:
        return self.logits.meta["val"].shape[1]


def trace(
    model: nn.Module, example: Tensor, *, name: str = "model", training: bool = False
) -> Trace:
    """Capture ``model`` as a graph.

    Args:
        model: maps images (batch, channels, height, width) to logits (batch, classes).
        example: one input; its values do not matter, its shape, dtype and device do.
        name: what errors call the model.
        training: capture the training-mode graph instead of the evaluation-mode one.

    Raises:
        TraceError: the model rejects the example, branches on the values of a tensor, or does not
            return one tensor of logits. Names the operation and the source line.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> captured = trace(model, torch.zeros(2, 3, 8, 8))
    >>> [node.name for node in captured.graph_module.graph.nodes]
    ['input_1', '_0', '_1', '_2', '_3', 'output']
    >>> captured.num_classes
    4
    """
    _check_names(model, name)
    tracer = _ValueTracer(example)
    try:
        with in_mode(model, training=training), torch.no_grad():
            graph = tracer.trace(model)
    except Exception as error:
        raise _explain(error, model, example, name, tracer) from error
    graph.output_node().meta["qualname"] = "output"
    _check_logits(graph, name)
    _redirect_reads_after_writes(graph, model, name)
    _drop_unread(graph)
    graph.lint()
    graph_module = fx.GraphModule(model, graph, class_name=type(model).__name__)
    for module in graph_module.modules():  # containers only: leaves are the model's own
        if module not in tracer.leaves:
            module.training = training
    return Trace(name, model, graph_module, example, training)


class _ValueProxy(fx.Proxy):
    """A proxy that answers questions about its value from the value for the example input."""

    @property
    def _value(self) -> Any:
        return self.node.meta["val"]

    def __getattr__(self, attribute: str) -> Any:
        value = self._value
        if isinstance(value, Tensor):
            if attribute in ("device", "is_cuda"):  # of the example, not of its stand-in
                return getattr(self.tracer.example, attribute)  # pyright: ignore[reportAttributeAccessIssue]
            if attribute in _CONSTANT_ATTRIBUTES:
                return getattr(value, attribute)
            if attribute in ("shape", "T", "mT", "H", "mH", "data"):
                return self.tracer.create_proxy("call_function", getattr, (self, attribute), {})
        return Attribute(self, attribute)

    def __len__(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return len(self._value)

    def __int__(self) -> int:
        return int(_known(self._value))

    def __index__(self) -> int:
        return operator.index(_known(self._value))

    def __float__(self) -> float:
        return float(_known(self._value))

    def __contains__(self, item: object) -> bool:
        return item in _known(self._value)

    def __hash__(self) -> int:
        return id(self.node)


def _augmented(operation: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], Any]:
    """``x += y`` as the write in place that it is; torch.fx alone records ``x + y``."""

    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


for _operation in IN_PLACE_OPERATORS:
    setattr(_ValueProxy, f"__{_operation.__name__}__", _augmented(_operation))


def _known(value: Any) -> Any:
    if isinstance(value, Tensor):
        raise _DataDependent("the model turns the values of a tensor into a Python number")
    return value


class _DataDependent(Exception):
    """The program depends on what the tensors hold, which a graph cannot record."""


class _ValueTracer(fx.Tracer):
    """Records operations, and runs each on tensors without data as it is recorded.

    Those are meta tensors: twice as fast as fake ones, which check devices and aliases besides.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.leaves: set[nn.Module] = set()
        self.last_target = "input"
        self._evaluating = False
        self._scope = [""]
        self._names: dict[str, int] = {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        # one data input; every other parameter of forward keeps its default
        return root_fn, [self.root, self.create_proxy("placeholder", "input", (), {})]

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        node = proxy.node
        node.meta["qualname"] = self._qualname(node)
        self.last_target = node.meta["qualname"]
        if kind != "output":
            node.meta["val"] = self._evaluate(node)
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ValueProxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        self._scope.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._scope.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._evaluating:
            return attr_val
        if isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            for name, buffer in self.root.named_buffers():
                if buffer is attr_val:
                    if name not in parameter_proxy_cache:
                        parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                    return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_leaf = super().is_leaf_module(m, module_qualified_name)
        if is_leaf:
            self.leaves.update(m.modules())
        return is_leaf

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = obj.node.meta["val"]
        if isinstance(value, Tensor):
            raise _DataDependent("the model branches on the values of a tensor")
        return bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        proxy: Any = obj
        return iter([proxy[index] for index in range(len(obj.node.meta["val"]))])

    def keys(self, obj: fx.Proxy) -> Any:
        return obj.node.meta["val"].keys()

    def _qualname(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "output"):
            base = node.op if node.op == "output" else str(node.target)
        elif node.op in ("call_module", "get_attr"):
            base = str(node.target)
        else:
            operation = str(getattr(node.target, "__name__", node.target))
            if node.target in IN_PLACE_OPERATORS:
                operation = operation.removeprefix("i")
            base = ".".join(part for part in (self._scope[-1], operation.strip("_")) if part)
        count = self._names[base] = self._names.get(base, -1) + 1
        return f"{base}_{count}" if count else base

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return _without_data(self.example)
        self._evaluating = True
        try:
            return evaluate(node, self.root)
        finally:
            self._evaluating = False


def evaluate(node: fx.Node, root: nn.Module) -> Any:
    """What ``node`` gives for the recorded values of its inputs, computed on tensors without data.

    Weights and buffers are stood in for, so that none is written to. Hooks before a module's call
    run, as weight normalisation is one; hooks after it do not.
    """
    args, kwargs = _on_meta(map_arg((node.args, node.kwargs), lambda other: other.meta["val"]))
    target = str(node.target)
    if node.op == "get_attr":
        return _on_meta(operator.attrgetter(target)(root))
    if node.op == "call_module":
        leaf = root.get_submodule(target)
        state = [*leaf.named_parameters(), *leaf.named_buffers()]
        stand_ins = {name: _without_data(value) for name, value in state}
        with _without_hooks(leaf):
            return _on_meta(torch.func.functional_call(leaf, stand_ins, args, kwargs))
    if node.op == "call_method":
        return _on_meta(getattr(args[0], target)(*args[1:], **kwargs))
    return _on_meta(node.target(*args, **kwargs))  # pyright: ignore[reportCallIssue]


def _on_meta(value: Any) -> Any:
    """``value`` with every tensor in it, and every device, on the device without data."""
    if isinstance(value, Tensor):
        return value if value.is_meta else _without_data(value)
    if isinstance(value, torch.device):
        return torch.device("meta")
    if type(value) in (tuple, list):
        return type(value)(_on_meta(item) for item in value)
    if type(value) is dict:
        return {key: _on_meta(item) for key, item in value.items()}
    return value


def _without_data(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="meta", requires_grad=False)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module of ``model`` in one mode, and afterwards in its own again."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _check_names(model: nn.Module, name: str) -> None:
    """torch.fx writes module names into generated source, so they must be plain text."""
    for path, _ in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]:
        if not path.isprintable() or set(path) & set('"\\'):
            raise TraceError(
                f"{name} has a module with quotes or control characters in its name.",
                where=repr(path),
                fix="rename that module",
            )


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Nobody who watches the model by forward hooks sees values that are not real."""
    before = {module: module._forward_hooks for module in model.modules()}
    for module in before:
        module._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, hooks in before.items():
            module._forward_hooks = hooks


def _check_logits(graph: fx.Graph, name: str) -> None:
    result = graph.output_node().args[0]
    value = result.meta["val"] if isinstance(result, fx.Node) else result
    if isinstance(result, fx.Node) and isinstance(value, Tensor) and value.ndim == 2:
        return
    raise TraceError(
        f"{name} does not return one tensor of logits (batch, classes).",
        returned=_describe(value),
        fix="wrap it in a module whose forward returns the logits alone",
    )


def _describe(value: Any) -> str:
    value = value.meta["val"] if isinstance(value, fx.Node) else value
    if isinstance(value, Tensor):
        return f"a tensor of shape {'×'.join(map(str, value.shape)) or '() (one number)'}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return f"a {kind} of {len(value)} values"
    return f"a {type(value).__name__}"


def writes_in_place(node: fx.Node, model: nn.Module) -> bool:
    """Whether ``node`` overwrites the tensor that is its first argument."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        if node.target in IN_PLACE_OPERATORS:
            return isinstance(node.meta["val"], Tensor)
        name = getattr(node.target, "__name__", "")
        in_place = node.kwargs.get("inplace", False)
        return bool(in_place) or (name.endswith("_") and not name.startswith("_"))
    return False


def _redirect_reads_after_writes(graph: fx.Graph, model: nn.Module, name: str) -> None:
    """Let every later reader of an overwritten tensor read the writer's result instead.

    The same values in the same order, and from then on in-place and out-of-place runs agree. That
    holds only while nobody reads the same memory through another view; who does is refused.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    sharing: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if writes_in_place(node, model) and node.args and isinstance(node.args[0], fx.Node):
            written = node.args[0]
            for reader in list(written.users):
                if order[reader] > order[node]:
                    reader.replace_input_with(written, node)
            for other in sharing.get(_memory(written), []):
                if other is not written and any(order[user] > order[node] for user in other.users):
                    raise TraceError(
                        f"{name} overwrites a tensor through a view of it.",
                        where=f"{node.meta['qualname']} writes what {other.meta['qualname']} holds",
                        fix="write out of place there, e.g. x = x * mask instead of x.mul_(mask)",
                    )
        sharing.setdefault(_memory(node), []).append(node)


def _memory(node: fx.Node) -> int:
    """Which memory a node's tensor lies in; views of a tensor lie in the same."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else id(node)


def _drop_unread(graph: fx.Graph) -> None:
    """Remove what nothing reads; in-place writes and module calls stay, for their effects."""
    for node in reversed(graph.nodes):
        is_effect = node.op in ("placeholder", "output", "call_module") or (
            node.op == "call_method" and str(node.target).endswith("_")
        )
        if not node.users and not is_effect and node.target is not operator.setitem:
            graph.erase_node(node)


def _explain(
    error: Exception, model: nn.Module, example: Tensor, name: str, tracer: _ValueTracer
) -> TraceError:
    """The foreign failure as one of ours, with the operation and the user's source line."""
    if isinstance(error, TraceError):
        return error
    place = f"{tracer.last_target}, {_source_line(error)}"
    shape = "×".join(map(str, example.shape[1:]))
    reason = _first_line(error)
    if isinstance(error, _DataDependent):
        return TraceError(
            f"{name} cannot be captured as a graph: {error}.",
            where=place,
            fix="move the decision out of forward, or hand kdsurgeon the part without it",
        )
    refusal = _refusal(model, example)
    if refusal is not None:
        return TraceError(
            f"{name} does not accept an input of shape {shape}.",
            where=f"{tracer.last_target}, {_source_line(refusal)}",
            why=_first_line(refusal),
            fix="give the size the model was made for: --input-size C,H,W",
        )
    return TraceError(
        f"{name} cannot be captured as a graph: {reason}",
        where=place,
        fix="rewrite that line with torch operations, or register the module as a leaf",
    )


def _refusal(model: nn.Module, example: Tensor) -> Exception | None:
    """What the model itself says to the example, outside of any capture."""
    try:
        with in_mode(model, training=False), torch.no_grad():
            model(example)
    except Exception as error:
        return error
    return None


def _first_line(error: Exception) -> str:
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _source_line(error: Exception) -> str:
    """``net.py:41 in forward``: the innermost frame that is neither torch's nor ours."""
    own = (str(Path(torch.__file__).parent), __file__)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(own)]
    if not theirs:
        return "inside torch"
    frame = theirs[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
