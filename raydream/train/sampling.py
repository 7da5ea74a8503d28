"""Samples of what a training has learned, and pictures of them."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from raydream.diffusion.guidance import classifier_free


@torch.no_grad()
def sample(
    answers: Callable[[Float[Tensor, "view 4 h w"], Int[Tensor, ""]], tuple[Tensor, Tensor]],
    scheduler: Mapping[str, Any],
    shape: tuple[int, ...],
    cfg_scale: float,
    num_steps: int,
    generator: torch.Generator,
    device: torch.device,
) -> Float[Tensor, "view 4 h w"]:
    """New latents by DPM-Solver++ with classifier-free guidance. ``answers`` takes all latents twice, one after the
    other, and gives the negative and the positive answer to them, in the parametrisation that ``scheduler`` names.
    """
    solver = DPMSolverMultistepScheduler.from_config(dict(scheduler))
    solver.set_timesteps(num_steps, device=device)
    latents = torch.randn(shape, generator=generator).to(device)
    for t in solver.timesteps:
        negative, positive = answers(torch.cat([latents, latents]), t)
        latents = solver.step(classifier_free(negative, positive, cfg_scale), t, latents, return_dict=False)[0]
    return latents


def png_grid(images: Float[Tensor, "view h w 3"], columns: int, zoom: int = 1) -> bytes:
    """Images in [0, 1] as one PNG, row by row, on white."""
    view, height, width, _ = images.shape
    rows = -(-view // columns)
    canvas = torch.ones(rows * columns, height, width, 3)
    canvas[:view] = images
    sheet = canvas.view(rows, columns, height, width, 3).permute(0, 2, 1, 3, 4).reshape(rows * height, -1, 3)
    pixels = (sheet * 255).round().byte().repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()
