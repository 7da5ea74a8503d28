"""Supervisor and runners as named, detached Ray actors: they outlive the HTTP replicas and each other."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raydream.cluster.placement import Cluster, find_cpu_share, find_gpu_shares, free_room, plan_bundles
from raydream.cluster.ray_runtime import ProcessPool, RayRuntime
from raydream.cluster.runtime import Runtime
from raydream.config.cluster import ClusterConfig
from raydream.config.run import RunConfig, cluster_config
from serve import pulse
from serve.files import GenerationFiles
from serve.generation import GenerationRun, GenerationWatch
from serve.janitor import Janitor
from serve.lease import BEAT_EVERY_S, Tenure, holder_at
from serve.records import Record, Records
from serve.settings import Settings
from serve.supervisor import Job, RunnerStatus, Supervisor, SupervisorHealth

_log = logging.getLogger(__name__)
_TICK_S = 0.25
_ANSWER_S = 30.0
_SWEEP_EVERY_S = 2.0
_SUPERVISOR = "supervisor"
_HEAD = "node:__internal_head__"
# Ray's own; without it they and all that they start would have that of the replica that starts them.
_PRIORITY = {"env_vars": {"RAY_worker_niceness": "15"}}

Handle = Any  # of an actor; Ray's own type knows none of its methods


class Runner:
    """A process that takes one generation after the other and keeps its actors' processes loaded between them."""

    def __init__(self, settings: Settings) -> None:
        logging.basicConfig(level=logging.INFO)
        pulse.end_with_node()
        self._settings, self._records = settings, Records(settings.database_url)
        self._pool: ProcessPool | None = None
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._run: GenerationRun | None = None
        self._is_ready = False
        self._is_new = False  # it has a job that has yet to ask for places
        threading.Thread(target=self._begin, daemon=True).start()

    def status(self, settings: Settings) -> RunnerStatus:
        """What it is at."""
        with self._lock:
            is_ready = self._is_ready and self._job is None
            return RunnerStatus(self._job, is_ready, settings != self._settings, self._is_new)

    def num_warm(self, bundle: dict[str, float]) -> int:
        """For how many particles that ask for this much there are processes."""
        pool = self._pool
        return self._settings.warm_particles if pool is not None and pool.has(("particle", 0), bundle) else 0

    def take(self, job: Job) -> bool:
        """Begins with a generation; False where it has one or is not ready."""
        with self._lock:
            if self._job is not None or not self._is_ready:
                return False
            self._job, self._run = job, GenerationRun(self._records, self._settings, *job)
            self._is_new = True
        threading.Thread(target=self._work, args=(self._run,), daemon=True).start()
        return True

    def stop(self) -> None:
        """Ends the generation that it is at, at a checkpoint."""
        with self._lock:
            if self._run is not None:
                self._run.stop()

    def _begin(self) -> None:
        try:
            from raydream.distill.particle import import_particle
            from raydream.distill.score import import_score

            if self._settings.warm_particles:
                base = self._settings.base_config(self._settings.presets[0], None)
                cluster = shared_cluster(base, self._settings, Cluster.now())
                imports = {"particle": import_particle, "score": import_score}
                self._pool = ProcessPool(cluster, self._settings.warm_particles, imports)
        except ValueError as error:  # each generation starts its own processes then
            _log.warning("no processes are kept warm: %s", error)
        finally:
            with self._lock:
                self._is_ready = True

    def _work(self, run: GenerationRun) -> None:
        try:
            run.run(self._make_runtime)
        finally:
            with self._lock:
                self._job = self._run = None
                self._is_new = False

    def _make_runtime(self, config: RunConfig, watch: GenerationWatch) -> Runtime:
        def on_phase(message: str) -> None:  # it waits, so it has asked
            self._is_new = False
            watch.phase(message)

        cluster = shared_cluster(config, self._settings, Cluster.now())
        try:
            return RayRuntime(cluster, config.n, self._pool, on_phase, watch.stop)
        finally:
            self._is_new = False


