"""Hold every number of a run in frozen, validated records.

Nothing is coerced: ``"3"`` is not 3, 3.0 is not a whole number, ``true`` is not 1. This module must
not import torch: a wrong configuration is answered before torch could have been loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_core.core_schema import ValidationInfo

from kdsurgeon.errors import ConfigError
from kdsurgeon.plugins import installed
from kdsurgeon.recipe.refusals import Must, contradict, did_you_mean, explain

# What a value may be. ``Must`` is the half sentence that an error finishes: "… must be <this>".


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _known_distance(name: Any) -> Any:
    if isinstance(name, str) and name != "kl" and name not in (known := installed("distances")):
        names = sorted({"kl", *known})
        hint = did_you_mean(name, names) or f"; installed: {', '.join(names)}"
        contradict(("", f'no distance is called "{name}"{hint}'))
    return name


def _known_trackers(names: Any) -> Any:
    for name in names if isinstance(names, tuple) else ():
        if name not in (known := installed("trackers")):
            hint = did_you_mean(name, sorted(known)) or f"; installed: {', '.join(sorted(known))}"
            contradict(("", f'no tracker is called "{name}"{hint}'))
    return names


def _known_optimizer(name: Any) -> Any:
    if name not in (*_OWN_OPTIMIZERS, *TIMM_OPTIMIZERS):
        raise ValueError
    if name in TIMM_OPTIMIZERS and find_spec("timm") is None:
        text = f"opt {name} comes with timm, which is not installed: pip install timm"
        contradict(("", text))
    return name


def _known_stones(value: Any) -> Any:
    if isinstance(value, str):
        if not re.fullmatch(r"all|random|drop-first|last-[1-9][0-9]{0,3}", value):
            raise ValueError
        return value
    depths = _as_tuple(value)
    if not (isinstance(depths, tuple) and depths and all(type(depth) is int for depth in depths)):
        raise ValueError
    if not 1 <= depths[0] <= depths[-1] <= 9_999:
        raise ValueError
    return _rising(depths)


def _known_schedule(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError
    pairs = [_as_tuple(pair) for pair in value]
    if any(type(pair) is not tuple or len(pair) != 2 for pair in pairs):
        raise ValueError
    shares = _rising(tuple(share for share, _ in pairs))
    if not all(type(share) in (int, float) and 0 < share < 1 for share in shares):
        raise ValueError
    return tuple((float(share), _known_stones(stones)) for share, stones in pairs)


def _rising(numbers: tuple[float, ...]) -> tuple[float, ...]:
    if any(low >= high for low, high in pairwise(numbers)):
        raise ValueError
    return numbers


def _auto_or_count(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and 1 <= value <= 1_000_000):
        raise ValueError
    return value


_OWN_OPTIMIZERS = ("sgd", "adamw")
TIMM_OPTIMIZERS = (
    "adabelief", "adafactor", "adafactorbv", "adan", "adopt", "lamb", "laprop", "lars", "lion",
    "madgrad", "mars", "novograd", "radam", "rmsproptf",
)  # fmt: skip
"""Of timm 1.0: those that need no second pass and no other package, and that no letter too many
or few makes of sgd and adamw."""

Optimizer = Annotated[
    str,
    BeforeValidator(_known_optimizer),
    Must('"sgd" or "adamw"', ("sgd", "adamw", "lamb", "lars", "lion")),
]
Positive = Annotated[float, Field(gt=0), Must("a number above 0")]
NotNegative = Annotated[
    float,
    Field(ge=0),
    BeforeValidator(lambda value: 0.0 if type(value) is float and value == 0 else value),  # no -0.0
    Must("a number of 0 or more"),
]
Share = Annotated[float, Field(ge=0, le=1), Must("a number from 0 to 1")]
Below1 = Annotated[float, Field(ge=0, lt=1), Must("a number from 0 to below 1")]
Inside01 = Annotated[float, Field(gt=0, lt=1), Must("a number above 0 and below 1")]
Count = Annotated[int, Field(ge=1, le=1_000_000), Must("a whole number from 1 to 1,000,000")]
Tolerance = Annotated[int, Field(ge=0, le=1_000_000), Must("a whole number from 0 to 1,000,000")]
Seed = Annotated[int, Field(ge=0, lt=2**32), Must("a whole number from 0 to 4,294,967,295")]
Label = Annotated[
    Annotated[int, Field(ge=-(2**31), lt=2**31)] | None, Must("a whole number, or null")
]
Switch = Annotated[bool, Must("true or false")]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$"), Must("text on one line, not empty")]
OptionalText = Annotated[Text | None, Must("text on one line, not empty, or null")]
Distance = Annotated[Text, BeforeValidator(_known_distance)]
Blocks = Annotated[
    int | Literal["auto"],
    BeforeValidator(_auto_or_count),
    Must('"auto" or a whole number from 1 to 1,000,000', ("auto",)),
]
Stones = Annotated[
    str | tuple[int, ...],
    BeforeValidator(_known_stones),
    Must(
        '"all", "random", "last-K" (K of 1 or more), "drop-first", or a list of depths of 1 or more'
        " in rising order, such as [1, 3]",
        ("all", "random", "last-1", "last-2", "last-3", "drop-first"),
    ),
]
StoneSchedule = Annotated[
    tuple[tuple[float, str | tuple[int, ...]], ...],
    BeforeValidator(_known_schedule),
    Must("a list of [share of the run, stones] with rising shares, such as [[0.5, last-1]]"),
]
Budget = Annotated[
    Annotated[float, Field(ge=1)] | None, Must("a number of 1 or more, such as 1.5, or null")
]
Shares = Annotated[
    tuple[Inside01, ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_rising),
    Must("a list of numbers above 0 and below 1 in rising order"),
]
Trackers = Annotated[
    tuple[Text, ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_known_trackers),
    Must("a list of trackers' names, or an empty one"),
]
Mean = Annotated[
    Annotated[tuple[float, ...], Field(min_length=1)] | None,
    BeforeValidator(_as_tuple),
    Must("a list of numbers, one per channel, or null"),
]
Std = Annotated[
    Annotated[tuple[Positive, ...], Field(min_length=1)] | None,
    BeforeValidator(_as_tuple),
    Must("a list of numbers above 0, one per channel, or null"),
]
InputSize = Annotated[
    tuple[Count, Count, Count] | None,
    BeforeValidator(_as_tuple),
    Must("a list of three whole numbers (channels, height, width), or null"),
]
AutoAugment = Annotated[
    Annotated[str, Field(pattern=r"^rand(-[mn][0-9]{1,2})*$")] | None,
    Must('"rand", or "rand-m9-n2" with a strength from 0 to 30 and a count, or null', ("rand",)),
]
ShareRange = Annotated[
    tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(le=1)]],
    BeforeValidator(_as_tuple),
    AfterValidator(lambda value: value if value[0] == value[1] else _rising(value)),
    Must("a list of two numbers above 0, at most 1, the greater last"),
]
Device = Annotated[
    str,
    Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$"),
    Must('"auto", "cpu", "cuda", "cuda:N" or "mps"', ("auto", "cpu", "cuda", "cuda:0", "mps")),
]


FREE_ON_RESUME = frozenset(
    {
        "output", "checkpoint_every", "optim.skip_nan", "optim.auto_batch",
        "optim.auto_batch_norm", "track", "log_interval", "teacher_cache",
        "teacher", "student", "data_dir", "plan", "keep_every", "data.workers",
        "data.data_device",
    }
)  # fmt: skip
"""Keys that a resumed run may change: no bit of it depends on them. Of files it is compared what
they hold, of threads and device what there is, not how either was asked for."""


def _without(values: Mapping[str, Any], keys: Collection[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if f"{prefix}{key}" not in keys
    }


class Section(BaseModel):
    """What all parts of a recipe share: frozen, strict, no unknown key, errors as ConfigError."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = explain(type(self), error)
            raise ConfigError(
                "\n".join(f"{type(self).__name__}: {text}" for _, text in found)
            ) from error

    # pydantic's own mark: without it a section inside a recipe would be built by the method above,
    # and its ConfigError would hide the problems of the other sections.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    def dump(self) -> dict[str, Any]:
        """Every key with its value as plain dicts, lists and scalars, for :func:`write_yaml`."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Self:
        """The same with other values, validated again; sections as records or dicts.

        >>> Recipe(epochs=3).replace(method="kd").epochs
        3
        """
        return type(self)(**{**dict(self), **changes})

    def hash(self) -> str:
        """The sha256 of the canonical dump, as 64 hexadecimal digits: equal for equal values.

        What no bit of a run depends on (:data:`FREE_ON_RESUME`) is left out.

        >>> Recipe(epochs=3).hash() == Recipe(epochs=3, seed=0).hash() != Recipe(epochs=4).hash()
        True
        """
        counted = _without(self.dump(), FREE_ON_RESUME)
        canonical = json.dumps(counted, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class LossRecipe(Section):
    """The weights of L = α·L_task + β·L_distill + γ·L_cross and what goes into its terms.

    Yu et al. 2024, arXiv 2411.01547, for the terms; each field says whether its number is theirs.
    """

    ce_weight: NotNegative = 1.0
    """α, factor of the cross-entropy terms, no unit; ours"""
    kd_weight: NotNegative = 1.0
    """β, factor of the terms against the teacher, no unit; ours"""
    cross_weight: NotNegative = 1.0
    """γ, factor of the terms against the mean of the stones, no unit; ours"""
    cross_start: Share = 200 / 240
    """share of the run after which γ applies, 0 at once, 1 never; epoch 200 of 240 in
    Yu et al. 2024, arXiv 2411.01547"""
    temperature: Positive = 4.0
    """τ, divides the logits, no unit; ours: 4 suits CIFAR, 1 ImageNet"""
    distance: Distance = "kl"
    """the logit distance d, by plugin name; kl is that of Yu et al. 2024, arXiv 2411.01547"""
    stones: Stones = "all"
    """the stepping stones trained through, by depth; all in Yu et al. 2024, arXiv 2411.01547,
    the smaller sets are ours; random is one a step, drawn by its weight"""
    stone_schedule: StoneSchedule = ()
    """sets that take the place of ``stones`` from that share of the run on; ours"""
    adapter_init: Literal["default", "least-squares"] = "default"
    """where adapters start: at random, or at the map that fits a few batches best (SN-Net, Pan et
    al. 2023, arXiv 2302.06586); ours"""
    stone_warmup: NotNegative = 0.0
    """epochs over which the weights of the stones rise linearly from 0; ours"""
    ignore_index: Label = None
    """label of the samples that no term counts, null for none; ours"""
    label_smoothing: Below1 = 0.0
    """share of the label spread over all classes, no unit; ours"""

    fused: Switch = True
    """all terms of all stones in one kernel where there is one: on CUDA, with distance kl; ours"""

    @field_validator("cross_weight")
    @classmethod
    def _some_weight(cls, value: float, info: ValidationInfo) -> float:
        if value == info.data.get("ce_weight") == info.data.get("kd_weight") == 0:
            text = "ce_weight, kd_weight and cross_weight are all 0: nothing to learn from"
            contradict(("", text))
        return value


class OptimRecipe(Section):
    """The optimiser of student and adapters and its learning rate over the run."""

    opt: Optimizer = "adamw"
    """the optimiser, sgd or adamw, or one of timm's where that is installed, such as lamb; ours"""
    lr: Positive = 1e-3
    """highest learning rate, per update; ours, for adamw (CIFAR protocol with sgd: 0.05)"""
    momentum: Below1 = 0.9
    """momentum of sgd, without Nesterov, no unit; CIFAR protocol of RepDistiller"""
    weight_decay: NotNegative = 0.01
    """weight decay, per update; ours, for adamw (CIFAR protocol with sgd: 0.0005)"""
    decay_norms: Switch = False
    """weight decay of biases and normalisation, too, as in the CIFAR protocol of RepDistiller;
    ours: off, as in timm"""
    sched: Literal["cosine", "step", "onecycle", "constant"] = "cosine"
    """course of the learning rate after the warm-up; ours"""
    decay_at: Shares = (150 / 240, 180 / 240, 210 / 240)
    """shares of the run after which sched step multiplies lr by decay_rate; epochs 150, 180 and 210
    of 240 in the CIFAR protocol of RepDistiller"""
    decay_rate: Annotated[float, Field(gt=0, le=1), Must("a number above 0, at most 1")] = 0.1
    """factor of lr at each decay_at, no unit; CIFAR protocol of RepDistiller"""
    warmup_epochs: NotNegative = 0.0
    """epochs over which lr rises linearly to its highest value; ours"""
    min_lr: NotNegative = 0.0
    """lowest learning rate, per update; ours"""
    clip_grad: Annotated[Positive | None, Must("a number above 0, or null")] = None
    """largest norm of the gradient, null for no clipping; ours"""
    grad_accum_steps: Count = 1
    """batches whose mean gradient makes one update; ours"""
    model_ema: Switch = False
    """keep a moving average of the student, which is evaluated and saved as well; ours"""
    model_ema_decay: Below1 = 0.9998
    """share of the moving average that an update keeps, no unit; ours, as in timm"""
    skip_nan: Tolerance = 0
    """updates of a run that may be left out, and counted, because a number is not finite, before
    it stops; ours"""
    auto_batch: Switch = False
    """where memory runs out, let a batch go through in parts, for the same update; ours"""
    auto_batch_norm: Switch = False
    """also where batch normalisation then computes with the statistics of the parts; ours"""

    @field_validator("min_lr")
    @classmethod
    def _below_lr(cls, value: float, info: ValidationInfo) -> float:
        if value > info.data.get("lr", math.inf):
            contradict(("", f"min_lr ({value}) is above lr ({info.data['lr']})"))
        return value


