"""The loop of every training, in one of its workers: steps, checkpoints, metrics, pictures, and when to stop."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raydream.train.learner import Learner, ModuleT
from raydream.train.team import Team

MetricsRow = Mapping[str, float | int | str]
MetricsSink = Callable[[MetricsRow], None]


@dataclass(frozen=True)
class Worker:
    """Where one worker of a training runs and whom it tells its metrics; ``should_stop`` is asked between steps."""

    device: torch.device
    team: Team
    report: MetricsSink
    should_stop: Callable[[], bool]


@dataclass(frozen=True)
class Every:
    """How often something is done: every so many steps or, where those are 0, seconds."""

    steps: int = 0
    seconds: float = 0.0

    def due(self, step: int, since_s: float) -> bool:
        """Whether it is now, after a step, ``since_s`` after it was last done."""
        return step % self.steps == 0 if self.steps else since_s > self.seconds


@dataclass(frozen=True)
class Stage:
    """What differs between trainings. ``loss`` is of this worker's batch of a step; all workers ``save`` together and
    ``log`` each row of metrics; the first alone shows the running average. A training that must stop is shown as it is
    then only with ``shows_when_stopped``.
    """

    loss: Callable[[int], Tensor]
    save: Callable[[], None]
    show: Callable[[Mapping[str, Tensor]], None]
    log: MetricsSink
    log_every_steps: int
    save_every: Every
    show_every: Every
    shows_when_stopped: bool


def train(learner: Learner[ModuleT], stage: Stage, worker: Worker) -> bool:
    """Steps until the stage is done (True) or the worker must stop (False); a checkpoint is left either way."""
    before_s, started = learner.elapsed_s, time.monotonic()
    saved_s = shown_s = logged_s = started
    saved = shown = logged = learner.step
    stop = False

    def show() -> None:
        average = learner.averaged()
        if worker.team.rank == 0:
            stage.show(average)

    while learner.progress < 1 and not stop:
        loss = learner.update(lambda: stage.loss(learner.step))
        now = time.monotonic()
        wishes = (
            worker.should_stop(),
            stage.save_every.due(learner.step, now - saved_s),
            stage.show_every.due(learner.step, now - shown_s),
        )
        learner.elapsed_s, *agreed = worker.team.largest([before_s + now - started, *map(float, wishes)], worker.device)
        stop, must_save, must_show = (wish > 0 for wish in agreed)
        if learner.step % stage.log_every_steps == 0:
            num_samples = (learner.step - logged) * learner.settings.batch_size * worker.team.size
            stage.log(_row(learner, loss, num_samples / (now - logged_s)))
            logged, logged_s = learner.step, now
        if must_save:
            stage.save()
            saved, saved_s = learner.step, time.monotonic()
        if must_show:
            show()
            shown, shown_s = learner.step, time.monotonic()
    if learner.step > saved:
        stage.save()
    if learner.step > shown and (stage.shows_when_stopped or not stop):
        show()
    return not stop


def _row(learner: Learner[ModuleT], loss: float, samples_per_s: float) -> MetricsRow:
    return {
        "step": learner.step,
        "progress": round(learner.progress, 4),
        "loss": loss,
        "samples_per_s": round(samples_per_s, 2),
        "elapsed_s": round(learner.elapsed_s, 1),
    }
