"""Settings on which nothing depends, given the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kdsurgeon.recipe.records import Recipe

_STONES = (
    "loss.stones", "loss.stone_schedule", "loss.cross_weight", "loss.cross_start",
    "loss.adapter_init", "loss.stone_warmup", "plan", "blocks", "budget",
)  # fmt: skip
_TEACHER = ("loss.kd_weight", "loss.temperature", "loss.distance", "data.teacher_views")

_RULES: tuple[tuple[Callable[[Recipe], bool], str, tuple[str, ...]], ...] = (
    (lambda r: r.method != "block-kd", "without stones", _STONES),
    (lambda r: r.method == "ce", "without a teacher", _TEACHER),
    (lambda r: not r.optim.model_ema, "without model_ema", ("optim.model_ema_decay",)),
    (lambda r: r.optim.opt == "adamw", "with opt adamw", ("optim.momentum",)),
    (lambda r: r.optim.sched != "step", "but with sched step",
     ("optim.decay_at", "optim.decay_rate")),
    (lambda r: r.optim.sched == "constant", "with sched constant", ("optim.min_lr",)),
    (lambda r: not r.optim.auto_batch, "without auto_batch", ("optim.auto_batch_norm",)),
    (lambda r: not r.amp, "without amp", ("amp_dtype",)),
    (lambda r: r.data.augment in ("none", "shift", "shift-flip"), "without crop", ("data.scale",)),
)  # fmt: skip


def idle_settings(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, why) of each setting that is not its default and that nothing depends on.

    >>> list(idle_settings(Recipe(method="kd", loss={"stones": (1,)})))
    [('loss.stones', 'without stones')]
    """
    fields = type(recipe).model_fields
    for is_idle, why, keys in _RULES:
        for key in keys if is_idle(recipe) else ():
            name, *rest = key.split(".")
            if name not in fields:
                continue
            given, default = getattr(recipe, name), fields[name].default
            for part in rest:
                given, default = getattr(given, part), getattr(default, part)
            if given != default:
                yield key, why
