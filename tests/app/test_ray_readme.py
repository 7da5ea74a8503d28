"""The README's commands in their order, on a machine that never saw Ray: a plain run, then a head, a job, a driver.

And that driver stands elsewhere than the head, where a relative path means something else.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from small_runs import SMALL

from raydream.priors.find import EMBEDDED

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]  # six starts of Ray, one after the other
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """That of a new machine, whose home is short: paths of sockets have to fit into 107 characters."""
    home = tempfile.mkdtemp(prefix="rd-")
    told = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYDREAM_"))}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    cache = str(Path.home() / ".cache")
    yield told | {"HOME": home, "PATH": path, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": home}
    shutil.rmtree(home, ignore_errors=True)


def main_job(out: Path) -> list[str]:
    settings = [setting for setting in SMALL if not setting.startswith(("n=", "cluster.runtime"))]
    words = [word for setting in settings for word in ("--set", setting)]
    return ["python", "jobs/vsd_particles.py", "--n", "1", "--steps", "2", *words, "--out", str(out)]


def run(words: list[str], environment: dict[str, str], where: Path = ROOT) -> tuple[int, str]:
    done = subprocess.run(
        words, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def test_the_readmes_commands_work_in_their_order(environment: dict[str, str], tmp_path: Path) -> None:
    code, told = run(main_job(tmp_path / "plain"), environment)
    assert code == 0, told
    assert not (Path(environment["HOME"]) / ".ray" / "auth_token").exists(), "a lock to which nobody knows of a key"
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(3)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        port, dashboard, agent = (free.getsockname()[1] for free in sockets)
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    memory = ["--num-cpus=3", f"--object-store-memory={128 * 2**20}"]
    head = subprocess.Popen(
        ["ray", "start", "--head", "--block", *memory, *ports], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        submit = ["ray", "job", "submit", "--address", f"http://127.0.0.1:{dashboard}"]
        while head.poll() is None and run([*submit, "--", "true"], environment)[0] != 0:
            time.sleep(0.5)  # until the agent is there that starts jobs
        for name, words in {"uploaded": ["--working-dir", ".", "--"], "where_the_head_is": ["--"]}.items():
            code, told = run([*submit, *words, *main_job(tmp_path / name)], environment)
            assert code == 0, told
            assert (tmp_path / name / "report.html").is_file()
        member = environment | {"RAY_ADDRESS": f"127.0.0.1:{port}", "PYTHONPATH": str(ROOT)}
        code, told = run(main_job(tmp_path / "driver"), member)
        assert code == 0, told
        shutil.copytree(EMBEDDED, tmp_path / "mine")
        script, *words = main_job(tmp_path / "relative")[1:]
        named = ["--preset", "embedded", "--prior", "mine", "--method", "sds", "--set", "prior.image_px=0"]
        code, told = run(["python", str(ROOT / script), *words, *named], member, tmp_path)
        assert code == 0, told
    finally:
        head.terminate()  # ends this cluster; `ray stop` would end every cluster on the machine
        head.wait(120)
