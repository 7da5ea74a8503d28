"""Supervisor and runners as named, detached Ray actors: they outlive the HTTP replicas and each other."""

import dataclasses
import logging
import threading
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raydream.config import ClusterConfig, RunConfig, cluster_config
from raydream.placement import Cluster, find_cpu_share, find_gpu_shares, free_room, plan_bundles
from raydream.ray_runtime import HostPool, RayRuntime
from raydream.runtime import Runtime
from serve.generation import GenerationRun, GenerationWatch
from serve.records import Record, Records
from serve.settings import Settings
from serve.supervisor import Hand, Job, Supervisor

_log = logging.getLogger(__name__)
_TICK_S = 0.25
_ANSWER_S = 30.0
_SUPERVISOR = "supervisor"
# Ray's own; without it they and all that they start would have that of the replica that starts them.
_PRIORITY = {"env_vars": {"RAY_worker_niceness": "15"}}

Handle = Any  # of an actor; Ray's own type knows none of its methods


class Runner:
    """A process that takes one generation after the other and keeps its actors' processes loaded between them."""

    def __init__(self, settings: Settings) -> None:
        logging.basicConfig(level=logging.INFO)
        self._settings, self._records = settings, Records(settings.database_url)
        self._pool: HostPool | None = None
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._run: GenerationRun | None = None
        self._is_ready = False
        self._is_new = False  # it has a job that has yet to ask for places
        threading.Thread(target=self._begin, daemon=True).start()

    def hand(self, settings: Settings) -> Hand:
        """What it is at."""
        with self._lock:
            is_ready = self._is_ready and self._job is None
            return Hand(self._job, is_ready, settings != self._settings, self._is_new)

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
            self._warm_up()
        finally:
            with self._lock:
                self._is_ready = True

    def _warm_up(self) -> None:
        from raydream.distill.particle import Particle
        from raydream.distill.score import Score

        if self._settings.warm_particles:
            base = self._settings.base_config(self._settings.presets[0], None)
            cluster = shared_cluster(base, self._settings, Cluster.now())
            try:
                self._pool = HostPool(cluster, self._settings.warm_particles, {"particle": Particle, "score": Score})
            except ValueError as error:  # each generation starts its own processes then
                _log.warning("no processes are kept warm: %s", error)

    def _work(self, run: GenerationRun) -> None:
        try:
            run.run(self._make_runtime)
        finally:
            with self._lock:
                self._job = self._run = None
                self._is_new = False

    def _make_runtime(self, config: RunConfig, watch: GenerationWatch) -> Runtime:
        def tell(message: str) -> None:  # it waits, so it has asked
            self._is_new = False
            watch.phase(message)

        cluster = shared_cluster(config, self._settings, Cluster.now())
        try:
            return RayRuntime(cluster, config.n, self._pool, tell, watch.stop)
        finally:
            self._is_new = False


class RayCrew:
    """The runners by their names."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def hands(self) -> dict[int, Hand]:
        asked = {}
        for slot in range(self._settings.max_running):
            runner = self._runner(slot)
            if runner is not None:
                asked[slot] = runner.hand.remote(self._settings)
        found = {}
        for slot, reference in asked.items():
            try:
                found[slot] = ray.get(reference, timeout=_ANSWER_S)
            except GetTimeoutError:
                found[slot] = Hand(("unknown", 0), is_ready=False)
            except RayError:
                _log.warning("the runner in slot %d is gone", slot)
        return found

    def open(self, slot: int) -> None:
        _start(Runner, _runner_name(slot), self._settings, max_restarts=0)

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

    def __init__(self, settings: Settings) -> None:
        logging.basicConfig(level=logging.INFO)
        self._settings = settings
        crew = RayCrew(settings)
        self._supervisor = Supervisor(Records(settings.database_url), crew, settings.max_running)
        self._ticked_at = time.monotonic()
        threading.Thread(target=self._tick_forever, daemon=True).start()

    def health(self, settings: Settings) -> tuple[bool, float]:
        """Whether it has these settings, and for how long it has not come round, in seconds."""
        return settings == self._settings, time.monotonic() - self._ticked_at

    def _tick_forever(self) -> None:
        while True:
            try:
                self._supervisor.tick()
                self._ticked_at = time.monotonic()
            except Exception:  # a database or a cluster that is away for a moment; health() tells if it stays so
                _log.exception("a tick failed")
            time.sleep(_TICK_S)


def look_after_supervisor(settings: Settings) -> float:
    """Starts the supervisor where there is none or one with other settings; for how long it has not ticked."""
    supervisor = _start(SupervisorActor, _SUPERVISOR, settings, max_restarts=-1)
    is_current, silent_s = ray.get(supervisor.health.remote(settings), timeout=_ANSWER_S)
    if not is_current:
        ray.kill(supervisor, no_restart=True)
        return float("inf")
    return silent_s


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


def _start(cls: type, name: str, settings: Settings, max_restarts: int) -> Handle:
    actor: Handle = ray.remote(num_cpus=0, max_restarts=max_restarts, max_task_retries=0)(cls)
    where = {"name": name, "namespace": settings.namespace}
    return actor.options(lifetime="detached", get_if_exists=True, runtime_env=_PRIORITY, **where).remote(settings)
