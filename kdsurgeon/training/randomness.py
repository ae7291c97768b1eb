"""The state of every source of random numbers, as plain integers: no pickle, nothing left out."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdsurgeon.errors import ModelFileError


@dataclass(frozen=True)
class RandomState:
    """The generators of Python, NumPy (the global one), torch's CPU and all CUDA devices in use.

    >>> before = RandomState.now()
    >>> drawn = torch.rand(2), random.random()
    >>> before.set()
    >>> torch.equal(drawn[0], torch.rand(2)), drawn[1] == random.random()
    (True, True)
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    cpu: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> RandomState:
        count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
        return cls(
            random.getstate(),
            np.random.get_state(legacy=True),  # pyright: ignore[reportArgumentType]
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state(index) for index in range(count)),
        )

    def set(self) -> None:
        """Let every generator go on from here."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for index, state in enumerate(self.cuda):
            torch.cuda.set_rng_state(state, index)

    def tensors(self) -> dict[str, Tensor]:
        """The same by name, for a file."""
        version, words, gauss = self.python
        kind, keys, position, has_gauss, cached = self.numpy
        assert (version, kind) == (3, "MT19937")
        found = {
            "python": torch.tensor(words, dtype=torch.int64),
            "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
            "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
            "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
            "cpu": self.cpu,
        }
        return found | {f"cuda.{index}": state for index, state in enumerate(self.cuda)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> RandomState:
        """What :meth:`tensors` gave.

        Raises:
            ModelFileError: a generator's state is missing, or its device is.
        """
        now = cls.now().tensors()
        if set(tensors) != set(now):
            raise ModelFileError(
                "the checkpoint holds other generators of random numbers than this process has.",
                saved=", ".join(sorted(tensors)),
                now=", ".join(sorted(now)),
                fix="go on with as many CUDA devices as before, or --allow-change device",
            )
        *keys, position, has_gauss = tensors["numpy"].tolist()
        gauss = tensors["python.gauss"].tolist()
        return cls(
            (3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None),
            (
                "MT19937",
                np.array(keys, dtype=np.uint32),
                position,
                has_gauss,
                tensors["numpy.gauss"].item(),
            ),
            tensors["cpu"],
            tuple(tensors[f"cuda.{index}"] for index in range(len(now) - 5)),
        )


def scatter(seed: int, rank: int) -> None:
    """Let a process draw other numbers than those of another rank, for dropout; rank 0 goes on."""
    if rank:
        drawn = np.random.SeedSequence([seed, rank]).generate_state(3).tolist()
        random.seed(drawn[0])
        np.random.seed(drawn[1])
        torch.manual_seed(drawn[2])
