"""A student becomes an ONNX file that is proved equal, its int8 twin, and their figures.

export(student, "student.onnx", example)      the one door
parity, accuracy, quantize                    its checks, for files that exist
latency, benchmark                            what the models cost, side by side
"""

from kdsurgeon.exporting.int8 import Int8, quantize
from kdsurgeon.exporting.latency import Benchmark, Latency, benchmark, latency
from kdsurgeon.exporting.onnx import Exported, export, read_metadata
from kdsurgeon.exporting.parity import Parity, accuracy, parity

__all__ = [
    "Benchmark",
    "Exported",
    "Int8",
    "Latency",
    "Parity",
    "accuracy",
    "benchmark",
    "export",
    "latency",
    "parity",
    "quantize",
    "read_metadata",
]
