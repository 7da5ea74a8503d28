"""The same runs as actors in processes of their own: the same bits, whoever is killed, hangs, or is stopped."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.job_submission import JobStatus, JobSubmissionClient
from small_runs import SMALL, Watch, assert_same_end, new_run, small_config, train

from raydream.cluster.ray_runtime import RayRuntime, actor_environment
from raydream.cluster.runtime import Actor, ActorFailed
from raydream.config import strict_json
from raydream.config.cluster import ClusterConfig
from raydream.config.run import RunConfig
from raydream.distill.loop import RunFailed
from raydream.distill.pipeline import run_pipeline
from raydream.launch import main
from raydream.store.run_folder import MESH, RunFolder, particle_file

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the cluster's GPUs are made up, results equal on CPUs only"),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
LONG = 120  # steps of a run that is to be caught in the middle
SPARSE = ("stages.0.branches.0.method=sds", "output.checkpoint_every=10", "output.preview_every=60")


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a cluster with four cores and nine GPUs that are none."""
    temporary = tempfile.mkdtemp(prefix="rd-")  # short: paths of sockets have to fit into 107 characters
    ray.shutdown()  # whatever tests before these left running in this process
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=9,
        include_dashboard=False,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        _temp_dir=temporary,
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = small_config("n=2", steps=STEPS)
    run = new_run(tmp_path_factory.mktemp("undisturbed") / "run", config)
    train(run, config)
    return run


def actor_of(runtime: RayRuntime, role: str, index: int) -> Actor:
    return next(a for a in runtime._started if (a.role, a.index) == (role, index))


def kill_process(runtime: RayRuntime, role: str, index: int, number: int = signal.SIGKILL) -> None:
    process = actor_of(runtime, role, index).place.__ray_call__.options(concurrency_group="ctl")
    os.kill(ray.get(process.remote(lambda host: os.getpid())), number)


def train_on_ray(config: RunConfig, run: RunFolder, runtime: RayRuntime, watch: Watch) -> int:
    try:
        return train(run, config, runtime, watch)
    finally:
        runtime.close()


# --- what an actor asks for ----------------------------------------------------------------------------------------


