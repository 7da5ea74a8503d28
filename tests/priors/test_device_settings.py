"""What a prior's networks are computed in on each kind of device, and what torch is told there."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_config
from tiny_prior import TEXT_WIDTH, make_tiny_prior
from torch import Tensor

from raydream.config.presets import diffusers, embedded, sd21
from raydream.config.prior import PriorConfig
from raydream.diffusion import denoiser, vae
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.vae import VaeCodec
from raydream.precision import memory_format
from raydream.priors.diffusers_folder import unet_dtype, vae_dtype
from raydream.runs import check_run
from raydream.types import Render

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
CARDS = [((6, 1), SINGLE), ((7, 0), HALF), ((7, 5), HALF), ((8, 0), BRAIN), ((8, 9), BRAIN), ((9, 0), BRAIN)]


def pretend_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """As torch speaks of one; cards before A100 emulate bfloat16."""

    def has_bfloat16(including_emulation: bool = True) -> bool:
        return including_emulation or capability >= (8, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(("capability", "expected"), CARDS)
def test_a_card_gets_the_precision_that_it_is_fast_at(
    capability: tuple[int, int], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_card(monkeypatch, capability)
    auto = diffusers().prior
    for device in (CUDA, META):  # what a run takes is reckoned on the meta device
        assert (unet_dtype(auto, device), vae_dtype(auto, device)) == (expected, expected)
    last = torch.contiguous_format if expected == SINGLE else torch.channels_last
    assert memory_format(expected, CUDA) == last
    for named in ("float32", "float16", "bfloat16"):
        prior = PriorConfig("diffusers", dtype=named)
        assert unet_dtype(prior, CUDA) == vae_dtype(prior, CUDA) == getattr(torch, named)
    assert unet_dtype(sd21().prior, CUDA) == vae_dtype(sd21().prior, CUDA) == HALF


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_cpu_keeps_its_vae_in_float32(is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for prior in (diffusers().prior, embedded().prior):
        for device in (CPU, META):
            assert (unet_dtype(prior, device), vae_dtype(prior, device)) == (BRAIN if is_fast else SINGLE, SINGLE)
    assert memory_format(BRAIN, CPU) == torch.contiguous_format


def test_channels_last_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, draws = make_tiny_prior(tmp_path / "prior"), torch.Generator().manual_seed(0)
    z_t, text = torch.randn(2, 4, 16, 16, generator=draws), torch.randn(2, 7, TEXT_WIDTH, generator=draws)
    pixels, flat = torch.rand(2, 64, 64, 3, generator=draws), torch.ones(2, 64, 64, 1)

    def answers() -> tuple[Tensor, Tensor, Tensor]:
        unet = DiffusersDenoiser.load(folder, SINGLE, CPU)
        codec = VaeCodec.load(folder, 64, False, SINGLE, CPU)
        rgb = pixels.clone().requires_grad_()
        latents = codec.encode(Render(rgb, rgb, flat, flat), torch.Generator())
        expected = torch.channels_last if is_last else torch.contiguous_format
        for network in (unet.unet, codec.vae):
            weight = network.get_parameter("conv_in.weight" if network is unet.unet else "encoder.conv_in.weight")
            assert weight.is_contiguous(memory_format=expected)
        with torch.no_grad():
            answer = unet.run(z_t, torch.tensor([20, 900]), text)
        return answer, latents.detach(), torch.autograd.grad(latents.square().sum(), rgb)[0]

    is_last = False
    plain = answers()
    for module in (denoiser, vae):
        monkeypatch.setattr(module, "memory_format", lambda *_: torch.channels_last)
    is_last = True
    for one, other in zip(plain, answers()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_only_a_network_multiplies_in_tf32(tmp_path: Path) -> None:
    frozen = DiffusersDenoiser.load(make_tiny_prior(tmp_path / "prior"), SINGLE, CPU)
    inside = []

    def seen() -> tuple[str, str]:
        cudnn: Any = torch.backends.cudnn
        return torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision

    def call(z_t: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        inside.append(seen())
        if len(inside) > 1:
            raise RuntimeError("on the way")
        return (z_t,)

    before, frozen.call = seen(), call
    assert before[0] != "tf32"
    told = torch.zeros(1, 4, 16, 16), torch.zeros(1, dtype=torch.long), torch.zeros(1, 7, TEXT_WIDTH)
    frozen.run(*told)
    with pytest.raises(RuntimeError, match="on the way"):
        frozen.run(*told)
    assert inside == [("tf32", "tf32")] * 2
    assert seen() == before


def test_memory_of_a_gpu_grows_unless_somebody_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in ((None, "expandable_segments:True"), ("backend:native", "backend:native")):
        if said is None:
            monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        else:
            monkeypatch.setenv("PYTORCH_ALLOC_CONF", said)
        check_run(small_config())
        assert os.environ["PYTORCH_ALLOC_CONF"] == expected
