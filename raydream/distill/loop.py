"""The single-controller loop: who is called with what, in which order, and what happens when one of them is lost.

The controller handles references, never tensors. It runs ahead of the figures that come back by ``_LAG`` steps, so
that no actor waits for it. On a failure everybody goes back to the last checkpoint and the same steps are taken again.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from raydream.cluster.runtime import Actor, ActorFailed, Reference, Runtime
from raydream.config.actors import particle_config, score_config
from raydream.config.run import PREVIOUS, RunConfig, StageConfig
from raydream.distill.particle import make_particle
from raydream.distill.recovery import Failure, GiveUp, decide
from raydream.distill.score import make_score
from raydream.store.run_folder import FileDigest, RunFolder

_log = logging.getLogger(__name__)
_LAG = 2
_LEFT_OUT = "non_finite/"  # how names of figures begin that count views, particles and fits
PREVIEW_AZIMUTHS_DEG = (20.0, 200.0)
PREVIEW_ELEVATION_DEG = 15.0

Row = dict[str, float]


class RunFailed(Exception):
    """The run cannot go on; what was made until then is in the run folder."""


@runtime_checkable
class Observer(Protocol):
    """Whoever watches a run: a progress bar, TensorBoard, a test."""

    def phase(self, message: str) -> None: ...

    def row(self, step: int, row: Row) -> None: ...

    def preview(self, step: int, pictures: list[np.ndarray]) -> None: ...


@dataclass
class InFlight:
    """What a submitted step will answer with."""

    step: int
    figures: list[Reference]
    warmed_up: list[Reference]
    pictures: list[Reference]


class RunLoop:
    """Drives particles and score replicas through the stages of a run; steps are counted through all of them."""

    def __init__(self, runtime: Runtime, run: RunFolder, config: RunConfig, observer: Observer) -> None:
        if runtime.budget is not None:
            config = replace(config, cluster=config.cluster.within(runtime.budget))
        self.runtime, self.run_folder, self.config, self.observer = runtime, run, config, observer
        self.particles = [runtime.spawn("particle", i) for i in range(config.n)]
        self.scores = [runtime.spawn("score", i) for i in range(config.cluster.score_replicas)]
        self._built: int | None = None  # the stage that the actors were built for
        self._timeout_s = config.cluster.step_timeout_s
        self._history: list[Failure] = []
        self._flight: deque[InFlight] = deque()
        self._last_row_s = time.monotonic()

    @property
    def actors(self) -> list[Actor]:
        return [*self.scores, *self.particles]

    @property
    def stage(self) -> StageConfig:
        """The stage that the actors were built for."""
        assert self._built is not None
        return self.config.stages[self._built]

    def start(self, step: int) -> None:
        """Builds all actors and, for a resumed run, takes them to the checkpoint of ``step``."""

        def begin() -> None:
            self._set_up(self.actors, step)
            self._tell_hardware()

        self._recovering(step, begin)

    def train(self, start: int, stop: threading.Event) -> int:
        """Runs from ``start`` to the end of the last stage, or until ``stop`` is set; returns the step saved last."""
        step = start
        while step < self.config.num_steps and not stop.is_set():
            try:
                if self._built != self.config.stage_at(step):
                    self._set_up(self.actors, step)
                    self._observe_stage()
                step = self._train_until_checkpoint(step, stop)
            except ActorFailed as failure:
                step = self._recover(failure, self._oldest_step(step))
        return step

    def everywhere(self, step: int, method: str, calls: Callable[[Actor], tuple[Any, ...]]) -> list[Any]:
        """Calls a method of every particle that leaves its state alone, and repeats it all if one of them is lost."""
        result: list[Any] = []

        def run() -> None:
            result[:] = self.runtime.get(
                [self.runtime.call(p, method, *calls(p)) for p in self.particles], 10 * self._timeout_s
            )

        self._recovering(step, run)
        return result

    def _train_until_checkpoint(self, start: int, stop: threading.Event) -> int:
        every = self.config.output.checkpoint_every
        assert self._built is not None
        end = min(self.config.first_step(self._built + 1), (start // every + 1) * every)
        step, self._last_row_s = start, time.monotonic()
        while step < end and not stop.is_set():
            self._flight.append(self._submit(step))
            step += 1
            while len(self._flight) > _LAG:
                self._harvest()
        while self._flight:
            self._harvest()
        self._save(step)
        return step

    def _submit(self, step: int) -> InFlight:
        """The whole algorithm of a step: render, guide, apply, fit; only references pass through here."""
        call, n, replicas = self.runtime.call, self.config.n, len(self.scores)
        views = [call(particle, "render", step) for particle in self.particles]
        everyone, learns = list(range(n)), self.stage.learns
        warms_up = learns and self._is_first(step) and self.stage.learner.warm_up_fits > 0
        warmed_up = [call(score, "warm_up", step, everyone, *views) for score in self.scores] if warms_up else []
        pulls: list[list[Reference]] = [[] for _ in everyone]  # of each particle: one gradient for each branch
        guided = []
        for branch, replica in itertools.product(self.stage.branches, range(replicas)):
            members, score = everyone[replica::replicas], self.scores[replica]
            seen = [views[i] for i in members]
            *parts, figures = call(score, "guide", step, branch.render, members, *seen, num_returns=len(members) + 1)
            guided.append(figures)
            for member, part in zip(members, parts):
                pulls[member].append(part)
        applied = [call(particle, "apply", step, *pull) for particle, pull in zip(self.particles, pulls)]
        fitted = self._fit(step, everyone, views) if learns else []
        return InFlight(step, [*applied, *guided, *fitted], warmed_up, self._look(step))

    def _fit(self, step: int, everyone: list[int], views: list[Reference]) -> list[Reference]:
        """One replica learns alone; several sum their shares of each gradient, so that all make the same update."""
        call, replicas = self.runtime.call, len(self.scores)
        if replicas == 1:
            return [call(self.scores[0], "fit", step, everyone, *views)]
        rounds = self.stage.learner.fits_per_step
        fitted: list[Reference] = []
        for round_index in range(rounds):
            shares = [
                call(score, "fit_gradients", step, round_index, everyone[r::replicas], *views[r::replicas])
                for r, score in enumerate(self.scores)
            ]
            last = round_index == rounds - 1
            fitted += [call(score, "fit_update", step, last, *shares) for score in self.scores]
        return fitted

    def _look(self, step: int) -> list[Reference]:
        """Asks for pictures of all particles after this step, where one is due."""
        done = step + 1
        if done % self.config.output.preview_every and not self._is_first(done) and done != self.config.num_steps:
            return []
        where = (list(PREVIEW_AZIMUTHS_DEG), PREVIEW_ELEVATION_DEG, self.config.output.preview_px)
        return [self.runtime.call(particle, "look_at", *where) for particle in self.particles]

    def _harvest(self) -> None:
        """Waits for the oldest submitted step and writes down its figures."""
        flight = self._flight[0]
        values = self.runtime.get([*flight.figures, *flight.pictures, *flight.warmed_up], self._timeout_s)
        self._flight.popleft()
        row = _row(values[: len(flight.figures)])
        pictures = values[len(flight.figures) :][: len(flight.pictures)]
        now = time.monotonic()
        row["time/step_s"], self._last_row_s = now - self._last_row_s, now
        self.run_folder.append_metrics([{"step": flight.step, **row}])
        self.observer.row(flight.step, row)
        left_out = [f"{row[name]:.0f} {name.removeprefix(_LEFT_OUT)}" for name in row if name.startswith(_LEFT_OUT)]
        if left_out:
            self.observer.phase(f"step {flight.step}: not finite and left out: {', '.join(left_out)}")
        if pictures:
            self.observer.preview(flight.step + 1, pictures)

    def _save(self, step: int) -> None:
        """A checkpoint of all actors at ``step``; it exists once its manifest is written."""
        writers = [*self.particles, self.scores[0]]
        written = self.runtime.get(
            [self.runtime.call(actor, "save", self.run_folder.uri, step) for actor in writers], self._timeout_s
        )
        files: dict[str, FileDigest] = {name: entry for part in written for name, entry in part.items()}
        self.run_folder.commit_checkpoint(step, files)
        self.run_folder.prune_checkpoints(self.config.output.keep_checkpoints)

    def _is_first(self, step: int) -> bool:
        """Whether a stage begins with this step."""
        return step == self.config.first_step(self.config.stage_at(step))

    def _set_up(self, actors: list[Actor], step: int) -> None:
        """Makes ``actors`` ready and takes everybody to ``step``: to its checkpoint, or to the beginning of its stage.

        All of them are built anew where that is another stage than they were built for.
        """
        stage = self.config.stage_at(step)
        begins = self._is_first(step)
        fresh = self.actors if begins or stage != self._built else actors
        self._built = None
        calls = [self.runtime.build(actor, self._factory(actor, stage)) for actor in fresh]
        if begins:
            calls += self._begin(self.config.stages[stage], step)
        else:
            calls += [self.runtime.call(actor, "load", self.run_folder.uri, step) for actor in self.actors]
        self.runtime.get(calls, 10 * self._timeout_s)
        self._built = stage

    def _factory(self, actor: Actor, stage: int) -> Callable[[], object]:
        if actor.role == "particle":
            return partial(make_particle, particle_config(self.config, stage, actor.index))
        return partial(make_score, score_config(self.config, stage, actor.index))

    def _begin(self, stage: StageConfig, step: int) -> list[Reference]:
        """The calls by which newly built actors take over what a stage starts from."""
        if not stage.start:
            return []
        uri, at = (self.run_folder.uri, step) if stage.start == PREVIOUS else other_run(stage.start, self.config.n)
        return [self.runtime.call(actor, "start_from", uri, at) for actor in self.actors]

    def _tell_hardware(self) -> None:
        """What each actor computes on: "particles 0-7: cuda (NVIDIA H100), kernels cuda; score 0: cpu"."""
        calls = [self.runtime.call(actor, "hardware") for actor in self.actors]
        alike: dict[tuple[str, str], list[int]] = {}
        for actor, hardware in zip(self.actors, self.runtime.get(calls, self._timeout_s)):
            alike.setdefault((actor.role, hardware), []).append(actor.index)
        self.observer.phase("; ".join(f"{_named(role, who)}: {hardware}" for (role, hardware), who in alike.items()))

    def _observe_stage(self) -> None:
        assert self._built is not None
        number, num_stages = self._built + 1, len(self.config.stages)
        self.observer.phase(f"stage {number} of {num_stages}, {self.stage.name}: {self.stage.num_steps} steps")

    def _recovering(self, step: int, action: Callable[[], None]) -> None:
        while True:
            try:
                return action()
            except ActorFailed as failure:
                if self._recover(failure, step) < step:
                    raise RunFailed(f"the checkpoint of step {step} is damaged; resume makes it again") from failure

    def _recover(self, failure: ActorFailed, step: int) -> int:
        """Restarts what is broken, rolls everybody back and returns the step to go on from. Raises ``RunFailed``."""
        while True:
            self._flight.clear()
            broken = self._decide(failure, step)
            try:
                for actor in broken:
                    self.runtime.respawn(actor)
                checkpoint = self.run_folder.latest_checkpoint()
                back_to = checkpoint.step if checkpoint else 0
                self.run_folder.truncate_metrics(back_to)
                self._set_up(broken, back_to)
            except ActorFailed as again:
                failure = again
                continue
            self.observer.phase(f"rolled back to step {back_to}, going on")
            return back_to

    def _decide(self, failure: ActorFailed, step: int) -> list[Actor]:
        """The actors to restart; raises ``RunFailed`` where it is hopeless."""
        # whose call raised is known, and alive; else half the time: who made the others wait for so long began his call
        # after the wait had begun
        raised = failure.kind == "application_error" and failure.actor is not None
        broken = [] if raised else self.runtime.failing(self.actors, self._timeout_s / 2)
        blamed = broken or [failure.actor or self.scores[0]]
        for actor in blamed:
            kind = "actor_died" if broken and failure.kind != "timeout" else failure.kind
            seen = Failure(kind, actor.role, actor.index, step, failure.error_type, failure.message)  # type: ignore[arg-type]
            decision = decide(self.config.cluster, self._history, seen)
            self._history.append(seen)
            if isinstance(decision, GiveUp):
                raise RunFailed(decision.reason) from failure
            self.observer.phase(f"{actor} failed at step {step} ({kind}); restarting in {decision.delay_s:.0f} s")
            _log.warning("%s failed at step %d: %s", actor, step, failure.message)
            time.sleep(decision.delay_s)
        return blamed

    def _oldest_step(self, step: int) -> int:
        return self._flight[0].step if self._flight else step


def other_run(uri: str, num_particles: int) -> tuple[str, int]:
    """The run that a stage starts from and the step of its last checkpoint; ``ValueError`` naming ``stages`` where
    there is none, or where it has fewer particles.
    """
    run = RunFolder.open(uri)
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        raise ValueError(f"stages: start: {uri!r} has no checkpoint; name a run that has one, or begin anew")
    held = sum(name.startswith("particle_") for name in checkpoint.files)
    if held < num_particles:
        raise ValueError(f"stages: start: {uri!r} has {held} particles, this run has {num_particles}; give --n {held}")
    return run.uri, checkpoint.step


def _named(role: str, indices: list[int]) -> str:
    """ "score 0", "particles 0-7" or "particles 0, 2, 3"."""
    if len(indices) == 1:
        return f"{role} {indices[0]}"
    first, last = indices[0], indices[-1]
    together = last - first == len(indices) - 1
    return f"{role}s {first}-{last}" if together else f"{role}s {', '.join(map(str, indices))}"


def _row(figures: list[Row]) -> Row:
    """Means of each figure over the actors that gave it, sums of the seconds and of what was left out."""
    names = dict.fromkeys(name for stats in figures for name in stats)
    values = {name: [stats[name] for stats in figures if name in stats] for name in names}
    summed = {name for name in names if name.endswith("_s") or name.startswith(_LEFT_OUT)}
    return {name: float((np.sum if name in summed else np.mean)(values[name])) for name in names}