class DataRecipe(Section):
    """What happens to the images before a model sees them."""

    augment: Literal["auto", "none", "shift", "shift-flip", "crop-flip"] = "auto"
    """random changes of training images: shift moves by a few pixels, flip mirrors left and right,
    crop takes a part of random size and aspect, auto lets the data set choose; ours"""
    teacher_views: Annotated[Count | None, Must("a whole number from 1 to 1,000,000, or null")] = (
        None
    )
    """augmentations of each image, repeated after so many epochs, for which the teacher is asked
    once and for all; null: it is asked at every step; ours"""
    val_split: Annotated[Inside01 | None, Must("a number above 0 and below 1, or null")] = None
    """share of the images held out where the data has no split of its own; null: 0.2, and 0.25 of
    the digits; ours"""
    max_bad_images: Tolerance = 0
    """unreadable images that are left out, by name, before the run refuses; ours"""
    mean: Mean = None
    """subtracted per channel, pixels in 0 … 1; null: as the teacher was trained, or measured"""
    std: Std = Field(default=None, validate_default=True)
    """divides per channel, pixels in 0 … 1; null: as the teacher was trained, or measured"""
    input_size: InputSize = None
    """channels, height and width in pixels, as timm has them; null: as teacher or data have them"""
    aa: AutoAugment = None
    """operations drawn for each training image, as timm spells it; 2 of strength 9 in Cubuk et al.
    2020, arXiv 1909.13719; null: none"""
    reprob: Share = 0.0
    """probability with which a rectangle of a training image becomes the mean, as in timm; ours:
    off"""
    cutout: Tolerance = 0
    """side in pixels of the square that becomes the mean in every training image, 0 for none;
    16 on CIFAR-10 in DeVries and Taylor 2017, arXiv 1708.04552; ours: off"""
    scale: ShareRange = (0.08, 1.0)
    """least and greatest share of the area that crop takes; ours, as in timm"""
    crop_pct: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None, Must("a number above 0, at most 1, or null")
    ] = None
    """share of each side kept of images that are resized to validate; null: as the teacher's own
    config says, else 1"""
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic"] | None,
        Must('"nearest", "bilinear" or "bicubic", or null', ("nearest", "bilinear", "bicubic")),
    ] = None
    """how images are resized; null: as the teacher's own config says, else bilinear"""
    classes: OptionalText = None
    """file of the classes to learn, one per line in the order of the student; null: all; ours"""
    workers: Annotated[
        Annotated[int, Field(ge=0, le=256)] | None, Must("a whole number from 0 to 256, or null")
    ] = None
    """processes that read and augment images, 0 for none; null: up to 8 where images are decoded
    in every epoch; no result depends on it; ours"""
    data_device: Literal["auto", "cpu", "device"] = "auto"
    """where images lie and are augmented; auto: on the device if it is no CPU and they take 2 GiB
    at most; ours"""

    @field_validator("std")
    @classmethod
    def _fits_mean(cls, std: Std, info: ValidationInfo) -> Std:
        if "mean" in info.data and len(info.data["mean"] or ()) != len(std or ()):
            text = "mean and std must have the same number of channels, or both be null"
            contradict(("", text))
        return std


