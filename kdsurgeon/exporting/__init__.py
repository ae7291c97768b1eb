"""A student becomes an ONNX file that is proved equal, its int8 twin, and their figures.

export(student, "student.onnx", example)      the one door
parity, accuracy, quantize                    its checks, for files that exist
latency, benchmark                            what the models cost, side by side
"""

from kdsurgeon.exporting.answers import accuracy
from kdsurgeon.exporting.form import Form
from kdsurgeon.exporting.int8 import Int8, quantize
from kdsurgeon.exporting.latency import Benchmark, Latency, benchmark, latency
from kdsurgeon.exporting.onnx import Exported, export, read_metadata
from kdsurgeon.exporting.parity import Parity, parity
from kdsurgeon.exporting.preprocessing import Preprocessing
from kdsurgeon.exporting.rounding import Rounded

__all__ = [
    "Benchmark",
    "Exported",
    "Form",
    "Int8",
    "Latency",
    "Parity",
    "Preprocessing",
    "Rounded",
    "accuracy",
    "benchmark",
    "export",
    "latency",
    "parity",
    "quantize",
    "read_metadata",
]
