"""A whole run in little: three particles, an exact score with a learned reference, a few milliseconds a step."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raydream.cluster.runtime import BUILD, Actor, ActorFailed, LocalRuntime, Reference, Runtime
from raydream.config import strict_json
from raydream.config.cluster import Budget
from raydream.config.presets import exhibit
from raydream.config.run import RunConfig
from raydream.distill.loop import RunLoop
from raydream.store.run_folder import RunFolder

SMALL = (
    "prompt=a chair",
    "n=3",
    "cluster.runtime=local",
    "cluster.restart_backoff_s=0",
    "cluster.step_timeout_s=60",
    "prior.image_px=16",
    "prior.exhibit.assets=procedural",
    "prior.exhibit.num_modes=3",
    "prior.exhibit.supersample=1",
    "stages.0.scene.grid.num_levels=4",
    "stages.0.scene.grid.log2_table_size=8",
    "stages.0.scene.grid.base_resolution=4",
    "stages.0.scene.grid.max_resolution=16",
    "stages.0.scene.hidden_width=16",
    "stages.0.scene.samples_per_diagonal=24",
    "stages.0.scene.occupancy_resolution=8",
    "stages.0.scene.occupancy_every=2",
    "stages.0.camera.image_px=16",
    "stages.0.camera.views_per_particle=1",
    "stages.0.branches.0.t_min=0.02",
    "stages.0.branches.0.t_max=0.98",
    "stages.0.learner.unet_channels=[16,16]",
    "stages.0.learner.warm_up_fits=2",
    "output.checkpoint_every=3",
    "output.preview_every=3",
    "output.preview_px=16",
    "output.mesh_resolution=32",
    "output.mesh_max_faces=300",
    "output.texture_px=64",
    "output.turntable_frames=4",
    "output.turntable_px=32",
)


def small_config(*overrides: str, steps: int = 8) -> RunConfig:
    """Checkpoints at 3, 6 and the end; ``overrides`` are ``field=value``, as on the command line."""
    return strict_json.apply_overrides(exhibit(steps), [*SMALL, *overrides])


class Watch:
    """An observer that keeps what it is told; sets ``stop`` once it has seen the row of step ``stop_after``.

    ``deeds[step]`` is done once, when the row of that step is seen for the first time.
    """

    def __init__(self, stop_after: int | None = None, deeds: dict[int, Callable[[], None]] | None = None) -> None:
        self.stop, self._stop_after, self._deeds = threading.Event(), stop_after, dict(deeds or {})
        self.phases: list[str] = []
        self.steps: list[int] = []
        self.previews: dict[int, list[np.ndarray]] = {}

    def phase(self, message: str) -> None:
        self.phases.append(message)

    def row(self, step: int, row: dict[str, float]) -> None:
        self.steps.append(step)
        if step == self._stop_after:
            self.stop.set()
        self._deeds.pop(step, lambda: None)()

    def preview(self, step: int, pictures: list[np.ndarray]) -> None:
        self.previews[step] = pictures

    @property
    def num_restarts(self) -> int:
        return sum("restarting" in message for message in self.phases)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What befalls one call: the actor is killed just before it, or an exception of type ``error`` comes out of it.

    ``step`` None means whatever step; of the calls that fit, ``skip`` go well before.
    """

    role: str
    index: int
    method: str
    step: int | None = None
    error: str = ""
    skip: int = 0


class Ticket:
    """A reference as Ray has them: it can be passed on, and nothing else."""

    def __init__(self, value: Any) -> None:
        self.value = value


