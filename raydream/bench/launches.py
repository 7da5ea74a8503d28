"""What each call of a step asks of a GPU, counted on a machine that has none: launches, waits and bytes.

``python -m raydream.bench.launches PRESET`` prints JSON. In a process of its own with ``TRITON_INTERPRET=1``, since
triton decides at its import whether it interprets. The layers are those of the preset's prior, so the launches are its
own; a Stable Diffusion is a tenth as wide, and pictures are small before they are encoded, for a CPU's sake. Launches
are calls of torch's operations and of our kernels; one may be a few kernels, and attention counts as one. So does a
CUDA graph; with ``cluster.graphs=false`` what is in them is counted.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from raydream.backend import cuda
from raydream.backend.cuda import CudaBackend
from raydream.bench import sd21
from raydream.bench.figures import CallCount
from raydream.bench.pretend_device import DEVICE, Tally, pretend_device
from raydream.config.actors import ParticleConfig, ScoreConfig, particle_config, score_config
from raydream.config.branches import BranchConfig
from raydream.config.presets import make_preset
from raydream.config.run import RunConfig
from raydream.config.strict_json import apply_overrides
from raydream.diffusion.graphs import Record
from raydream.diffusion.latent import LatentCodec
from raydream.diffusion.layout import latent_px
from raydream.distill import score as score_module
from raydream.distill.branches import Branch
from raydream.distill.messages import Message
from raydream.distill.particle import Particle
from raydream.distill.score import Score, make_score
from raydream.priors import exhibit
from raydream.priors.find import resolve_agp_prior
from raydream.priors.geometric import load_agp
from raydream.priors.kinds import prior_kind
from raydream.scene.kinds import make_scene
from raydream.seeds import generator

_STEPS = 2  # the first fills what is kept for good
_NUM_PARTICLES = 2
_SD21_PX = 128  # of pictures, instead of 512
# An operation costs the interpreter the same however wide it is, so programs take more at once here than on a GPU.
WIDE = {
    "SAMPLES_PER_PROGRAM": 4096,
    "RAYS_PER_PROGRAM": 256,
    "RAYS_PER_WALK": 256,
    "INTERVALS_PER_WALK": 64,
    "PIXELS_PER_PROGRAM": 256,
    "PROGRAMS_WANTED": 160,  # two for each of the faces
}
_SKIPPED = frozenset({"depth_test"})  # what an exhibit looks like decides nothing here, and takes minutes
_SMALL = (
    f"n={_NUM_PARTICLES}",
    "stages.0.camera.image_px=8",
    "stages.0.camera.views_per_particle=1",
    "stages.0.scene.samples_per_diagonal=16",
    "stages.0.scene.occupancy_resolution=8",
    "stages.0.scene.grid.log2_table_size=8",
    "stages.0.scene.grid.num_levels=2",
    "stages.0.scene.occupancy_every=1",
    "stages.0.scene.bfloat16=off",  # autocast knows real devices only
    "stages.0.learner.bfloat16=off",
    "prior.dtype=float32",
)
WIRE = {  # who waits for an answer that leaves the actor
    "distill.messages.to_wire",
    "distill.messages.read_figures",
    "distill.score.guide",
    "distill.score.fit",
}


def count_elsewhere(preset: str, overrides: tuple[str, ...] = ()) -> list[CallCount]:
    """``count`` in a process of its own; ``RuntimeError`` with its words where it fails."""
    command = [sys.executable, "-m", "raydream.bench.launches", preset, *overrides]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return [CallCount(**row) for row in json.loads(done.stdout)]


def count(preset: str, overrides: tuple[str, ...] = ()) -> list[CallCount]:
    """Each call of a step of the preset, for two particles of one view; where a reference learns, also as two
    replicas do it.
    """
    run = apply_overrides(make_preset(preset, None), [*_SMALL, *overrides])
    recorded = run.cluster.graphs and run.prior.mixture is None
    files = _Files(run) if preset != "sd21" and run.prior.kind == "diffusers" else None
    with patch.dict(vars(cuda), WIDE), pretend_device(_SKIPPED) as tally:
        return _Counted(preset, run, files, tally, tally.record if recorded else None).steps()


class _Files:
    """What a prior's files hold, still with the host: libraries that read files know no pretend device."""

    def __init__(self, run: RunConfig) -> None:
        config, kind, cpu = score_config(run, 0, 0), prior_kind(run.prior), torch.device("cpu")
        self.codec = kind.codec(cpu)
        self.parts: list[tuple[BranchConfig, Any, Any]] = []
        for branch in config.branches:
            if branch.render == "ccm":
                denoiser, texts, _ = load_agp(branch, config, cpu)
            else:
                denoiser, _ = kind.denoiser(config.prompt, config.backend, cpu)
                texts = kind.texts(config.prompt, config.negative_prompt, branch, config.backend, cpu)
            self.parts.append((branch, denoiser, texts))

    def score(self, config: ScoreConfig, record: Record | None) -> Score:
        """A score model of them on the device."""
        branches, learner = [], None
        for branch, denoiser, texts in self.parts:
            torch.nn.Module.to(denoiser.unet, device=DEVICE)
            denoiser.unet.set_attn_processor(AttnProcessor2_0())  # not that of small UNets on a CPU
            model = denoiser.model if branch.render == "ccm" else denoiser
            model.alphas_cumprod = model.alphas_cumprod.to(DEVICE)
            texts = copy.copy(texts)
            texts._embeddings = {text: value.to(DEVICE) for text, value in texts._embeddings.items()}
            branches.append(Branch(branch, denoiser, texts, model.alphas_cumprod))
            if branch.learns:
                init = generator(config.seed, "learner", 0, 0)
                learner = prior_kind(config.prior).learner(denoiser, config.learner, init)
        return Score(config, DEVICE, branches, learner, record)


