"""What a person types: bad input is one clear line and leaves nothing behind, a stopped run says how to go on."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import SMALL, assert_same_end, new_run, small_config, train

from raydream.cli import build_parser
from raydream.config import strict_json
from raydream.config.run import RunConfig
from raydream.launch import main
from raydream.store.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SMALL_WORDS = [word for s in SMALL if not s.startswith(("prompt=", "n=")) for word in ("--set", s)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a request is refused with."""
    assert main("test", words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stpes", "3"], "--stpes: unknown flag; did you mean '--steps'?"),
        (["--n-particles=3"], "--n-particles: unknown flag; "),
        (["--zzz"], "--zzz: unknown flag; see --help"),
        (["a chair"], "'a chair': belongs to no flag"),
        (["--n", "many"], "--n: invalid int value: 'many'"),
        (["--n"], "--n: expected one argument"),
        (["--method", "gan"], "--method: unknown 'gan'; choose one of vsd, sds"),
        (["--method", "vds"], "--method: unknown 'vds'; did you mean 'vsd'?"),
        (["--runtime", "locale"], "--runtime: unknown 'locale'; did you mean 'local'?"),
        (["--set", "stages.0.scene.background=netwrok"], "'constant', got 'netwrok'; did you mean 'network'?"),
        (["--n", "0"], "n: must be at least 1 particle, got 0"),
        (["--n", "-3"], "n: must be at least 1 particle, got -3"),
        (["--steps", "0"], "steps: must be at least 1, got 0"),
        (["--seed", "-1"], "seed: must be a non-negative"),
        (["--preset", "exhibition"], "preset: unknown 'exhibition'; did you mean 'exhibit'?"),
        (["--prompt", ""], "prompt: must not be empty"),
        (["--prompt", " \n\t"], "prompt: must not be empty"),
        (["--prompt", "chair " * 2000], "prompt: must be at most 1000 characters, got 12000"),
        (["--negative-prompt", "x" * 10_000], "negative_prompt: must be at most 1000 characters"),
        (["--set", "stages.0.branches.0.scael=3"], "stages.0.branches.0.scael: unknown field; did you mean 'scale'?"),
        (
            ["--set", "method=sds"],
            "method: no setting of this release; it is called stages.0.branches.0.method, or --me",
        ),
        (
            ["--method", "csd", "--set", "prior.exhibit.assets=procedural"],
            "stages.0.branches.0.method: must not be csd",
        ),
        (["--set", "n=two"], "n: must be of type int, got 'two'"),
        (["--set", "n"], "set: need FIELD=VALUE, got 'n'"),
        (["--set", "stages.0.camera.image_px=NaN"], "stages.0.camera.image_px: must be a finite number"),
        (["--set", "stages.0.camera.image_px=0"], "stages.0.camera.image_px: must be at least 4 everywhere"),
        (["--prior", "no/such/folder"], "prior: 'no/such/folder' is neither a folder nor a known name"),
        (["--preset", "diffusers"], "prior: the preset needs one; give --prior FOLDER"),
        (["--preset", "sd21"], "prior: 'sd21-base' is not on this machine; fetch it with `hf download"),
        (["--prompt", "a zeppelin", "--set", "prior.exhibit.assets=procedural"], "prompt: 'a zeppelin' names nothing"),
        (["--set", "prior.exhibit.assets=nowhere"], "nowhere"),
        (["--set", "stages.0.branches.0.scale=7.5"], "scale: "),
        (["--negative-prompt", "ugly"], "negative_prompt: "),
        (["--preset", "embedded", "--prompt", "a red chair " * 20], "prompt: 41 tokens too long for this prior, which"),
        (["--preset", "embedded", "--negative-prompt", "red " * 40], "negative_prompt: 18 tokens too long"),
        (["--resume", "no/such/run"], "resume: 'no/such/run' is not a run folder"),
        (["--out", "", "--resume", "x"], "out: cannot be given with --resume"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, says, capsys, in_empty_folder) -> None:
    assert says in refused(capsys, *words)
    assert not list(in_empty_folder.iterdir())


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no model_index.json; it must be a folder in the diffusers layout"),
        ({"model_index.json": "{"}, "is not valid JSON"),
        ({"model_index.json": '{"_class_name": "StableDiffusionXLPipeline"}'}, "is a StableDiffusionXLPipeline; only"),
        ({"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}, "has no unet/"),
    ],
)
def test_a_prior_of_the_wrong_kind_is_refused(files, says, capsys, in_empty_folder, tmp_path) -> None:
    folder = tmp_path / "prior"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    line = refused(capsys, "--prior", str(folder))
    assert line.startswith(f"error: prior: {folder}")
    assert says in line
    assert not list(in_empty_folder.iterdir())


def test_an_output_that_cannot_be_is_refused(capsys, tmp_path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "thesis.txt").write_text("three years of work")
    file.write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    words = ["--set", "prior.exhibit.assets=procedural", "--out"]
    assert "out: cannot start a run in" in refused(capsys, *words, str(file))
    assert "out: cannot start a run in" in refused(capsys, *words, str(file / "below"))
    assert "exists and is not empty" in refused(capsys, *words, str(full))
    assert "out: cannot start a run in" in refused(capsys, *words, "gopher://host/run")
    assert sorted(tmp_path.rglob("*")) == before
    assert (full / "thesis.txt").read_text() == "three years of work"
    assert file.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_refused(capsys, tmp_path) -> None:
    tmp_path.chmod(0o500)
    words = ["--set", "prior.exhibit.assets=procedural", "--out", str(tmp_path / "run")]
    assert "out: cannot start a run in" in refused(capsys, *words)


@pytest.fixture
def saved(tmp_path: Path) -> RunFolder:
    return new_run(tmp_path / "saved", small_config())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "9"], "steps: cannot be given with --resume"),
        (["--preset", "sd21"], "preset: cannot be given with --resume"),
        (["--n", "4"], "resume: n would differ"),
        (["--prompt", "a table", "--seed", "3"], "resume: prompt, seed would differ"),
        (
            ["--set", "stages.0.camera.distance=[2, 3]"],
            "resume: stages.0.camera.distance.0, stages.0.camera.distance.1",
        ),
        (["--set", "stages.0.branches.0.t_max=0.5"], "resume: stages.0.branches.0.t_max.value would differ"),
        (["--prior", "elsewhere"], "resume: prior.kind, prior.source would differ"),
        (["--set", "n=0"], "n: must be at least 1"),
    ],
)
def test_a_run_does_not_go_on_as_another(words, says, capsys, saved) -> None:
    before = {path: path.read_bytes() for path in Path(saved.uri).rglob("*") if path.is_file()}
    assert says in refused(capsys, "--resume", saved.uri, *words)
    assert {path: path.read_bytes() for path in Path(saved.uri).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"prompt": "a chair", "preset": "exhibit", "colour": "red"}'])
