"""Every number of a run: read without coercion, validated all at once, written back as it was."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import random
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from kdsurgeon.errors import ConfigError, ResourceError
from kdsurgeon.recipe import (
    DataRecipe,
    LossRecipe,
    OptimRecipe,
    Recipe,
    RunConfig,
    Section,
    idle_settings,
    parse_set,
    parse_yaml,
    read_config,
    read_yaml,
    records,
    write_yaml,
)

NEEDED = {"teacher": "t.pt", "student": "s.pt", "data_dir": "digits"}
HEAD = "teacher: t.pt\nstudent: s.pt\ndata_dir: digits\n"  # lines 1 to 3 of most files here
SECTIONS: dict[str, type[Section]] = {"loss": LossRecipe, "optim": OptimRecipe, "data": DataRecipe}

Write = Callable[[str], Path]


@pytest.fixture
def run_file(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def every_key() -> list[str]:
    leaves = [f"{name}.{key}" for name, kind in SECTIONS.items() for key in kind.model_fields]
    return [*RunConfig.model_fields, *leaves]


def lines_of(error: pytest.ExceptionInfo[ConfigError], path: Path) -> list[str]:
    return str(error.value).replace(f"{path.parent}/", "").splitlines()


# Nothing is coerced.

NO = object()
WHOLE = {
    **dict.fromkeys(["3.0", "3.", "3e0", "1e2", "1_000", "3,000", "0b11", "0o8", "0x", "0xg"], NO),
    **dict.fromkeys(
        ["+-3", "--3", "3-", "1:30", "12:30:45", "2026-01-01", "three", "3 epochs"], NO
    ),
    **dict.fromkeys(
        ["true", "yes", "on", "null", "~", "", '"3"', "'3'", "[3]", "{}", "{a: 3}"], NO
    ),
    **dict.fromkeys([".inf", "-.inf", ".nan", "inf", "nan", "-1", "0", "-0", "1000001", "３"], NO),
    **dict.fromkeys(["9" * 400, "9" * 5000, "0x1p3", "1e", "½", "|\n  3", ">\n  3", "- 3"], NO),
    "3": 3,
    "+3": 3,
    "003": 3,
    "010": 10,
    "08": 8,
    "0o10": 8,
    "0x1F": 31,
    "3 # three": 3,
}
REAL = {
    **dict.fromkeys(
        ["1e", "e3", "1e+", "1_0.0", "1,5", "0.5.1", ".", "+-", "+", ".e1", "1 e3"], NO
    ),
    **dict.fromkeys(
        ["NaN", "nan", ".nan", ".NaN", "inf", ".inf", "-.inf", "+.Inf", "Infinity"], NO
    ),
    **dict.fromkeys(["1e999", "-1e999", "0", "0.0", "-0.0", "-1", "1e-999", "true", "false"], NO),
    **dict.fromkeys(['"4"', "'4.0'", "null", "~", "", "four", "4.0f", "0x1.8p1", "1:30.5"], NO),
    **dict.fromkeys(
        ["[4.0]", "{t: 4}", "yes", "4 4", "4%", "1/2", "1e3.5", "9" * 5000, "４.0"], NO
    ),
    "1e-3": 0.001,
    "1E-3": 0.001,
    "1.": 1.0,
    ".5": 0.5,
    "+.5": 0.5,
    "4": 4.0,
    "1e3": 1000.0,
    "0x10": 16.0,
    "010": 10.0,
    "01.5": 1.5,
    "1e+2": 100.0,
    "4.0 # τ": 4.0,
    "0o17": 15.0,
}
BOOL = {
    **dict.fromkeys(["yes", "no", "on", "off", "Yes", "NO", "On", "OFF", "y", "n", "Y", "N"], NO),
    **dict.fromkeys(["1", "0", "1.0", '"true"', "'false'", "tRUE", "truE", "fALSE", "T", "F"], NO),
    **dict.fromkeys(
        ["null", "~", "", "[true]", "{}", "enabled", "true.", "true false", "|\n  true"], NO
    ),
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
TEXT = {
    **dict.fromkeys(
        ["null", "Null", "NULL", "~", "", '""', "''", "3", "3.5", "1e3", "010", "0o7"], NO
    ),
    **dict.fromkeys(["0x1F", ".5", "1.", "-1", "+1", "true", "True", "FALSE", ".inf", ".nan"], NO),
    **dict.fromkeys(
        ["[a]", "{a: b}", "- a", '"a\\nb"', '"a\\0b"', "|\n  a", '"\\t"', '"\\x7f"'], NO
    ),
    **{
        text: text for text in ["yes", "no", "on", "off", "1_000", "2026-01-01", "12:30:45", "1:30"]
    },
    **{
        text: text
        for text in ["0b1", "0o8", "1e", "NaN", "nan", "inf", "tRUE", "=", "<<", "C:\\t.pt"]
    },
    **{
        text: text
        for text in ["py:a.b:c", "timm/x,a=1", "２", "é.pt", "nULL", "+", ".", "..", "a b"]
    },
    '"3"': "3",
    "'null'": "null",
    '"true"': "true",
    '"1e3"': "1e3",
    "' a '": " a ",
}
TRAPS = [
    (key, text, meant)
    for key, table in (
        ("epochs", WHOLE),
        ("loss.temperature", REAL),
        ("amp", BOOL),
        ("teacher", TEXT),
    )
    for text, meant in table.items()
]


def test_there_are_200_scalar_traps() -> None:
    assert len(TRAPS) >= 200


@pytest.mark.parametrize(("key", "text", "meant"), TRAPS)
def test_a_scalar_means_itself_or_is_refused(key: str, text: str, meant: Any) -> None:
    section, _, leaf = key.rpartition(".")
    shift = "  " if section else ""
    scalar = (
        text.replace("\n", f"\n{shift}") if text != "- a" and text != "- 3" else f"\n{shift}{text}"
    )
    source = f"{section}:\n" * bool(section) + f"{shift}{leaf}: {scalar}\n"
    values = parse_yaml(source)
    if meant is NO:
        with pytest.raises(ConfigError, match=rf"^RunConfig: {key} must be ") as error:
            RunConfig(**{**NEEDED, **values})
        assert error.value.exit_code == 2
        assert len(str(error.value).splitlines()) == 1
    else:
        built: Any = RunConfig(**{**NEEDED, **values})
        for part in key.split("."):
            built = getattr(built, part)
        assert (type(built), built) == (type(meant), meant)


PYTHON_TRAPS = [
    ("epochs", True, 1), ("epochs", 1.0, 1), ("epochs", "1", 1), ("epochs", b"1", 1),
    ("seed", False, 0), ("amp", 1, True), ("amp", "true", True), ("threads", 2.0, 2),
    ("device", None, "auto"), ("method", ["kd"], "kd"), ("batch_size", None, 64),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "near"), PYTHON_TRAPS)
def test_a_python_value_of_another_type_is_refused(key: str, value: Any, near: Any) -> None:
    Recipe(**{key: near})
    with pytest.raises(ConfigError, match=f"^Recipe: {key} must be "):
        Recipe(**{key: value})


def test_a_whole_number_is_a_number_and_a_list_is_a_tuple() -> None:
    built = Recipe(
        loss=LossRecipe(temperature=2, stones=(1, 3)), data=DataRecipe(input_size=(1, 8, 8))
    )
    assert type(built.loss.temperature) is float
    assert built == Recipe(
        loss={"temperature": 2.0, "stones": [1, 3]}, data={"input_size": [1, 8, 8]}
    )


# Dump and load.


def numbers(low: float, high: float, **edges: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **edges)


names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
factors = numbers(0, 1e300)
positive = numbers(0, 1e300, exclude_min=True)
rising = st.lists(numbers(0, 1, exclude_min=True, exclude_max=True), max_size=4, unique=True).map(
    sorted
)
channels = st.integers(1, 3).flatmap(
    lambda count: st.fixed_dictionaries(
        {
            "mean": st.lists(numbers(-1e9, 1e9), min_size=count, max_size=count),
            "std": st.lists(positive, min_size=count, max_size=count),
        }
    )
)
losses = st.fixed_dictionaries(
    {},
    optional={
        "ce_weight": positive,
        "kd_weight": factors,
        "cross_weight": factors,
        "cross_start": numbers(0, 1),
        "temperature": positive,
        "stones": st.sampled_from(["all", "random", "drop-first", "last-1", "last-12"])
        | st.lists(st.integers(1, 9_999), min_size=1, max_size=4, unique=True).map(sorted),
        "stone_warmup": numbers(0, 1),
        "label_smoothing": numbers(0, 1, exclude_max=True),
    },
)
optims = st.fixed_dictionaries(
    {},
    optional={
        "opt": st.sampled_from(["sgd", "adamw"]),
        "lr": numbers(1e-3, 1e300),
        "momentum": numbers(0, 1, exclude_max=True),
        "weight_decay": factors,
        "sched": st.sampled_from(["cosine", "step", "onecycle", "constant"]),
        "decay_at": rising,
        "decay_rate": numbers(0, 1, exclude_min=True),
        "warmup_epochs": numbers(0, 1, exclude_max=True),
        "min_lr": numbers(0, 1e-3),
        "clip_grad": st.none() | positive,
        "grad_accum_steps": st.integers(1, 1_000_000),
    },
)
datas = st.builds(
    lambda given, statistics: {**given, **statistics},
    st.fixed_dictionaries(
        {},
        optional={
            "augment": st.sampled_from(["auto", "none", "shift", "shift-flip", "crop-flip"]),
            "aa": st.sampled_from([None, "rand", "rand-m7", "rand-m9-n2"]),
            "reprob": st.floats(0, 1),
            "cutout": st.integers(0, 1_000_000),
            "scale": st.sampled_from([[0.08, 1.0], (0.5, 0.5), [0.2, 0.9]]),
            "crop_pct": st.none() | numbers(0, 1, exclude_min=True),
            "interpolation": st.sampled_from([None, "nearest", "bilinear", "bicubic"]),
            "classes": st.none() | names,
            "workers": st.none() | st.integers(0, 256),
            "data_device": st.sampled_from(["auto", "cpu", "device"]),
            "val_split": numbers(0, 1, exclude_min=True, exclude_max=True),
            "max_bad_images": st.integers(0, 1_000_000),
            "input_size": st.none() | st.lists(st.integers(1, 1_000_000), min_size=3, max_size=3),
        },
    ),
    st.just({}) | channels,
)
configs = st.fixed_dictionaries(
    {"teacher": names, "student": names, "data_dir": names},
    optional={
        "method": st.sampled_from(["ce", "kd", "block-kd"]),
        "epochs": st.integers(1, 1_000_000),
        "batch_size": st.integers(1, 1_000_000),
        "seed": st.integers(0, 2**32 - 1),
        "device": st.sampled_from(["auto", "cpu", "mps", "cuda", "cuda:7"]),
        "threads": st.none() | st.integers(1, 64),
        "amp": st.booleans(),
        "loss": losses,
        "optim": optims,
        "data": datas,
        "teacher_arch": st.none() | names,
        "output": st.none() | names,
        "plan": st.none() | names,
        "blocks": st.just("auto") | st.integers(1, 99),
        "budget": st.none() | numbers(1, 1e300),
    },
).filter(lambda given: not given.get("budget") or "stones" not in given.get("loss", {}))


@settings(max_examples=2000, derandomize=True, deadline=None, database=None)
@given(configs)
def test_a_config_dumped_and_loaded_is_equal(values: dict[str, Any]) -> None:
    config = RunConfig(**values)
    written = write_yaml({key: config.dump()[key] for key in values})
    loaded = RunConfig(**parse_yaml(written))
    assert loaded == config
    assert loaded.hash() == config.hash()


def test_a_full_dump_holds_every_key_and_loads_as_a_file(run_file: Write) -> None:
    config = RunConfig(**NEEDED, method="kd", loss=LossRecipe(stones=(1, 3)), blocks=4)
    dumped = config.dump()
    assert list(dumped) == list(RunConfig.model_fields)
    assert all(list(dumped[name]) == list(kind.model_fields) for name, kind in SECTIONS.items())
    loaded = read_config(run_file(write_yaml(dumped)))
    assert loaded == config
    assert write_yaml(loaded.dump()) == write_yaml(dumped)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(
        ["null", "yes", "1e3", "1_0", "2026-01-01", "0o7", "a: b", "a #b", "- a", "&a"]
    )
    | st.from_regex(r"[0-9.eE_:+xobn~-]{1,6}", fullmatch=True)
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.dictionaries(keys, trees, max_size=4))
def test_any_plain_data_round_trips_here_and_through_another_reader(data: dict[str, Any]) -> None:
    written = write_yaml(data)
    assert repr(parse_yaml(written)) == repr(data)
    assert repr(YAML(typ="safe", pure=True, plug_ins=[]).load(written)) == repr(data)


def test_not_a_number_round_trips() -> None:
    assert math.isnan(parse_yaml(write_yaml({"loss": math.nan}))["loss"])


def test_yaml_is_written_in_order_with_comments_behind_values() -> None:
    plan = {
        "teacher": "cifar/resnet56",
        "empty": {},
        "stones": [
            {"depth": 1, "weight": 0.5, "shape": (16, 32, 32)},
            {"depth": 2, "why": 'yes: "both"', "cuts": []},
        ],
        "grid": [[1, 2], [3]],
    }
    comments = {
        ("teacher",): "0.86 M parameters",
        ("stones",): "one per boundary",
        ("stones", 0, "weight"): "2 ** -1\nours",
        ("stones", 1): "the last",
        ("grid", 1): "half",
    }
    assert write_yaml(plan, comments) == (
        "teacher: cifar/resnet56  # 0.86 M parameters\n"
        "empty: {}\n"
        "stones:  # one per boundary\n"
        "  - depth: 1\n"
        "    weight: 0.5  # 2 ** -1\ufffdours\n"
        "    shape: [16, 32, 32]\n"
        "  -  # the last\n"
        "    depth: 2\n"
        '    why: "yes: \\"both\\""\n'
        "    cuts: []\n"
        "grid:\n"
        "  - [1, 2]\n"
        "  - [3]  # half\n"
    )
    assert parse_yaml(write_yaml(plan, comments)) == parse_yaml(write_yaml(plan))
    assert write_yaml({}) == "{}\n"


def test_what_yaml_cannot_hold_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="YAML cannot hold"):
        write_yaml({"path": Path("x")})
    with pytest.raises(AssertionError, match="the key 1 is not text"):
        write_yaml({1: 2})  # pyright: ignore[reportArgumentType]  # that is the test


# Errors: all at once, each with its place.

SEVERAL = """\
teacher: t.pt
lr: 0.1
data_dir: digits
loss:
  temperature: -1
  stones: [2, 1]
  ce_weight: "3"