class Recipe(Section):
    """Every number of a run that does not name a file.

    Sections may be given as records or as dicts. Raises :class:`ConfigError` with every problem.

    >>> Recipe(epochs=3, loss={"temperature": 2.0}).loss.temperature
    2.0
    >>> Recipe(epoch=3)
    Traceback (most recent call last):
    kdsurgeon.errors.ConfigError: Recipe: unknown key "epoch"; did you mean "epochs"?
    """

    method: Literal["ce", "kd", "block-kd"] = "block-kd"
    """ce: labels only; kd: the logits of the teacher, too; block-kd: and the stepping stones of
    Yu et al. 2024, arXiv 2411.01547"""
    epochs: Count = 30
    """passes over the training images; ours (240 in Yu et al. 2024, arXiv 2411.01547)"""
    batch_size: Count = 64
    """images in a batch; CIFAR protocol of RepDistiller"""
    seed: Seed = 0
    """the one seed of new weights, order and augmentation; ours"""
    device: Device = "auto"
    """where to compute, in torch's words; ours"""
    threads: Annotated[Count | None, Must("a whole number from 1 to 1,000,000, or null")] = None
    """CPU threads, null: as torch chooses; the last bits of every result depend on it; ours"""
    amp: Switch = False
    """compute in mixed precision (autocast); ours"""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """number format under amp; ours: bfloat16 needs no loss scaling, which float16 gets"""
    torch_compile: Switch = False
    """let torch.compile make one program of the training graph, where it can; ours"""
    channels_last: Annotated[bool | None, Must("true, false or null")] = None
    """images with channels last in memory; null: where the model can take it; ours"""
    deterministic: Switch = False
    """only operations that give the same bits again, also on CUDA; ours"""
    sync_bn: Switch = False
    """batch normalisation counts the whole batch of several processes, on CUDA; ours, as timm's"""
    shard: Literal["none", "teacher", "all"] = "none"
    """what several processes share out, each holding a part: the teacher's weights, or those of all
    that is trained, too; ours"""
    checkpoint_every: Annotated[
        Count | None, Must("a whole number from 1 to 1,000,000, or null")
    ] = None
    """updates between two checkpoints inside an epoch; null: at the ends of epochs only; ours"""
    keep_every: Tolerance = 0
    """every Nth checkpoint stays, beside the last two and the best; 0: none; ours"""
    loss: LossRecipe = LossRecipe()
    """the loss"""
    optim: OptimRecipe = OptimRecipe()
    """the optimiser"""
    data: DataRecipe = DataRecipe()
    """the data"""

    @field_validator("loss")
    @classmethod
    def _loss_fits(cls, loss: LossRecipe, info: ValidationInfo) -> LossRecipe:
        found = list(_loss_contradictions(loss, info.data.get("method"), info.data.get("epochs")))
        return loss if not found else contradict(*found)

    @field_validator("optim")
    @classmethod
    def _optim_fits(cls, optim: OptimRecipe, info: ValidationInfo) -> OptimRecipe:
        epochs = info.data.get("epochs", math.inf)
        if optim.warmup_epochs >= epochs:
            text = f"warmup_epochs ({optim.warmup_epochs}) leaves nothing of {epochs} epochs"
            contradict(("warmup_epochs", text))
        return optim