def test_a_folder_with_a_damaged_config_is_refused(text, capsys, saved) -> None:
    (Path(saved.uri) / "config.json").write_text(text)
    refused(capsys, "--resume", saved.uri)


def test_a_run_of_an_earlier_release_is_refused_and_left_alone(capsys, saved) -> None:
    """Its settings have a method of the whole run, and its checkpoints have another form."""
    config = Path(saved.uri) / "config.json"
    document = json.loads(config.read_text())
    document["stages"][0]["guidance"] = document["stages"][0].pop("branches")[0]
    config.write_text(json.dumps(document | {"method": "vsd"}))
    before = config.read_bytes()
    line = refused(capsys, "--resume", saved.uri)
    assert line.startswith(f"error: resume: {saved.uri!r} was begun by an earlier release")
    assert "start a new run, or go on with the release that began it" in line
    assert config.read_bytes() == before


def test_a_run_in_use_is_refused(capsys, saved) -> None:
    with saved.lock():
        assert f"resume: {saved.uri} is in use by another driver: pid {os.getpid()}" in refused(
            capsys, "--resume", saved.uri
        )


def test_where_a_run_goes_on_may_change(capsys, saved) -> None:
    words = ["--runtime", "ray", "--set", "cluster.max_restarts=99", "--set", "cluster.gpus_per_particle=0.5"]
    assert main("test", ["--resume", saved.uri, "--dry-run", *words]) == 0
    config = strict_json.loads(RunConfig, capsys.readouterr().out)
    assert (config.cluster.runtime, config.cluster.max_restarts, config.n) == ("ray", 99, 3)


