"""docs/deploying.md: its programs classify digits as the exported file does, without kdsurgeon."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import ExifTags, Image

from kdsurgeon.checkpoints import load_model, save_model
from kdsurgeon.cli import main
from kdsurgeon.data import Fit, load
from kdsurgeon.data.decoding import fit_into
from tests.browser import Browser, find_browser

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "deploying.md").read_text(encoding="utf-8")
PACKAGE = "onnxruntime-web@1.27.0"
INTEGRITY = (
    "ogDLsqIozHZwifPuN37OproAo0byX6t43/bP8GzeZWBWD6MOGExswFAx3up4NS/vvWBOg2u2PXomDt3rMmdQSg=="
)
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
PICTURES = 20


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def deployed(digit_models, tmp_path_factory):
    """A folder with student.onnx, a network that knows the digits, and pictures of some of them."""
    folder = tmp_path_factory.mktemp("deployed")
    model = str(digit_models / "teacher.pt")
    assert main(["export", model, str(folder / "student.onnx"), "--data-dir", "digits"]) == 0
    held_out = load("digits").val
    white = held_out.images[:PICTURES].astype(np.float64) * 255 / held_out.scale
    for index, pixels in enumerate(np.rint(white).astype(np.uint8)):
        Image.fromarray(pixels[..., 0]).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def answers(deployed, digit_models):
    """What the network itself says of the pictures, normalised as its file says: (n, classes)."""
    return answers_in(255, deployed, digit_models)


def answers_in(steps, deployed, digit_models):
    """The same of pictures of so many shades; the digits have 16, their files 255."""
    known = onnxruntime.InferenceSession(deployed / "student.onnx").get_modelmeta()
    mean, std = (json.loads(known.custom_metadata_map[name])[0] for name in ("mean", "std"))
    pictures = [np.asarray(Image.open(deployed / f"{n}.png")) for n in range(PICTURES)]
    shades = np.rint(np.stack(pictures).astype(np.float32) / 255 * steps) / steps
    images = torch.from_numpy(shades)[:, None]
    model = load_model(str(digit_models / "teacher.pt")).model.eval()
    with torch.inference_mode():
        return model((images - mean) / std).numpy()


def run_alone(program: str, folder: Path, *arguments: str) -> str:
    """What a Python program prints where neither torch nor kdsurgeon can be imported."""
    (folder / "program.py").write_text(program, encoding="utf-8")
    blocked = "import runpy, sys; sys.modules.update(torch=None, kdsurgeon=None, onnx=None); "
    code = f"{blocked}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, "program.py", *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_first(deployed: Path, file: str) -> list[list[str]]:
    names = [f"{number}.png" for number in range(PICTURES)]
    shown = run_alone(blocks("python")[0], deployed, file, *names)
    lines = [line.split() for line in shown.splitlines()]
    assert [line[0] for line in lines] == names
    return lines


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--softmax"], ("input", "probabilities")),
        (["--embed-preprocessing"], ("image", "logits")),
        (["--embed-preprocessing", "--softmax", "--static"], ("image", "probabilities")),
    ],
)
def test_the_same_program_serves_files_of_other_forms(flags, names, deployed, digit_models):
    model = str(digit_models / "teacher.pt")
    line = ["export", model, str(deployed / "other.onnx"), "--data-dir", "digits"]
    assert main([*line, *flags]) == 0
    session = onnxruntime.InferenceSession(deployed / "other.onnx")
    assert (session.get_inputs()[0].name, session.get_outputs()[0].name) == names
    lines = run_first(deployed, "other.onnx")
    answers = answers_in(16 if names[0] == "image" else 255, deployed, digit_models)
    assert [int(line[1]) for line in lines] == answers.argmax(1).tolist()
    if names[1] == "probabilities":
        shares = np.exp(answers - answers.max(1, keepdims=True))
        answers = shares / shares.sum(1, keepdims=True)
    assert [float(line[2]) for line in lines] == pytest.approx(answers.max(1).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "KeyError: 'mean'"), (1, "does not say class_names, mean, std: export with")],
)
def test_a_file_that_lacks_a_fact_is_told_apart(number, said, deployed, digit_models):
    model, bare = str(digit_models / "student.pt"), deployed / "bare.onnx"
    assert main(["export", model, str(bare), "--input-size", "1,8,8"]) == 0
    with pytest.raises(AssertionError, match=said):
        run_alone(blocks("python")[number], deployed, "bare.onnx", "0.png")


def test_a_few_lines_of_python_classify_as_the_network_does(deployed, answers):
    program = blocks("python")[0]
    assert len([line for line in program.splitlines() if line.strip()]) <= 20
    lines = run_first(deployed, "student.onnx")
    assert [int(line[1]) for line in lines] == answers.argmax(1).tolist()
    assert len({line[1] for line in lines}) > 4, "they are not all of one class"
    assert [float(line[2]) for line in lines] == pytest.approx(answers.max(1).tolist(), abs=1e-4)


def test_a_picture_is_turned_as_kdsurgeon_turns_it(deployed):
    upright = run_alone(blocks("python")[0], deployed, "student.onnx", "3.png")
    turned = Image.open(deployed / "3.png").transpose(Image.Transpose.ROTATE_90)
    marks = Image.Exif()
    marks[ExifTags.Base.Orientation] = 6  # to be shown turned back
    turned.save(deployed / "turned.png", exif=marks)
    found = run_alone(blocks("python")[0], deployed, "student.onnx", "turned.png")
    assert found.split()[1:] == upright.split()[1:]


def test_the_margin_that_evaluation_leaves_out_is_left_out(deployed, digit_models):
    model = load_model(str(digit_models / "teacher.pt"))
    card = replace(model.card, crop_pct=0.5, interpolation="bicubic")
    save_model(model.model, deployed / "margin.safetensors", card)
    line = ["export", str(deployed / "margin.safetensors"), str(deployed / "margin.onnx")]
    assert main([*line, "--data-dir", "digits"]) == 0
    framed = Image.new("L", (32, 40))
    framed.paste(Image.open(deployed / "3.png").resize((16, 16)), (8, 12))
    framed.save(deployed / "framed.png")
    pixels = np.empty((1, 8, 8, 1), np.uint8)
    fit_into(pixels[0], framed, Fit(0.5, "bicubic"))
    wanted = model.model.eval()(
        replace(load("digits").val, scale=255.0).normalise(pixels.transpose(0, 3, 1, 2))
    )
    _, name, score = run_alone(blocks("python")[0], deployed, "margin.onnx", "framed.png").split()
    assert (int(name), float(score)) == (wanted.argmax(), pytest.approx(wanted.max().item(), 1e-4))
    plain = run_alone(blocks("python")[0], deployed, "student.onnx", "framed.png").split()
    assert plain[2] != score, "the margin tells"


def test_the_facts_for_javascript_are_those_of_the_file(deployed):
    found = json.loads(run_alone(blocks("python")[1], deployed, "student.onnx"))
    assert found["input_size"] == [1, 8, 8] and found["class_names"] == list("0123456789")
    assert len(found["mean"]) == len(found["std"]) == 1


def unless_needed(reason: str) -> None:
    """Skips, but where a browser was put in place for this very test."""
    if os.environ.get("KDSURGEON_NEEDS_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def runtime():
    """The folder of onnxruntime-web's files, fetched once by npm and checked by their hash."""
    folder = ROOT / ".cache" / PACKAGE.replace("@", "-")
    if all((folder / name).is_file() for name in RUNTIME):
        return folder
    if shutil.which("npm") is None:
        unless_needed("there is no npm to fetch onnxruntime-web with")
    draft = folder.with_name(f".tmp-{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        done = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=draft, capture_output=True, text=True,
            check=False, timeout=45,
        )  # fmt: skip
        if done.returncode:
            unless_needed(f"npm cannot fetch {PACKAGE}: {done.stderr.strip()[:200]}")
        (package,) = draft.glob("*.tgz")
        digest = hashlib.sha512(package.read_bytes()).digest()
        assert base64.b64encode(digest).decode() == INTEGRITY
        with tarfile.open(package) as archive:
            for name in RUNTIME:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None
                (draft / name).write_bytes(member.read())
        package.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except subprocess.TimeoutExpired:
        unless_needed(f"npm did not fetch {PACKAGE} in time")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(deployed, runtime, tmp_path):
    """The address of a server on this machine for the page, the file and the runtime."""
    for source in (*deployed.glob("*.png"), deployed / "student.onnx"):
        shutil.copy(source, tmp_path)
    for name in RUNTIME:
        (tmp_path / name).symlink_to(runtime / name)
    (tmp_path / "student.json").write_text(run_alone(blocks("python")[1], tmp_path, "student.onnx"))
    (tmp_path / "classify.mjs").write_text(blocks("js")[0], encoding="utf-8")
    (tmp_path / "favicon.ico").touch()  # every browser asks for it
    (tmp_path / "index.html").write_text(blocks("html")[0], encoding="utf-8")
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_browser_classifies_as_the_network_does(served, answers, tmp_path):
    program = find_browser()
    if program is None:
        unless_needed("there is no Chromium to run onnxruntime-web in")
        return
    script = """(async () => {
        const { classify } = await import("./classify.mjs");
        const found = [];
        for (let n = 0; n < %d; n++) {
            const picture = await fetch(n + ".png");
            found.push(await classify(await picture.blob()));
        }
        return found;
    })()"""
    with Browser(program, tmp_path / "profile") as browser:
        browser.open(f"{served}/index.html", width=800)
        found = browser.value(script % PICTURES)
        others = [url for url in browser.requests() if not url.startswith(served)]
        complaints = browser.complaints()
    assert [int(each["name"]) for each in found] == answers.argmax(1).tolist()
    logits = np.array([each["logits"] for each in found])
    assert np.abs(logits - answers).max() <= 1e-4 * max(1.0, np.abs(answers).max())
    assert others == [] and complaints == []
