"""Latent codecs: the VAE as diffusers has it, with gradients to the pixels only, and colour with opacity directly."""
# mypy: disable-error-code="attr-defined"
# diffusers stands in for each of its classes by one without attributes where torch is missing; mypy sees that one

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tiny_prior import make_tiny_prior
from torch import Tensor

from raydream.diffusion import latent
from raydream.diffusion.latent import LatentCodec, RgbaCodec, normal_latent, normal_picture, random_turn
from raydream.diffusion.vae import VaeCodec
from raydream.types import Render

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_prior(tmp_path_factory.mktemp("prior") / "tiny")


@pytest.fixture(scope="module")
def vae(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()


def render(size_px: int, generator: torch.Generator, background: float = 1.0) -> Render:
    opacity = torch.rand(2, size_px, size_px, 1, generator=generator)
    foreground = torch.rand(2, size_px, size_px, 3, generator=generator) * opacity
    return Render(foreground + background * (1 - opacity), foreground, opacity, opacity)


def of_rgb(rgb: Tensor) -> Render:
    return Render(rgb, rgb, rgb[..., :1], rgb[..., :1])


def vae_codec(folder: Path, size_px: int = 0, sample_posterior: bool = False) -> LatentCodec:
    return VaeCodec.load(folder, size_px, sample_posterior, torch.float32, CPU)


def test_the_mean_is_the_vaes_own(folder: Path, vae: AutoencoderKL, generator: torch.Generator) -> None:
    image = render(64, generator)
    pixels = image.rgb.permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    latents = vae_codec(folder).encode(image, generator)
    assert latents.shape == (2, 4, 16, 16)
    torch.testing.assert_close(latents, expected)


def test_a_sample_is_drawn_from_the_given_generator(
    folder: Path, vae: AutoencoderKL, generator: torch.Generator
) -> None:
    image, codec = render(64, generator), vae_codec(folder, sample_posterior=True)
    first, again, other = (codec.encode(image, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with torch.no_grad():
        posterior = vae.encode(image.rgb.permute(0, 3, 1, 2) * 2 - 1).latent_dist
        expected = posterior.sample(torch.Generator().manual_seed(1)) * vae.config.scaling_factor
    torch.testing.assert_close(first, expected)


def test_the_mean_does_not_touch_the_generator(folder: Path, generator: torch.Generator) -> None:
    image = render(64, generator)
    before = generator.get_state()
    vae_codec(folder).encode(image, generator)
    assert torch.equal(generator.get_state(), before)


def test_gradients_reach_the_pixels_and_nothing_else(
    folder: Path, vae: AutoencoderKL, generator: torch.Generator
) -> None:
    codec = VaeCodec(vae, 64, sample_posterior=False)
    image = render(64, generator)
    rgb = image.rgb.requires_grad_()
    codec.encode(of_rgb(rgb), generator).square().sum().backward()
    assert rgb.grad is not None
    assert rgb.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    assert all(value.grad is None and not value.requires_grad for value in vae.parameters())


def test_the_gradient_is_the_slope(folder: Path, generator: torch.Generator) -> None:
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").double()
    codec, image = VaeCodec(vae, 16, sample_posterior=False), render(8, generator)
    rgb = image.rgb.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: codec.encode(of_rgb(x), generator), rgb, fast_mode=True)


def test_small_renders_are_enlarged_as_interpolate_does(folder: Path, generator: torch.Generator) -> None:
    image = render(24, generator)
    large = F.interpolate(image.rgb.permute(0, 3, 1, 2), (64, 64), mode="bilinear", align_corners=False)
    same_size = of_rgb(large.permute(0, 2, 3, 1))
    codec = vae_codec(folder)
    torch.testing.assert_close(codec.encode(image, generator), codec.encode(same_size, generator), rtol=1e-4, atol=1e-4)


def test_large_renders_shrink_without_aliasing(generator: torch.Generator) -> None:
    fine = (torch.arange(64) % 2).float().expand(2, 64, 64)[..., None]  # one-pixel stripes: grey from afar
    striped = Render(fine.expand(-1, -1, -1, 3), fine.expand(-1, -1, -1, 3), torch.ones_like(fine), fine)
    latents = RgbaCodec(16).encode(striped, generator)
    assert latents.shape == (2, 4, 16, 16)
    assert latents[:, :3, :, 2:-2].abs().max() < 0.05


def test_decoding_is_the_vaes_own_and_keeps_no_graph(
    folder: Path, vae: AutoencoderKL, generator: torch.Generator
) -> None:
    latents = torch.randn(2, 4, 16, 16, generator=generator, requires_grad=True)
    rgb = vae_codec(folder).decode(latents)
    with torch.no_grad():
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(rgb, expected)
    assert not rgb.requires_grad


def test_a_round_trip_pulls_pixels_to_what_the_vae_sees(generator: torch.Generator) -> None:
    """The gradient by a pixel is its distance, shared by the views; what is seen is a constant, of its own size."""
    rgb = torch.rand(3, 8, 8, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    seen = torch.rand(3, 8, 8, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = latent.round_trip_loss(rgb, seen)
    gradient, through = torch.autograd.grad(loss, [rgb, seen], allow_unused=True)
    torch.testing.assert_close(gradient, (rgb - seen).detach() / 3)
    assert through is None
    plain = torch.full((1, 32, 32, 3), 0.25, dtype=torch.float64)
    torch.testing.assert_close(latent.round_trip_loss(plain, seen[:1]), 0.5 * (0.25 - seen[0]).square().sum())


def test_colour_and_opacity_directly(generator: torch.Generator) -> None:
    image = render(8, generator)
    latents = RgbaCodec(0).encode(image, generator)
    over_grey = image.foreground + 0.5 * (1 - image.opacity)
    torch.testing.assert_close(latents[:, :3].permute(0, 2, 3, 1), 2 * over_grey - 1)
    torch.testing.assert_close(latents[:, 3], 2 * image.opacity[..., 0] - 1)
    torch.testing.assert_close(RgbaCodec(0).decode(latents), over_grey)
    assert latents.abs().max() <= 1


def test_an_empty_render_is_grey_whatever_its_background(generator: torch.Generator) -> None:
    nothing = torch.zeros(1, 4, 4, 1)
    for background in (0.0, 1.0):
        empty = Render(torch.full((1, 4, 4, 3), background), nothing.expand(-1, -1, -1, 3), nothing, nothing)
        latents = RgbaCodec(0).encode(empty, generator)
        assert (latents[:, :3] == 0).all()
        assert (latents[:, 3] == -1).all()


def test_the_rgba_gradient_is_the_slope(generator: torch.Generator) -> None:
    image = render(6, generator)
    foreground, opacity = image.foreground.double().requires_grad_(), image.opacity.double().requires_grad_()

    def encode(foreground: Tensor, opacity: Tensor) -> Tensor:
        return RgbaCodec(4).encode(Render(image.rgb, foreground, opacity, image.depth), generator)

    assert torch.autograd.gradcheck(encode, (foreground, opacity))


@pytest.mark.slow
def test_the_direct_codec_does_without_diffusers() -> None:
    code = (
        "import sys, torch\nfrom raydream.diffusion import guidance, text\n"
        "from raydream.diffusion.latent import RgbaCodec\n"
        "RgbaCodec(0)\n"
        "print({'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    )
    root = Path(latent.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"


def normal_render() -> Render:
    """One view of 8 px: its left half looks along +x, half transparent; the rest is empty."""
    normal, opacity = torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 1)
    normal[:, :, :4, 0], opacity[:, :, :4] = 0.5, 0.5
    black = torch.zeros(1, 8, 8, 3)
    return Render(black, black, opacity, opacity, normal)


def test_normals_are_a_picture_on_black() -> None:
    picture = normal_picture(normal_render())
    expected = torch.zeros(1, 8, 8, 3)
    expected[:, :, :4] = 0.5 * torch.tensor([1.0, 0.5, 0.5])
    torch.testing.assert_close(picture.rgb, expected)
    torch.testing.assert_close(picture.foreground, expected)


def test_normals_and_opacity_are_a_latent(generator: torch.Generator) -> None:
    turn = random_turn(generator)
    torch.testing.assert_close(turn @ turn.T, torch.eye(3))
    assert float(torch.linalg.det(turn)) == pytest.approx(1.0)
    assert not torch.equal(turn, random_turn(generator))
    for size_px in (4, 8):
        latent = normal_latent(normal_render(), turn, size_px)
        assert latent.shape == (1, 4, size_px, size_px)
        half = size_px // 2
        torch.testing.assert_close(latent[0, :3, 0, :half], 0.5 * turn[:, :1].expand(3, half))
        torch.testing.assert_close(latent[0, 3, 0, :half], torch.full((half,), 0.5))
        assert (latent[..., half:] == 0).all()
