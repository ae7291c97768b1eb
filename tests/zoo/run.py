"""Measure kdsurgeon on the whole zoo: ``python -m tests.zoo.run capture modes others pairs …``.

Every part appends one JSON line a model to PART.jsonl in the results folder and skips the names
that stand there, so a broken run goes on where it stopped. ``report`` writes docs/zoo.md.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import onnx
import onnxruntime
import torch

from kdsurgeon.alignment import align
from kdsurgeon.exporting import export
from kdsurgeon.exporting.gate import read_onnx
from kdsurgeon.partitioning import CutPoint, cut, find_cut_points
from kdsurgeon.stones import certify, plan_stones
from kdsurgeon.tracing import Trace, trace
from tests.zoo import gates, models, report
from tests.zoo.gates import Gap, LeftAsItWas
from tests.zoo.pool import Limits, Record, Task, one_line, run

CLASSES = 1000  # of both models of a pair
NUM_MODES = 320
MOST_PARAMETERS = 45e6  # of the models whose two modes are compared
NUM_TRAINED = 200


def capture(name: str, record: Record) -> None:
    """Trace and cut a model of timm without data, at the size it was made for."""
    model, example = models.full_size(name)
    record["parameters"] = sum(weight.numel() for weight in model.parameters())
    _trace_and_cut(model, example, name, record)


def _trace_and_cut(
    model: torch.nn.Module, example: models.Example, name: str, record: Record
) -> Trace:
    started = time.process_time()
    captured = trace(model, example, name=name)
    traced = time.process_time()
    record["trace_s"] = round(traced - started, 3)
    points = find_cut_points(captured)
    cut(captured, tuple(point for point in points if gates.width(point) == 1))
    record["cut_s"] = round(time.process_time() - traced, 3)
    record["nodes"] = len(captured.nodes)
    record["rung"], record["lost"] = captured.rung, list(captured.lost)
    for width in range(1, 5):
        chosen = [point for point in points if gates.width(point) <= width]
        record[f"cuts_{width}"] = len(chosen)
        record[f"piece_{width}"] = round(largest_piece(chosen), 3)
    return captured


def largest_piece(points: Iterable[CutPoint]) -> float:
    """The most that lies between two neighbouring cut points, as a share of the compute."""
    ends = sorted({0.0, 1.0, *(point.progress for point in points)})
    return max(later - earlier for earlier, later in pairwise(ends))


def modes(name: str, record: Record) -> None:
    """Compare graph and model bit for bit in both modes, on real tensors."""
    torch.manual_seed(0)
    model, example = models.real(name)
    shapes = example if isinstance(example, dict) else {"input": example}
    record["input"] = {key: list(value.shape[1:]) for key, value in shapes.items()}
    both_modes(model, example, name, record)


def both_modes(model: torch.nn.Module, example: models.Example, name: str, record: Record) -> None:
    """Every gate is tried; ``error`` names those that did not hold."""
    model.eval()
    with LeftAsItWas(model):
        captured = _trace_and_cut(model, example, name, record)
    failed = []
    for gate in (
        lambda: gates.evaluates_alike(model, captured, example),
        lambda: gates.trains_alike(model, example),
        lambda: record.update(spliced=gates.splices_alike(model, captured, example)),
    ):
        try:
            gate()
        except Exception as error:
            failed.append(one_line(error))
    if failed:
        raise Gap(" ‖ ".join(failed))


def pairs(name: str, record: Record) -> None:
    """Plan one pair of the matrix on the meta device, with no flag."""
    teacher, student = name.split(" ← ")
    size = models.common_size(teacher, student)
    if size is None:
        raise Gap("no size of the input fits both models")
    record["size"] = size
    traces = [_traced(model, size) for model in (teacher, student)]
    started = time.process_time()
    plan = plan_stones(align(*traces))
    record["plan_s"] = round(time.process_time() - started, 3)
    record["stones"] = len(plan.stones)
    record["boundaries"] = [
        f"{pair.teacher} ← {pair.student}" for pair in plan.alignment.boundaries
    ]


@cache
def _traced(name: str, size: int) -> Trace:
    model, example = models.full_size(name, size, num_classes=CLASSES)
    captured = trace(model, example, name=name)
    find_cut_points(captured)
    return captured


def _trace_all(names: Iterable[str]) -> None:
    """Trace every model of the pairs once, here, for the children to find."""
    for name in names:
        teacher, student = name.split(" ← ")
        size = models.common_size(teacher, student)
        for model in (teacher, student):
            try:
                _traced(model, size)
            except Exception:
                continue  # the child meets the same and reports it


def trained(name: str, record: Record) -> None:
    """Build every stone of a pair on real tensors, run it forward and backward, and certify."""
    teacher, student = name.split(" ← ")
    size = models.smallest_common(teacher, student)
    record["size"] = size
    torch.manual_seed(0)
    traces = []
    for model in (teacher, student):
        module, example = models.real(model, size, num_classes=CLASSES)
        traces.append(trace(module.eval(), example, name=model))
    plan = plan_stones(align(*traces))
    images = torch.randn(3, 3, size, size)
    record["stones"] = gates.stones_learn_where_they_should(plan, images)
    record["certificate"] = repr(certify(plan))


def exported(name: str, record: Record) -> None:
    """Write a student as ONNX at the smallest size it takes, prove it, and count its nodes."""
    torch.manual_seed(0)
    model, example = models.real(name)
    record["family"] = models.family(name)
    images = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        done = export(model.eval(), Path(folder) / "student.onnx", images[:2], samples=images)
        record["export_s"] = round(time.process_time() - started, 2)
        record["nodes"] = len(read_onnx(done.path).model.graph.node)
        record["left"] = _nodes_that_run(done.path)
    found = done.parity
    assert found is not None
    record |= {"gap": found.gap, "scale": found.scale, "batch_sizes": list(found.batch_sizes)}
    missing = {1, 3, 8} - set(found.batch_sizes)
    if missing:
        raise Gap(f"not compared at batch {missing}")


def _nodes_that_run(path: Path) -> int:
    """How many nodes ONNX Runtime makes of a file by its own optimisation."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return len(onnx.load(options.optimized_model_filepath).graph.node)


