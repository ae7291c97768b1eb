"""Find what is installed by entry point, and import only what was asked for by name.

An extension is an object with a documented signature, published under ``kdsurgeon.<kind>``:

=============  =====================================================================
kind           signature
=============  =====================================================================
``models``     ``build(name: str, **kwargs) -> nn.Module``, found as ``SOURCE/name``
``distances``  ``d(student, teacher, target, temperature) -> Tensor``, see ``losses.Distance``
``data``       ``read(path) -> (train images, train labels, test images, test labels, class
               names)``, found as ``SOURCE:PATH``; uint8 (N, H, W, C) and int64 (N,) arrays. Images
               may also be any sequence of image files as bytes or of Pillow's images, then
               decoded as they are needed; ``name_of(row)`` on it says what messages call one,
               ``groups`` (N,) which shard each lies in. The test part may be None twice.
``trackers``   ``open(folder, settings) -> Tracker``, see ``tracking.Tracker``
=============  =====================================================================

Listing reads metadata only; no plugin is imported until it is named. ``KDSURGEON_NO_PLUGINS=1``
hides everything that kdsurgeon itself does not ship.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kdsurgeon.errors import PluginError, UsageError, nearest

KINDS = ("models", "distances", "data", "trackers")


@dataclass(frozen=True)
class Plugin:
    """One installed extension, as its metadata describes it."""

    kind: str
    name: str
    target: str
    distribution: str
    version: str


def installed(kind: str) -> dict[str, Plugin]:
    """Every extension of one kind by name; nothing is imported."""
    return {name: _describe(kind, entry) for name, entry in sorted(_entries(kind).items())}


def load(kind: str, name: str) -> Any:
    """The object that the plugin ``name`` publishes.

    Raises :class:`UsageError` when no such plugin is installed and :class:`PluginError` when
    importing it fails.

    >>> load("distances", "kl").__name__
    'kl'
    """
    entries = _entries(kind)
    if name not in entries:
        raise UsageError(
            f'no {kind.removesuffix("s")} is called "{name}".',
            installed=", ".join(sorted(entries)) or "none",
            fix=nearest(name, entries) or "`kdsurgeon plugins` lists what is installed",
        )
    plugin = _describe(kind, entries[name])
    try:
        return entries[name].load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f'the plugin "{name}" of {plugin.distribution} {plugin.version} failed to load.',
            where=plugin.target,
            why=f"{type(error).__name__}: {error}",
            fix=f"reinstall {plugin.distribution}, or uninstall it if you do not need it",
        ) from error


def _entries(kind: str) -> dict[str, EntryPoint]:
    assert kind in KINDS, kind
    own_only = os.environ.get("KDSURGEON_NO_PLUGINS", "") not in ("", "0")
    found = sorted(entry_points(group=f"kdsurgeon.{kind}"), key=_is_own)  # of one name, ours
    return {entry.name: entry for entry in found if _is_own(entry) or not own_only}


def _is_own(entry: EntryPoint) -> bool:
    return entry.dist is not None and entry.dist.name == "kdsurgeon"


def _describe(kind: str, entry: EntryPoint) -> Plugin:
    dist = entry.dist
    return Plugin(
        kind=kind,
        name=entry.name,
        target=entry.value,
        distribution=dist.name if dist else "unknown",
        version=dist.version if dist else "unknown",
    )
