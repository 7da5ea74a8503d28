"""How much of a fine-tuning's time is not the model: the job's steps against bare ones on the same batches."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from raydream.config.agp import AgpConfig
from raydream.priors.agp import AgpDenoiser
from raydream.train.agp.samples import SampleSource
from raydream.train.agp.train import AgpBatch, agp_loss, draw_batch
from raydream.train.engine import make_optimizer
from raydream.train.learner import Learner
from raydream.train.team import Team
from raydream.train.texts import CachedTexts


@dataclass(frozen=True)
class Throughput:
    """Samples a second of this process's own time (its threads' CPU time on a CPU, else the clock's), medians."""

    job: float
    bare: float

    @property
    def overhead(self) -> float:
        """By how much longer a step of the job takes; 0.1 is 10 %."""
        return self.bare / self.job - 1


def compare_throughput(
    config: AgpConfig, prior: Path, source: SampleSource, device: torch.device, num_rounds: int = 5, num_steps: int = 4
) -> Throughput:
    """Steps of the job (draw samples, captions, noise; texts; update; running average) and of the bare model (forward,
    backward, clipping, AdamW on the very same batches, made before), block by block in turns, after one of each.
    """
    texts = CachedTexts.load(prior, device)
    denoiser, twin = (AgpDenoiser.from_prior(prior, config.model.rank, config.seed, device) for _ in range(2))

    def batch(step: int) -> AgpBatch:
        return draw_batch(config, denoiser, texts, source, 0, step)

    learner = Learner(denoiser.unet, config.stage, Team(), denoiser.trainable())
    parameters = list(twin.trainable().values())
    optimizer = make_optimizer(parameters, config.stage)
    batches = [batch(step) for step in range(num_steps)]

    def job() -> None:
        for step in range(num_steps):
            learner.update(lambda step=step: agp_loss(denoiser, batch(step), config.bfloat16))  # type: ignore[misc]

    def bare() -> None:
        for each in batches:
            agp_loss(twin, each, config.bfloat16).backward()
            nn.utils.clip_grad_norm_(parameters, config.stage.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    times: dict[Callable[[], None], list[float]] = {job: [], bare: []}
    for number in range(num_rounds + 1):
        for work in (job, bare) if number % 2 else (bare, job):
            times[work].append(_seconds(work, device))
    size = num_steps * config.stage.batch_size
    return Throughput(*(size / statistics.median(times[work][1:]) for work in (job, bare)))


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.monotonic
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begin