def decoder(name: str, record: Record) -> None:
    """Trace and cut a decoder of seven billion parameters; how much memory that takes."""
    model, example = models.llama_7b()
    record["parameters"] = sum(weight.numel() for weight in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _peak_gigabytes()
    _trace_and_cut(model, example, name, record)
    record["gigabytes"] = round(_peak_gigabytes() - before, 3)


def _peak_gigabytes() -> float:
    """The most memory that this process ever held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def _modes_names(folder: Path) -> list[str]:
    """The lightest model of every family, then others by seed, none of them heavy."""
    size = {row["name"]: row.get("parameters", 0) for row in read(folder, "capture")}
    by_family: dict[str, list[str]] = defaultdict(list)
    for name in sorted(size, key=lambda name: (size[name], name)):
        by_family[models.family(name)].append(name)
    chosen = [members[0] for members in by_family.values()]
    rest = sorted(name for name in set(size) - set(chosen) if size[name] < MOST_PARAMETERS)
    random.Random(0).shuffle(rest)
    return chosen + rest[: NUM_MODES - len(chosen)]


def _pair_names(_: Path) -> list[str]:
    teachers, students = models.listed("teachers"), models.listed("students")
    return [f"{teacher} ← {student}" for teacher in teachers for student in students]


def _trained_names(folder: Path) -> list[str]:
    planned = sorted(row["name"] for row in read(folder, "pairs") if "error" not in row)
    random.Random(0).shuffle(planned)
    return planned[:NUM_TRAINED]


def _export_names(_: Path) -> list[str]:
    """Every student, and of the sample the first of each family that they lack."""
    names = list(models.listed("students"))
    seen = {models.family(name) for name in names}
    for name in models.listed("sample"):
        if models.family(name) not in seen:
            seen.add(models.family(name))
            names.append(name)
    return names


@dataclass(frozen=True)
class Part:
    """One table of the zoo: which names, what is done with each, and what a child may use."""

    names: Callable[[Path], Iterable[str]]
    task: Task
    limits: Limits
    prepare: Callable[[Iterable[str]], None] | None = None


PARTS = {
    "capture": Part(lambda _: models.every_timm_name(), capture, Limits(300, 4)),
    "modes": Part(_modes_names, modes, Limits(600, 8)),
    "others": Part(lambda _: models.others(), modes, Limits(900, 16)),
    "pairs": Part(_pair_names, pairs, Limits(120, 8), _trace_all),
    "trained": Part(_trained_names, trained, Limits(600, 10)),
    "export": Part(_export_names, exported, Limits(600, 12)),
    "decoder": Part(lambda _: ["hf/LlamaForCausalLM 7B"], decoder, Limits(300, 8)),
}


def read(folder: Path, part: str) -> list[Record]:
    """What a part has found so far."""
    path = folder / f"{part}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def measure(part: str, folder: Path, *, match: str, limit: int | None, jobs: int) -> None:
    """Run one part on the names that have no record yet, in order."""
    plan = PARTS[part]
    done = {row["name"] for row in read(folder, part)}
    names = [name for name in plan.names(folder) if match in name and name not in done][:limit]
    if plan.prepare:
        plan.prepare(names)
    with (folder / f"{part}.jsonl").open("a", encoding="utf-8") as results:
        for record in run(names, plan.task, plan.limits, jobs):
            record["date"] = time.strftime("%Y-%m-%d")
            results.write(json.dumps(record) + "\n")
            results.flush()
            print(part, record["name"], record.get("error", "ok"), record["seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "report"])
    parser.add_argument("--results", type=Path, default=Path("build/zoo"))
    parser.add_argument("--match", default="", help="only names that contain this")
    parser.add_argument("--limit", type=int, help="at most so many names a part")
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    asked.results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _trace_and_cut(
        *models.full_size("timm/test_resnet"), "warm-up", {}
    )  # imports torch's lazy parts
    for part in asked.parts:
        if part == "report":
            found = {name: read(asked.results, name) for name in PARTS}
            report.write(found, models.versions(), Path("docs/zoo.md"))
        else:
            measure(part, asked.results, match=asked.match, limit=asked.limit, jobs=asked.jobs)


if __name__ == "__main__":
    main()