class WatchedRuntime:
    """``LocalRuntime`` with references that cannot be looked into, a record of all calls, and faults by script."""

    def __init__(self, *faults: Fault) -> None:
        self._local, self._faults = LocalRuntime(), list(faults)
        self.budget: Budget | None = None
        self.calls: list[tuple[str, int, str, int | None]] = []
        self.sent: list[Any] = []
        self.received: list[Any] = []
        self.rendered: dict[int, dict[int, dict[str, np.ndarray]]] = {}

    @property
    def num_faults_left(self) -> int:
        return len(self._faults)

    def spawn(self, role: str, index: int) -> Actor:
        return self._local.spawn(role, index)

    def build(self, actor: Actor, factory: Callable[[], object]) -> Reference:
        self.calls.append((actor.role, actor.index, BUILD, None))
        fault = self._due_fault(actor, BUILD, None)
        if fault is not None and fault.error:
            return Ticket(ActorFailed("application_error", f"{actor}: planted", fault.error, actor))
        if fault is not None:
            self._local.kill(actor)
        return Ticket(self._local.build(actor, factory))

    def respawn(self, actor: Actor) -> None:
        self._local.respawn(actor)

    def call(self, actor: Actor, method: str, *args: Any, num_returns: int = 1) -> Any:
        step = next((arg for arg in args if type(arg) is int), None)
        self.calls.append((actor.role, actor.index, method, step))
        self.sent += [arg for arg in args if not isinstance(arg, Ticket)]
        fault = self._due_fault(actor, method, step)
        if fault is not None:
            if fault.error:
                failed = ActorFailed("application_error", f"{actor}: planted", fault.error, actor)
                return Ticket(failed) if num_returns == 1 else (Ticket(failed),) * num_returns
            self._local.kill(actor)
        known = [arg.value if isinstance(arg, Ticket) else arg for arg in args]
        result = self._local.call(actor, method, *known, num_returns=num_returns)
        if method == "render" and isinstance(result, dict):
            self.rendered.setdefault(step or 0, {})[actor.index] = result
        return Ticket(result) if num_returns == 1 else tuple(Ticket(part) for part in result)

    def get(self, references: Sequence[Reference], timeout_s: float) -> list[Any]:
        values = self._local.get([ticket.value for ticket in references], timeout_s)
        self.received += values
        return values

    def failing(self, actors: Sequence[Actor], busy_limit_s: float) -> list[Actor]:
        return self._local.failing(actors, busy_limit_s)

    def close(self) -> None:
        self._local.close()

    def _due_fault(self, actor: Actor, method: str, step: int | None) -> Fault | None:
        for place, fault in enumerate(self._faults):
            if (fault.role, fault.index, fault.method) == (actor.role, actor.index, method):
                if fault.step not in (None, step):
                    continue
                if fault.skip == 0:
                    return self._faults.pop(place)
                self._faults[place] = dataclasses.replace(fault, skip=fault.skip - 1)
        return None


def new_run(folder: Path, config: RunConfig) -> RunFolder:
    """A run folder with the config in it, as the command line makes it."""
    return RunFolder.create(str(folder), strict_json.dumps(config))


def train(run: RunFolder, config: RunConfig, runtime: Runtime | None = None, watch: Watch | None = None) -> int:
    """The loop alone, from the newest checkpoint on, without exports and report; returns the step that was reached."""
    watch = watch or Watch()
    checkpoint = run.latest_checkpoint()
    start = checkpoint.step if checkpoint else 0
    run.truncate_metrics(start)
    loop = RunLoop(runtime or LocalRuntime(), run, config, watch)
    loop.start(start)
    return loop.train(start, watch.stop)


def checkpoint_bytes(run: RunFolder) -> dict[str, bytes]:
    """All files of the newest checkpoint."""
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    return {name: run.read_checkpoint_file(checkpoint.step, name) for name in checkpoint.files}


def timeless_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "cpu/"))} for row in run.read_metrics()]


def assert_same_end(run: RunFolder, undisturbed: RunFolder) -> None:
    """Both came to the same end, to the bit: every file of the last checkpoint, and every figure of every step."""
    assert run.latest_checkpoint() == undisturbed.latest_checkpoint()
    assert checkpoint_bytes(run) == checkpoint_bytes(undisturbed)
    assert timeless_metrics(run) == timeless_metrics(undisturbed)
