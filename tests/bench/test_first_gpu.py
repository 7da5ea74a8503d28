"""The script for the first minutes on a GPU, from its first line to its last, in little and on a CPU; on a machine that
has no more packages than such a one may have.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_views import small_config, small_views

from raydream.bench.first_gpu import main, table
from raydream.bench.gpu_child import WORK, run_part
from raydream.bench.parts import Bench
from raydream.bench.plan import PARTS, SECONDS, WHOLE_MINUTES, read_lines
from raydream.config import strict_json
from raydream.views.view_set import pack

ROOT = Path(__file__).parents[2]
AWAY = (
    "pyarrow", "trimesh", "xatlas", "skimage", "fast_simplification", "ray", "numba", "scipy", "imageio_ffmpeg", "rich",
    "deepspeed", "sqlalchemy", "fastapi",
)  # fmt: skip
SITE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None: (
    None if name.split(".")[0] in {AWAY} else find(name, path, target)
))
"""


def without_packages(folder: Path) -> dict[str, str]:
    """An environment whose Pythons find none of ``AWAY``."""
    (folder / "sitecustomize.py").write_text(SITE)
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


def test_a_step_needs_no_package_of_exports_stores_and_clusters(tmp_path: Path) -> None:
    code = "import raydream.distill.particle, importlib.util as util; assert not util.find_spec('pyarrow')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=without_packages(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_whole_script_in_little(tmp_path: Path) -> None:
    out, views, settings = tmp_path / "out", tmp_path / "views.zip", tmp_path / "settings.json"
    pack(small_views(), views)
    settings.write_text(strict_json.dumps(small_config(2, 2)))
    words = ["--small", "--out", str(out), "--minutes", "60"]
    words += ["--prior-views", str(views), "--prior-settings", str(settings)]
    command = [sys.executable, "jobs/first_gpu.py", *words]
    environment = without_packages(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = {line["part"]: line for line in read_lines(out)}
    assert tuple(lines) == PARTS
    assert not any(line["error"] for line in lines.values())
    assert "skipped" in lines["tests"]["found"]["said"]  # all of them want a GPU
    skipped = {part for part, line in lines.items() if "skipped" in line["found"]}
    assert skipped == {"agp"}  # nothing to train on
    assert lines["rates"]["found"]["bfloat16"]["tflops"] > 0
    assert lines["unet"]["found"]["fit, B 2"]["share"] > 0
    assert lines["score"]["found"]["n 2"]["guide_ms"] > 0
    assert lines["gradients"]["found"]["bfloat16, loss times 1"]["median"] > 0.99
    assert lines["composition"]["found"]["times"] > 0
    assert (out / "prior/prior/model_index.json").is_file()
    assert "| unet | frozen, B 1 |" in table(list(lines.values()))


def test_the_parts_and_their_times_are_told_once() -> None:
    assert tuple(WORK) == tuple(SECONDS) == PARTS
    assert sum(SECONDS.values()) == 60 * WHOLE_MINUTES


def test_a_part_that_fails_or_takes_too_long_leaves_what_it_found(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(bench: Bench, found: dict[str, object]) -> None:
        found["begun"] = True
        while True:
            pass

    def broken(bench: Bench, found: dict[str, object]) -> None:
        found["half"] = 1
        raise RuntimeError("planted")

    monkeypatch.setitem(WORK, "kernels", endless)
    monkeypatch.setitem(WORK, "vae", broken)
    assert run_part("kernels", bench, tmp_path)
    assert run_part("vae", bench, tmp_path)
    first, second = read_lines(tmp_path)
    assert first["found"] == {"begun": True}
    assert "time" in first["error"]
    assert second["found"] == {"half": 1}
    assert second["error"] == "RuntimeError: planted"


@pytest.fixture
def bench() -> Bench:
    import torch

    return Bench(torch.device("cpu"), is_small=True, seconds=0.2)


def test_a_process_that_dies_costs_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after it is run in a new process."""
    fake = tmp_path / "raydream_fake.py"
    fake.write_text(
        "import json, os, sys\n"
        "parts = sys.argv[len(sys.argv) - sys.argv[::-1].index('--parts') :]\n"  # the last say so
        f"out = open({str(tmp_path / 'first_gpu.jsonl')!r}, 'a')\n"
        "for part in parts:\n"
        "    if part == 'vae': os.abort()\n"
        "    print(json.dumps({'part': part, 'seconds': 1, 'error': None, 'found': {}}), file=out, flush=True)\n"
    )
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: real([sys.executable, str(fake), *command[3:]]))
    assert main("", ["--small", "--out", str(tmp_path), "--parts", "card", "vae", "unet"]) == 1
    assert [(line["part"], line["error"]) for line in read_lines(tmp_path)] == [
        ("card", None),
        ("vae", "ended its process with code -6"),
        ("unet", None),
    ]


def test_the_table_is_headed_by_the_device() -> None:
    lines = [{"part": "card", "seconds": 0.1, "error": None, "found": {"device": "NVIDIA H100"}}]
    lines += [{"part": "rates", "seconds": 1, "error": "cut", "found": {"bfloat16": {"tflops": 701.25, "ms": 1.5}}}]
    text = table(json.loads(json.dumps(lines)))
    assert text.startswith("Measured on NVIDIA H100:")
    assert "| rates | bfloat16 | tflops 701.2, ms 1.5 |" in text
    assert "| rates | error | cut |" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--minutes", "-1", "--small"], "--minutes: must be above 0"),
        (["--table"], "has no first_gpu.jsonl"),
        ([], "torch sees no GPU"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main("", [*words, "--out", str(tmp_path / "none")])
    assert told in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
