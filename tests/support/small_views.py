"""View sets drawn by hand: flat shapes in known colours, whose fronts are wide and whose sides are narrow."""

import torch

from raydream.config.train import GateConfig, StageSettings, TrainConfig, UnetConfig, VaeConfig, WordsConfig
from raydream.views.view_set import ObjectCard, ViewSet

SIZE_PX, NUM_VIEWS = 32, 12
SHAPES = ("ball", "crate", "sword")
_COLOURS = ((200, 30, 30), (40, 90, 200), (40, 150, 60), (128, 128, 128))


def small_views(assets_per_noun: int = 6, licence: str = "CC0-1.0") -> ViewSet:
    """Discs, squares and thin upright bars. Every second crate is half as wide from its sides, with a known front."""
    cards, rgb, alpha = [], [], []
    azimuth = torch.arange(NUM_VIEWS) * 30.0
    for noun in SHAPES:
        for number in range(assets_per_noun):
            colour = torch.tensor(_COLOURS[number % len(_COLOURS)], dtype=torch.uint8)
            has_front = noun == "crate" and number % 2 == 0
            cards.append(
                ObjectCard(f"{noun}-{number}", (f"a {noun}, mostly red", f"a plain {noun}"), (), licence, has_front)
            )
            narrow = [has_front and 45 < angle % 180 < 135 for angle in azimuth.tolist()]
            masks = torch.stack([_mask(noun, from_the_side, number) for from_the_side in narrow])
            alpha.append(masks[..., None] * 255)
            rgb.append(masks[..., None] * colour)
    shade = torch.full((len(cards), NUM_VIEWS, SIZE_PX, SIZE_PX, 1), 230, dtype=torch.uint8)
    angles = azimuth.expand(len(cards), -1).contiguous()
    return ViewSet(tuple(cards), torch.stack(rgb), torch.stack(alpha), shade, angles, torch.zeros_like(angles))


def _mask(noun: str, from_the_side: bool, number: int) -> torch.Tensor:
    place = torch.arange(SIZE_PX) - (SIZE_PX - 1) / 2
    y, x = torch.meshgrid(place, place, indexing="ij")
    size = 9.0 + number % 3
    match noun:
        case "ball":
            inside = x.square() + y.square() < size**2
        case "crate":
            inside = (x.abs() < (size / 2 if from_the_side else size)) & (y.abs() < size)
        case _:
            inside = (x.abs() < 2.5) & (y.abs() < size + 3)
    return inside.byte()


def small_config(vae_steps: int, unet_steps: int) -> TrainConfig:
    """Seconds of training: 32 px, 8 x 8 latents, a UNet of two levels."""
    vae = StageSettings(num_steps=vae_steps, batch_size=8, lr=2e-3, warm_up_steps=5, ema_decay=0.9)
    unet = StageSettings(num_steps=unet_steps, batch_size=8, lr=2e-3, warm_up_steps=5, ema_decay=0.9)
    return TrainConfig(
        words=WordsConfig(min_assets=4),
        vae=VaeConfig(channels=(8, 16, 16), norm_groups=8, stage=vae),
        unet=UnetConfig(
            channels=(32, 64), norm_groups=8, text_width=32, text_layers=1, text_heads=2, num_tokens=24, stage=unet
        ),
        gate=GateConfig(sample_steps=3),
        bfloat16="off",
        log_every_steps=1,
    )
