"""Turn a model string into a module: ``SOURCE/NAME[,key=value…]`` or ``py:module:factory``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

import kdsurgeon.plugins as plugins
from kdsurgeon.errors import ModelFileError, PluginError, SurgeonError, UsageError, nearest

MAX_OFFERS = 8  # names of a module that an error lists
GRAMMAR = "SOURCE/NAME[,key=value…] or py:package.module:factory[,key=value…]"


@dataclass(frozen=True)
class Spec:
    """A model string taken apart; the source is ``py`` for a factory of the user."""

    text: str
    source: str
    name: str
    arguments: dict[str, Any]


def build(spec: str, *, num_classes: int | None = None) -> nn.Module:
    """The module that a model string describes, as its factory returns it.

    ``SOURCE/NAME`` asks the installed model source ``SOURCE``; ``py:package.module:factory`` and
    ``py:file.py:factory`` import code that the user typed. Arguments are YAML-like scalars.
    ``num_classes`` is passed on when given, unless the string has one or the factory takes none.

    Raises :class:`UsageError` for a string that leads nowhere or a factory that fails and
    :class:`PluginError` when the plugin behind ``SOURCE`` crashes.

    >>> parse("timm/resnet18,pretrained=true,drop_rate=0.1").arguments
    {'pretrained': True, 'drop_rate': 0.1}
    """
    parsed = parse(spec)
    maker = _from_factory if parsed.source == "py" else _from_plugin
    model = maker(parsed, num_classes)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f'"{parsed.text}" made {type(model).__name__}, not a torch.nn.Module.',
            fix="name a class or function that returns the module",
        )
    return model


def parse(text: str) -> Spec:
    """A model string taken apart; nothing is imported. Raises :class:`UsageError`."""
    head, *pairs = _split(text)
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise UsageError(f'"{pair.strip()}" in "{text}" is not key=value.', expected=GRAMMAR)
        if key in arguments:
            raise UsageError(f'"{text}" gives {key} twice.')
        arguments[key] = _scalar(value.strip())
    if head.startswith("py:"):
        where, colon, factory = head[3:].rpartition(":")
        if not colon or not where or not factory.isidentifier():
            raise UsageError(f'"{text}" names no factory.', expected="py:package.module:factory")
        return Spec(text, "py", head[3:], arguments)
    source, slash, name = head.partition("/")
    if not slash or not name or not re.fullmatch(r"[A-Za-z0-9_.-]+", source):
        raise UsageError(
            f'"{text}" is neither a file nor a model string.',
            expected=GRAMMAR,
            sources=", ".join(plugins.installed("models")) or "none installed",
            fix=nearest(head, plugins.installed("models")),
        )
    return Spec(text, source, name, arguments)


def code_in(spec: str) -> str | None:
    """A model string that runs code of the user, its file under its whole path; else None.

    >>> code_in("timm/resnet18"), code_in("py:nets:small,width=3")
    (None, 'py:nets:small,width=3')
    >>> code_in("py:/home/me/../nets.py:small")
    'py:/home/nets.py:small'
    """
    if not spec.startswith("py:"):
        return None
    head, *arguments = _split(spec)
    where, _, factory = head[3:].rpartition(":")
    if where.endswith(".py"):
        where = str(Path(where).resolve())
    return ",".join([f"py:{where}:{factory}", *arguments])


def from_file(arch: str, name: str, flag: str) -> str:
    """The part of an arch found *inside* a file that may be followed; weights never name code.

    Only an installed source and plain values pass; what could lead to a file, an address or code
    is refused with the flag to type. ``pretrained`` is dropped: the weights come from the file.
    """
    fix = f"if you trust it, type it yourself: {flag} '{arch}'"
    if arch.startswith("py:"):
        raise ModelFileError(
            f"{name} asks to run {arch!r}; a weight file never names code.", fix=fix
        )
    if "/" not in arch:
        raise ModelFileError(
            f'{name} says it is a "{arch}", but not of which library.',
            fix=f"say it yourself, for example {flag} timm/{arch}",
        )
    try:
        parsed = parse(arch)
    except UsageError as error:
        raise ModelFileError(
            f"{name} names an architecture that cannot be read: {arch!r}."
        ) from error
    kept = {key: value for key, value in parsed.arguments.items() if key != "pretrained"}
    leads_out = re.compile(r"path|file|url|cfg|checkpoint|pretrained|weights|hub|repo")
    suspicious = [
        key
        for key, value in kept.items()
        if leads_out.search(key) or (isinstance(value, str) and not re.fullmatch(r"\w+", value))
    ]
    if suspicious or not re.fullmatch(r"[\w.-]+", parsed.name) or parsed.source.startswith("local"):
        raise ModelFileError(
            f"{name} names an architecture that leads outside of it: {arch!r}.", fix=fix
        )
    return ",".join([f"{parsed.source}/{parsed.name}", *map(_pair, kept.items())])


def _pair(item: tuple[str, Any]) -> str:
    key, value = item
    words = {True: "true", False: "false", None: "null"}
    return f"{key}={words[value] if value is None or isinstance(value, bool) else value}"


def _split(text: str) -> list[str]:
    """The parts of ``text`` between commas that stand outside of quotes."""
    parts = re.findall(r"""(?:[^,"']|"[^"]*"|'[^']*')+""", text)
    if not parts or ",".join(parts) != text:
        raise UsageError(f'"{text}" has an open quote or a comma too many.', expected=GRAMMAR)
    return parts


def _scalar(text: str) -> Any:
    """A YAML 1.2 scalar: null, true, false, an integer, a float, or a string (quoted or bare)."""
    words = {"null": None, "~": None, "none": None, "true": True, "false": False}
    if text.lower() in words and text in (text.lower(), text.capitalize()):
        return words[text.lower()]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][+-]?[0-9]+)?", text):
        return float(text)
    return text


