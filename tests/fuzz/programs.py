"""A classifier as data: a list of steps that can be shrunk, printed as Python, built and run.

What is printed is what runs: :func:`build` executes the text that :func:`source` gives.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 5
IMAGE = (3, 8, 8)
HINT = 4  # width of the second input, where there is one
_CALL = "{out} = self.{layer}({x})"


@dataclass(frozen=True)
class Kind:
    """How a step is written: the layer it makes, if any, and its lines in ``forward``."""

    run: str = _CALL
    make: str = ""


# x, y are the values that a step reads, a to e its numbers
KINDS: dict[str, Kind] = {
    "conv": Kind(make="nn.Conv2d({a}, {b}, {c}, {d}, {c} // 2, groups={e}, bias=False)"),
    "conv_block": Kind(
        make="nn.Sequential(nn.Conv2d({a}, {b}, 3, {c}, 1), nn.BatchNorm2d({b}), nn.ReLU(True))"
    ),
    "linear": Kind(make="nn.Linear({a}, {b})"),
    "batch_norm": Kind(make="nn.BatchNorm2d({a})"),
    "batch_norm_1d": Kind(make="nn.BatchNorm1d({a})"),
    "layer_norm": Kind(make="nn.LayerNorm({a})"),
    "relu": Kind(make="nn.ReLU()"),
    "relu_in_place": Kind(make="nn.ReLU(inplace=True)"),
    "relu_function": Kind("{out} = functional.relu({x})"),
    "relu_function_in_place": Kind("{out} = functional.relu({x}, inplace=True)"),
    "relu_method_in_place": Kind("{out} = {x}.relu_()"),
    "gelu": Kind(make="nn.GELU()"),
    "max_pool": Kind(make="nn.MaxPool2d(2)"),
    "avg_pool": Kind("{out} = functional.avg_pool2d({x}, 2)"),
    "identity": Kind(make="nn.Identity()"),
    "dropout": Kind(make="nn.Dropout(0.3)"),
    "dropout_function": Kind("{out} = functional.dropout({x}, 0.3, self.training)"),
    "drop_path": Kind(make="DropPath(0.3)"),
    "squeeze_excite": Kind(make="SqueezeExcite({a})"),
    "attention": Kind(make="Attention({a}, 2)"),
    "multi_head": Kind(
        "{out} = self.{layer}({x}, {x}, {x}, need_weights=False)[0]",
        "nn.MultiheadAttention({a}, 2, batch_first=True)",
    ),
    "class_token": Kind(make="ClassToken({a})"),
    "position": Kind("{out} = {x} + self.{layer}.weight[: {x}.shape[1]]", "nn.Embedding({b}, {a})"),
    "position_table": Kind(
        "{out} = {x} + self.{layer}(torch.arange({x}.shape[1], device={x}.device))",
        "nn.Embedding({b}, {a})",
    ),
    "tied": Kind("{out} = functional.linear({x}, self.{layer}.weight)", "nn.Linear({a}, {a})"),
    "add": Kind("{out} = {x} + {y}"),
    "multiply": Kind("{out} = {x} * {y}"),
    "add_in_place": Kind("{out} = {x}\n{out} += {y}"),
    "add_method_in_place": Kind("{out} = {x}.add_({y})"),
    "multiply_in_place": Kind("{out} = {x}\n{out} *= {y}"),
    "gate": Kind("{out} = {x} * {y}.sigmoid()[:, :, None, None]"),
    "mask_map": Kind("{out} = {x}.masked_fill({y}[:, :1, None, None] > 0, 0.5)"),
    "mask_tokens": Kind("{out} = {x}.masked_fill({y}[:, :1, None] > 0, 0.5)"),
    "cat": Kind("{out} = torch.cat(({x}, {y}), {a})"),
    "chunk": Kind("{out} = {x}.chunk(2, {a})"),
    "item": Kind("{out} = {x}[{a}]"),
    "channels": Kind("{out} = {x}[:, {a}:{b}]"),
    "sizes": Kind("{out} = {x}.shape"),
    "flatten": Kind("{out} = {x}.flatten(2).transpose(1, 2)"),
    "flatten_by_sizes": Kind(
        "batch, width, height, breadth = {y}\n"
        "{out} = {x}.reshape(batch, width, height * breadth).permute(0, 2, 1)"
    ),
    "unflatten": Kind("{out} = {x}.transpose(1, 2).unflatten(2, ({a}, {a}))"),
    "unflatten_by_sizes": Kind("{out} = {x}.transpose(1, 2).reshape({y}[0], -1, {y}[2], {y}[3])"),
    "drop_first": Kind("{out} = {x}[:, 1:]"),
    "to_nhwc": Kind("{out} = {x}.permute(0, 2, 3, 1)"),
    "to_nchw": Kind("{out} = {x}.permute(0, 3, 1, 2)"),
    "mean_of_map": Kind("{out} = {x}.mean((2, 3))"),
    "mean_of_tokens": Kind("{out} = {x}.mean(1)"),
    "first_token": Kind("{out} = {x}[:, 0]"),
    "item_assignment": Kind("{out} = {x}.clone()\n{out}[:, 0] = {out}[:, 1] * 0.5"),
    "view_write": Kind("{out} = {x} * 1.5\n{out}[:, :1].mul_(0.5)"),
    "branch": Kind("{out} = {x}\nif {x}.sum() > 0:\n    {out} = {x} + 1"),
}


@dataclass(frozen=True)
class Step:
    """One value computed from others; steps with the same ``layer`` share it."""

    kind: str
    out: str
    reads: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    layer: str = ""

    def _written(self, text: str) -> str:
        fields = dict(zip("xyz", self.reads, strict=False))
        fields |= {letter: str(n) for letter, n in zip("abcde", self.numbers, strict=False)}
        return text.format(out=self.out, layer=self.layer, **fields)

    @property
    def lines(self) -> list[str]:
        return self._written(KINDS[self.kind].run).splitlines()

    @property
    def maker(self) -> str:
        return self._written(KINDS[self.kind].make)


@dataclass(frozen=True)
class Program:
    """The steps of ``forward``, in order; the last makes the logits."""

    seed: int
    steps: tuple[Step, ...]
    returns: str = "tensor"  # or "dict" or "tuple": the logits with another value
    has_hint: bool = False

    @property
    def kinds(self) -> set[str]:
        inputs = {"hint"} if self.has_hint else set()
        return {step.kind for step in self.steps} | {self.returns} | inputs


def source(program: Program) -> str:
    """The program as Python text that defines ``Net``."""
    makers: dict[str, str] = {}
    for step in program.steps:
        if step.layer:
            makers.setdefault(step.layer, f"self.{step.layer} = {step.maker}")
    body = [line for step in program.steps for line in step.lines]
    logits, other = program.steps[-1].out, program.steps[0].out
    body.append(
        {
            "tensor": f"return {logits}",
            "dict": f'return {{"features": {other}, "logits": {logits}}}',
            "tuple": f"return {logits}, {other}",
        }[program.returns]
    )
    parameters = "self, image, hint" if program.has_hint else "self, image"
    lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        {line}" for line in makers.values()]
    lines += ["", f"    def forward({parameters}):"]
    lines += [f"        {line}" for line in body]
    return "\n".join(lines) + "\n"


PREAMBLE = """\
import torch
from torch import nn
from torch.nn import functional