def test_help_says_a_word_about_every_flag(capsys) -> None:
    parser = build_parser("the description")
    with pytest.raises(SystemExit) as leaving:
        main("the description", ["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {"--prompt", "--n", "--resume", "--set", "--dry-run", "--out", "--help"} <= flags
    assert all(flag in text for flag in flags)
    assert all(action.help for action in parser._actions)
    assert "the description" in text
    assert "ray job submit" in text


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


def test_a_dry_run_prints_the_settings_and_loads_no_torch(in_empty_folder) -> None:
    code = (
        "import sys\nfrom raydream.launch import main\n"
        "assert main('test', ['--dry-run', '--n', '3', '--prompt', 'a <b>', '--set', 'output.texture_px=64']) == 0\n"
        "assert not {'torch', 'ray', 'diffusers'} & set(sys.modules)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    config = strict_json.loads(RunConfig, done.stdout)
    assert (config.n, config.prompt, config.output.texture_px) == (3, "a <b>", 64)
    assert not list(in_empty_folder.iterdir())


def test_settings_can_be_checked_where_there_is_no_torch() -> None:
    code = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "ray", "numpy", "pyarrow", "diffusers"}:
            raise ImportError(name)
sys.meta_path.insert(0, NoTorch())
from raydream import schedule
from raydream.config import presets, run, strict_json
made = presets.make_preset("sd21", 100)
assert strict_json.loads(run.RunConfig, strict_json.dumps(made)) == made
try:
    import torch
except ImportError:
    print("no torch")
"""
    done = run_python(code)
    assert done.stdout == "no torch\n", done.stderr


@pytest.mark.parametrize("prompt", ["../../etc/passwd chair", "<script>alert(1)</script> a chair", "/abs chair\x07"])
def test_a_prompt_is_never_a_path_nor_markup(prompt, capsys, in_empty_folder) -> None:
    words = [*SMALL_WORDS, "--method", "sds", "--n", "1", "--steps", "1", "--prompt", prompt, "--out", "run"]
    assert main("test", words) == 0
    assert [path.name for path in in_empty_folder.iterdir()] == ["run"]
    run = RunFolder.open("run")
    assert json.loads(run.read_config())["prompt"] == prompt
    assert "<script>alert" not in run.read_bytes("report.html").decode()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_can_be_resumed(number, capfd, tmp_path) -> None:
    steps, folder = 60, tmp_path / "a run"
    words = [*SMALL_WORDS, "--method", "sds", "--n", "2", "--steps", str(steps), "--out", str(folder)]
    before = signal.getsignal(number)

    def interrupt() -> None:
        metrics = folder / "metrics.jsonl"
        while not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=interrupt)
    sender.start()
    code = main("test", words)
    sender.join()
    told = capfd.readouterr().err
    assert code == 130, told
    assert signal.getsignal(number) is before
    run = RunFolder.open(str(folder))
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert 0 < checkpoint.step < steps
    assert re.search(
        rf"stopped at step {checkpoint.step}\nresume with: \S*python\S* jobs/vsd_particles.py --resume '{folder}'", told
    )

    assert main("test", ["--resume", str(folder)]) == 0
    config = strict_json.loads(RunConfig, run.read_config())
    whole = new_run(tmp_path / "whole", config)
    train(whole, config)
    assert_same_end(RunFolder.open(str(folder)), whole)


def test_two_signals_leave_at_once(capfd, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"

    def interrupted_twice(self: object, step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr("raydream.distill.loop.RunLoop.start", interrupted_twice)
    assert main("test", [*SMALL_WORDS, "--out", str(folder)]) == 130
    told = capfd.readouterr().err
    assert re.search(rf"left at once\nresume with: \S*python\S* jobs/vsd_particles.py --resume {folder}", told)


def test_a_run_that_fails_says_so_and_how_to_go_on(capfd, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    words = [*SMALL_WORDS, "--n", "2", "--steps", "1", "--set", "cluster.max_restarts=0", "--out", str(folder)]

    def breaks(self: object, *arguments: object) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("raydream.distill.particle.Particle.save", breaks)
    assert main("test", words) == 1
    told = capfd.readouterr().err
    assert "particle 0 raised RuntimeError" in told
    assert "the disk is on fire" in told
    assert f" jobs/vsd_particles.py --resume {folder}" in told
    monkeypatch.undo()
    assert main("test", ["--resume", str(folder)]) == 0


# --- exported again ------------------------------------------------------------------------------------------------

EXPORT = [*SMALL_WORDS, "--method", "sds", "--n", "1", "--steps", "1", "--set", "output.mesh_resolution=16"]


def artefacts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "particles/000").iterdir()}


def test_a_finished_run_is_exported_again_without_training(capfd, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    assert main("test", [*EXPORT, "--set", "output.mesh_threshold=1e9", "--out", str(folder)]) == 0
    assert "particle 0: no surface: the densest point" in capfd.readouterr().err
    assert set(artefacts(folder)) == {"turntable.mp4", "preview.png"}
    trained = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}

    monkeypatch.setattr("raydream.distill.particle.Particle.render", None)  # nobody trains
    again = ["--resume", str(folder), "--set", "output.mesh_threshold=5", "--set", "output.texture_px=32"]
    again += ["--faces", "300", "--lods", "100", "50", "--formats", "stl"]
    assert main("test", again) == 0, capfd.readouterr().err
    first = artefacts(folder)
    made = {"mesh.glb", "mesh_lod1.glb", "mesh_lod2.glb", "mesh.stl", "turntable.mp4", "preview.png"}
    assert set(first) == made
    assert {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()} == trained
    saved = strict_json.loads(RunConfig, RunFolder.open(str(folder)).read_config()).output
    assert (saved.mesh_threshold, saved.texture_px) == (5, 32)
    assert (saved.mesh_max_faces, saved.mesh_lods, saved.mesh_formats) == (300, (100, 50), ("stl",))
    assert "output.mesh_threshold" in (folder / "report.html").read_text()

    # what there is stays where the new settings give less
    assert main("test", ["--resume", str(folder), "--set", "output.mesh_threshold=1e9"]) == 0
    assert "particle 0: its earlier export was kept" in capfd.readouterr().err
    assert artefacts(folder) == first


def test_a_format_that_needs_a_package_is_refused_at_once(capfd, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("raydream.runs.find_spec", lambda name: None)
    assert main("test", [*EXPORT, "--formats", "usdz", "--out", str(tmp_path / "run")]) == 2
    assert "output.mesh_formats: usdz needs usd-core; pip install 'raydream[usd]'" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_export_that_breaks_leaves_the_old_one(tmp_path, monkeypatch, capfd) -> None:
    folder = tmp_path / "run"
    assert main("test", [*EXPORT, "--out", str(folder)]) == 0
    before = artefacts(folder)

    def breaks(*_arguments: object) -> bytes:
        raise ValueError("no picture today")

    with monkeypatch.context() as patch:
        patch.setattr("raydream.distill.artefacts.write_png", breaks)
        assert main("test", ["--resume", str(folder), "--set", "output.turntable_frames=2"]) == 1
    assert artefacts(folder) == before

    def without_ffmpeg() -> str:
        raise RuntimeError("no ffmpeg here")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", without_ffmpeg)
    assert main("test", ["--resume", str(folder), "--set", "output.mesh_max_faces=100"]) == 0
    assert "particle 0: no new film: no ffmpeg here" in capfd.readouterr().err
    after = artefacts(folder)
    assert after["turntable.mp4"] == before["turntable.mp4"]
    assert after["mesh.glb"] != before["mesh.glb"]


def test_a_run_of_old_settings_that_no_export_can_use_is_put_right(saved, capsys) -> None:
    raw = json.loads(saved.read_config())
    raw["output"] |= {"mesh_max_faces": 0}
    saved.write_text("config.json", json.dumps(raw))
    assert "output.mesh_max_faces: must be 16.." in refused(capsys, "--resume", saved.uri)
    assert main("test", ["--resume", saved.uri, "--set", "output.mesh_max_faces=300", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["output"]["mesh_max_faces"] == 300
    assert "output.meshes: unknown field" in refused(
        capsys, "--resume", saved.uri, "--set", "output.mesh_max_faces=300", "--set", "output.meshes=1"
    )
    assert "output.out would differ" in refused(
        capsys, "--resume", saved.uri, "--set", "output.mesh_max_faces=300", "--set", "output.out=elsewhere"
    )