def _loss_contradictions(
    loss: LossRecipe, method: str | None, epochs: int | None
) -> Iterator[tuple[str, str]]:
    """(key, sentence) of what ``loss`` has against the other values; None for one that is wrong."""
    if loss.stone_warmup > (epochs or math.inf):
        yield "stone_warmup", f"stone_warmup ({loss.stone_warmup}) is above epochs ({epochs})"
    if method == "ce" and loss.ce_weight == 0:
        yield "ce_weight", "ce_weight is 0: method ce has nothing to learn from"
    if method == "kd" and loss.ce_weight == loss.kd_weight == 0:
        yield "kd_weight", "ce_weight and kd_weight are 0: method kd has nothing to learn from"
    if method == "block-kd" and loss.ce_weight == loss.kd_weight == 0 < loss.cross_start:
        why = "ce_weight and kd_weight are 0, so nothing is learned before cross_start"
        yield "cross_start", f"{why}; set cross_start to 0"


class RunConfig(Recipe):
    """A recipe and what it is applied to: all that ``kdsurgeon distill`` needs to know."""

    teacher: Text
    """the teacher: a model file or SOURCE/NAME"""
    student: Text
    """the student: a model file or SOURCE/NAME"""
    teacher_arch: OptionalText = None
    """architecture SOURCE/NAME for a teacher file that holds only tensors"""
    student_arch: OptionalText = None
    """architecture SOURCE/NAME for a student file that holds only tensors"""
    data_dir: Text
    """the data: a folder, an .npz file, or digits"""
    output: OptionalText = None
    """the run folder, null: a new one is named"""
    teacher_cache: OptionalText = None
    """file that keeps the teacher's logits for other runs, null: in memory; ours"""
    track: Trackers = ("tensorboard",)
    """where numbers are sent beside metrics.jsonl, by plugin name; ours"""
    log_interval: Count = 50
    """batches between two numbers sent or lines printed; ours, as in timm"""
    plan: OptionalText = None
    """a plan file to follow, null: plan afresh"""
    blocks: Blocks = "auto"
    """blocks to cut both models into; ours"""
    budget: Budget = None
    """what a step may cost, as a multiple of plain distillation; null: all stones; ours"""

    @field_validator("teacher_cache")
    @classmethod
    def _is_asked_for(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is not None and info.data.get("method") == "ce":
            contradict(("", "method ce asks no teacher; leave one of the two out"))
        return path

    @field_validator("budget")
    @classmethod
    def _chooses_alone(cls, budget: Budget, info: ValidationInfo) -> Budget:
        loss = info.data.get("loss")
        if budget is not None and loss is not None and loss.stones != "all":
            contradict(("", "loss.stones chooses the stones already; leave one of the two out"))
        return budget
