"""Read a data set that an installed plugin knows how to read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kdsurgeon import plugins
from kdsurgeon.data.arrays import array_content
from kdsurgeon.data.sets import Options, Part, Split, content_hash, finish
from kdsurgeon.errors import PluginError, SurgeonError


def load_source(name: str, path: Path, options: Options) -> Split:
    """The data set that the plugin ``name`` reads at ``path``; its test part validates."""
    plugin = plugins.load("data", name)
    try:
        train_images, train_labels, test_images, test_labels, class_names = plugin(path)
    except (SurgeonError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f'the data source "{name}" failed on {path}.', why=f"{type(error).__name__}: {error}"
        ) from error
    images, labels = (train_images, test_images), (train_labels, test_labels)
    train, val = (
        Part(pixels, numbers, tuple(hashlib.sha256(row).digest() for row in pixels))
        for pixels, numbers in zip(images, labels, strict=True)
    )
    fingerprint = content_hash(array_content(images, labels), class_names)
    notes = ["the test part serves as the validation part."]
    return finish(
        name, train, val, tuple(class_names), options, fingerprint=fingerprint, notes=notes
    )