class _Counted:
    """A particle and a score model on the pretend device, and what their calls took."""

    def __init__(self, preset: str, run: RunConfig, files: _Files | None, tally: Tally, record: Record | None) -> None:
        self._preset, self._tally, self._found = preset, tally, dict[str, CallCount]()
        particle, score = particle_config(run, 0, 0), score_config(run, 0, 0)
        codec: LatentCodec
        if files is not None:
            torch.nn.Module.to(files.codec.vae, device=DEVICE)  # type: ignore[attr-defined]
            codec, self._score = files.codec, files.score(score, record)
        elif preset == "sd21":
            sampled = run.prior.sample_posterior
            codec = sd21.random_codec(sd21.NARROW_VAE, _SD21_PX, sampled, torch.float32, DEVICE)
            self._score = sd21.random_score(score, sd21.NARROW_UNET, torch.float32, DEVICE, record)
        else:
            codec, self._score = prior_kind(run.prior).codec(DEVICE), _exhibit_score(score)
        self._particle = _particle(particle, codec)

    def steps(self) -> list[CallCount]:
        """A few steps; what was counted in the last."""
        for step in range(_STEPS):
            self._step(step)
        return list(self._found.values())

    def _step(self, step: int) -> None:
        particle, score, everyone = self._particle, self._score, range(_NUM_PARTICLES)
        message: Message = self._called("render", lambda: particle.render(step))
        messages, pulls = [message] * _NUM_PARTICLES, []
        for render in score.branches:
            name = "guide" if render == "rgb" else "guide (maps)"
            answers = self._called(name, partial(score.guide, step, render, everyone, *messages))
            pulls.append(np.asarray(answers[0]))
        self._called("apply", lambda: particle.apply(step, *pulls))
        if score.learned:
            share = self._called("fit_gradients", lambda: score.fit_gradients(step, 0, everyone, *messages))
            self._called("fit_update", lambda: score.fit_update(step, False, share, share))
            self._called("fit", lambda: score.fit(step, everyone, *messages))

    def _called(self, name: str, call: Callable[[], Any]) -> Any:
        tally = self._tally
        tally.clear()
        answer = call()
        self._found[name] = CallCount(
            preset=self._preset,
            call=name,
            launches=tally.launches.total(),
            waits=sum(number for asker, number in tally.waits.items() if asker not in WIRE),
            wire_waits=sum(number for asker, number in tally.waits.items() if asker in WIRE),
            copies=tally.to_device.total() + tally.to_host.total(),
            to_device_bytes=tally.to_device_bytes.total(),
            to_host_bytes=tally.to_host_bytes.total(),
            askers={asker: number for asker, number in tally.waits.items() if asker not in WIRE},
        )
        return answer


def _particle(config: ParticleConfig, codec: LatentCodec) -> Particle:
    def draws(purpose: str, step: int) -> torch.Generator:
        return generator(config.seed, purpose, config.index, step)

    scene = make_scene(config.stage, CudaBackend(), DEVICE, draws)
    maps = config.stage.branch("ccm")
    map_px = latent_px(resolve_agp_prior(maps.geometric_prior.prior, config.prior.source)) if maps else 0
    return Particle(config, DEVICE, scene, codec, map_px, "cuda")


def _exhibit_score(config: ScoreConfig) -> Score:
    with (
        patch.object(score_module, "own_device", lambda: DEVICE),
        patch.object(exhibit, "load_backend", lambda *_: CudaBackend()),
    ):
        return make_score(config)


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(row) for row in count(sys.argv[1], tuple(sys.argv[2:]))]))