class RayRunners:
    """The runners by their names."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def statuses(self) -> dict[int, RunnerStatus]:
        runners = {slot: self._runner(slot) for slot in range(self._settings.max_running)}
        asked = {slot: each.status.remote(self._settings) for slot, each in runners.items() if each is not None}
        found = {}
        for slot, reference in asked.items():
            try:
                found[slot] = ray.get(reference, timeout=_ANSWER_S)
            except GetTimeoutError:
                found[slot] = RunnerStatus(("unknown", 0), is_ready=False)
            except RayError:
                _log.warning("the runner in slot %d is gone", slot)
        return found

    def open(self, slot: int) -> None:
        _start(Runner, _runner_name(slot), self._settings, 0, self._settings)

    def has_room(self, slot: int, record: Record) -> bool:
        try:
            cluster, base = Cluster.now(), self._settings.base_config(record.preset, None)
            bundles = plan_bundles(shared_cluster(base, self._settings, cluster), record.n, cluster)
        except ValueError:
            return True  # it never will have: the run says so in words
        runner = self._runner(slot)
        num_warm = 0 if runner is None else ray.get(runner.num_warm.remote(bundles[0]), timeout=_ANSWER_S)
        missing = bundles[num_warm : record.n] if num_warm else bundles
        room, names = free_room(cluster), {name for bundle in missing for name in bundle}
        return all(sum(b.get(name, 0.0) for b in missing) <= room.get(name, 0.0) + 1e-6 for name in names)

    def start(self, slot: int, job: Job) -> bool:
        runner = self._runner(slot)
        try:
            return runner is not None and ray.get(runner.take.remote(job), timeout=_ANSWER_S)
        except RayError:
            _log.warning("the runner in slot %d was lost while it took generation %s", slot, job[0])
            return False

    def stop(self, slot: int) -> None:
        runner = self._runner(slot)
        if runner is not None:
            runner.stop.remote()

    def kill(self, slot: int) -> None:
        runner = self._runner(slot)
        if runner is not None:
            ray.kill(runner, no_restart=True)

    def _runner(self, slot: int) -> Handle | None:
        return _find(self._settings, _runner_name(slot))


class SupervisorActor:
    """The one process that ticks. Ray starts it again whenever it dies; whatever it knew is in the record."""

    def __init__(self, settings: Settings, owner: str) -> None:
        logging.basicConfig(level=logging.INFO)
        pulse.end_with_node()
        self._settings, records, files = settings, Records(settings.database_url), GenerationFiles(settings)
        self._tenure = Tenure(records.leases, owner, holder_at(settings.address))
        runners = RayRunners(settings)
        self._supervisor = Supervisor(
            records, runners, settings.max_running, lambda: self._tenure.epoch, pause=files.want_of_room
        )
        self._janitor = Janitor(records, settings, files)
        self._ticked_at, self._refused = time.monotonic(), ""
        for work, pause_s in ((self._beat, BEAT_EVERY_S), (self._tick, _TICK_S), (self._sweep, _SWEEP_EVERY_S)):
            threading.Thread(target=self._forever, args=(work, pause_s), daemon=True).start()

    def health(self, settings: Settings, owner: str) -> SupervisorHealth | None:
        """How it is; None where it was started for another service or with other settings."""
        if (settings, owner) != (self._settings, self._tenure.owner):
            return None
        return SupervisorHealth(time.monotonic() - self._ticked_at, self._refused, self._supervisor.paused)

    def _beat(self) -> None:
        is_ours = self._tenure.beat()
        self._refused = "" if is_ours else f"nothing is run here: the record belongs to {self._tenure.look()}"

    def _tick(self) -> None:
        self._supervisor.tick()
        self._ticked_at = time.monotonic()

    def _sweep(self) -> None:
        if self._tenure.epoch is not None and self._supervisor.busy is not None:
            self._janitor.sweep(self._supervisor.busy)

    def _forever(self, work: Callable[[], None], pause_s: float) -> None:
        while True:
            try:
                work()
            except Exception:  # a database or a cluster that is away for a moment; health() tells if it stays so
                _log.exception("%s failed", work.__name__)
            time.sleep(pause_s)


def look_after_supervisor(settings: Settings, owner: str) -> SupervisorHealth:
    """Starts the supervisor where there is none or another's; how it is. ``owner`` is who holds the record's lease,
    empty where that is whoever runs in this cluster.
    """
    owner = owner or _owner_of_cluster()
    supervisor = _start(SupervisorActor, _SUPERVISOR, settings, -1, settings, owner)
    health = ray.get(supervisor.health.remote(settings, owner), timeout=_ANSWER_S)
    if health is None:
        ray.kill(supervisor, no_restart=True)
        return SupervisorHealth(float("inf"))
    return health


def end_actors(settings: Settings) -> None:
    """Ends supervisor and runners; what they were at is taken up again by the next service."""
    for name in (_SUPERVISOR, *(_runner_name(slot) for slot in range(settings.max_running))):
        actor = _find(settings, name)
        if actor is not None:
            ray.kill(actor, no_restart=True)


def _owner_of_cluster() -> str:
    """The same for all replicas, and after a supervisor's death; another one for each start of the cluster."""
    heads = (node["NodeID"] for node in ray.nodes() if _HEAD in node["Resources"])
    return f"cluster {next(heads, ray.get_runtime_context().get_job_id())}"


def shared_cluster(run: RunConfig, settings: Settings, cluster: Cluster) -> ClusterConfig:
    """Shares of GPUs and cores that leave room for ``max_running`` generations of ``max_n`` particles, where the
    settings say nothing; the same for every n, so that processes can be passed on from one generation to the next.
    """
    config = cluster_config(run)
    counts = (settings.max_running * settings.max_n, settings.max_running * config.score_replicas)
    gpus = find_gpu_shares(config, counts, cluster) or (config.gpus_per_particle, config.gpus_per_score)
    share = max(0.01, find_cpu_share(config, counts, cluster, (max(gpus[0], 0.0), max(gpus[1], 0.0))))
    particle, score = config.cpus_per_particle, config.cpus_per_score
    return dataclasses.replace(
        config,
        gpus_per_particle=gpus[0],
        gpus_per_score=gpus[1],
        cpus_per_particle=share if particle < 0 else particle,
        cpus_per_score=share if score < 0 else score,
    )


def _runner_name(slot: int) -> str:
    return f"runner-{slot}"


def _find(settings: Settings, name: str) -> Handle | None:
    try:
        return ray.get_actor(name, namespace=settings.namespace)
    except ValueError:
        return None


def _start(cls: type, name: str, settings: Settings, max_restarts: int, *arguments: object) -> Handle:
    actor: Handle = ray.remote(num_cpus=0, max_restarts=max_restarts, max_task_retries=0)(cls)
    where = {"name": name, "namespace": settings.namespace}
    return actor.options(lifetime="detached", get_if_exists=True, runtime_env=_PRIORITY, **where).remote(*arguments)
