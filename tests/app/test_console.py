"""The console script: each name reaches its command with its words, help costs nothing, the doctor finds what lacks."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from raydream.console import doctor
from raydream.console.__main__ import COMMANDS, main
from raydream.console.doctor import Finding, examine

ROOT = Path(__file__).resolve().parents[2]
PLACES = {
    "run": "raydream.launch",
    "render": "raydream.views.command",
    "train-prior": "raydream.train.prior.job",
    "finetune-agp": "raydream.train.agp.job",
    "evaluate": "raydream.evaluate.command",
    "serve": "serve.__main__",
    "doctor": "raydream.console.doctor",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_hands_its_words_to_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[object] = []

    def seven(*arguments: object) -> int:
        heard.extend(arguments)
        return 7

    monkeypatch.setattr(importlib.import_module(PLACES[name]), "main", seven)
    monkeypatch.setattr(sys, "argv", ["raydream"])
    assert main([name, "--some", "--words"]) == 7
    assert heard[-1] == ["--some", "--words"]
    assert sys.argv[0] == f"raydream {name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_its_flags(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["raydream"])
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_jobs_and_console_are_one() -> None:
    """The files in jobs/ call the same functions; what they say in their first line is what the help says."""
    for name, job in {"run": "vsd_particles", "render": "render_ccm", "evaluate": "evaluate"}.items():
        text = (ROOT / "jobs" / f"{job}.py").read_text(encoding="utf-8")
        assert f"from {PLACES[name]} import main" in text


def test_help_comes_without_anything_heavy() -> None:
    program = (
        "import sys; from raydream.console.__main__ import main; code = main([]);"
        "print([name for name in ('torch', 'ray', 'numba', 'numpy', 'pyarrow') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_a_wrong_name_is_told_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalute"]) == 2
    assert "did you mean evaluate?" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("raydream ")


# --- doctor ---------------------------------------------------------------------------------------------------------


def finding(name: str) -> Finding:
    return next(found for found in examine() if found.name == name)


def test_nothing_is_broken_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["raydream"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("python", "torch", "kernels", "ffmpeg", "disk", "ray", "triton"))
    assert told.splitlines()[-1] == "all that every run needs is here"


def test_each_lack_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_film() -> str:
        raise RuntimeError("no ffmpeg")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", no_film)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_MIN_FREE_GIB", 10.0**9)
    monkeypatch.setenv("RAYDREAM_ASSETS", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found = {entry.name: entry for entry in examine()}
    assert all(found[name].remedy for name in ("ffmpeg", "disk", "assets", "ray", "triton", "pxr"))
    assert {name for name, entry in found.items() if entry.is_broken} == {"assets", "ray"}
    assert "RAYDREAM_ASSETS" in found["assets"].text
    assert "no Ray cluster answers there" in found["ray"].text


def test_a_damaged_install_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr("raydream.priors.find.EMBEDDED_AGP", tmp_path)
        assert finding("priors").is_broken
        monkeypatch.setattr(sys, "argv", ["raydream"])
        assert main(["doctor"]) == 1
        assert capsys.readouterr().out.splitlines()[-1] == "broken: priors"
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["not-there-at-all>=2", 'other; extra == "dev"'])
    (_, lacking) = examine()
    assert lacking.remedy == "pip install not-there-at-all"
    assert lacking.is_broken


def test_a_gpu_that_torch_does_not_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    assert "torch sees no GPU" in finding("GPU").text