def _from_plugin(spec: Spec, num_classes: int | None) -> object:
    sources = plugins.installed("models")
    if spec.source not in sources:
        raise UsageError(
            f'{spec.text} does not exist, and no model is called "{spec.source}".',
            installed=", ".join(sources) or "none",
            fix=nearest(spec.source, sources) or "check the path",
        )
    factory = plugins.load("models", spec.source)
    arguments = _arguments(spec, factory, num_classes)
    try:
        return factory(spec.name, **arguments)
    except SurgeonError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f'the model source "{spec.source}" failed on "{spec.text}".',
            why=f"{type(error).__name__}: {error}",
            fix="check the name and its arguments; the message above is the plugin's own",
        ) from error


def _from_factory(spec: Spec, num_classes: int | None) -> object:
    factory = _factory(spec)
    arguments = _arguments(spec, factory, num_classes)
    try:
        return factory(**arguments)
    except SurgeonError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f'the factory of "{spec.text}" failed.',
            why=f"{type(error).__name__}: {error}",
            fix="call it in Python with the same arguments to see where",
        ) from error


def _arguments(
    spec: Spec, factory: Callable[..., object], num_classes: int | None
) -> dict[str, Any]:
    """The arguments of the string, and ``num_classes`` where it is wished for and can be taken."""
    if num_classes is None or "num_classes" in spec.arguments:
        return spec.arguments
    try:
        taken = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a callable that does not tell
        return spec.arguments
    is_open = (
        getattr(factory, "__init__", None) is not nn.Module.__init__
    )  # which takes and refuses
    can_take = any(p.name == "num_classes" or (is_open and p.kind is p.VAR_KEYWORD) for p in taken)
    return {**spec.arguments, "num_classes": num_classes} if can_take else spec.arguments


def _factory(spec: Spec) -> Callable[..., object]:
    where, _, name = spec.name.rpartition(":")
    module = _import(spec, where)
    if not hasattr(module, name):
        offers = _offers(module)
        more = " …" if len(offers) > MAX_OFFERS else ""
        raise UsageError(
            f'"{where}" has no factory "{name}".',
            offers=", ".join(offers[:MAX_OFFERS]) + more or "nothing that can be called",
            fix=nearest(name, offers),
        )
    factory = getattr(module, name)
    if isinstance(factory, nn.Module):
        return lambda: factory
    if not callable(factory):
        raise UsageError(f'"{spec.text}" names {type(factory).__name__}, which cannot be called.')
    return factory


def _offers(module: ModuleType) -> list[str]:
    """What can be called there: what the module made itself, or else what it imported."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    callables = {name: value for name, value in public.items() if callable(value)}
    own = [name for name, value in callables.items() if _is_made_in(module, value)]
    return own or list(callables)


def _is_made_in(module: ModuleType, value: Any) -> bool:
    if isinstance(value, nn.Module | functools.partial):
        return True
    home = f"{getattr(value, '__module__', None)}."
    return home.startswith(f"{module.__name__}.")


def _import(spec: Spec, where: str) -> ModuleType:
    is_file = where.endswith(".py")
    path = Path(where)
    if is_file and not path.is_file():
        raise UsageError(f"{where} does not exist.", where=spec.text, fix="check the path")
    with importable_from(path.resolve().parent if is_file else Path.cwd()):
        try:
            return _import_file(path) if is_file else importlib.import_module(where)
        except ModuleNotFoundError as error:
            missing = error.name or where
            raise UsageError(
                f'"{spec.text}" needs the module "{missing}", which is not installed.',
                fix="install it, or run from the folder that holds it",
            ) from error
        except (Exception, SystemExit) as error:
            raise UsageError(
                f'importing "{where}" failed.',
                why=f"{type(error).__name__}: {error}",
                fix="import it in Python to see where",
            ) from error


def _import_file(path: Path) -> ModuleType:
    name = f"kdsurgeon_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def importable_from(folder: Path) -> Iterator[None]:
    """Let ``import`` look into ``folder`` first, as ``python`` itself would."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
