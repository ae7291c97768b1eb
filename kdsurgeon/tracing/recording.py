"""Record what a forward pass does while it runs on tensors without data.

The model's own Python runs unchanged: its tensors are real tensor objects, its sizes are real
integers, so every ``if``, ``len``, ``int`` and ``isinstance`` in it works. A torch function mode
sees each operation and writes it down. A number that grows with the batch is recognised by its
factor :data:`BATCH` and becomes a size read from the input, so that the batch stays dynamic.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

from kdsurgeon.tracing.values import (
    BATCH,
    batch_axis,
    call,
    call_leaf,
    mapped,
    on_meta,
    tensors_in,
    without_data,
)

_ITEMS = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}
_QUERIES = frozenset(
    {
        "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "item",
        "tolist", "is_nonzero", "equal", "allclose", "numpy", "__array__",
    }
)  # fmt: skip
_DECISIONS = frozenset({"__bool__", "__contains__", "is_nonzero", "equal", "allclose"})
_PLAIN = (
    bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format,
    range, Enum,
)  # fmt: skip
_STRANGE_MODULES = (torch.jit.ScriptModule,)


class DataDependent(Exception):
    """The program depends on what the tensors hold, which a graph cannot record."""


class Unsupported(DataDependent):
    """What no rung can help: the graph would not be the model."""


class Recorder(TorchFunctionMode):
    """Everything torch does between :meth:`record`'s start and end, as an fx graph.

    Args:
        model: what is recorded; its state is called by its name there.
        stand_ins: the inputs without data, by the name of their placeholder.
        device: where the real inputs lie, for models that ask.
        leaves: modules that stay whole, beside those of ``torch.nn``.
        owner: whose names weights and buffers have, if not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        stand_ins: Mapping[str, Tensor],
        device: torch.device,
        leaves: Collection[nn.Module] = (),
        owner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.device = device
        self.extra_leaves = set(leaves)
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.lost: list[str] = []
        self.last = "input"
        self.failed_in: str | None = None
        self.seen_leaves: set[nn.Module] = set()
        self._paths = {module: path for path, module in model.named_modules()}
        self._state = _names_of_state(owner or model)
        self._weights = {name for name, _ in (owner or model).named_parameters()}
        self._nodes: dict[int, fx.Node] = {}
        self._stand_ins: dict[int, Tensor] = {}
        self._kept: list[Any] = []  # alive, so that no two tensors get the same id
        self._scope: list[str] = [""]
        self._names: dict[str, int] = {}
        self._batch: dict[int, fx.Node] = {}
        self._is_inside_leaf = False
        for name, value in stand_ins.items():
            node = self._create("placeholder", name, (), {}, self._unique(name))
            self._bind(node, value)
        self._inputs_end = node  # pyright: ignore[reportPossiblyUnboundVariable]

    # what runs ───────────────────────────────────────────────────────────────────────────────────

    def record(self, run: Callable[[], Any]) -> fx.Graph:
        """The graph of ``run``, which returns one tensor."""
        with _said_to_be_compiling(), _watched_modules(self), _watched_functions(self), self:
            result = run()
        node = self._argument(result)
        if not isinstance(node, fx.Node):
            raise DataDependent("the model returns what was not computed from its input")
        self._create("output", "output", (node,), {}, "output")
        return self.graph

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args[0])
        if name in ("__set__", "__delete__"):
            return self._set_attribute(func, args)
        if name in _QUERIES and args and isinstance(args[0], Tensor):
            return self._answer(func, args, kwargs or {})
        return self._operation(func, args, kwargs or {})

    def _operation(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        values = mapped(list(args), self._stand_in), mapped(dict(kwargs), self._stand_in)
        before = [(tensor, tensor._version) for tensor in tensors_in(values)]
        result = call(func, *values)
        written = {id(tensor) for tensor, version in before if tensor._version != version}
        if not written and next(tensors_in(result), None) is None:
            return result
        if isinstance(result, (tuple, list)) and result and len(result) % BATCH == 0:
            raise DataDependent("the model loops over the samples of a batch")
        kind, target = _kind_of(func)
        return self._record(kind, target, args, kwargs, result, written)

    def call_function(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call that torch functions do not show, e.g. of a scripted function."""
        with torch._C.DisableTorchFunction():
            return self._operation(target, args, kwargs)

    def call_module(self, module: nn.Module, run: Callable[..., Any], args: Any, kw: Any) -> Any:
        """A leaf becomes one node; any other module runs and shows what it does."""
        path = self._paths.get(module)
        if type(module).__name__ == "OptimizedModule" and not self._is_inside_leaf:
            return module._modules["_orig_mod"](*args, **kw)  # pyright: ignore[reportOptionalCall]
        if self._is_inside_leaf or path == "":
            return run(module, *args, **kw)
        if path is None:
            self._refuse_foreign_weights(module)
            return run(module, *args, **kw)
        if not self._is_leaf(module):
            self._scope.append(path)
            try:
                return run(module, *args, **kw)
            except Exception:
                self.failed_in = self.failed_in or path
                raise
            finally:
                self._scope.pop()
        with torch._C.DisableTorchFunction():
            return self._call_leaf(module, path, args, kw)

    def _refuse_foreign_weights(self, module: nn.Module) -> None:
        if any(id(weight) not in self._state for weight in module.parameters()):
            raise Unsupported(
                f"the model calls a {type(module).__name__} that it does not register (keep "
                "modules in nn.ModuleList, not in a list)"
            )

    def _call_leaf(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        self.seen_leaves.update(module.modules())
        self.last = path
        values = mapped(list(args), self._stand_in), mapped(dict(kwargs), self._stand_in)
        before = [(tensor, tensor._version) for tensor in tensors_in(values)]
        self._is_inside_leaf = True
        try:
            result, state = call_leaf(module, *values)
        finally:
            self._is_inside_leaf = False
        written = {id(tensor) for tensor, version in before if tensor._version != version}
        keeps_state = any(tensor._version for tensor in state.values())
        return self._record(
            "call_module", path, args, kwargs, result, written, keeps_state=keeps_state
        )

    def _is_leaf(self, module: nn.Module) -> bool:
        if module in self.extra_leaves or isinstance(module, _STRANGE_MODULES):
            return True
        if not type(module).__module__.startswith("torch.nn"):
            return False
        return not any(isinstance(m, (nn.ModuleList, nn.Sequential)) for m in module.modules())

    # what it gives ───────────────────────────────────────────────────────────────────────────────

    def _record(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Mapping[str, Any],
        result: Any,
        written: set[int],
        *,
        keeps_state: bool = False,
    ) -> Any:
        arguments = mapped(tuple(args), self._argument), mapped(dict(kwargs), self._argument)
        node = self._create(kind, target, *arguments, self._qualname(kind, target))
        if written:
            node.meta["writes"] = self._written_by(args, kwargs, written)
        if keeps_state or any(n.op == "get_attr" for n in node.meta.get("writes", ())):
            node.meta["keeps_state"] = True
        if not torch.is_grad_enabled():
            node.meta["no_grad"] = True
        self._bind(node, result)
        for source in node.meta.get("writes", ()):
            self._refuse_written_weight(source)
            if isinstance(result, Tensor) and result.shape == source.meta["val"].shape:
                self._rename(source, node)
        return result

    def _refuse_written_weight(self, source: fx.Node) -> None:
        if source.op == "get_attr" and str(source.target) in self._weights:
            raise Unsupported(f"the model overwrites its weight {source.target} while it runs")

    def _written_by(
        self, args: Any, kwargs: Mapping[str, Any], written: set[int]
    ) -> tuple[fx.Node, ...]:
        """The arguments that were overwritten; of several names of one memory the first."""
        found: dict[int, fx.Node] = {}
        for tensor in tensors_in((args, list(kwargs.values()))):
            stand_in = self._stand_ins.get(id(tensor), tensor)
            if id(stand_in) in written:
                memory = stand_in.untyped_storage()._cdata
                found.setdefault(memory, self._nodes[id(tensor)])
        return tuple(found.values())

    def _rename(self, old: fx.Node, new: fx.Node) -> None:
        """Let the tensor that ``old`` gave be known as what ``new`` gives."""
        for key in [key for key, node in self._nodes.items() if node is old]:
            self._nodes[key] = new

    def _bind(self, node: fx.Node, value: Any) -> None:
        """Let ``value``, or every tensor in it, be known as what ``node`` gives."""
        node.meta["val"] = value
        self._kept.append(value)
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node
        elif isinstance(value, (tuple, list)):
            self._bind_items(node, enumerate(value))
        elif isinstance(value, Mapping):
            self._bind_items(node, value.items())

    def _bind_items(self, node: fx.Node, items: Any) -> None:
        for key, item in items:
            if next(tensors_in(item), None) is not None:
                name = self._unique(f"{node.meta['qualname']}.{key}")
                part = self._create("call_function", operator.getitem, (node, key), {}, name)
                self._bind(part, item)

    def _create(self, kind: str, target: Any, args: Any, kwargs: Any, qualname: str) -> fx.Node:
        node = self.graph.create_node(kind, target, args, kwargs)
        node.meta["qualname"] = self.last = qualname
        return node

    def _qualname(self, kind: str, target: Any) -> str:
        if kind in ("call_module", "get_attr"):
            return self._unique(str(target))
        name = str(getattr(target, "__name__", target)).strip("_")
        return self._unique(".".join(part for part in (self._scope[-1], name) if part))

    def _unique(self, base: str) -> str:
        count = self._names[base] = self._names.get(base, -1) + 1
        return f"{base}_{count}" if count else base

    # what it takes ───────────────────────────────────────────────────────────────────────────────

    def _stand_in(self, value: Any) -> Any:
        """A leaf argument as the operation gets it while recording."""
        if not isinstance(value, Tensor):
            return on_meta(value)
        if id(value) in self._nodes and value.is_meta and id(value) not in self._stand_ins:
            return value
        if id(value) not in self._stand_ins:
            self._kept.append(value)
            self._stand_ins[id(value)] = without_data(value)
        return self._stand_ins[id(value)]

    def _argument(self, value: Any) -> Any:
        """A leaf argument as it stands in the graph."""
        if isinstance(value, Tensor):
            return self._nodes.get(id(value)) or self._attribute_node(value)
        if isinstance(value, int) and not isinstance(value, bool) and value and value % BATCH == 0:
            return self._batch_multiple(value // BATCH)
        if isinstance(value, torch.device) and value.type == "meta":
            return self.device
        if value is None or value is ... or isinstance(value, _PLAIN):
            return value
        raise DataDependent(f"the model passes a {type(value).__name__} to {self.last}")

    def _attribute_node(self, value: Tensor) -> fx.Node:
        """The node that fetches a weight, a buffer, or a constant from outside of the model."""
        name = self._state.get(id(value))
        if name is None:
            if value.is_meta and self.device.type != "meta":
                raise DataDependent("the model computes with something that torch does not show")
            name = f"_constant{len(self.constants)}"
            self.constants[name] = value
        node = self._create("get_attr", name, (), {}, self._unique(name))
        node.meta["val"] = self._stand_in(value)
        self._nodes[id(value)] = self._nodes[id(node.meta["val"])] = node
        return node

    def _batch_multiple(self, factor: int) -> fx.Node:
        """The node for ``factor`` times the number of samples."""
        if 1 not in self._batch:
            source = next(n for n in self.graph.nodes if batch_axis(n.meta["val"]) is not None)
            with self.graph.inserting_after(self._inputs_end):
                axis = batch_axis(source.meta["val"])
                node = self._create(
                    "call_method", "size", (source, axis), {}, self._unique("batch")
                )
            node.meta |= {"val": BATCH, "batch": 1}
            self._batch[1] = node
        if factor not in self._batch:
            base = self._batch[1]
            with self.graph.inserting_after(base):
                name = self._unique("batch.mul")
                node = self._create("call_function", operator.mul, (base, factor), {}, name)
            node.meta |= {"val": BATCH * factor, "batch": factor}
            self._batch[factor] = node
        return self._batch[factor]

    # what it answers ─────────────────────────────────────────────────────────────────────────────

    def _attribute(self, getter: Any, tensor: Tensor) -> Any:
        owner = getter.__self__
        name = getattr(owner, "__name__", None) or owner.fget.__name__
        if name == "device":
            return self.device if tensor.is_meta else tensor.device
        if name in ("is_meta", "is_cuda", "is_cpu", "is_mps", "is_xpu"):
            kind = (self.device if tensor.is_meta else tensor.device).type
            return kind == name.removeprefix("is_")
        value = getter(tensor)
        if not isinstance(value, Tensor) or name in ("grad", "_grad"):
            return value
        return self._operation(_attribute_reader(name), (tensor,), {})

    def _set_attribute(self, setter: Any, args: Any) -> Any:
        name = getattr(setter.__self__, "__name__", "")
        if name != "requires_grad":
            raise DataDependent(f"the model replaces the {name} of a tensor while it runs")
        return None

    def _answer(self, query: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What Python learns of a tensor's values, where those do not depend on the input."""
        try:
            return query(*mapped(args, self._known_value), **mapped(dict(kwargs), on_meta))
        except DataDependent as error:
            verb = "branches on" if query.__name__ in _DECISIONS else "turns into Python numbers"
            raise DataDependent(f"the model {verb} the values of a tensor") from error

    def _known_value(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return on_meta(value)
        return _constant_value(self._argument(value), self.model, self.constants, {})


def _kind_of(func: Any) -> tuple[str, Any]:
    name = getattr(func, "__name__", "")
    if name in _ITEMS:
        return "call_function", _ITEMS[name]
    method = getattr(torch.Tensor, name, None)
    wraps_method = method is not None and getattr(func, "__module__", None) == "torch._tensor"
    if method is func or wraps_method:  # x ** 2 is a wrapper of pow
        return "call_method", name
    return "call_function", func


@functools.cache
def _attribute_reader(name: str) -> Callable[[Tensor], Tensor]:
    def read(tensor: Tensor) -> Tensor:
        return getattr(tensor, name)

    read.__name__ = read.__qualname__ = name
    return read


def _names_of_state(model: nn.Module) -> dict[int, str]:
    state = [*model.named_parameters(), *model.named_buffers()]
    return {id(value): name for name, value in reversed(state)}


def _constant_value(
    node: fx.Node, model: nn.Module, constants: Mapping[str, Tensor], known: dict[fx.Node, Any]
) -> Any:
    """What ``node`` holds, if nothing that it is computed from depends on an input."""
    if node in known:
        return known[node]
    if node.op == "placeholder" or "batch" in node.meta:
        raise DataDependent("it depends on the input")
    if node.op == "get_attr":
        target = str(node.target)
        value = constants[target] if target in constants else operator.attrgetter(target)(model)
        known[node] = value.detach()
        return known[node]
    args, kwargs = map_arg(
        (node.args, node.kwargs), lambda n: _constant_value(n, model, constants, known)
    )
    with torch.no_grad():
        if node.op == "call_module":
            known[node] = model.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            known[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    return known[node]


# seeing what torch functions do not show ─────────────────────────────────────────────────────────


@contextmanager
def _said_to_be_compiling() -> Iterator[None]:
    """Code that asks is told that it must not decide by the values of tensors."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextmanager
def _watched_modules(recorder: Recorder) -> Iterator[None]:
    """Calls of modules go to the recorder first."""
    original = nn.Module.__call__

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # not by its __call__, which a compiled module has replaced
        return recorder.call_module(module, nn.Module._call_impl, args, kwargs)

    nn.Module.__call__ = watched  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        nn.Module.__call__ = original


@contextmanager
def _watched_functions(recorder: Recorder) -> Iterator[None]:
    """Scripted functions and hand-written gradients become one node each."""
    scripted = torch._C.ScriptFunction.__call__
    applied = torch.autograd.Function.__dict__["apply"]

    def call_scripted(function: Any, *args: Any, **kwargs: Any) -> Any:
        original = functools.partial(scripted, function)
        return recorder.call_function(_named_call(original, function.name), args, kwargs)

    def apply(cls: Any, *args: Any) -> Any:
        function = functools.partial(applied.__func__, cls)
        return recorder.call_function(_named_call(function, cls.__name__), args, {})

    torch._C.ScriptFunction.__call__ = call_scripted  # pyright: ignore[reportAttributeAccessIssue]
    torch.autograd.Function.apply = classmethod(apply)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch._C.ScriptFunction.__call__ = scripted
        torch.autograd.Function.apply = applied


def _named_call(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    run.__name__ = run.__qualname__ = name
    return run


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Whatever a forward pass stores in the model, or in the caches of its code, is undone.

    A cache that a model keeps of its own tensors is empty meanwhile: a graph must hold how they
    are computed, not what they once were.
    """
    before = [(module, _attributes(module)) for module in model.modules()]
    around = [(container, container.copy()) for container in _containers_around(model)]
    caches = [cache for module in model.modules() for cache in _tensor_caches(module)]
    contents = [dict(cache) for cache in caches]
    _clear_function_caches(model)
    for cache in caches:
        cache.clear()
    try:
        yield
    finally:
        _clear_function_caches(model)
        for cache, content in zip(caches, contents, strict=True):
            cache.clear()
            cache.update(content)
        for container, content in around:
            _refill(container, content)
        for module, attributes in before:
            _restore(module, attributes)


_CONTAINERS = (dict, list, set, OrderedDict)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The module's attributes; of dicts, lists and sets also what is in them."""
    return {
        name: (value, value.copy() if type(value) in _CONTAINERS else None)
        for name, value in module.__dict__.items()
    }


def _restore(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    for name in module.__dict__.keys() - attributes.keys():
        del module.__dict__[name]
    for name, (value, content) in attributes.items():
        module.__dict__[name] = value
        if content is not None:
            _refill(value, content)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if type(container) is list else container.update)(content)


def _containers_around(model: nn.Module) -> list[Any]:
    """What the code of the model closes over and may keep tensors in."""
    functions = [
        value
        for module in model.modules()
        for value in [*vars(type(module)).values(), module.__dict__.get("forward")]
        if isinstance(value, FunctionType) and not type(module).__module__.startswith("torch.")
    ]
    found = {
        id(cell.cell_contents): cell.cell_contents
        for function in functions
        for cell in function.__closure__ or ()
        if _is_filled(cell) and type(cell.cell_contents) in _CONTAINERS
    }
    sources = {function.__module__ for function in functions}
    for source in sources & sys.modules.keys():
        for name, value in vars(sys.modules[source]).items():
            if type(value) in _CONTAINERS and not name.startswith("__"):
                found[id(value)] = value
    return list(found.values())


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # the name is not bound yet
        return False


def _tensor_caches(module: nn.Module) -> list[dict[Any, Any]]:
    own = (module._parameters, module._buffers, module._modules)
    return [
        value
        for value in module.__dict__.values()
        if type(value) is dict
        and value
        and not any(value is state for state in own)
        and all(isinstance(item, Tensor) for item in value.values())
    ]


def _clear_function_caches(model: nn.Module) -> None:
    """Forget what ``functools.cache`` keeps in the code of the model: it may be without data."""
    for source in {type(module).__module__ for module in model.modules()}:
        if source.startswith("torch.") or source not in sys.modules:
            continue
        for value in list(vars(sys.modules[source]).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
