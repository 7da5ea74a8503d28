"""``RayRuntime``: one placement group, one process for each actor, values passed by reference through the object
store.
"""

import dataclasses
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raydream.backend import load_backend
from raydream.cluster.connection import connect
from raydream.cluster.gpus import Need, plan_in_words
from raydream.cluster.placement import Cluster, Key, plan_bundles, reserve
from raydream.cluster.runtime import BUILD, Actor, ActorFailed, Place, Reference
from raydream.cluster.turns import turn_on_gpu
from raydream.config.cluster import GPU_ALLOCATOR, ClusterConfig
from raydream.config.kernels import need_cuda
from raydream.device import own_device

_log = logging.getLogger(__name__)
MADE_UP_GPUS = "RAYDREAM_MADE_UP_GPUS"  # set where a test's cluster has GPUs that are none

# One thread for each actor: eight actors with two threads each are eight times slower than with one.
_ACTOR_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# Large activations come from the heap again instead of from fresh pages every time.
_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}
_PING_TIMEOUT_S = 10.0
_POOL_TIMEOUT_S = 10.0  # a pool takes what is free: where it waited, it would take what a run should have next
_LANES: dict[str, Any] = {"concurrency_groups": {"ctl": 1}}  # beside the lane that works


class CallError(Exception):
    """A method raised: who, which exception, and what it said. The traceback is in Ray's message around it."""

    def __init__(self, label: str, error_type: str, message: str) -> None:
        super().__init__(label, error_type, message)
        self.label, self.error_type, self.message = label, error_type, message


class ActorProcess:
    """The process around one actor's object: work in one lane, questions about its health in another."""

    def __init__(self, label: str, has_gpu: bool) -> None:
        self._label, self._has_gpu, self._place = label, has_gpu, Place()
        self._busy_since: float | None = None
        self._lock = threading.Lock()
        self._takes_turns = False

    def take_turns(self, takes_turns: bool) -> None:
        """Whether calls, once it is built, wait for those of the processes on the same GPU; that is not being busy."""
        self._takes_turns = takes_turns

    def call(self, method: str, *args: Any) -> Any:
        """What ``Place.call`` does."""
        with turn_on_gpu() if self._takes_turns and method != BUILD else nullcontext():
            with self._lock:
                self._busy_since = time.monotonic()
            try:
                if method == BUILD and self._has_gpu:
                    check_gpu(self._label)
                return self._place.call(method, *args)
            except Exception as error:  # told in words: its own class may not survive the way to the driver
                raise CallError(self._label, type(error).__name__, str(error)) from error
            finally:
                with self._lock:
                    self._busy_since = None

    @ray.method(concurrency_group="ctl")
    def busy_s(self) -> float:
        """For how long the call that is running has been running, 0 where none is."""
        with self._lock:
            return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since


class ReservedPlaces:
    """Reserved places for actors, by role and index; each actor that is started in one is a process of its own."""

    def __init__(
        self,
        bundles: Mapping[Key, dict[str, float]],
        config: ClusterConfig,
        cluster: Cluster,
        on_phase: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        self.bundles, self._order = bundles, list(bundles)
        self._group = reserve(bundles, config, cluster, on_phase, stop) if bundles else None

    def __contains__(self, key: Key) -> bool:
        return key in self.bundles

    def start(self, key: Key) -> Any:
        assert self._group is not None
        resources = self.bundles[key]
        process = ray.remote(**_LANES)(ActorProcess).options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, self._order.index(key)),
            runtime_env={"env_vars": actor_environment(resources)},
        )
        return process.remote(str(Actor(*key)), "GPU" in resources)

    def close(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)


