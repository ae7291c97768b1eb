"""Write what the zoo measured as one page: asked, measured, and every failure by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

from tests.zoo import models
from tests.zoo.pool import Record

Found = Mapping[str, list[Record]]

HEAD = """# The acceptance zoo

What kdsurgeon is held to on every model that can be had by name, and what it reached. Written by
`make zoo`; a part of it, on {sample} models and 40 pairs, runs in `make test`.

| figure | asked | measured |
|---|---|---|
"""


def write(found: Found, versions: Mapping[str, str], path: Path) -> None:
    """The table of figures with its conditions, then the failures with their reasons."""
    rows = "".join(f"| {' | '.join(row)} |\n" for row in _figures(found))
    dates = sorted({record["date"] for records in found.values() for record in records})
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    when = dates[-1] if dates else "not yet"
    conditions = f"\nMeasured {when}, on one of 2 CPU cores, with {software}.\n"
    sections = "".join(_section(part, records) for part, records in found.items())
    head = HEAD.format(sample=len(models.listed("sample")))
    path.write_text(head + rows + conditions + sections, encoding="utf-8")


def _figures(found: Found) -> Iterable[tuple[str, str, str]]:
    captured = found["capture"]
    cut = [record for record in captured if record.get("cuts_4", 0) >= 3]
    traced = sum("trace_s" in record for record in captured)
    yield "timm: architectures captured", "all but 3", f"{traced} of {len(captured)}"
    yield "of these, with 3 cut points or more", "all but 3", f"{len(cut)} of {len(captured)}"
    yield from _times(captured)
    yield (
        "timm: graph and model equal, evaluating and training",
        "all of 300",
        _share(found["modes"]),
    )
    others = {record["name"]: record for record in found["others"]}
    for title, names in _groups().items():
        asked = "all, or refused with a reason"
        yield title, asked, _share([others[name] for name in names if name in others])
    yield "pairs planned with no flag", "99 % of 1,600", _share(found["pairs"])
    yield (
        "pairs whose every stone trains where it should, certified",
        "200 of 200",
        _share(found["trained"]),
    )
    yield from _exports(found["export"])
    for record in found["decoder"]:
        seconds = record.get("trace_s", 0) + record.get("cut_s", 0)
        got = record.get("error") or f"{seconds:.2f} s, {record['gigabytes']:.2f} GB"
        yield "decoder of 7 billion parameters: trace and cut", "1 s, 1 GB", got


def _groups() -> dict[str, tuple[str, ...]]:
    return {
        "transformers: captured, both modes, spliced": models.listed("transformers"),
        "torchvision: captured, both modes, spliced": models.torchvision_names(),
        "the study's forty: captured, both modes, spliced": models.listed("study"),
    }


def _times(captured: list[Record]) -> Iterable[tuple[str, str, str]]:
    seconds = [record["trace_s"] + record["cut_s"] for record in captured if "cut_s" in record]
    if seconds:
        worst = f"{median(seconds):.2f} s / {max(seconds):.1f} s"
        yield "timm: trace and cut, CPU time, median / worst", "0.5 s / 8 s", worst


def _exports(records: list[Record]) -> Iterable[tuple[str, str, str]]:
    proved = [record for record in records if "error" not in record]
    families = {record["family"] for record in proved}
    got = f"{_share(records)}, of {len(families)} families" if records else _share(records)
    yield "students exported to ONNX, equal at batch 1, 3 and 8", "30 families", got
    if proved:
        worst = max(record["gap"] / max(1.0, record["scale"]) for record in proved)
        yield "largest gap, of max(1, largest logit)", "1e-5", f"{worst:.1e}"


def _share(records: list[Record]) -> str:
    held = sum("error" not in record for record in records)
    return f"{held} of {len(records)}" if records else "not measured"


def _section(part: str, records: list[Record]) -> str:
    reasons = {record["name"]: _reason(part, record) for record in records}
    lines = [f"* `{name}`: {reason}\n" for name, reason in sorted(reasons.items()) if reason]
    return f"\n## Not held: {part}\n\n" + "".join(lines) if lines else ""


def _reason(part: str, record: Record) -> str | None:
    if "error" in record:
        return record["error"].removeprefix(record["name"]).replace(" | ", "; ").strip()
    if part == "capture" and record["cuts_4"] < 3:
        return f"has {record['cuts_4']} cut points"
    return None