optimiser:
  lerning_rate: 1
  sched: cosin
epochs: 3.0
data:
  mean: [0.1, x]
  input_size: [1, 2]
amp: yes
optim.lr: 3
optim:
method: block_kd
epochs: 4
seed: &a 3
threads: !!int 4
"""
SEVERAL_ERRORS = """\
run.yaml:2: unknown key "lr"; did you mean "optim.lr"?
run.yaml:5: loss.temperature must be a number above 0, not -1
run.yaml:6: loss.stones must be "all", "random", "last-K" (K of 1 or more), "drop-first", or a list of depths of 1 or more in rising order, such as [1, 3], not [2, 1]
run.yaml:7: loss.ce_weight must be a number of 0 or more, not "3"; remove the quotes
run.yaml:8: unknown key "optimiser"; did you mean "optim"?
run.yaml:9: in "optimiser": unknown key "lerning_rate"; did you mean "lr"?
run.yaml:10: in "optimiser": sched must be "cosine", "step", "onecycle" or "constant", not "cosin"; did you mean "cosine"?
run.yaml:11: epochs must be a whole number from 1 to 1,000,000, not 3.0
run.yaml:13: data.mean must be a list of numbers, one per channel, or null, but item 2 is "x"
run.yaml:14: data.input_size must be a list of three whole numbers (channels, height, width), or null, not [1, 2]
run.yaml:15: amp must be true or false, not "yes"
run.yaml:16: unknown key "optim.lr"; write "lr:" indented below "optim:"
run.yaml:17: "optim" is a section: write keys below it
run.yaml:18: method must be "ce", "kd" or "block-kd", not "block_kd"; did you mean "block-kd"?
run.yaml:19: the key "epochs" is given twice (first on line 11)
run.yaml:20: the anchor "&a": write the value out where it is used
run.yaml:21: the tag "tag:yaml.org,2002:int": values are plain YAML, without tags
--set optm.lr=3: unknown key "optm.lr"; did you mean "optim.lr"?
--set loss=3: "loss" is a section: write keys below it
--set epochs.x=1: unknown key "epochs.x"
--kd-weight yes: loss.kd_weight must be a number of 0 or more, not "yes"
--set blocks=0: blocks must be "auto" or a whole number from 1 to 1,000,000, not 0
run.yaml: "student" is missing (the student: a model file or SOURCE/NAME)
"""  # noqa: E501 - the lines a user sees, as they are


def test_all_problems_of_file_and_flags_come_at_once_with_their_places(run_file: Write) -> None:
    path = run_file(SEVERAL)
    flags = {"optm.lr": 3, "loss": 3, "epochs.x": 1, "loss.kd_weight": "yes", "blocks": 0}
    with pytest.raises(ConfigError) as error:
        read_config(path, flags, spelled={"loss.kd_weight": "--kd-weight yes"})
    assert error.value.exit_code == 2
    assert sorted(lines_of(error, path)) == sorted(SEVERAL_ERRORS.splitlines())
    numbered = [line for line in lines_of(error, path) if line.startswith("run.yaml:")]
    assert [line for line in SEVERAL_ERRORS.splitlines() if line in numbered] == numbered


BAD_FILES: list[tuple[str, str, str]] = [
    # below HEAD, so from line 4: (text, place, what is named)
    ("epoch: 3", "run.yaml:4", '"epochs"'),
    ("lr: 0.1", "run.yaml:4", '"optim.lr"'),
    ("learning_rate: 0.1", "run.yaml:4", '"optim.lr"'),
    ("tau: 4", "run.yaml:4", '"loss.temperature"'),
    ("batch-size: 8", "run.yaml:4", '"batch_size"'),
    ("BATCH_SIZE: 8", "run.yaml:4", '"batch_size"'),
    ("zzzzzzzzzzzz: 8", "run.yaml:4", 'unknown key "zzzzzzzzzzzz"'),
    ("optim.lr: 3", "run.yaml:4", '"lr:" indented below "optim:"'),
    ("los:\n  temperature: 4", "run.yaml:4", '"loss"'),
    ("loss:\n\n  temprature: 4", "run.yaml:6", '"loss.temperature"'),
    ("loss:\n  lr: 4", "run.yaml:5", '"optim.lr"'),
    ("loss: 3", "run.yaml:4", '"loss" is a section'),
    ("loss:", "run.yaml:4", '"loss" is a section'),
    ("loss: [1]", "run.yaml:4", '"loss" is a section'),
    ("epochs: {a: 1}", "run.yaml:4", "epochs"),
    ("epochs: 0", "run.yaml:4", "epochs"),
    ("epochs: -1", "run.yaml:4", "epochs"),
    ("batch_size: 0", "run.yaml:4", "batch_size"),
    ("seed: -1", "run.yaml:4", "seed"),
    ("seed: 4294967296", "run.yaml:4", "seed"),
    ("threads: 0", "run.yaml:4", "threads"),
    ("device: gpu", "run.yaml:4", '"cpu"'),
    ("device: cuda:x", "run.yaml:4", '"cuda"'),
    ("amp_dtype: bf16", "run.yaml:4", '"bfloat16"'),
    ("method: blok-kd", "run.yaml:4", '"block-kd"'),
    ("blocks: Auto", "run.yaml:4", '"auto"'),
    ("blocks: 0", "run.yaml:4", "blocks"),
    ("budget: 0.9", "run.yaml:4", "budget must be a number of 1 or more, such as 1.5"),
    ("budget: 1.5x", "run.yaml:4", "budget must be a number of 1 or more, such as 1.5"),
    ("loss: {stones: last-2}\nbudget: 2", "run.yaml:5", "loss.stones chooses the stones already"),
    ("method: ce\nteacher_cache: t.npz", "run.yaml:5", "method ce asks no teacher"),
    ("output: [a]", "run.yaml:4", "output"),
    ("loss: {temperature: 0}", "run.yaml:4", "loss.temperature"),
    ("loss: {temperature: .nan}", "run.yaml:4", "loss.temperature"),
    ("loss: {temperature: .inf}", "run.yaml:4", "loss.temperature"),
    ("loss: {ce_weight: -0.1}", "run.yaml:4", "loss.ce_weight"),
    ("loss: {kd_weight: .nan}", "run.yaml:4", "loss.kd_weight"),
    ("loss: {cross_start: 1.5}", "run.yaml:4", "loss.cross_start"),
    ("loss: {stones: alll}", "run.yaml:4", '"all"'),
    ("loss: {stones: last-0}", "run.yaml:4", '"last-1"'),
    ("loss: {stones: []}", "run.yaml:4", "loss.stones"),
    ("loss: {stones: [0, 1]}", "run.yaml:4", "loss.stones"),
    ("loss: {stones: [1, 1]}", "run.yaml:4", "loss.stones"),
    ("loss: {stones: [1, true]}", "run.yaml:4", "loss.stones"),
    ("loss: {label_smoothing: 1}", "run.yaml:4", "loss.label_smoothing"),
    ("loss: {ce_weight: 0, kd_weight: 0, cross_weight: 0}", "run.yaml:4", "loss.cross_weight"),
    ("method: ce\nloss:\n  ce_weight: 0", "run.yaml:6", "loss.ce_weight"),
    ("method: kd\nloss:\n  ce_weight: 0\n  kd_weight: 0", "run.yaml:7", "loss.kd_weight"),
    ("loss:\n  ce_weight: 0\n  kd_weight: 0\n  cross_start: 1", "run.yaml:7", "loss.cross_start"),
    ("epochs: 2\nloss:\n  stone_warmup: 3", "run.yaml:6", "loss.stone_warmup"),
    ("optim: {opt: adam}", "run.yaml:4", '"adamw"'),
    ("optim: {sched: cos}", "run.yaml:4", '"cosine"'),
    ("optim: {momentum: 1}", "run.yaml:4", "optim.momentum"),
    ("optim: {decay_rate: 0}", "run.yaml:4", "optim.decay_rate"),
    ("optim: {decay_at: [0.5, 0.2]}", "run.yaml:4", "optim.decay_at"),
    ("optim: {decay_at: [150, 180]}", "run.yaml:4", "optim.decay_at"),
    ("optim: {decay_at: [0.5, a]}", "run.yaml:4", "item 2"),
    ("optim: {clip_grad: 0}", "run.yaml:4", "optim.clip_grad"),
    ("optim: {lr: 0.1, min_lr: 0.2}", "run.yaml:4", "optim.min_lr"),
    ("epochs: 2\noptim:\n  warmup_epochs: 2", "run.yaml:6", "optim.warmup_epochs"),
    ("data: {augment: flip}", "run.yaml:4", '"shift-flip"'),
    ("data: {val_split: 1}", "run.yaml:4", "data.val_split"),
    ("data: {max_bad_images: -1}", "run.yaml:4", "data.max_bad_images"),
    ("data: {mean: []}", "run.yaml:4", "data.mean"),
    ("data: {mean: [0.5], std: [0.5, 0.5]}", "run.yaml:4", "data.std"),
    ("data: {mean: [0.5], std: [0]}", "run.yaml:4", "data.std"),
    ("data: {mean: [0.5]}", "run.yaml:4", "data.std"),
    ("data: {input_size: [3, 32]}", "run.yaml:4", "data.input_size"),
    ("data: {input_size: [3, 32, 32, 1]}", "run.yaml:4", "data.input_size"),
    ("data: {input_size: 32}", "run.yaml:4", "data.input_size"),
    ("teacher: other.pt", "run.yaml:4", '"teacher" is given twice (first on line 1)'),
    ("loss:\n  stones: all\n  stones: all", "run.yaml:6", '"loss.stones" is given twice'),
    ("epochs: &e 3", "run.yaml:4", "&e"),
    ("epochs: *e", "run.yaml:4", "*e"),
    ("? *e\n: 3", "run.yaml:4", "*e"),
    ("epochs: !!python/object:os.system 3", "run.yaml:4", "python/object"),
    ("epochs: ! 3", "run.yaml:4", "tag"),
    ("1: 3", "run.yaml:4", "not 1"),
    ("null: 3", "run.yaml:4", "not null"),
    ("? [a]\n: 3", "run.yaml:4", '["a"]'),
    ("<<: {epochs: 3}", "run.yaml:4", "<<"),
    ("---\nepochs: 3", "run.yaml:4", "second document"),
    ("epochs: [1,", "run.yaml:5", "not valid YAML"),
    ("epochs: a: b", "run.yaml:4", "not valid YAML"),
    ("\tepochs: 3", "run.yaml:4", "not valid YAML"),
    ("epochs: 'x", "run.yaml:5", "not valid YAML"),
    ("epochs: @x", "run.yaml:4", "not valid YAML"),
    ("epochs: \x01", "run.yaml:4", "not valid YAML"),
    ('teacher_arch: "\\UFFFFFFFF"', "run.yaml:1", "not valid YAML"),
    ('teacher_arch: "\\ud83d"', "run.yaml:4", "surrogate"),
    ("epochs: " + "[" * 40 + "]" * 40, "run.yaml:4", "32 levels"),
    ("epochs: " + "[" * 100_000, "run.yaml:4", "32 levels"),
    ("epochs: [" + "1," * 10_000 + "]", "run.yaml:4", "10,000 values"),
]


def test_there_are_60_bad_config_files() -> None:
    assert len(BAD_FILES) >= 60


@pytest.mark.parametrize(("text", "place", "named"), BAD_FILES)
def test_a_bad_config_file_names_file_line_and_key(
    text: str, place: str, named: str, run_file: Write
) -> None:
    path = run_file(f"{HEAD}{text}\n")
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert error.value.exit_code == 2
    lines = [line for line in lines_of(error, path) if named in line]
    assert {line.partition(": ")[0] for line in lines} == {place}
    assert max(map(len, lines)) < 300


@pytest.mark.parametrize("value", ["*e", '"\\ud83d"'])
def test_a_value_that_cannot_be_read_is_not_called_wrong_as_well(
    value: str, run_file: Write
) -> None:
    path = run_file(f"{HEAD}epochs: {value}\n")
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert len(lines_of(error, path)) == 1
    with pytest.raises(ConfigError, match=r"--set epochs=0: epochs must be"):
        read_config(path, {"epochs": 0})


WHOLE_FILES = [
    ("", "run.yaml is empty."),
    ("# nothing yet\n", "run.yaml is empty."),
    ("- a\n- b\n", "run.yaml:1: the top level must be `key: value` lines."),
    ("epochs 3\n", "run.yaml:1: the top level must be `key: value` lines."),
    ("&a [1]\n", 'run.yaml:1: the anchor "&a": write the value out where it is used'),
    ("%YAML 1.1\n---\na: 1\n", "run.yaml:2: a %YAML or %TAG directive"),
    ("%TAG ! tag:x,2000:\n---\na: 1\n", "run.yaml:2: a %YAML or %TAG directive"),
    ("a: " + "x" * (1 << 20), "run.yaml is larger than 1 MiB"),
]


@pytest.mark.parametrize(("text", "message"), WHOLE_FILES)
def test_a_file_that_is_no_mapping_is_refused(text: str, message: str, run_file: Write) -> None:
    path = run_file(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert "\n".join(lines_of(error, path)).startswith(message)
    assert error.value.exit_code == 2


def test_a_path_that_is_no_readable_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist\.") as error:
        read_config(tmp_path / "none.yaml")
    assert error.value.exit_code == 2
    with pytest.raises(ConfigError, match="is a folder, not a YAML file"):
        read_yaml(tmp_path)
    with pytest.raises(ConfigError, match="/dev/null is not a regular file"):
        read_yaml("/dev/null")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8 text \(byte 8\)"):
        read_yaml(latin)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResourceError, match=r"latin\.yaml cannot be read") as refused:
        read_yaml(latin)
    assert refused.value.exit_code == 6
    assert refused.value.notes == {"why": "Permission denied"}


def test_text_over_a_mebibyte_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^plan is larger than 1 MiB"):
        parse_yaml("a: 1\n" * 300_000, "plan")


def test_more_than_100_problems_are_cut_short(run_file: Write) -> None:
    path = run_file(HEAD + "".join(f"qqqqqqqqqq{index}: 1\n" for index in range(4_000)))
    with pytest.raises(ConfigError) as error:
        read_config(path)
    lines = lines_of(error, path)
    assert len(lines) == 101
    assert lines[0] == 'run.yaml:4: unknown key "qqqqqqqqqq0"'
    assert lines[-1] == "… and more than 100 in all"


def test_a_key_too_long_to_be_a_typo_is_cut_and_gets_no_suggestion() -> None:
    with pytest.raises(ConfigError) as error:
        Recipe(**{"epochs" * 1000: 1})
    assert len(str(error.value)) < 120
    assert "did you mean" not in str(error.value)


def test_a_problem_across_sections_is_told_although_another_value_is_wrong() -> None:
    with pytest.raises(ConfigError) as error:
        Recipe(epochs=1, seed=-1, optim={"warmup_epochs": 1, "min_lr": 1}, loss={"stone_warmup": 3})
    assert str(error.value).splitlines() == [
        "Recipe: seed must be a whole number from 0 to 4,294,967,295, not -1",
        "Recipe: loss.stone_warmup: stone_warmup (3.0) is above epochs (1)",
        "Recipe: optim.min_lr: min_lr (1.0) is above lr (0.001)",
    ]


# Suggestions.


def one_edit(word: str, draw: random.Random) -> str:
    """``word`` with one letter inserted, dropped, replaced or swapped with the next."""
    at = draw.randrange(len(word))
    letter = draw.choice(string.ascii_lowercase + "_")
    swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    edits = [
        word[:at] + letter + word[at:],
        word[:at] + word[at + 1 :],
        word[:at] + letter + word[at + 1 :],
    ]
    return draw.choice([*edits, swapped, word + letter])


def typos(words: list[str], count: int) -> Iterator[tuple[str, str]]:
    draw = random.Random(2411)
    for word in words:
        leaf = word.rpartition(".")[2]
        made = (one_edit(leaf, draw) for _ in itertools.count())
        for typo in itertools.islice((typo for typo in made if typo not in ("", leaf)), count):
            yield word, word.removesuffix(leaf) + typo


def test_at_least_95_percent_of_one_edit_typos_in_keys_get_the_right_suggestion() -> None:
    right, wrong = 0, []
    for key, typo in typos(every_key(), 30):
        section, _, leaf = typo.rpartition(".")
        value: Any = {} if key in SECTIONS else 1
        with pytest.raises(ConfigError) as error:
            RunConfig(**NEEDED, **({section: {leaf: value}} if section else {leaf: value}))
        if f'unknown key "{typo}"; did you mean "{key}"?' in str(error.value):
            right += 1
        else:
            wrong.append((typo, str(error.value)))
    assert right + len(wrong) == 30 * len(every_key()) > 1300
    assert right / (right + len(wrong)) >= 0.95, wrong


def test_at_least_95_percent_of_one_edit_typos_in_values_get_the_right_suggestion() -> None:
    right = 0
    cases = [
        ("loss", "stones", ["all", "drop-first"]),
        ("optim", "opt", ["sgd", "adamw"]),
        *(
            (name, key, list(get_args(field.annotation)))
            for name, kind in {"": Recipe, **SECTIONS}.items()
            for key, field in kind.model_fields.items()
            if key in ("method", "amp_dtype", "sched", "augment")
        ),
    ]
    asked = [
        (*case[:2], *pair)
        for case in cases
        for pair in typos(case[2], 30)
        if pair[1] not in case[2]  # float16 for bfloat16
    ]
    for section, key, value, typo in asked:
        given = {key: typo} if not section else {section: {key: typo}}
        with pytest.raises(ConfigError) as error:
            Recipe(**given)
        right += f'did you mean "{value}"?' in str(error.value)
    assert len(asked) == 539
    assert right / len(asked) >= 0.95


SYNONYMS = [
    ("optim.learning_rate", "optim.lr"), ("optim.lerning_rate", "optim.lr"), ("lr", "optim.lr"),
    ("alpha", "loss.ce_weight"), ("beta", "loss.kd_weight"), ("gamma", "loss.cross_weight"),
    ("temperature", "loss.temperature"), ("data.lr", "optim.lr"), ("num_epochs", "epochs"),
    ("optimizer.lr", "optim.lr"), ("wd", "optim.weight_decay"), ("batchsize", "batch_size"),
    ("loss.tau", "loss.temperature"), ("optim.milestones", "optim.decay_at"),
    ("val_split", "data.val_split"), ("output_dir", "output"),
]  # fmt: skip


@pytest.mark.parametrize(("given_key", "meant"), SYNONYMS)
def test_a_key_of_another_program_or_section_is_recognised(given_key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(None, {**NEEDED, given_key: 1})
    assert str(error.value) == (
        f'--set {given_key}=1: unknown key "{given_key}"; did you mean "{meant}"?'
    )


# Reading.


def test_flags_win_over_the_file_and_the_file_over_defaults(run_file: Write) -> None:
    path = run_file(f"{HEAD}epochs: 5\nseed: 7\nloss:\n  temperature: 2\n")
    config = read_config(path, {"epochs": 9, "loss.kd_weight": 0.5, "optim.lr": 1e-2})
    assert (config.epochs, config.seed, config.batch_size) == (9, 7, 64)
    assert (config.loss.temperature, config.loss.kd_weight) == (2.0, 0.5)
    assert config.optim == OptimRecipe(lr=0.01)


def test_flags_alone_are_enough_and_what_is_missing_is_listed() -> None:
    assert read_config(None, NEEDED) == RunConfig(**NEEDED)
    with pytest.raises(ConfigError) as error:
        read_config(None, {"teacher": "t.pt"})
    assert str(error.value) == (
        'command line: "student" is missing (the student: a model file or SOURCE/NAME)\n'
        'command line: "data_dir" is missing (the data: a folder, an .npz file, or digits)'
    )


def test_reading_leaves_its_arguments_as_they_were() -> None:
    given_flags = {**NEEDED, "loss.stones": [1, 2]}
    before = copy.deepcopy(given_flags)
    read_config(None, given_flags)
    assert given_flags == before


def test_a_document_is_a_plain_dict_that_knows_its_lines() -> None:
    document = parse_yaml("a: 1\nb:\n  - c: x\n  - [1,\n     2]\n", "plan.yaml")
    assert document == {"a": 1, "b": [{"c": "x"}, [1, 2]]}
    assert document.where("b") == "plan.yaml:2"
    assert document.where("b", 0, "c") == "plan.yaml:3"
    assert document.where("b", 1, 1) == "plan.yaml:5"
    assert document.where("b", 0, "unknown") == "plan.yaml:3"
    assert document.where("unknown") == "plan.yaml"


def test_a_byte_order_mark_and_a_final_document_mark_are_read_over(run_file: Write) -> None:
    assert read_yaml(run_file("\ufeff%YAML 1.2\n---\na: 1\n...\n")) == {"a": 1}


SETS = [
    ("optim.lr=1e-3", 0.001), ("epochs=3", 3), ("amp=true", True), ("amp=yes", "yes"),
    ("teacher=py:a.b:c", "py:a.b:c"), ("output=", None), ("loss.stones=[1, 3]", [1, 3]),
    ("teacher=a=b", "a=b"), ('teacher="3"', "3"), (" seed = 010 ", 10), ("output=~/runs", "~/runs"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SETS)
def test_a_set_value_is_read_by_the_rules_of_yaml(text: str, value: Any) -> None:
    key, parsed = parse_set(text)
    assert key == text.partition("=")[0].strip()
    assert (type(parsed), parsed) == (type(value), value)


BAD_SETS = [
    ("epochs", "this is not key=value"), ("=3", "this is not key=value"), ("", "not key=value"),
    ("a..b=3", "this is not key=value"), ("a b=3", "this is not key=value"),
    ("a=[1,", "not valid YAML"), ("a=*x", "the alias"), ("a=&x 3", "the anchor"),
    ("a=!!int 3", "the tag"), ("loss={temperature: 2}", "the value reads as keys"),
    ("a=b: c", "the value reads as keys"), ("a=\x00", "not valid YAML"),
    ("a={b: 1, b: 2}", 'the key "b" is given twice'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_SETS)
def test_a_set_that_cannot_be_read_is_shown_with_its_problem(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_set(text)
    assert error.value.exit_code == 2
    assert str(error.value).startswith("--set ")
    assert message in str(error.value)


# From Python.


def test_a_wrong_recipe_in_python_is_a_config_error_with_every_problem() -> None:
    values: dict[str, Any] = {
        "epoch": 3,
        "loss": {"temperature": 0, "tau": 1, 2: 3},
        "optim": DataRecipe(),
        "data": None,
        "seed": 10**5000,
    }
    with pytest.raises(ConfigError) as error:
        Recipe(**values)
    assert str(error.value).splitlines() == [
        "Recipe: seed must be a whole number from 0 to 4,294,967,295,"
        " not a whole number of 16,610 bits",
        "Recipe: loss.temperature must be a number above 0, not 0",
        'Recipe: unknown key "loss.tau"; did you mean "loss.temperature"?',
        'Recipe: unknown key "loss.2"',
        'Recipe: "optim" is a section: write keys below it,'
        " not DataRecipe(augment='auto', teacher_views=None, val_split=No…",
        'Recipe: "data" is a section: write keys below it',
        'Recipe: unknown key "epoch"; did you mean "epochs"?',
    ]


def test_a_section_alone_is_validated_too() -> None:
    with pytest.raises(ConfigError, match=r"^LossRecipe: temperature must be a number above 0"):
        LossRecipe(temperature=-1)
    with pytest.raises(ConfigError, match=r'unknown key "tau"; did you mean "temperature"\?$'):
        LossRecipe(tau=1)


def test_a_recipe_is_frozen_hashable_and_replaced_with_validation() -> None:
    first = Recipe(epochs=3)
    with pytest.raises(ValueError, match="frozen"):
        first.epochs = 4  # pyright: ignore[reportAttributeAccessIssue]  # that is the test
    second = first.replace(method="kd", loss={"temperature": 2})
    assert (second.epochs, second.method, second.loss.temperature) == (3, "kd", 2.0)
    assert first == copy.deepcopy(first) == Recipe(epochs=3)
    assert len({first, second, Recipe(epochs=3)}) == 2
    with pytest.raises(ConfigError, match=r"^Recipe: epochs must be"):
        first.replace(epochs=0)


def test_equal_recipes_have_equal_hashes_and_every_key_counts() -> None:
    base = Recipe()
    changed = [
        base.replace(seed=1),
        base.replace(loss={"temperature": 5}),
        base.replace(optim={"lr": 2e-3}),
        base.replace(data={"mean": [0.5], "std": [0.5]}),
    ]
    hashes = {recipe.hash() for recipe in [base, *changed]}
    assert len(hashes) == 5
    run = RunConfig(teacher="t.pt", student="s.pt", data_dir="digits", output="one")
    moved = run.replace(output="two", log_interval=7, data={"workers": 3}, optim={"skip_nan": 1})
    assert run.hash() == moved.hash() != run.replace(epochs=7).hash()
    assert all(len(digest) == 64 for digest in hashes)
    without_sign = LossRecipe(kd_weight=0)
    assert LossRecipe(kd_weight=-0.0).hash() == without_sign.hash()
    canonical = (
        '{"aa":null,"augment":"auto","classes":null,"crop_pct":null,"cutout":0,'
        '"data_device":"auto","input_size":null,"interpolation":null,"max_bad_images":0,'
        '"mean":null,"reprob":0.0,"scale":[0.08,1.0],"std":null,"teacher_views":null,'
        '"val_split":null,"workers":null}'
    )
    assert DataRecipe().hash() == hashlib.sha256(canonical.encode()).hexdigest()


def test_the_distance_is_one_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "installed", lambda kind: {"dkd": kind})
    assert LossRecipe(distance="dkd").distance == "dkd"
    assert LossRecipe(distance="kl").distance == "kl"
    with pytest.raises(
        ConfigError, match=r'distance: no distance is called "dkdd"; did you mean "dkd"\?'
    ):
        LossRecipe(distance="dkdd")


def test_every_key_says_what_it_is_and_every_number_where_it_comes_from() -> None:
    for kind in (RunConfig, *SECTIONS.values()):
        for name, field in kind.model_fields.items():
            assert field.description, name
            if isinstance(field.default, int | float | tuple):
                origins = ("ours", "Yu et al. 2024", "CIFAR protocol")
                assert any(origin in field.description for origin in origins), name


def test_the_defaults_are_those_of_the_method() -> None:
    loss = Recipe().loss
    assert (loss.ce_weight, loss.kd_weight, loss.cross_weight) == (1, 1, 1)
    assert (loss.temperature, loss.cross_start) == (4, 200 / 240)
    assert (loss.stones, loss.stone_warmup, loss.distance) == ("all", 0, "kl")


def test_the_recipe_imports_neither_torch_nor_plugins() -> None:
    code = "import sys, kdsurgeon.recipe as r; r.parse_set('a=1'); print(*sys.modules, sep='\\n')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ran.stdout.splitlines()
    assert "kdsurgeon.recipe" in loaded
    assert not {"torch", "numpy", "onnx", "kdsurgeon_plugins"} & set(loaded)


@pytest.mark.parametrize("method", ["ce", "kd", "block-kd"])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_nothing_is_idle_that_nobody_set(method: str, opt: str) -> None:
    assert not [*idle_settings(Recipe(method=method, optim={"opt": opt}))]


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({"method": "kd", "loss": {"stones": [1], "temperature": 2.0}}, ["loss.stones"]),
        ({"method": "kd", "blocks": 3}, ["blocks"]),
        ({"method": "ce", "loss": {"temperature": 2.0}}, ["loss.temperature"]),
        ({"loss": {"temperature": 2.0, "stones": [1]}, "blocks": 3}, []),
        ({"optim": {"model_ema_decay": 0.9}}, ["optim.model_ema_decay"]),
        ({"optim": {"model_ema": True, "model_ema_decay": 0.9}}, []),
        ({"optim": {"opt": "adamw", "momentum": 0.5}}, ["optim.momentum"]),
        ({"optim": {"opt": "sgd", "momentum": 0.5}}, []),
        ({"optim": {"decay_rate": 0.5}}, ["optim.decay_rate"]),
        ({"optim": {"sched": "constant", "min_lr": 1e-5}}, ["optim.min_lr"]),
        ({"optim": {"auto_batch_norm": True}}, ["optim.auto_batch_norm"]),
        ({"amp_dtype": "float16"}, ["amp_dtype"]),
        ({"data": {"augment": "none", "scale": [0.5, 1.0]}}, ["data.scale"]),
        ({"data": {"scale": [0.5, 1.0]}}, []),
    ],
)
def test_a_setting_on_which_nothing_depends_is_named(given: dict[str, Any], idle: list) -> None:
    settings = RunConfig(teacher="t.pt", student="s.pt", data_dir="digits", **given)
    assert [key for key, _ in idle_settings(settings)] == idle
