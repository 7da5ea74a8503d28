"""A full disk, and readers who went away: nothing hangs, what is for people is told once and left out, and where the
run itself cannot be written it ends at its last checkpoint, says so, and goes on from there once there is room.
"""

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from event_files import events
from small_runs import SMALL, Watch, assert_same_end, new_run, small_config, train

from raydream.cluster.runtime import LocalRuntime
from raydream.distill.loop import RunFailed
from raydream.distill.pipeline import run_pipeline
from raydream.distill.watch import RunWatch
from raydream.launch import main
from raydream.report.progress import Progress
from raydream.report.tensorboard import TensorboardLog
from raydream.report.terminal import LastingStream
from raydream.store.run_folder import RunFolder
from raydream.store.storage import LocalFiles, LocalLog

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
WORDS = [word for s in SMALL if not s.startswith(("prompt=", "n=")) for word in ("--set", s)]
WORDS += ["--set", "output.preview_every=1", "--set", "output.mesh_resolution=16"]
WORDS += ["--method", "sds", "--n", "2", "--steps", str(STEPS)]


class SmallDisk:
    """Writes fail as on a full disk, from the ``skip``-th on, where ``is_full`` says so of a file's name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_full: Callable[[str], bool], skip: int = 0) -> None:
        self.is_full, self.skip, self.num_failed = is_full, skip, 0
        write, append = LocalFiles.write, LocalLog.append

        def checked_write(files: LocalFiles, name: str, data: bytes) -> None:
            self.check(name)
            write(files, name, data)

        def checked_append(log: LocalLog, data: bytes) -> None:
            self.check(log.name)
            append(log, data)

        monkeypatch.setattr(LocalFiles, "write", checked_write)
        monkeypatch.setattr(LocalLog, "append", checked_append)

    def check(self, name: str) -> None:
        if self.is_full(name):
            self.skip -= 1
            if self.skip < 0:
                self.num_failed += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# What a run cannot do without. The last one is written when all steps are done.
@pytest.mark.parametrize(
    ("is_full", "skip"),
    [
        pytest.param(lambda name: name == "versions.json", 0, id="versions"),
        pytest.param(lambda name: name == "metrics.jsonl", 3, id="metrics"),
        pytest.param(lambda name: "step_00000006/particle_001" in name, 0, id="particle"),
        pytest.param(lambda name: "step_00000006/score" in name, 0, id="score"),
        pytest.param(lambda name: "step_00000006/manifest" in name, 0, id="manifest"),
        pytest.param(lambda name: name.endswith("001/mesh.glb"), 0, id="mesh"),
        pytest.param(lambda name: name.endswith("000/turntable.mp4"), 0, id="film"),
        pytest.param(lambda name: name == "report.html", 0, id="report"),
    ],
)
def test_a_run_that_cannot_be_written_ends_and_can_be_resumed(is_full, skip, tmp_path, monkeypatch, capfd) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        disk = SmallDisk(patch, is_full, skip)
        assert main("test", [*WORDS, "--out", str(folder)]) == 1
        assert disk.num_failed == 1, "tried again what cannot change"
    told = capfd.readouterr().err
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert f" jobs/vsd_particles.py --resume {folder}" in told
    assert "Traceback" not in told
    steps = {name.split("/")[1] for name in RunFolder.open(str(folder)).list_files("checkpoints")}
    assert all((folder / "checkpoints" / step / "manifest.json").is_file() for step in steps), "half a checkpoint stays"

    assert main("test", ["--resume", str(folder)]) == 0
    config = small_config(
        "prompt=a chair", "n=2", "stages.0.branches.0.method=sds", "output.preview_every=1", steps=STEPS
    )
    whole = new_run(tmp_path / "whole", config)
    train(whole, config)
    assert_same_end(RunFolder.open(str(folder)), whole)
    assert "report.html" in os.listdir(folder)


def test_what_is_for_people_is_told_once_and_left_out(tmp_path, monkeypatch, capfd) -> None:
    config = small_config("n=2", "stages.0.branches.0.method=sds", "output.preview_every=1", steps=STEPS)
    run = new_run(tmp_path / "run", config)
    disk = SmallDisk(monkeypatch, lambda name: name.startswith(("previews/", "tensorboard/")))
    monkeypatch.setattr(TensorboardLog, "_append", lambda log, step, values: disk.check("tensorboard/events"))
    watch = RunWatch(run, Progress(STEPS), TensorboardLog(run), config.n)
    assert run_pipeline(config, run, LocalRuntime, watch, Watch().stop) == STEPS
    watch.close()
    told = capfd.readouterr().err
    assert disk.num_failed > 2 * STEPS
    assert told.count("No space left on device") == 2
    assert "a preview could not be written, the run goes on without" in told
    assert "TensorBoard's file could not be written, the run goes on without" in told
    assert "previews" not in os.listdir(run.uri)
    assert "report.html" in os.listdir(run.uri)


def test_tensorboards_file_stays_readable(tmp_path, monkeypatch) -> None:
    run = RunFolder.create(str(tmp_path / "run"), "{}")
    log = TensorboardLog(run)
    log.scalars(0, {"loss": 0.5})
    (name,) = run.list_files("tensorboard")
    before = run.read_bytes(name)

    class HalfWritten:
        def __init__(self, *arguments: object, **settings: object) -> None:
            self.file, self.num_writes = open(*arguments, **settings), 0  # noqa: SIM115

        def write(self, data: memoryview) -> int:
            self.num_writes += 1
            if self.num_writes == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data[:5])

        def __getattr__(self, attribute: str) -> object:
            return getattr(self.file, attribute)

        def __enter__(self) -> "HalfWritten":
            return self

        def __exit__(self, *_exception: object) -> None:
            self.file.close()

    with monkeypatch.context() as patch:
        patch.setattr("raydream.report.tensorboard.open", HalfWritten, raising=False)
        with pytest.raises(OSError, match="No space left"):
            log.scalars(1, {"loss": 0.25})
    assert run.read_bytes(name) == before
    log.scalars(2, {"loss": 0.125})
    assert [e.summary.value[0].simple_value for e in events(run.read_bytes(name)) if e.summary.value] == [0.5, 0.125]


def test_an_actor_that_finds_the_disk_full_is_not_tried_again(tmp_path, monkeypatch) -> None:
    config = small_config("n=2", "stages.0.branches.0.method=sds", steps=STEPS)
    run, watch = new_run(tmp_path / "run", config), Watch()
    SmallDisk(monkeypatch, lambda name: "particle_000.safetensors" in name)
    with pytest.raises(RunFailed, match=r"NoSpaceError.*No space left on device.*particle_000"):
        run_pipeline(config, run, LocalRuntime, watch, watch.stop)
    assert watch.num_restarts == 0


# --- whoever reads the terminal ------------------------------------------------------------------------------------


def test_a_stream_outlives_its_reader(tmp_path) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1) as stream:
        os.close(reader)
        lasting = LastingStream(stream)
        for _ in range(3):
            lasting.write("a line\n")
            lasting.flush()
        print("others do not stumble over it either", file=stream, flush=True)
    assert not LastingStream(None).isatty()
    LastingStream(None).write("nobody ever listened")


def test_a_log_on_a_full_disk_stops_nothing() -> None:
    with open("/dev/full", "w", buffering=1) as full:
        LastingStream(full).write("a line\n")
        LastingStream(full).flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what it still holds


def run_job(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A shell script with $JOB, the main job with small settings, and $RUN, its run folder."""
    job = f"{sys.executable} {ROOT}/jobs/vsd_particles.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JOB": job, "RUN": str(folder)}
    environment["SMALL"] = " ".join(word.replace(" ", "") for word in WORDS)
    return subprocess.run(
        ["bash", "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, timeout=600
    )


def test_a_run_whose_terminal_went_away_goes_on(tmp_path) -> None:
    folder = tmp_path / "run"
    done = run_job('{ $JOB $SMALL --out "$RUN" 2>&1; echo "exit code $?" >&3; } 3>&2 | head -n 1', folder)
    assert done.stdout == f"run folder: {folder}\n"
    assert done.stderr == "exit code 0\n"
    assert (folder / "report.html").is_file()


def _can_mount() -> bool:
    mount = "mount -t tmpfs tmpfs /mnt"
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False).returncode == 0


def test_a_real_disk_that_fills_up(tmp_path) -> None:
    if not _can_mount():
        pytest.skip("needs root and `unshare -m`, for a small disk of its own")
    disk = tmp_path / "disk"
    script = """
        unshare -m bash -c '
        mkdir "$DISK" && mount -t tmpfs -o size=1m tmpfs "$DISK" && head -c 700k /dev/zero >"$DISK/theirs"
        $JOB $SMALL --steps 4000 --set output.checkpoint_every=2 --out "$RUN"
        echo "exit code $?"; ls "$RUN/checkpoints"; find "$RUN" -name "*.tmp"'
        """
    done = run_job(script.replace("$DISK", str(disk)), disk / "run")
    assert done.stdout.startswith("exit code 1\nstep_"), done.stdout + done.stderr
    assert ".tmp" not in done.stdout
    assert "No space left on device" in next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "resume with: " in done.stderr
