"""What kind of ONNX file is written."""

from __future__ import annotations

from dataclasses import dataclass

from kdsurgeon.errors import UsageError
from kdsurgeon.exporting.parity import Precision
from kdsurgeon.exporting.preprocessing import Preprocessing

OPSETS = range(18, 25)  # 17 is silently written as 18 by torch, so it is refused
PRECISION = "kdsurgeon.precision"
OUTPUT = "kdsurgeon.output"
VERIFIED = "kdsurgeon.verified"


@dataclass(frozen=True)
class Form:
    """What kind of file is written: everything but its name, its metadata and its proof.

    ``batch`` None leaves the batch axis free, a number fixes it (as an NPU wants it);
    ``dynamic_size`` leaves height and width free too, or the length of tokens. ``half`` stores and
    computes in float16; inputs and outputs stay float32. ``softmax`` makes probabilities of the
    logits. ``external`` puts the weights into a file of their own, as more than 2 GB must be.
    With ``preprocessing`` the file takes uint8 images (n, height, width, C) of any size, and
    resizes and normalises them itself.
    """

    opset: int = 18
    batch: int | None = None
    dynamic_size: bool = False
    half: bool = False
    softmax: bool = False
    external: bool = False
    preprocessing: Preprocessing | None = None

    @property
    def precision(self) -> Precision:
        return "fp16" if self.half else "fp32"

    @property
    def facts(self) -> dict[str, str]:
        """What the metadata say of it, where it is not the usual."""
        found = {PRECISION: "fp16"} if self.half else {}
        return found | ({OUTPUT: "probabilities"} if self.softmax else {})

    def check_int8(self) -> None:
        """Raises :class:`UsageError` where no int8 file can be made of one of this form."""
        for is_set, what in (
            (self.half, "fp16"),
            (self.preprocessing is not None, "with preprocessing inside"),
            (self.batch is not None, "of a fixed batch"),
        ):
            if is_set:
                raise UsageError(
                    f"int8 is made of an fp32 file; one {what} was asked for.",
                    fix="export twice, under two names: once with --int8 and once without",
                )

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise UsageError(
                f"opset {self.opset} cannot be written.",
                why=f"the exporter writes opset {OPSETS.start} to {OPSETS.stop - 1}",
                fix=f"choose one of these; {OPSETS.start} runs on the most devices",
            )
        if self.batch is not None and not 1 <= self.batch <= 4096:
            raise UsageError(f"a batch of {self.batch} cannot be fixed.", fix="1 is usual")
        if self.dynamic_size and (self.batch or self.preprocessing):
            other = "a fixed batch" if self.batch else "preprocessing inside the file"
            raise UsageError(
                f"a free size and {other} exclude each other.",
                why="such a file has sizes that are fixed",
                fix="leave one of the two out",
            )
