"""Resize and normalise images inside the file, to the very pixels that the student is judged on.

What is written repeats Pillow's resampling (``Resample.c``): filter weights in float64 rounded to
22 bits, rows before columns or the other way round as Pillow chooses, each pass rounded to whole
pixel values. Each weight is split into two
halves of 11 bits, so that both sums are whole numbers that float32 holds exactly (of up to 32
pixels each) in whatever order they are added: the result does not depend on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import PIL
import torch
from onnx import compose, parser
from PIL import Image
from torch import Tensor, nn

from kdsurgeon.data.decoding import MODES, fit_into
from kdsurgeon.data.sets import Dataset, Fit
from kdsurgeon.errors import NumericsError, UsageError
from kdsurgeon.exporting.runtime import open_session
from kdsurgeon.exporting.samples import ONE

IMAGE = "image"  # what the file calls its input of pixels
_REACH = {"bilinear": 1.0, "bicubic": 2.0}
_TOLERANCE = 1e-6  # of a normalised pixel; its two roundings may melt into one


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the network's input: as :class:`kdsurgeon.data.sets.Dataset` says it.

    ``input_size`` is (C, H, W) of the network. ``mean`` and ``std`` hold one number per channel on
    the scale of ``pixels / scale``; ``fit`` says how an image of another size is brought to that
    of the network. Raises :class:`DataError` and :class:`UsageError` for numbers that are none.

    >>> gray = Preprocessing((1, 8, 8), (0.5,), (0.25,))
    >>> gray.pixels(torch.zeros(2, 9, 9, 1, dtype=torch.uint8)).shape
    torch.Size([2, 1, 8, 8])
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0
    fit: Fit = Fit()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        self._like(np.zeros((1, *self._shape), np.uint8))

    @property
    def _shape(self) -> tuple[int, int, int]:
        channels, height, width = self.input_size
        return height, width, channels

    def _like(self, images: np.ndarray) -> Dataset:
        return Dataset(
            "the images", images, np.zeros(len(images), np.int64), ("any",), tuple(self.mean),
            tuple(self.std), scale=self.scale,
        )  # fmt: skip

    def pixels(self, images: Tensor) -> Tensor:
        """What the network is given for uint8 ``images`` (n, h, w, C), by the product's own code.

        float32 (n, C, H, W), as in evaluation.
        """
        fitted = np.empty((len(images), *self._shape), np.uint8)
        for into, image in zip(fitted, images.numpy(), strict=True):
            planes = image[..., 0] if image.shape[-1] == 1 else image
            fit_into(into, Image.fromarray(planes, MODES[self._shape[2]]), self.fit)
        return self._like(fitted).samples()

    def put_before(self, model: onnx.ModelProto, *, batch: int | None) -> onnx.ModelProto:
        """``model`` that takes uint8 images (n, h, w, C) of any size, all alike, instead.

        With ``batch``, so many images of the network's own size, which need no resizing.
        """
        first = parser.parse_model(self._text(model, batch))
        merged = compose.merge_models(first, model, io_map=[("fitted_input", ONE)])
        del merged.opset_import[1:]  # the same twice
        return merged

    def check(self, model: onnx.ModelProto, images: Tensor) -> float:
        """The largest difference between what the file makes of ``images`` and :meth:`pixels`.

        Raises :class:`NumericsError` for one that is more than rounding.
        """
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        shown.graph.output.append(onnx.ValueInfoProto(name="fitted_input"))
        run = open_session(shown.SerializeToString(), {}, torch.get_num_threads())
        (found,) = run.run(["fitted_input"], {IMAGE: images.numpy()})
        wanted = self.pixels(images)
        gap = (torch.from_numpy(np.asarray(found)) - wanted).abs().max().item()
        if not gap <= _TOLERANCE * max(1.0, wanted.abs().max().item()):
            raise NumericsError(
                f"the file makes other pixels of an image of {images.shape[1]}×{images.shape[2]} "
                f"than evaluation does: they differ by {gap:.3g}."
            )
        return gap

    def _text(self, model: onnx.ModelProto, batch: int | None) -> str:
        """The graph in ONNX's own notation; every value it makes is called pre_…, but the last."""
        height, width, channels = self._shape
        opset = next(each.version for each in model.opset_import if not each.domain)
        count = batch or "batch"
        taken = f"{height}, {width}" if batch else "height, width"
        std, mean = np.asarray(self.std), np.asarray(self.mean)
        factor = np.asarray(1 / (self.scale * std), np.float32)
        offset = np.asarray(-mean / std, np.float32)
        body = "" if batch else self._resizing()
        return f"""<ir_version: {model.ir_version}, opset_import: ["" : {opset}]>
            preprocessing (uint8[{count}, {taken}, {channels}] {IMAGE})
                => (float[{count}, {channels}, {height}, {width}] fitted_input) {{
            pre_planes = Transpose <perm = [0, 3, 1, 2]> ({IMAGE})
            pre_whole = Cast <to = 1> (pre_planes)
            {body}
            pre_factor = Constant <value = float[1, {channels}, 1, 1] {{{_listed(factor)}}}> ()
            pre_offset = Constant <value = float[1, {channels}, 1, 1] {{{_listed(offset)}}}> ()
            pre_scaled = Mul ({"pre_whole" if batch else "pre_fitted"}, pre_factor)
            fitted_input = Add (pre_scaled, pre_offset)
            }}"""

    def _resizing(self) -> str:
        height, width, _ = self._shape
        return f"""
            pre_sizes = Shape <start = 2, end = 4> (pre_whole)
            pre_from = Cast <to = 11> (pre_sizes)
            pre_to = Constant <value = double[2] {{{height}.0, {width}.0}}> ()
            pre_ratios = Div (pre_from, pre_to)
            pre_least = ReduceMin <keepdims = 1> (pre_ratios)
            pre_share = Constant <value = double[1] {{{self.fit.crop_pct!r}}}> ()
            pre_step = Mul (pre_least, pre_share)
            pre_part = Mul (pre_to, pre_step)
            pre_margins = Sub (pre_from, pre_part)
            pre_zero = Constant <value = double[1] {{0.0}}> ()
            pre_half = Constant <value = double[1] {{0.5}}> ()
            pre_one = Constant <value = double[1] {{1.0}}> ()
            pre_halved = Mul (pre_margins, pre_half)
            pre_starts = Max (pre_halved, pre_zero)
            pre_equal = Equal (pre_from, pre_to)
            pre_equals = Cast <to = 6> (pre_equal)
            pre_both = ReduceMin <keepdims = 1> (pre_equals)
            pre_is_same = Cast <to = 9> (pre_both)
            pre_begin = Where (pre_is_same, pre_zero, pre_starts)
            pre_end = Sub (pre_from, pre_begin)
            {_pass("x", 1, width, self.fit.interpolation)}
            {_pass("y", 0, height, self.fit.interpolation)}
            pre_bits = Constant <value = int32[1] {{2048}}> ()
            pre_rounding = Constant <value = int32[1] {{2097152}}> ()
            pre_unit = Constant <value = int32[1] {{4194304}}> ()
            pre_black = Constant <value = float {{0.0}}> ()
            pre_white = Constant <value = float {{255.0}}> ()
            {_order(height, width)}
            pre_fitted = If (pre_is_tall) <
                then_branch = down () => ({self._fitted} pre_down) {{
                    {_columns("pre_whole", "pre_flat")}
                    {_rows("pre_flat", "pre_down")}
                }},
                else_branch = across () => ({self._fitted} pre_across) {{
                    {_rows("pre_whole", "pre_narrow")}
                    {_columns("pre_narrow", "pre_across")}
                }}>"""

    @property
    def _fitted(self) -> str:
        channels, height, width = self.input_size
        return f"float[batch, {channels}, {height}, {width}]"


