"""Whole runs and folders of meshes, from files to evaluation.json, with what is missing or broken in them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from tiny_clip import make_tiny_clip
from tiny_prior import make_tiny_prior

from raydream.assets.procedural import procedural_asset
from raydream.config import strict_json
from raydream.config.evaluate import EvaluateConfig
from raydream.config.presets import make_preset
from raydream.config.prior import ExhibitConfig
from raydream.evaluate.command import main
from raydream.evaluate.facing import Facing, JudgeCheck
from raydream.evaluate.results import Evaluation, ParticleEvaluation, Recognition, comparison_table
from raydream.evaluate.run import EVALUATION, SHEET, evaluate_run
from raydream.store.faults import StorageError
from raydream.store.run_folder import MESH, RunFolder, particle_file

pytestmark = pytest.mark.slow


def glb(noun: str, variant: int) -> bytes:
    """A procedural asset as another program writes it: vertex colours, everything in one file."""
    asset = procedural_asset(noun, variant)
    linear = ((asset.corner_colors + 0.055) / 1.055).clamp_min(0) ** 2.4
    colors = (linear.reshape(-1, 3) * 255).round().byte().numpy()
    mesh = trimesh.Trimesh(
        asset.vertices[asset.faces].reshape(-1, 3).numpy(),
        np.arange(3 * asset.num_faces).reshape(-1, 3),
        vertex_colors=np.column_stack([colors, np.full(len(colors), 255)]),
        process=False,
    )
    return trimesh.Scene(mesh).export(file_type="glb")


def new_run(folder: Path, meshes: list[bytes | None]) -> Path:
    config = replace(make_preset("exhibit", 10), n=len(meshes))
    exhibit = replace(config.prior, exhibit=ExhibitConfig(assets="procedural", num_modes=4))
    run = RunFolder.create(str(folder), strict_json.dumps(replace(config, prior=exhibit)))
    for index, data in enumerate(meshes):
        if data is not None:
            run.write_bytes(particle_file(index, MESH), data)
    return folder


def test_a_run_of_an_exhibit(tmp_path):
    """A chair is recognised; a car is not, nor is what has no mesh or a broken one."""
    run = new_run(tmp_path / "run", [glb("chair", 0), glb("car", 0), None, b"glTF but broken"])
    evaluation = evaluate_run(str(run), EvaluateConfig())
    chair, car, absent, broken = evaluation.particles
    assert [r.judge for r in chair.recognitions] == ["nearest"]
    assert (chair.recognitions[0].right, chair.recognitions[0].rank) == (True, 1)
    assert chair.recognitions[0].right_views > 0.9
    assert not car.recognitions[0].right
    assert (absent.note, absent.mesh) == ("no mesh was exported", None)
    assert broken.note
    assert broken.recognitions == ()
    summary = evaluation.summary()
    assert summary["r_precision/nearest"] == 0.25
    assert summary["particles"] == 4
    assert summary["diversity/picture"] > 0.3
    assert summary["ccm_agreement"] > 0.95
    written = json.loads((run / EVALUATION).read_text())
    assert written["summary"] == pytest.approx(summary)
    assert written["particles"][0]["mesh"]["faces"] == procedural_asset("chair", 0).num_faces
    assert Image.open(io.BytesIO((run / SHEET).read_bytes())).width > 256


def test_a_folder_of_meshes_with_a_prior_and_a_clip(tmp_path, capsys):
    """Random weights judge at random; what is checked is that every judge is asked, and about the same candidates."""
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    for variant in range(2):
        (meshes / f"chair-{variant}.glb").write_bytes(glb("chair", variant))
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("a car\n\na tree\na cup\n")
    given = {
        "--run": meshes,
        "--prompt": "a chair",
        "--captions": wrong,
        "--assets": "procedural",
        "--prior": make_tiny_prior(tmp_path / "prior"),
        "--clip": make_tiny_clip(tmp_path / "clip"),
    }
    flags = [text for flag, value in given.items() for text in (flag, str(value))]
    code = main("test", [*flags, "--set", "num_noises=1", "--set", "timesteps=[500]"])
    assert code == 0
    assert "chair-1" in capsys.readouterr().out
    written = json.loads((meshes / EVALUATION).read_text())
    assert written["candidates"] == ["a chair", "a car", "a tree", "a cup"]
    assert [r["judge"] for r in written["particles"][0]["recognitions"]] == ["clip", "prior"]
    assert [d["kind"] for d in written["diversity"]] == ["picture", "clip", "prior"]
    assert {"consistency/prior", "janus/clip"} <= written["summary"].keys()
    for particle in written["particles"]:
        for recognition in particle["recognitions"]:
            assert recognition["right"] == (recognition["rank"] == 1) == (recognition["best"] == "a chair")


def test_bad_input_is_named_before_anything_loads(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (["--run", str(tmp_path / "nothing")], "run: "),
        (["--run", str(empty)], "run: "),
        (["--run", str(empty), "--set", "judged_views=5"], "judged_views: "),
        (["--run", str(empty), "--captions", str(tmp_path / "none.txt")], "captions: "),
        (["--run", str(new_run(tmp_path / "run", [None])), "--prior", str(empty)], "prior: "),
    ]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.glb").write_bytes(b"")
    cases.append((["--run", str(tmp_path / "one")], "prompt: "))
    for arguments, start in cases:
        assert main("test", arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {start}")


def test_a_storage_that_is_away_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    def away(uri: str, settings: EvaluateConfig) -> Evaluation:
        raise StorageError(f"{uri}: it does not answer")

    monkeypatch.setattr("raydream.evaluate.run.evaluate_run", away)
    assert main("test", ["--run", "s3://bucket/run"]) == 1
    assert capsys.readouterr().err == "error: s3://bucket/run: it does not answer; try again when the storage answers\n"


def evaluation_of(label: str, ranks: list[int], verdicts: list[str], check: JudgeCheck | None = None) -> Evaluation:
    particles = tuple(
        ParticleEvaluation(
            str(index),
            "",
            (Recognition("prior", rank == 1, rank, "a chair", 1.0, 10),),
            (Facing("references", verdict, 0.0, 1.0, -1.0, 0.0),),  # type: ignore[arg-type]
        )
        for index, (rank, verdict) in enumerate(zip(ranks, verdicts))
    )
    return Evaluation("", label, "a chair", "vsd", 0, (), particles, (), (check,) if check else ())


def test_runs_are_compared_by_means_and_deviations():
    runs = [
        evaluation_of("vsd", [1, 1], ["consistent", "janus"]),
        evaluation_of("sds", [1, 2], ["janus", "janus"]),
        evaluation_of("vsd", [1, 3], ["consistent", "consistent"]),
    ]
    lines = comparison_table(runs).splitlines()
    header, _, vsd, sds = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header[:5] == ["", "runs", "particles", "r_precision/prior", "consistency/references"]
    assert vsd[:5] == ["vsd", "2", "4", "0.750 ± 0.354", "0.750 ± 0.354"]
    assert sds[:5] == ["sds", "1", "2", "0.500", "0.000"]


def test_only_a_judge_that_knows_the_truth_speaks_for_a_run():
    good, bad = JudgeCheck("references", 9, 0.9, 0.9, 0.8), JudgeCheck("references", 9, 1.0, 0.2, 0.2)
    known = evaluation_of("a", [1, 1], ["consistent", "janus"], good).summary()
    assert (known["consistency"], known["janus"]) == (0.5, 0.5)
    unknown = evaluation_of("a", [1, 1], ["consistent", "janus"], bad).summary()
    assert "consistency" not in unknown
    assert unknown["consistency/references"] == 0.5


def test_settings_are_checked_without_torch():
    for field, value in (("num_candidates", 1), ("image_px", 8), ("timesteps", ()), ("background", 2.0)):
        with pytest.raises(ValueError, match=field):
            replace(EvaluateConfig(), **{field: value})
    assert torch.get_num_threads() == 1