class ProcessPool:
    """Places whose processes stay loaded between runs: what one run gives back, empty, the next one takes.

    Lives in the process that makes it, and ends with it. One run uses it at a time.
    """

    def __init__(self, config: ClusterConfig, num_particles: int, imports: Mapping[str, Callable[[], None]]) -> None:
        """``imports`` by role are functions of the modules to import beforehand. Starts no nodes: they would stay for
        as long as it does.

        Raises ``ValueError`` as ``RayRuntime`` does, and where the places are taken.
        """
        connect()
        _warm_up(config.kernels)
        cluster = Cluster(Cluster.now().there)
        self._imports, bundles = imports, _plan(config, num_particles, cluster)
        at_once = dataclasses.replace(config, placement_timeout_s=_POOL_TIMEOUT_S)
        self._reserved = ReservedPlaces(bundles, at_once, cluster, _log.info, threading.Event())
        self._places = {key: self._reserved.start(key) for key in bundles}
        try:
            ray.get([place.call.remote(BUILD, imports[key[0]]) for key, place in self._places.items()])
        except RayError as error:
            self.close()
            raise ValueError(f"warm_particles: a process could not be started: {error}") from error

    def has(self, key: Key, bundle: Mapping[str, float]) -> bool:
        """Whether there is such a place, with a share of a GPU where one is asked for and none where not."""
        return key in self._reserved and ("GPU" in self._reserved.bundles[key]) == ("GPU" in bundle)

    def take(self, key: Key) -> Any:
        """The place's process; whatever is still under way there comes before anything that it is asked now."""
        return self._places[key]

    def restart(self, key: Key) -> Any:
        """Ends the place's process and starts a new one."""
        ray.kill(self._places[key], no_restart=True)
        self._places[key] = self._reserved.start(key)
        return self._places[key]

    def settle(self) -> None:
        """Frees what the last run left in the processes, and replaces those that died or do not come to an end."""
        for (key, place), busy_s in zip(list(self._places.items()), _ask(list(self._places.values()))):
            idle = place if busy_s == 0 else self.restart(key)
            idle.call.remote(BUILD, self._imports[key[0]])

    def close(self) -> None:
        """Ends all processes."""
        for place in self._places.values():
            ray.kill(place, no_restart=True)
        self._reserved.close()


class RayRuntime:
    """Actors in a placement group of n particle bundles and k score bundles, as far as no pool has places for them.

    Ray itself neither restarts an actor nor retries a call (its retries are at-least-once): the loop rolls everybody
    back.
    """

    def __init__(
        self,
        config: ClusterConfig,
        num_particles: int,
        pool: ProcessPool | None = None,
        on_phase: Callable[[str], None] = _log.info,
        stop: threading.Event | None = None,
        find_needs: Callable[[], Sequence[Need]] = tuple,
    ) -> None:
        """Waits for places, and for nodes where an autoscaler starts them; ``on_phase`` hears the plan and what is
        waited for. ``find_needs`` is asked what actors on GPUs take of their memory, under budgets from fast to frugal.

        ``ValueError`` naming the field for what the cluster can never hold or did not within the time limit,
        ``Withdrawn`` once ``stop`` is set.
        """
        connect()
        self._pool = pool
        if pool is None:
            _warm_up(config.kernels)
        else:
            pool.settle()
        cluster = Cluster.now()
        bundles = _plan(config, num_particles, cluster)
        on_gpus = any("GPU" in bundle for bundle in bundles.values())
        words, self.budget = plan_in_words(bundles, cluster, find_needs() if on_gpus else ())
        on_phase(words)
        again = self.budget.renders_again if self.budget else config.renders == "again"
        self._in_turns = {key for key in bundles if again and 0 < bundles[key].get("GPU", 0.0) < 1}
        self._pooled = {key for key in bundles if pool is not None and pool.has(key, bundles[key])}
        missing = {key: bundles[key] for key in bundles if key not in self._pooled}
        self._reserved = ReservedPlaces(missing, config, cluster, on_phase, stop or threading.Event())
        self._started: dict[Actor, Reference] = {}  # answered once the actor's process is up, or has failed to be

    def spawn(self, role: str, index: int) -> Actor:
        actor, key = Actor(role, index), (role, index)
        if self._pool is not None and key in self._pooled:
            actor.place = self._pool.take(key)
        else:
            actor.place = self._reserved.start(key)
        self._begin(actor)
        return actor

    def build(self, actor: Actor, factory: Callable[[], object]) -> Reference:
        return actor.place.call.remote(BUILD, factory)

    def respawn(self, actor: Actor) -> None:
        key = (actor.role, actor.index)
        if self._pool is not None and key in self._pooled:
            actor.place = self._pool.restart(key)
        else:
            ray.kill(actor.place, no_restart=True)
            actor.place = self._reserved.start(key)
        self._begin(actor)

    def _begin(self, actor: Actor) -> None:
        self._started[actor] = actor.place.busy_s.remote()
        actor.place.take_turns.remote((actor.role, actor.index) in self._in_turns)

    def call(self, actor: Actor, method: str, *args: Any, num_returns: int = 1) -> Any:
        return actor.place.call.options(num_returns=num_returns).remote(method, *args)

    def get(self, references: Sequence[Reference], timeout_s: float) -> list[Any]:
        try:
            return ray.get(list(references), timeout=timeout_s)
        except GetTimeoutError as error:
            raise ActorFailed("timeout", f"no answer within {timeout_s:.0f} s") from error
        except RayTaskError as error:
            cause = error.cause  # the first one's, however many calls it was an argument of
            if isinstance(cause, CallError):
                actor = next((a for a in self._started if str(a) == cause.label), None)
                message = f"{cause.label}: {cause.message}"
                raise ActorFailed("application_error", message, cause.error_type, actor) from error
            raise ActorFailed("actor_died", str(cause)) from error  # an argument was lost with the actor that made it
        except RayError as error:
            raise ActorFailed("actor_died", str(error)) from error

    def failing(self, actors: Sequence[Actor], busy_limit_s: float) -> list[Actor]:
        starting = [self._started[actor] for actor in actors]
        ray.wait(starting, num_returns=len(starting), timeout=busy_limit_s)  # importing torch is no silence
        # Asked by a process of its own: from here the question would queue behind calls that wait for their arguments.
        busy_s = ray.get(ray.remote(num_cpus=0)(_ask).remote([actor.place for actor in actors]))
        return [actor for actor, seconds in zip(actors, busy_s) if seconds is None or seconds > busy_limit_s]

    def close(self) -> None:
        for actor in self._started:
            if (actor.role, actor.index) in self._reserved:
                ray.kill(actor.place, no_restart=True)
        self._started.clear()
        self._reserved.close()
        if self._pool is not None:
            self._pool.settle()


