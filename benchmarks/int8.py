"""Does int8 pay? ONNX Runtime's fp32 file of a network against its int8 one, in turns.

    python -m benchmarks.int8

One thread, one image, milliseconds of CPU time of which the median is given, so that others on the
machine do not count; random weights. AMD EPYC (Zen 4, AVX-512 VNNI), two cores shared with others
(load 7), ONNX Runtime 1.31.1, OpenVINO 2026.4.1, 2026-11-21; raw lines in int8.jsonl.

                              fp32      int8   times as fast    aim   OpenVINO int8
    cifar/resnet8x4          3.531     0.937            3.77      3           0.900
    timm/resnet18             33.9      10.0            3.39      3             9.0
    timm/mobilenetv2_100      7.91      3.70            2.14      2            3.29
    cifar/mobilenetv2        0.239     0.190            1.26      2           0.211
    demo/student            0.0144    0.0208            0.69      –          0.0293
    timm/vit_tiny, static         34.9      21.7            1.61      –
    timm/vit_tiny, dynamic        32.2      14.9            2.16      –

Dynamic rounding serves a transformer better than static, which cuts GELU and attention into pieces
that ONNX Runtime then no longer fuses (both rows: 2026-11-22, load 4).

The half-wide MobileNetV2 for 32×32 misses its aim, and the demo's student is slower. Both spend
their time around multiplications, not in them: every operator runs in int8, OpenVINO is no faster,
and one of their convolutions alone, as a profile times it, gains little or loses:

    microseconds of one convolution                        fp32    int8
    8 → 16, 1×1 on 4×4, of demo/student                     3.0     3.5
    48 → 288, 1×1 on 4×4, of cifar/mobilenetv2              6.9     5.0
    288 depthwise, 3×3 on 4×4, of cifar/mobilenetv2         4.0     6.0
    96 → 576, 1×1 on 14×14, of timm/mobilenetv2_100         192      61
    64 → 64, 3×3 on 56×56, of timm/resnet18               3,272     538

Tried and left, in a run of their own: symmetric u8 activations take 1.1 (resnet8x4) to 1.7 times
(mobilenetv2_100) as long, symmetric s8 ones 2.3 to 2.5 times; weights per tensor save 1 to 7 % of
the time. What is kept in int8 of the demo's student is its size: 9.0 of 17.8 kB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from kdsurgeon import load_model
from kdsurgeon.exporting import export
from kdsurgeon.exporting.latency import has_openvino
from kdsurgeon.exporting.qdq import calibrated, prepared, quantized
from kdsurgeon.exporting.staging import silence
from tests import bootstrap

NETWORKS = (  # name, input, aim: times as fast as fp32
    ("demo/student", (1, 8, 8), None),
    ("cifar/resnet8x4", (3, 32, 32), 3.0),
    ("timm/resnet18", (3, 224, 224), 3.0),
    ("timm/mobilenetv2_100", (3, 224, 224), 2.0),
    ("cifar/mobilenetv2", (3, 32, 32), 2.0),
    ("timm/vit_tiny_patch16_224", (3, 224, 224), None),
)
BARE = (  # one convolution alone: channels in and out, kernel, groups, side
    ("of demo/student", 8, 16, 1, 1, 4),
    ("of cifar/mobilenetv2, pointwise", 48, 288, 1, 1, 4),
    ("of cifar/mobilenetv2, depthwise", 288, 288, 3, 288, 4),
    ("of timm/mobilenetv2_100, pointwise", 96, 576, 1, 1, 14),
    ("of timm/resnet18", 64, 64, 3, 1, 56),
)
TURN = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing for each network")
    parser.add_argument("--match", default="", help="only networks whose name contains this")
    given = parser.parse_args()
    seconds = given.seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bootstrap.prepare()  # for a torchvision without compiled operators
    told = {
        "cpu": _cpu(),
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(told), flush=True)
    with TemporaryDirectory() as folder:
        for name, size, aim in NETWORKS:
            for mode in ("static", "dynamic") if "vit" in name else ("static",):
                if given.match in name:
                    row = {"network": name, "aim": aim, "mode": mode}
                    row |= _network(name, size, Path(folder), seconds, mode)
                    print(json.dumps(row), flush=True)
        for name, *shape in () if given.match else BARE:
            row = {"convolution": name, "shape": shape} | _bare(shape, Path(folder), seconds / 2)
            print(json.dumps(row), flush=True)


def _network(name: str, size: tuple[int, ...], folder: Path, seconds: float, mode: str) -> dict:
    """Random weights: what a multiplication takes does not depend on them."""
    model = load_model(name).model.eval()
    path = folder / "network.onnx"
    images = torch.randn(16, *size)
    done = export(
        model, path, images[:2], calibration=images, int8_gate=False, verify=False,
        int8_options={"mode": mode},
    )  # fmt: skip
    assert done.int8 is not None
    files = {"fp32": path, "int8": done.int8.path}
    return {
        "bytes": [done.bytes, done.int8.bytes],
        "nodes": _optimized(done.int8.path, folder),
        **_times(files, (1, *size), seconds),
    }


def _bare(shape: list[int], folder: Path, seconds: float) -> dict:
    """One convolution with its ReLU, in fp32 and in int8."""
    width_in, width, kernel, groups, side = shape
    draws = np.random.default_rng(0)
    weight = draws.standard_normal((width, width_in // groups, kernel, kernel), np.float32)
    pad = kernel // 2
    nodes = [
        helper.make_node(
            "Conv", ["input", "weight", "bias"], ["wide"], "conv", group=groups, pads=[pad] * 4
        ),
        helper.make_node("Relu", ["wide"], ["logits"], "relu"),
    ]
    given, result = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c, side, side])
        for n, c in (("input", width_in), ("logits", width))
    )
    constants = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.zeros(width, np.float32), "bias"),
    ]
    graph = helper.make_graph(nodes, "bare", [given], [result], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    fp32, int8 = folder / "bare.onnx", folder / "bare.int8.onnx"
    onnx.save(model, fp32)
    images = torch.randn(16, width_in, side, side)
    with silence():
        ready = prepared(model, folder)
        onnx.save(quantized(ready, calibrated(ready, images, "min-max", folder)), int8)
    # the kernels alone, as a profile has them: the way into int8 and back is not the convolution's
    return {
        "fp32_us": _kernel(fp32, images, folder, seconds),
        "int8_us": _kernel(int8, images, folder, seconds),
    }


def _kernel(path: Path, images: torch.Tensor, folder: Path, seconds: float) -> float:
    """Median microseconds in the convolution itself."""
    options = _options()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    run = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"input": images[:1].numpy()}
    end = time.monotonic() + seconds / 2
    while time.monotonic() < end:
        run.run(None, feed)
    profile = Path(run.end_profiling())
    events = json.loads(profile.read_text())
    profile.unlink()
    found = [
        event["dur"]
        for event in events
        if event["name"].endswith("_kernel_time")
        and event["args"]["op_name"] in ("Conv", "FusedConv", "QLinearConv")
    ]
    return float(np.mean(np.sort(found)[: max(1, int(len(found) * 0.8))]))


def _times(files: dict[str, Path], shape: tuple[int, ...], seconds: float) -> dict:
    """Milliseconds of CPU time of one call: 20 % and 50 % of the calls stayed below."""
    inputs = np.random.default_rng(0).standard_normal(shape, np.float32)
    runs = {}
    for kind, path in files.items():
        run = onnxruntime.InferenceSession(path, _options(), providers=["CPUExecutionProvider"])
        runs[kind] = lambda run=run: run.run(None, {"input": inputs})
    if has_openvino():
        for kind, path in files.items():
            runs[f"openvino_{kind}"] = _openvino(path, inputs)
    times = {kind: [] for kind in runs}
    for call in runs.values():
        for _ in range(10):
            call()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for kind, call in runs.items():
            call()
            for _ in range(TURN):
                start = time.process_time()
                call()
                times[kind].append(time.process_time() - start)
    marks = {kind: np.percentile(found, [20, 50]) * 1e3 for kind, found in times.items()}
    ratio = marks["fp32"] / marks["int8"]
    return {
        "ms": {kind: [round(float(mark), 4) for mark in found] for kind, found in marks.items()},
        "times_as_fast": [round(float(each), 2) for each in ratio],
        "calls": len(times["int8"]),
        "load": round(os.getloadavg()[0], 1),
    }


def _openvino(path: Path, inputs: np.ndarray):
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(inputs))
    return request.infer


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


def _optimized(path: Path, folder: Path) -> dict[str, int]:
    """The operators that ONNX Runtime runs, and how often."""
    options = _options()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    flags = next(line.split() for line in lines if line.startswith("flags"))
    return f"{model}, {'with' if 'avx512_vnni' in flags else 'without'} VNNI"


if __name__ == "__main__":
    sys.exit(main())
