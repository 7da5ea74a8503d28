"""Runs on a cluster that starts with no node at all for them: Ray's own autoscaler, whose machines are made up."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.util import get_node_ip_address
from service_kills import LONG, look, running_service
from small_runs import SMALL

from raydream.cluster.placement import NODE_TYPES
from raydream.store.run_folder import RunFolder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the cluster's GPUs are made up"),
]
ROOT = Path(__file__).resolve().parents[2]
HEAD = f"{0:056x}"  # what the provider calls the head
WHOLE_GPUS = ("cluster.gpus_per_particle=1", "cluster.gpus_per_score=1")  # which an exhibit takes only when told to
MEMORY = 80 * 2**20  # of each node's object store


def pool(num_cpus: int, role: str, max_workers: int) -> dict[str, Any]:
    resources, labels = {"CPU": num_cpus, "GPU": 1}, {"raydream/role": role}
    return {"resources": resources, "labels": labels, "min_workers": 0, "max_workers": max_workers}


POOLS = {"particle": pool(2, "particle", 2), "score": pool(1, "score", 1)}


def autoscaling_config(address: str) -> dict[str, Any]:
    """In the cluster launcher's words; "external" because the wheel lacks the defaults of Ray's provider for tests."""
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "head_node_id": HEAD,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    commands = [f"{when}_commands" for when in ("setup", "head_setup", "worker_setup", "initialization")]
    commands += ["head_start_ray_commands", "worker_start_ray_commands"]
    empty: dict[str, Any] = {name: [] for name in (*commands, "cluster_synced_files", "rsync_exclude", "rsync_filter")}
    empty |= {"auth": {}, "file_mounts": {}}
    kinds = {name: {**kind, "node_config": {}} for name, kind in POOLS.items()}
    for kind in kinds.values():
        kind["resources"] = {**kind["resources"], "object_store_memory": MEMORY}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return empty | {
        "cluster_name": "made-up",
        "max_workers": 8,
        "idle_timeout_minutes": 30,
        "upscaling_speed": 100,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": {**kinds, "ray.head.default": head},
    }


@contextmanager
def empty_cluster() -> Iterator[str]:
    """The address of a head without a core, beside the autoscaler that cluster.yaml asks for."""
    temporary = tempfile.mkdtemp(prefix="rd-")  # short: paths of sockets have to fit into 107 characters
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(2)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        port, agent = (free.getsockname()[1] for free in sockets)
    address = f"{get_node_ip_address()}:{port}"
    config = Path(temporary) / "autoscaler.json"
    config.write_text(json.dumps(autoscaling_config(address)))
    flags = f"--port={port} --dashboard-agent-listen-port={agent} --include-dashboard=false --temp-dir={temporary}"
    command = f"start --head --block --num-cpus=0 --object-store-memory={MEMORY} --autoscaling-config={config} {flags}"
    environment = os.environ | {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environment |= {NODE_TYPES: json.dumps(POOLS)}
    environment |= {"RAY_FAKE_CLUSTER": "1", "RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    environment.pop("RAY_ADDRESS", None)
    ray_program = Path(sys.executable).with_name("ray")
    head = subprocess.Popen([ray_program, *command.split()], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield address
    finally:
        machines = psutil.Process(head.pid).children(recursive=True)  # the provider leaves them to themselves
        head.terminate()  # ends this cluster; `ray stop` would end every cluster on the machine
        head.wait(120)
        for process in machines:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with empty_cluster() as found:
        yield found


def start(folder: Path, address: str, n: int, types: dict[str, Any], *changes: str) -> "subprocess.Popen[str]":
    """The main job on that cluster, as a user starts it."""
    settings = [setting for setting in (*SMALL, *changes) if not setting.startswith(("n=", "cluster.runtime"))]
    words = [word for setting in (*settings, *WHOLE_GPUS) for word in ("--set", setting)]
    command = [sys.executable, "jobs/vsd_particles.py", "--n", str(n), "--steps", "4", "--out", str(folder), *words]
    environment = os.environ | {"RAY_ADDRESS": address, NODE_TYPES: json.dumps(types), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_what_the_cluster_can_never_hold_is_refused_at_once(address: str, tmp_path: Path) -> None:
    told = start(tmp_path / "run", address, 8, POOLS).communicate(timeout=120)[1]
    assert "error: gpus_per_particle: n=8 particles of 1 GPU and 1 score replicas of 1 GPU do not fit" in told
    assert "on the 3 GPUs that the cluster can grow to; --set cluster.gpus_per_particle=" in told
    assert "waiting for" not in told


def test_nodes_that_do_not_come_end_the_wait(address: str, tmp_path: Path) -> None:
    boast = {"particle": pool(2, "particle", 9)}
    job = start(tmp_path / "run", address, 8, boast, "cluster.nodes_timeout_s=3")
    told = job.communicate(timeout=120)[1]
    assert job.returncode == 1, told
    assert "error: nodes_timeout_s: could not place 9 actors (1 CPU, 1 GPU each, PACK) within 3 s" in told


def test_who_waits_can_be_stopped(address: str, tmp_path: Path) -> None:
    job = start(tmp_path / "run", address, 8, {"particle": pool(2, "particle", 9)})
    assert job.stderr is not None
    told = ""
    while "waiting for" not in told:
        line = job.stderr.readline()
        assert line, told
        told += line
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    told += job.communicate(timeout=120)[1]
    assert job.returncode == 130, told
    assert told.rstrip().endswith(f" jobs/vsd_particles.py --resume {tmp_path / 'run'}"), told
    assert "Traceback" not in told


def test_a_run_waits_for_the_nodes_that_it_makes_start(address: str, tmp_path: Path) -> None:
    job = start(tmp_path / "run", address, 2, POOLS)
    told = job.communicate(timeout=300)[1]
    assert job.returncode == 0, told
    waits = [line for line in told.splitlines() if line.startswith("waiting for 3 GPUs: ")]
    assert waits, told
    assert not waits[0].startswith("waiting for 3 GPUs: 3 free"), told  # for a moment all are there, not yet given
    assert any("starting" in line for line in waits), told
    assert RunFolder.open(str(tmp_path / "run")).exists("report.html")


def test_the_service_admits_what_the_cluster_can_grow_to(tmp_path: Path) -> None:
    """Two at once want three GPUs each, of the three that there can be: the second one waits in the queue."""
    slots = ("MAX_RUNNING=2", "MAX_N=8", "WARM_PARTICLES=2", "PRESETS=exhibit")
    with (
        empty_cluster() as address,
        running_service(tmp_path, *slots, overrides=WHOLE_GPUS, address=address) as (client, _),
    ):
        paths = [
            client.post("/v1/generations", json=LONG | {"steps": 10, "n": n}).raise_for_status().headers["location"]
            for n in (2, 2, 8)
        ]
        at_once: set[str] = set()
        phases: set[str] = set()
        found: list[dict[str, Any]] = []
        while not found or any(now["ended_at"] is None for now in found):
            found = [look(client, path) for path in paths]
            if all(now["state"] == "running" for now in found[:2]):
                at_once.add(found[0]["progress"]["phase"])
            phases |= {now["progress"]["phase"] for now in found}
            time.sleep(0.1)
    assert [now["state"] for now in found] == ["finished", "finished", "failed"], found
    assert "do not fit on the 3 GPUs that the cluster can grow to; " in found[2]["error"]["detail"]
    # the first one's places are free when its meshes are written, a moment before its report and its end
    assert all(phase.startswith(("exporting", "done")) for phase in at_once), at_once
    assert any(phase.startswith("waiting for 3 GPUs: ") for phase in phases), phases
