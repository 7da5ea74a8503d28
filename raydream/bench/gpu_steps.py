"""Parts on a GPU that are about whole steps: the score model for several particles, and a step as threestudio composes
it beside ours in the same run.
"""

from collections.abc import Callable

import torch

from raydream.bench import sd21
from raydream.bench.gpu_models import inputs, least_tflop
from raydream.bench.parts import Bench, Found
from raydream.camera import orbit_cameras
from raydream.config.actors import score_config
from raydream.config.presets import make_preset
from raydream.config.strict_json import apply_overrides
from raydream.diffusion.graphs import CudaRecorder, Record
from raydream.diffusion.lora import LoraDenoiser
from raydream.diffusion.vae import VaeCodec
from raydream.distill.messages import Message, pack_views
from raydream.distill.score import Score
from raydream.types import Render, Views

_TEXTS = 2  # of guidance: the prompt and the negative one


def score(bench: Bench, found: Found) -> None:
    """``guide`` and ``fit`` from messages to messages, for some numbers of particles of one view each."""
    least, records = least_tflop(bench), dict[str, Record | None]({"": None})
    if bench.device.type == "cuda":
        records |= {", graphs": CudaRecorder()}
    for number in bench.sizes.particles:
        run = apply_overrides(make_preset("sd21", None), [f"n={number}", "cluster.wire_dtype=float32"])
        for word, record in records.items():
            config = score_config(run, 0, 0)
            model = sd21.random_score(config, bench.sizes.unet, bench.half, bench.device, record)
            guided, fitted = (bench.seconds_of(work) for work in _calls(bench, model, number))
            work = number * (_TEXTS * least["frozen"] + least["LoRA"] + least["fit"])
            told = bench.rate(work, guided + fitted)
            told |= {"guide_ms": round(1e3 * guided, 2), "fit_ms": round(1e3 * fitted, 2)}
            peaks = [bench.peak_gib(call) or 0.0 for call in _calls(bench, model, number)]
            found[f"n {number}{word}"] = told | {"peak_gib": max(peaks)}


def _calls(bench: Bench, model: Score, number: int) -> tuple[Callable[[], object], Callable[[], object]]:
    def guide() -> object:
        return model.guide(model.step, "rgb", range(number), *[_message(bench, model.step)] * number)

    def fit() -> object:
        return model.fit(model.step, range(number), *[_message(bench, model.step)] * number)

    return guide, fit


def _message(bench: Bench, step: int) -> Message:
    size = bench.sizes.latent_px
    azimuth, elevation, distance, fov = (torch.tensor([value]) for value in (30.0, 15.0, 1.2, 50.0))
    cameras = orbit_cameras(azimuth, elevation, distance, fov, 1, 1)
    where = (cameras.c2w, cameras.fov_y_deg, cameras.azimuth_deg, cameras.elevation_deg)
    return pack_views({"rgb": Views(torch.zeros(1, 4, size, size), *where)}, step, "float32")


def composition(bench: Bench, found: Found) -> None:
    """One particle's step after its render, as we compose it and as threestudio does: its LoRA in float32, asked with
    and without the text for guidance of its own, and a decoded picture that nothing looks at.
    """
    sizes = bench.sizes
    frozen, base, others = (sd21.random_denoiser(sizes.unet, bench.half, bench.device) for _ in range(3))
    codec = sd21.random_codec(sizes.vae, sizes.image_px, False, bench.half, bench.device)
    own, whole = LoraDenoiser(base, 4, seed=0), LoraDenoiser(others, 4, seed=0, hastened=False)

    def step(lora: LoraDenoiser, texts_of_lora: int, decodes: bool) -> None:
        latents = _encoded(bench, codec)
        with torch.no_grad():
            frozen.eps(*inputs(bench, _TEXTS))
            lora.eps(*inputs(bench, texts_of_lora))
            if decodes:
                codec.decode(latents)
        latents.float().sum().backward()
        loss = lora.predict(*inputs(bench, 1)).float().square().mean()
        torch.autograd.grad(loss, list(lora.trainable().values()), allow_unused=True)

    ours = bench.seconds_of(lambda: step(own, 1, False))
    theirs = bench.seconds_of(lambda: step(whole, _TEXTS, True))
    found |= {
        "ours_ms": round(1e3 * ours, 2),
        "threestudio_ms": round(1e3 * theirs, 2),
        "times": round(theirs / ours, 3),
    }


def _encoded(bench: Bench, codec: VaeCodec) -> torch.Tensor:
    size = bench.sizes.image_px
    pixels = torch.rand(1, size, size, 3, device=bench.device, requires_grad=True)
    flat = pixels[..., :1]
    return codec.encode(Render(pixels, pixels, flat, flat), torch.Generator())