from tests.fuzz.layers import Attention, ClassToken, DropPath, SqueezeExcite

"""


def runnable(program: Program) -> str:
    """The program as a file of its own, with the weights and inputs that it failed with."""
    return (
        f"{PREAMBLE}from tests.fuzz.programs import inputs, settled\n\n\n{source(program)}\n\n"
        f"model = settled(Net().eval(), seed={program.seed})\n"
        f"print(model(**inputs(3, seed={program.seed}, has_hint={program.has_hint})))\n"
    )


def build(program: Program, *, text: str | None = None) -> nn.Module:
    """The program as a module in evaluation mode, every weight and statistic of which matters."""
    names: dict[str, Any] = {"__name__": "random_program"}
    code = compile(PREAMBLE + (text or source(program)), f"program_{program.seed}.py", "exec")
    exec(code, names)
    with torch.random.fork_rng(devices=[]):
        model = names["Net"]()
    return settled(model.eval(), seed=program.seed)


@torch.no_grad()
def settled(model: nn.Module, *, seed: int) -> nn.Module:
    """``model`` with weights drawn by their names, so that other layers do not change them."""
    generator = torch.Generator()
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        generator.manual_seed(seed * 65_521 + zlib.crc32(name.encode()))
        drawn = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(drawn.abs() + 0.5)
        elif value.ndim > 1:
            value.copy_(drawn * 1.3 / math.sqrt(max(1, value[0].numel())))
        elif name.endswith("weight"):
            value.copy_(drawn.abs() * 0.5 + 0.5)
        else:
            value.copy_(drawn * 0.2)
    return model


def inputs(count: int, *, seed: int = 0, has_hint: bool = False) -> dict[str, Tensor]:
    """A batch by parameter name: images (count, 3, 8, 8), and hints (count, 4) if wanted."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"image": torch.randn((count, *IMAGE), generator=generator)}
    if has_hint:
        batch["hint"] = torch.randn((count, HINT), generator=generator)
    return batch


def renamed(text: str) -> str:
    """``text`` with every layer called otherwise, and sorting the other way round."""
    return re.sub(r"\bm(\d\d)(?!\d)", lambda match: f"w{99 - int(match[1]):02d}", text)


def without_dead_steps(program: Program) -> Program:
    """``program`` without the steps that nothing reads."""
    read = {program.steps[-1].out} | (
        {program.steps[0].out} if program.returns != "tensor" else set()
    )
    kept = []
    for step in reversed(program.steps):
        if step.out in read:
            kept.append(step)
            read.update(step.reads)
    return replace(program, steps=tuple(reversed(kept)))