def test_an_actor_without_a_gpu_sees_none() -> None:
    assert actor_environment({"CPU": 1.0})["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in actor_environment({"CPU": 1.0, "GPU": 0.5})
    assert actor_environment({"GPU": 1.0})["OMP_NUM_THREADS"] == "1"


def test_memory_of_a_gpu_grows_unless_the_driver_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    assert actor_environment({"GPU": 0.5})["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in actor_environment({"CPU": 1.0})
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    assert actor_environment({"GPU": 1.0})["PYTORCH_ALLOC_CONF"] == "backend:native"


def test_a_gpu_that_torch_does_not_see_is_an_error_at_once(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that was given one computes on no core instead, whatever the driver's machine sees."""
    monkeypatch.setattr(
        "raydream.cluster.ray_runtime.actor_environment", lambda resources: {"RAYDREAM_MADE_UP_GPUS": ""}
    )
    runtime = RayRuntime(ClusterConfig(kernels="reference", gpus_per_particle=0.5, gpus_per_score=0.0), 1)
    try:
        particle, score = runtime.spawn("particle", 0), runtime.spawn("score", 0)
        runtime.get([runtime.build(score, dict)], 60.0)
        with pytest.raises(ActorFailed, match=r"gpus_per_particle: Ray gave particle 0 a GPU on .*torch .* sees none"):
            runtime.get([runtime.build(particle, dict)], 60.0)
        with pytest.raises(ActorFailed) as caught:
            runtime.get([runtime.build(particle, dict)], 60.0)
        assert caught.value.error_type == "ValueError", "no restart could change it"
    finally:
        runtime.close()


# --- the runtime ---------------------------------------------------------------------------------------------------


def test_calls_keep_their_order_and_failures_are_passed_on(cluster: str) -> None:
    class Worker:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def see(self, value: Any, delay_s: float = 0.0) -> list[Any]:
            time.sleep(delay_s)
            self.seen.append(value)
            return self.seen

        def fail(self, message: str) -> None:
            raise KeyError(message)

        def pair(self) -> tuple[int, int]:
            return 1, 2

    runtime = RayRuntime(ClusterConfig(kernels="reference", gpus_per_particle=0.0, gpus_per_score=0.0), 1)
    try:
        one, two = runtime.spawn("particle", 0), runtime.spawn("score", 0)
        runtime.get([runtime.build(actor, Worker) for actor in (one, two)], 60.0)
        late = runtime.call(one, "see", "late", 0.3)
        calls = [runtime.call(two, "see", late), *(runtime.call(two, "see", i) for i in range(5))]
        assert runtime.get(calls, 60.0)[-1] == [["late"], 0, 1, 2, 3, 4]
        first, second = runtime.call(one, "pair", num_returns=2)
        assert runtime.get([second, first], 60.0) == [2, 1]

        failed = runtime.call(one, "fail", "no such key")
        chain = runtime.call(one, "see", runtime.call(two, "see", failed))
        for reference in (failed, chain):
            with pytest.raises(ActorFailed, match="particle 0: 'no such key'") as caught:
                runtime.get([reference], 60.0)
            assert (caught.value.kind, caught.value.error_type, caught.value.actor) == (
                "application_error", "KeyError", one,
            )  # fmt: skip
        assert runtime.failing([one, two], 60.0) == []

        slow = runtime.call(one, "see", "slow", 3600.0)
        with pytest.raises(ActorFailed) as caught:
            runtime.get([slow], 1.0)
        assert caught.value.kind == "timeout"
        assert runtime.failing([one, two], 0.5) == [one]
        waiting = runtime.call(two, "see", slow)
        assert runtime.failing([one, two], 0.5) == [one]  # whoever waits for it is well
        runtime.respawn(one)
        with pytest.raises(ActorFailed) as caught:
            runtime.get([waiting], 60.0)
        assert caught.value.kind == "actor_died"
        runtime.build(one, Worker)
        assert runtime.get([runtime.call(one, "see", "anew")], 60.0) == [["anew"]]
        kill_process(runtime, "score", 0)
        with pytest.raises(ActorFailed):
            runtime.get([runtime.call(two, "see", 1)], 60.0)
        assert runtime.failing([one, two], 60.0) == [two]
    finally:
        runtime.close()


def test_more_than_the_cluster_has_ends_the_run_with_the_setting(cluster: str, tmp_path: Path, capfd) -> None:
    words = [*words_of_a_run(tmp_path / "run"), "--n", "9", "--set", "cluster.gpus_per_particle=1"]
    assert main("test", words) == 1
    told = capfd.readouterr().err
    assert "error: gpus_per_particle: n=9 particles of 1 GPU and 1 score replicas do not fit on the 9 GPUs that" in told
    assert "; --set cluster.gpus_per_particle=0.9001 --set cluster.gpus_per_score=0.0999 would do; or " in told


# --- whole runs ----------------------------------------------------------------------------------------------------


def test_actors_in_processes_compute_the_same_bits(cluster: str, tmp_path: Path, undisturbed: RunFolder) -> None:
    config = small_config("n=2", steps=STEPS)
    run = new_run(tmp_path / "run", config)
    assert train_on_ray(config, run, RayRuntime(config.cluster, config.n), Watch()) == STEPS
    assert_same_end(run, undisturbed)


def test_killed_processes_and_passing_errors_change_nothing(cluster, tmp_path, undisturbed) -> None:
    config = small_config("n=2", steps=STEPS)
    run, runtime = new_run(tmp_path / "run", config), RayRuntime(config.cluster, config.n)

    def break_render() -> None:
        def broken(step: int) -> None:
            raise RuntimeError("out of memory, perhaps")

        def sabotage(host: Any) -> None:
            host._place._target.render = broken

        ray.get(actor_of(runtime, "particle", 0).place.__ray_call__.options(concurrency_group="ctl").remote(sabotage))

    deeds = {
        0: lambda: kill_process(runtime, "particle", 1),  # before the first checkpoint
        3: lambda: kill_process(runtime, "score", 0),
        4: break_render,
    }
    watch = Watch(deeds=deeds)
    assert train_on_ray(config, run, runtime, watch) == STEPS
    restarts = [message for message in watch.phases if "restarting" in message]
    assert [message.partition(" failed")[0] for message in restarts] == ["particle 1", "score 0", "particle 0"]
    assert "application_error" in restarts[2]
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("way", ["busy", "silent"])
def test_an_actor_that_hangs_is_restarted(cluster: str, tmp_path: Path, way: str) -> None:
    config = small_config("n=1", "stages.0.branches.0.method=sds", "cluster.step_timeout_s=8", steps=4)
    run, whole = new_run(tmp_path / "run", config), new_run(tmp_path / "whole", config)
    train(whole, config)
    runtime = RayRuntime(config.cluster, config.n)

    def hang() -> None:
        def sabotage(host: Any) -> None:
            host._place._target.render = lambda step: time.sleep(3600)

        ray.get(actor_of(runtime, "particle", 0).place.__ray_call__.options(concurrency_group="ctl").remote(sabotage))

    deed = hang if way == "busy" else lambda: kill_process(runtime, "particle", 0, signal.SIGSTOP)
    watch = Watch(deeds={0: deed})
    assert train_on_ray(config, run, runtime, watch) == 4
    restarts = [message for message in watch.phases if "restarting" in message]
    assert len(restarts) == 1, restarts  # not also those that waited for it
    assert restarts[0].startswith("particle 0 failed")
    assert "(timeout)" in restarts[0]
    assert_same_end(run, whole)


def test_a_mistake_ends_the_run_at_once(cluster: str, tmp_path: Path) -> None:
    config = small_config("n=1", "prompt=a zeppelin", "stages.0.branches.0.method=sds")
    run, watch = new_run(tmp_path / "run", config), Watch()
    with pytest.raises(RunFailed, match=r"score 0 raised ValueError .*'a zeppelin' names nothing.*cannot change that"):
        train_on_ray(config, run, RayRuntime(config.cluster, config.n), watch)
    assert watch.num_restarts == 0


def test_eight_particles_on_eight_gpus_and_a_score_model_on_the_ninth(cluster: str, tmp_path: Path) -> None:
    config = small_config("n=8", "output.texture_px=32", steps=2)
    run, runtimes, seen = new_run(tmp_path / "run", config), [], []

    def make_runtime() -> RayRuntime:
        runtimes.append(RayRuntime(config.cluster, config.n))
        return runtimes[0]

    def look_at_gpus() -> None:
        asks = [actor.place.__ray_call__.options(concurrency_group="ctl") for actor in runtimes[0]._started]
        seen.extend(ray.get([ask.remote(lambda host: os.environ["CUDA_VISIBLE_DEVICES"]) for ask in asks]))

    watch = Watch(deeds={0: look_at_gpus})
    assert run_pipeline(config, run, make_runtime, watch, watch.stop) == 2
    assert sorted(seen) == [str(gpu) for gpu in range(9)]
    assert [row["step"] for row in run.read_metrics()] == [0, 1]
    meshes = [run.read_bytes(particle_file(index, MESH)) for index in range(8)]
    assert len(set(meshes)) == 8
    assert run.exists("report.html")


def test_who_shares_a_gpu_takes_turns_where_renders_are_made_again(cluster: str, tmp_path: Path) -> None:
    class Marks:
        """Writes down when each of its calls begins and ends."""

        def work(self, path: Path) -> None:
            for mark in ("begins", "ends"):
                with open(path, "a") as file:
                    file.write(f"{mark} {os.getpid()}\n")
                time.sleep(0.02)

    shares = ("cluster.gpus_per_particle=0.4", "cluster.gpus_per_score=0.2")
    runtime = RayRuntime(small_config(*shares, "cluster.renders=again").cluster, 2)
    actors = [runtime.spawn("particle", 0), runtime.spawn("particle", 1), runtime.spawn("score", 0)]

    def marks(name: str) -> list[str]:
        path = tmp_path / name
        runtime.get([runtime.call(actor, "work", path) for _ in range(10) for actor in actors], 60.0)
        lines = path.read_text().splitlines()
        assert len(lines) == 60
        return [line.split()[1] for line in lines]

    try:
        runtime.get([runtime.build(actor, Marks) for actor in actors], 60.0)
        alone = marks("alone")
        assert alone[::2] == alone[1::2], "who begins ends before another begins"
        ray.get([actor.place.take_turns.remote(False) for actor in actors])
        crowded = marks("crowded")
        assert crowded[::2] != crowded[1::2]
    finally:
        runtime.close()


# --- drivers that are stopped --------------------------------------------------------------------------------------


def words_of_a_run(folder: Path) -> list[str]:
    named = [setting for setting in (*SMALL, *SPARSE) if not setting.startswith(("n=", "cluster.runtime"))]
    return [*(word for setting in named for word in ("--set", setting)), "--runtime", "ray", "--out", str(folder)]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    config = small_config("n=2", *SPARSE, steps=LONG)
    run = new_run(tmp_path_factory.mktemp("long") / "run", config)
    train(run, config)
    return run


def stop_driver(folder: Path, number: int, address: str | None) -> tuple[int, str]:
    """Starts the main job, sends it a signal once it has made a checkpoint; its exit code and what it said."""
    command = [sys.executable, "jobs/vsd_particles.py", *words_of_a_run(folder), "--n", "2", "--steps", str(LONG)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": address} if address else {}
    # a session of its own, as a terminal has; its errors go to a file, which Ray's processes may keep open
    with open(folder.with_suffix(".log"), "w+") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log, start_new_session=True)
        try:
            while driver.poll() is None and not list(folder.glob("checkpoints/*/manifest.json")):
                time.sleep(0.01)
            if number == signal.SIGINT:
                os.killpg(driver.pid, number)  # Ctrl-C goes to everyone in the terminal, Ray's processes too
            else:
                driver.send_signal(number)
            driver.wait(120)
        finally:
            driver.kill()
        log.seek(0)
        return driver.returncode, log.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])  # SIGTERM: see the job that is stopped
def test_a_stopped_driver_leaves_a_run_that_can_be_resumed(cluster, tmp_path, long_run, number) -> None:
    folder = tmp_path / "run"
    code, told = stop_driver(folder, number, None if number == signal.SIGINT else cluster)
    run = RunFolder.open(str(folder))
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None, told
    assert 0 < checkpoint.step < LONG, told
    if number != signal.SIGKILL:
        assert code == 130, told
        assert f"stopped at step {checkpoint.step}" in told
        assert told.rstrip().endswith(f" jobs/vsd_particles.py --resume {folder}")
        assert "Traceback" not in told
    assert strict_json.loads(RunConfig, run.read_config()).cluster.runtime == "ray"
    assert main("test", ["--resume", str(folder), "--runtime", "local"]) == 0
    assert_same_end(run, long_run)
    assert run.exists(particle_file(1, MESH))


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobSubmissionClient]:
    """The job server of a head that was started in the checkout, with ports and a folder of its own."""
    temporary = tempfile.mkdtemp(prefix="rd-")
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(3)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        port, dashboard, agent = (free.getsockname()[1] for free in sockets)
    flags = (
        f"--port={port} --dashboard-host=127.0.0.1 --dashboard-port={dashboard} --dashboard-agent-listen-port={agent}"
    )
    command = f"start --head --block --num-cpus=3 --object-store-memory={128 * 2**20} --temp-dir={temporary} {flags}"
    ray_program = Path(sys.executable).with_name("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    head = subprocess.Popen([ray_program, *command.split()], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield answering_client(f"http://127.0.0.1:{dashboard}", head)
    finally:
        head.terminate()  # ends this cluster; `ray stop` would end every cluster on the machine
        head.wait(120)
        shutil.rmtree(temporary, ignore_errors=True)


def answering_client(url: str, head: subprocess.Popen[bytes]) -> JobSubmissionClient:
    """Waits for the server, then for the agent that starts jobs, which comes some seconds later."""
    while head.poll() is None:
        try:
            client = JobSubmissionClient(url)
            client.submit_job(entrypoint="true")
            return client
        except (ConnectionError, RuntimeError):
            time.sleep(0.5)
    raise AssertionError(f"the head ended with {head.returncode}")


def test_a_submitted_job_that_is_stopped_can_be_resumed(jobs: JobSubmissionClient, tmp_path, long_run) -> None:
    folder = tmp_path / "run"
    words = ["python", "jobs/vsd_particles.py", *words_of_a_run(folder), "--n", "2", "--steps", str(LONG)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    patience = {"PATH": path, "RAY_JOB_STOP_WAIT_TIME_S": "120"}  # Ray's own is 3 s
    job = jobs.submit_job(entrypoint=shlex.join(words), runtime_env={"env_vars": patience})
    while not list(folder.glob("checkpoints/*/manifest.json")) and not jobs.get_job_status(job).is_terminal():
        time.sleep(0.1)
    jobs.stop_job(job)
    while not jobs.get_job_status(job).is_terminal():
        time.sleep(0.2)
    told = jobs.get_job_logs(job)
    assert jobs.get_job_status(job) == JobStatus.STOPPED, told
    assert told.rstrip().endswith(f" jobs/vsd_particles.py --resume {folder}")
    checkpoint = RunFolder.open(str(folder)).latest_checkpoint()
    assert checkpoint is not None
    assert 0 < checkpoint.step < LONG
    assert f"stopped at step {checkpoint.step}" in told
    assert main("test", ["--resume", str(folder), "--runtime", "local"]) == 0
    assert_same_end(RunFolder.open(str(folder)), long_run)
