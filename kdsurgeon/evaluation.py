"""Accuracy and agreement of student, teacher and every stone on held-out data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdsurgeon.errors import DataError
from kdsurgeon.ranks import ALONE, Ranks, total
from kdsurgeon.stones import SteppingStones
from kdsurgeon.tracing import Inputs, in_mode, logits_of, move


@dataclass(frozen=True)
class ClassCounts:
    """Samples of one class: all, those that teacher and student get right, and those that only the
    teacher does."""

    samples: int
    teacher: int
    student: int
    lost: int

    @property
    def gained(self) -> int:
        """Those that only the student gets right."""
        return self.student - (self.teacher - self.lost)


@dataclass(frozen=True)
class Report:
    """Shares between 0 and 1. ``agreement`` is how often a stone or the student gives the
    teacher's answer; stones are keyed by depth, ``classes`` stand in the order of the logits."""

    samples: int
    student: float
    teacher: float
    stones: dict[int, float]
    student_agreement: float
    stone_agreement: dict[int, float]
    classes: tuple[ClassCounts, ...] = ()

    @property
    def lost(self) -> dict[str, float]:
        """Agreement with the teacher that each part of the student loses, by name.

        Stone i is the student up to block i and the teacher from there. What a deeper stone, or
        the student itself, still knows was not lost before: so the best of those from i on counts,
        and what it agrees less than the best from i - 1 on is lost in the student's blocks between
        the two, or in the adapters.
        """
        found, before, agreement = {}, 0, 1.0
        for depth in sorted(self.stone_agreement):
            deeper = (share for at, share in self.stone_agreement.items() if at >= depth)
            reached = max(self.student_agreement, *deeper)
            name = f"block {depth}" if depth == before + 1 else f"blocks {before + 1} to {depth}"
            found[name] = agreement - reached
            before, agreement = depth, reached
        if found:
            found["the rest"] = agreement - self.student_agreement
        return found

    @property
    def weakest(self) -> str | None:
        """Where most is lost, unless the samples are too few to say: within two standard errors."""
        if not self.lost:
            return None
        name, most = max(self.lost.items(), key=lambda item: item[1])
        noise = 2 * (0.5 / self.samples) ** 0.5  # of the difference of two shares, at most
        return name if most > noise else None


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Tensor]],
    ranks: Ranks = ALONE,
    *,
    ignored: int | None = None,
) -> float:
    """The share of samples whose largest logit is the right class; in evaluation mode.

    Samples of the label ``ignored`` do not count. With several ``ranks``, ``batches`` are this
    one's part and the share is that of all samples.

    >>> images, labels = torch.eye(4).reshape(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> accuracy(nn.Flatten(), [(images, labels)])
    0.75
    """
    right, seen = 0, 0
    with in_mode(model, training=False):
        for inputs, target in batches:
            inputs, target = move(inputs, _device(model)), target.to(_device(model))
            hits = logits_of(model, inputs).argmax(-1) == target
            if ignored is not None:
                hits = hits[target != ignored]
            right += int(hits.sum())
            seen += len(hits)
    right, seen = total(ranks.all((right, seen)))
    if not seen:
        raise DataError("there is no sample to measure accuracy on.")
    return right / seen


@torch.inference_mode()
def evaluate(
    stones: SteppingStones,
    batches: Iterable[tuple[Inputs, Tensor]],
    ranks: Ranks = ALONE,
    *,
    ignored: int | None = None,
) -> Report:
    """Accuracy of student, teacher and each stone, from one pass of the training graph.

    Samples of the label ``ignored`` do not count. With several ``ranks``, ``batches`` are this
    one's part and the report is on all samples.
    """
    right = torch.zeros(len(stones.depths) + 2, dtype=torch.float64)
    agree = torch.zeros(len(stones.depths) + 1, dtype=torch.float64)
    classes = torch.zeros(0, 4, dtype=torch.int64)
    seen = 0
    with in_mode(stones, training=False):
        for inputs, target in batches:
            logits = stones(move(inputs, _device(stones)))
            target = target.to(_device(stones))
            answers = torch.cat([logits.student[None], logits.stones, logits.teacher[None]])
            answers = answers.argmax(-1)
            if ignored is not None:
                answers, target = answers[:, target != ignored], target[target != ignored]
            right += (answers == target).sum(-1).cpu()
            agree += (answers[:-1] == answers[-1]).sum(-1).cpu()
            found = _by_class(answers, target, logits.student.shape[-1])
            classes = found if not len(classes) else classes + found
            seen += len(target)
    everyone = ranks.all((right, agree, seen, classes))
    right = torch.stack([each[0] for each in everyone]).sum(0)
    agree = torch.stack([each[1] for each in everyone]).sum(0)
    seen = sum(each[2] for each in everyone)
    if not seen:
        raise DataError("there is no sample to measure accuracy on.")
    classes = torch.stack([each[3] for each in everyone if len(each[3])]).sum(0)
    student, *each, teacher_right = (right / seen).tolist()
    student_agree, *each_agree = (agree / seen).tolist()
    return Report(
        samples=seen,
        student=student,
        teacher=teacher_right,
        stones=dict(zip(stones.depths, each, strict=True)),
        student_agreement=student_agree,
        stone_agreement=dict(zip(stones.depths, each_agree, strict=True)),
        classes=tuple(ClassCounts(*counts) for counts in classes.tolist()),
    )


def _by_class(answers: Tensor, target: Tensor, number: int) -> Tensor:
    """(classes, 4): what :class:`ClassCounts` holds, of answers that begin with the student's and
    end with the teacher's."""
    answers, target = answers.cpu(), target.cpu()
    student, teacher = answers[0] == target, answers[-1] == target
    is_class = (target >= 0) & (target < number)
    groups = (is_class, teacher, student, teacher & ~student)
    counts = [torch.bincount(target[group], minlength=number) for group in groups]
    return torch.stack(counts, 1)


def _device(model: nn.Module) -> torch.device:
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))