class Embedded(nn.Module):
    """A network that takes images: what a file with its own preprocessing must equal."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.preprocessing.pixels(images))


def other_sizes(images: Tensor, seed: int = 0) -> list[Tensor]:
    """Random images of sizes unlike that of ``images``: larger, much larger, smaller, elongated."""
    generator = torch.Generator().manual_seed(seed)
    _, height, width, channels = images.shape
    shapes = [
        (height + 3, width + 5),
        (3 * height + 1, 2 * width),
        (max(2, height // 2), max(2, width - 1)),
        (height, 4 * width + 3),
    ]
    return [
        torch.randint(0, 256, (2, *shape, channels), dtype=torch.uint8, generator=generator)
        for shape in shapes
    ]


def check_images(images: Tensor, preprocessing: Preprocessing, name: str) -> None:
    """Raise :class:`UsageError` unless these are images that the preprocessing can be given."""
    channels = preprocessing.input_size[0]
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != channels:
        raise UsageError(
            f"{name} must be images, uint8 (n, height, width, {channels}), as the file that "
            f"normalises them itself takes them; it is {images.dtype} {tuple(images.shape)}."
        )


def _pass(axis: str, at: int, size: int, interpolation: str) -> str:
    """The weights of one direction, (size, size of the image), as two halves of whole numbers."""
    names = {"a": f"pre_{axis}", "at": at, "size": size}
    places = """
            {a}_at = Constant <value = int64[1] {{{at}}}> ()
            {a}_wide = Gather <axis = 0> (pre_begin, {a}_at)
            {a}_begin_f = Cast <to = 1> ({a}_wide)
            {a}_last = Gather <axis = 0> (pre_end, {a}_at)
            {a}_end_f = Cast <to = 1> ({a}_last)
            {a}_length_f = Sub ({a}_end_f, {a}_begin_f)
            {a}_begin = Cast <to = 11> ({a}_begin_f)
            {a}_length = Cast <to = 11> ({a}_length_f)
            {a}_size = Constant <value = double[1] {{{size}.0}}> ()
            {a}_step = Div ({a}_length, {a}_size)
            {a}_start = Constant <value = double {{0.0}}> ()
            {a}_limit = Constant <value = double {{{size}.0}}> ()
            {a}_delta = Constant <value = double {{1.0}}> ()
            {a}_to = Range ({a}_start, {a}_limit, {a}_delta)
            {a}_rows = Constant <value = int64[2] {{{size}, 1}}> ()
            {a}_column = Reshape ({a}_to, {a}_rows)
            {a}_middle = Add ({a}_column, pre_half)
            {a}_scaled = Mul ({a}_middle, {a}_step)
            {a}_centre = Add ({a}_scaled, {a}_begin)
            {a}_width_d = Gather <axis = 0> (pre_from, {a}_at)
            {a}_width = Squeeze ({a}_width_d)
            {a}_from = Range ({a}_start, {a}_width, {a}_delta)
    """.format(**names)
    weights = _nearest(axis) if interpolation == "nearest" else _filtered(axis, interpolation)
    return f"""{places}{weights}
            {names["a"]}_many = Constant <value = double[1] {{4194304.0}}> ()
            {names["a"]}_fixed = Mul ({names["a"]}_weights, {names["a"]}_many)
            {names["a"]}_sign = Sign ({names["a"]}_fixed)
            {names["a"]}_size_of = Abs ({names["a"]}_fixed)
            {names["a"]}_raised = Add ({names["a"]}_size_of, pre_half)
            {names["a"]}_floor = Floor ({names["a"]}_raised)
            {names["a"]}_number = Mul ({names["a"]}_floor, {names["a"]}_sign)
            {names["a"]}_bits = Constant <value = double[1] {{2048.0}}> ()
            {names["a"]}_parts = Div ({names["a"]}_number, {names["a"]}_bits)
            {names["a"]}_upper = Floor ({names["a"]}_parts)
            {names["a"]}_above = Mul ({names["a"]}_upper, {names["a"]}_bits)
            {names["a"]}_lower = Sub ({names["a"]}_number, {names["a"]}_above)
            {names["a"]}_high = Cast <to = 1> ({names["a"]}_upper)
            {names["a"]}_low = Cast <to = 1> ({names["a"]}_lower)"""


def _nearest(axis: str) -> str:
    a = f"pre_{axis}"
    return f"""
            {a}_place = Floor ({a}_centre)
            {a}_hit = Equal ({a}_place, {a}_from)
            {a}_weights = Cast <to = 11> ({a}_hit)"""


def _filtered(axis: str, interpolation: str) -> str:
    """A filter as wide as the step, where that is above one, cut off at whole pixels."""
    a = f"pre_{axis}"
    return f"""
            {a}_spread = Max ({a}_step, pre_one)
            {a}_reach_of = Constant <value = double[1] {{{_REACH[interpolation]}}}> ()
            {a}_reach = Mul ({a}_spread, {a}_reach_of)
            {a}_before = Sub ({a}_centre, {a}_reach)
            {a}_before_h = Add ({a}_before, pre_half)
            {a}_before_w = Floor ({a}_before_h)
            {a}_first = Max ({a}_before_w, pre_zero)
            {a}_after = Add ({a}_centre, {a}_reach)
            {a}_after_h = Add ({a}_after, pre_half)
            {a}_end_w = Floor ({a}_after_h)
            {a}_is_in = GreaterOrEqual ({a}_from, {a}_first)
            {a}_is_before = Less ({a}_from, {a}_end_w)
            {a}_is_used = And ({a}_is_in, {a}_is_before)
            {a}_mask = Cast <to = 11> ({a}_is_used)
            {a}_off = Sub ({a}_from, {a}_centre)
            {a}_off_h = Add ({a}_off, pre_half)
            {a}_inverse = Div (pre_one, {a}_spread)
            {a}_t_signed = Mul ({a}_off_h, {a}_inverse)
            {a}_t = Abs ({a}_t_signed)
            {_BICUBIC.format(a=a) if interpolation == "bicubic" else _BILINEAR.format(a=a)}
            {a}_kept = Mul ({a}_height, {a}_mask)
            {a}_axes = Constant <value = int64[1] {{1}}> ()
            {a}_total = ReduceSum <keepdims = 1> ({a}_kept, {a}_axes)
            {a}_weights = Div ({a}_kept, {a}_total)"""


_BILINEAR = """
            {a}_slope = Sub (pre_one, {a}_t)
            {a}_height = Max ({a}_slope, pre_zero)"""

# Keys 1981, equation 4, with a = -1/2, multiplied out as Pillow does
_BICUBIC = """
            {a}_c15 = Constant <value = double[1] {{1.5}}> ()
            {a}_c25 = Constant <value = double[1] {{2.5}}> ()
            {a}_c5 = Constant <value = double[1] {{5.0}}> ()
            {a}_c8 = Constant <value = double[1] {{8.0}}> ()
            {a}_c4 = Constant <value = double[1] {{4.0}}> ()
            {a}_c2 = Constant <value = double[1] {{2.0}}> ()
            {a}_cm = Constant <value = double[1] {{-0.5}}> ()
            {a}_n1 = Mul ({a}_c15, {a}_t)
            {a}_n2 = Sub ({a}_n1, {a}_c25)
            {a}_n3 = Mul ({a}_n2, {a}_t)
            {a}_n4 = Mul ({a}_n3, {a}_t)
            {a}_near = Add ({a}_n4, pre_one)
            {a}_f1 = Sub ({a}_t, {a}_c5)
            {a}_f2 = Mul ({a}_f1, {a}_t)
            {a}_f3 = Add ({a}_f2, {a}_c8)
            {a}_f4 = Mul ({a}_f3, {a}_t)
            {a}_f5 = Sub ({a}_f4, {a}_c4)
            {a}_far = Mul ({a}_f5, {a}_cm)
            {a}_is_near = Less ({a}_t, pre_one)
            {a}_is_far = Less ({a}_t, {a}_c2)
            {a}_outer = Where ({a}_is_far, {a}_far, pre_zero)
            {a}_height = Where ({a}_is_near, {a}_near, {a}_outer)"""


def _order(height: int, width: int) -> str:
    """Whether columns come first: since Pillow 13, where they shrink by twice as many as rows."""
    least = 0 if int(PIL.__version__.split(".")[0]) >= 13 else 2**40
    return f"""
            pre_target = Constant <value = int64[2] {{{height}, {width}}}> ()
            pre_lost = Sub (pre_sizes, pre_target)
            pre_index_0 = Constant <value = int64 {{0}}> ()
            pre_index_1 = Constant <value = int64 {{1}}> ()
            pre_lost_y = Gather <axis = 0> (pre_lost, pre_index_0)
            pre_lost_x = Gather <axis = 0> (pre_lost, pre_index_1)
            pre_two = Constant <value = int64 {{2}}> ()
            pre_least_lost = Constant <value = int64 {{{least}}}> ()
            pre_twice_x = Mul (pre_lost_x, pre_two)
            pre_is_more = Greater (pre_lost_y, pre_twice_x)
            pre_is_less = Greater (pre_lost_y, pre_least_lost)
            pre_is_tall = And (pre_is_more, pre_is_less)"""


def _rows(value: str, result: str) -> str:
    """The pass along each row of ``value`` (n, C, h, w)."""
    a = result
    return f"""
                    {a}_high_t = Transpose <perm = [1, 0]> (pre_x_high)
                    {a}_low_t = Transpose <perm = [1, 0]> (pre_x_low)
                    {a}_coarse = MatMul ({value}, {a}_high_t)
                    {a}_fine = MatMul ({value}, {a}_low_t)
                    {_rounded(a)}"""


def _columns(value: str, result: str) -> str:
    """The pass along each column of ``value`` (n, C, h, w)."""
    return f"""
                    {result}_coarse = MatMul (pre_y_high, {value})
                    {result}_fine = MatMul (pre_y_low, {value})
                    {_rounded(result)}"""


def _rounded(a: str) -> str:
    """Both sums put together, rounded half up to a pixel value from 0 to 255."""
    return f"""
                    {a}_coarse_i = Cast <to = 6> ({a}_coarse)
                    {a}_fine_i = Cast <to = 6> ({a}_fine)
                    {a}_coarse_s = Mul ({a}_coarse_i, pre_bits)
                    {a}_sum = Add ({a}_coarse_s, {a}_fine_i)
                    {a}_sum_r = Add ({a}_sum, pre_rounding)
                    {a}_pixel = Div ({a}_sum_r, pre_unit)
                    {a}_pixel_f = Cast <to = 1> ({a}_pixel)
                    {a} = Clip ({a}_pixel_f, pre_black, pre_white)"""


def _listed(values: np.ndarray) -> str:
    return ", ".join(repr(float(value)) for value in values)
