"""The doctor's look at NVIDIA GPUs: the cards, the driver under them, and whether torch's wheel fits that driver."""

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from raydream.console.finding import Finding

_LEAST_DRIVER = {"13": 580, "12": 525}  # of a CUDA release: docs.nvidia.com/deploy/cuda-compatibility
_OLDER_WHEEL, _NEWER_WHEEL = "cu126", "cu130"
_QUERY = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
_TIMEOUT_S = 30.0
_MPS_FOLDER = "/tmp/nvidia-mps"  # where its daemon listens unless CUDA_MPS_PIPE_DIRECTORY says another


def gpu_findings() -> list[Finding]:
    """Cards, driver and sharing; one line where there is no NVIDIA GPU."""
    import torch

    program, num_seen = shutil.which("nvidia-smi"), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if program is None and not num_seen:
        return [Finding("GPU", "none; the exhibit and embedded presets need none")]
    if program is None:
        names = [torch.cuda.get_device_name(index) for index in range(num_seen)]
        return [Finding("GPU", f"{_counted(names)}; nvidia-smi is not here to say which driver")]
    try:
        done = subprocess.run([program, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("GPU", f"nvidia-smi cannot be run: {error}", f"install the driver again, {_least()}")]
    cards = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 2]
    if done.returncode or not cards:
        said = (done.stdout + done.stderr).strip().splitlines()
        remedy = f"install or load the driver, {_least()}; in a container: start it with --gpus all"
        return [Finding("GPU", f"nvidia-smi finds none: {said[0] if said else 'it says nothing'}", remedy)]
    found = Finding("GPU", _counted([f"{name} ({_gib(memory)})" for name, memory, _ in cards]))
    driver = _driver(cards[0][2], len(cards), num_seen)
    return [found, driver, *([_wheel(num_seen), _mps()] if num_seen else [])]


def install_torch(wheel: str) -> str:
    """The command that puts a wheel of torch in the place of the one that is here."""
    return f"pip install --force-reinstall 'torch>=2.11,<2.14' --index-url https://download.pytorch.org/whl/{wheel}"


def _driver(version: str, num_cards: int, num_seen: int) -> Finding:
    """Whether torch can use the driver, and what to do where it does not."""
    import torch

    cuda, major = torch.version.cuda, int(version.split(".")[0])
    fitting = _NEWER_WHEEL if major >= _LEAST_DRIVER["13"] else _OLDER_WHEEL
    if cuda is None:
        return Finding("driver", f"{version}; torch {torch.__version__} is built for the CPU", install_torch(fitting))
    least = _LEAST_DRIVER.get(cuda.split(".")[0], 0)
    text = f"{version}; torch {torch.__version__}, built for CUDA {cuda}, wants {least} or newer"
    if major < least:
        older = f", or {install_torch(_OLDER_WHEEL)}" if major >= _LEAST_DRIVER["12"] else ""
        return Finding("driver", text, f"update the driver to {least} or newer{older}")
    if num_seen == num_cards:
        return Finding("driver", text)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    remedy = f"CUDA_VISIBLE_DEVICES={hidden} hides the others" if hidden is not None else "restart the machine"
    return Finding("driver", f"{text}; torch sees {num_seen} of {num_cards} cards", remedy)


def _wheel(num_seen: int) -> Finding:
    """Whether torch has code for every card: wheels for CUDA 13 have none for those before 7.5."""
    import torch

    built = torch.cuda.get_arch_list()
    capabilities = sorted({torch.cuda.get_device_capability(index) for index in range(num_seen)})
    strange = [f"{major}.{minor}" for major, minor in capabilities if not _runs_on(built, major, minor)]
    if strange:
        text = f"torch is built for {', '.join(built)}, not for cards of capability {', '.join(strange)}"
        return Finding("wheel", text, install_torch(_OLDER_WHEEL))
    return Finding("wheel", f"torch has code for capability {', '.join(f'{a}.{b}' for a, b in capabilities)}")


def _runs_on(built: list[str], major: int, minor: int) -> bool:
    """Machine code (sm_90) runs on cards of its own generation from its capability on, PTX (compute_90) on all later
    ones.
    """
    for name in built:
        kind, _, digits = name.partition("_")
        found = int(digits.rstrip("af")[:-1]), int(digits.rstrip("af")[-1])
        is_near = found[0] == major if kind == "sm" else True
        if is_near and found <= (major, minor):
            return True
    return False


def _mps() -> Finding:
    """Actors that share a GPU are processes of their own, which take turns unless NVIDIA's daemon joins them."""
    runs = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", _MPS_FOLDER)).is_dir()
    text = "runs: actors on one GPU compute at once" if runs else "not running: actors that share a GPU take turns"
    return Finding("MPS", text, "" if runs else "nvidia-cuda-mps-control -d (only where actors share GPUs)")


def _counted(names: list[str]) -> str:
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in Counter(names).items())


def _gib(mib: str) -> str:
    return f"{int(mib) / 1024:.0f} GiB" if mib.isdigit() else "memory unknown"  # "[N/A]" of cards that share the host's


def _least() -> str:
    return f"{_LEAST_DRIVER['13']} or newer for torch's {_NEWER_WHEEL} wheels"