def _ask(places: list[Any]) -> list[float | None]:
    """For how long each actor has been busy with one call; None for one that is dead or does not answer."""
    pings = [place.busy_s.remote() for place in places]
    ready, _ = ray.wait(pings, num_returns=len(pings), timeout=_PING_TIMEOUT_S)
    answers: list[float | None] = []
    for ping in pings:
        try:
            answers.append(ray.get(ping) if ping in ready else None)
        except RayError:  # not RayActorError alone: one that ran out of memory is gone too
            answers.append(None)
    return answers


def _plan(config: ClusterConfig, num_particles: int, cluster: Cluster) -> dict[Key, dict[str, float]]:
    """The bundles of ``plan_bundles`` by role and index."""
    bundles = plan_bundles(config, num_particles, cluster)
    particles, scores = enumerate(bundles[:num_particles]), enumerate(bundles[num_particles:])
    return {("particle", i): bundle for i, bundle in particles} | {("score", i): bundle for i, bundle in scores}


def actor_environment(resources: dict[str, float]) -> dict[str, str]:
    """Environment of one actor: threads, allocator, and no GPU in sight where none was asked for."""
    environment = _ACTOR_ENVIRONMENT | _ALLOCATOR
    if resources.get("GPU"):
        environment = environment | {name: os.environ.get(name, value) for name, value in GPU_ALLOCATOR.items()}
    else:
        environment = environment | {"CUDA_VISIBLE_DEVICES": ""}  # Ray leaves all GPUs visible to an actor without one
    numba_cache = os.environ.get("NUMBA_CACHE_DIR")
    return environment | ({"NUMBA_CACHE_DIR": numba_cache} if numba_cache else {})


def check_gpu(label: str) -> None:
    """``ValueError`` naming the field where torch sees none of the GPU that Ray gave an actor: it would hold the GPU
    and compute on a core.
    """
    if torch.cuda.is_available() or os.environ.get(MADE_UP_GPUS):
        return
    raise ValueError(
        f"gpus_per_{label.split()[0]}: Ray gave {label} a GPU on {platform.node()}, where torch {torch.__version__} "
        "sees none; `raydream doctor` says there what is wrong, or give it none"
    )


def _warm_up(kernels: str) -> None:
    """Fills this node's cache of compiled kernels, lest all actors compile them at once."""
    if need_cuda(kernels):
        return  # they are for the nodes with GPUs, of which this may be none
    if load_backend(kernels, own_device().type).name == "numba":
        from raydream.backend.cpu import warm_up

        warm_up()
