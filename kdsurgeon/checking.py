"""What the batches of a run must be: looked at before the first step, and as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdsurgeon.errors import UsageError
from kdsurgeon.ranks import Ranks
from kdsurgeon.tracing import Inputs, in_mode
from kdsurgeon.training import Batches, Before


def first_batch(batches: Batches) -> tuple[Inputs, Tensor]:
    """The inputs and labels of the first batch, if that is what the batches hold."""
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise UsageError(
            f"the batches, of type {type(batches).__name__}, cannot be gone through anew each "
            "epoch.",
            fix="give a DataLoader, or a list of (images, labels)",
        )
    first: Any = next(iter(batches), None)
    pair = isinstance(first, tuple | list) and len(first) == 2
    if not pair or not _are_inputs(first[0]) or not isinstance(first[1], Tensor):
        kind = "nothing" if first is None else f"a {type(first).__name__}"
        raise UsageError(
            f"the batches hold {kind}, not pairs of tensors (images, labels).",
            fix="give a DataLoader whose batches are (images, labels), or ({name: tensor}, labels)",
        )
    inputs, target = first
    is_image = isinstance(inputs, Tensor) and not inputs.is_floating_point()
    is_index = target.dtype == torch.int64 and target.ndim == 1
    is_share = target.is_floating_point() and target.ndim == 2
    if is_image or not (is_index or is_share):
        raise UsageError(
            f"a batch holds {_dtypes(inputs)} and labels of {target.dtype} with "
            f"{target.ndim} axes.",
            fix="give normalised images of float32, and class indices of int64, one per image, or "
            "the shares of all classes (batch, classes)",
        )
    sizes = {x.shape[:1] for x in ([inputs] if isinstance(inputs, Tensor) else inputs.values())}
    if target.shape[:1] not in sizes:
        raise UsageError(
            f"a batch holds {len(target)} labels for inputs of another number of samples.",
            given=", ".join("×".join(map(str, size)) or "one number" for size in sorted(sizes)),
            fix="give one label for each sample",
        )
    return inputs, target


def _are_inputs(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(each, Tensor) for each in value.values())
    return isinstance(value, Tensor)


def _dtypes(inputs: Inputs) -> str:
    if isinstance(inputs, Tensor):
        return f"images of {inputs.dtype}"
    return f"inputs of {', '.join(str(value.dtype) for value in inputs.values())}"


def check_least_part(
    model: nn.Module, run: Callable[[], object], batches: Batches, ranks: Ranks
) -> None:
    """Whether ``model`` can learn from the smallest part of a batch that a process gets.

    Args:
        run: the model's forward pass on one sample; asked only where a process gets no more.

    Raises:
        UsageError: it cannot, because batch normalisation needs two values of each channel.
    """
    source: Any = batches
    if not hasattr(source, "least_part") or source.least_part(ranks.world) != 1:
        return
    before = Before(model)
    before.remember()
    try:
        with in_mode(model, training=True), torch.no_grad():
            run()
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            "the last batch of an epoch leaves a process one image, from which batch "
            "normalisation cannot learn.",
            given=f"{ranks.world} processes" if ranks.world > 1 else None,
            fix=f"--batch-size {source.roomier(ranks.world)}, for example",
        ) from error
    finally:
        before.restore()


class CheckedBatches:
    """Batches whose labels are looked at as they come, while they are still on the host."""

    def __init__(
        self, batches: Batches, classes: int, ignored: int | None, *, one_size: bool
    ) -> None:
        self._batches, self._one_size = batches, one_size
        self._sizes: list[list[int]] | None = None
        self.check = partial(_check_labels, classes=classes, ignored=ignored)

    def __len__(self) -> int:
        return len(self._batches) if isinstance(self._batches, Sized) else 0

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        for inputs, target in self._batches:
            if self._one_size:
                self._check_sizes(inputs)
            self.check(target)
            yield inputs, target

    def _check_sizes(self, inputs: Inputs) -> None:
        """A graph holds for the sizes it was captured with; only the batch may vary."""
        each = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
        sizes = [list(value.shape[1:]) for value in each]
        self._sizes = self._sizes or sizes
        if sizes != self._sizes:
            raise UsageError(
                "a batch holds samples of another size than the first.",
                first="; ".join(map(str, self._sizes)),
                now="; ".join(map(str, sizes)),
                fix="resize images, or pad sequences, to one size for the whole run",
            )

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._batches, name)
        if name == "shard":
            known = {**self.check.keywords, "one_size": self._one_size}
            return lambda rank, world: CheckedBatches(found(rank, world), **known)
        return found


def _check_labels(target: Tensor, classes: int, ignored: int | None) -> None:
    if target.is_floating_point():
        _check_shares(target, classes)
        return
    counted = target if ignored is None else target[target != ignored]
    if len(counted) and (counted.min() < 0 or counted.max() >= classes):
        wrong = counted.max() if counted.max() >= classes else counted.min()
        raise UsageError(
            f"a label is {int(wrong)}; the models have {classes} classes, counted from 0.",
            fix="loss.ignore_index names the label of samples that are not to be counted",
        )


def _check_shares(target: Tensor, classes: int) -> None:
    fix = "give class indices, or what mixup and cutmix make of them: (batch, classes)"
    if target.shape[-1] != classes:
        raise UsageError(
            f"the labels are shares of {target.shape[-1]} classes; the models have {classes}.",
            fix=fix,
        )
    sums = target.double().sum(-1)
    # bfloat16 rounds each share by up to 0.2 %; and what is compared so finds NaN, too
    right = (target >= 0).all(-1) & ((sums - 1).abs() < 0.01)
    if not right.all():
        row = int((~right).nonzero()[0])
        raise UsageError(
            f"the labels are no shares of {classes} classes: those of sample {row} sum to "
            f"{sums[row]:.4g}, the least of them is {target[row].min():.4g}.",
            why="each row must hold numbers of 0 or more that sum to 1",
            fix=fix,
        )
