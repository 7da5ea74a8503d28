"""Parts on a GPU that are about one model alone: a particle's scene, a VAE, a UNet with and without its LoRA, and how
true the LoRA's gradients are in half precision.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from raydream.backend import load_backend
from raydream.bench import sd21
from raydream.bench.parts import Bench, Found, tflop_of
from raydream.config.actors import particle_config
from raydream.config.presets import make_preset
from raydream.config.strict_json import apply_overrides
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.graphs import CudaRecorder, GraphedDenoiser
from raydream.diffusion.latent import RgbaCodec
from raydream.diffusion.lora import LoraDenoiser
from raydream.distill.particle import Particle
from raydream.distill.score import HALF_LOSS_SCALE
from raydream.scene.kinds import make_scene
from raydream.seeds import generator
from raydream.types import Condition, Render

_RANK = 4
_META = torch.device("meta")


def particle(bench: Bench, found: Found) -> None:
    """A step of the ``sd21`` preset's scene at its full size, without a VAE, with its cameras and with those of the
    ``embedded`` preset, which stand farther away.
    """
    sizes = bench.sizes
    for name in ("sd21", "embedded"):
        camera = make_preset(name, None).stages[0].camera
        low, high = camera.distance
        settings = [f"stages.0.camera.image_px={sizes.image_px}", f"stages.0.camera.distance=[{low},{high}]"]
        settings.append(f"stages.0.camera.fov_y_deg=[{camera.fov_y_deg[0]},{camera.fov_y_deg[1]}]")
        settings.append(f"stages.0.scene.samples_per_diagonal={sizes.samples_per_diagonal}")
        settings.append(f"stages.0.scene.grid.log2_table_size={sizes.log2_table_size}")
        config = particle_config(apply_overrides(make_preset("sd21", None), settings), 0, 0)
        backend = load_backend("auto", bench.device.type)
        scene = make_scene(config.stage, backend, bench.device, lambda what, at: generator(0, what, 0, at))
        one = Particle(config, bench.device, scene, RgbaCodec(sizes.latent_px), 0, backend.name)
        draws = torch.randn(1, 4, sizes.latent_px, sizes.latent_px, generator=generator(0, "pull", 0, 0)).numpy()

        def step(one: Particle = one, draws: object = draws) -> dict[str, float]:
            at = one.step
            one.render(at)
            return one.apply(at, draws)  # type: ignore[arg-type]

        seconds = bench.seconds_of(step)
        told: Found = {"ms": round(1e3 * seconds, 2), "peak_gib": bench.peak_gib(step)}
        told["samples"] = step().get("scene/samples")
        found[f"cameras of {name}"] = told | {"launches": _launches(bench, step)}


def _launches(bench: Bench, work: Callable[[], object]) -> int:
    """Kernels on a GPU as the profiler sees them; operations on a CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
    return len(profile.events())


def vae(bench: Bench, found: Found) -> None:
    """Encoding one view and going back to its pixels, in both orders of memory."""
    sizes = bench.sizes
    codec = sd21.random_codec(sizes.vae, sizes.image_px, False, torch.float32, _META)
    tflop = tflop_of(lambda: _encode_and_back(codec.encode, _pixels(sizes.image_px, _META)))
    for name, order in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last)):
        codec = sd21.random_codec(sizes.vae, sizes.image_px, False, bench.half, bench.device)
        codec.vae.to(memory_format=order)  # type: ignore[call-arg]
        pixels = _pixels(sizes.image_px, bench.device)
        work = lambda codec=codec, pixels=pixels: _encode_and_back(codec.encode, pixels)  # noqa: E731
        found[name] = bench.rate(tflop, bench.seconds_of(work)) | {"peak_gib": bench.peak_gib(work)}


def _pixels(size: int, device: torch.device) -> Tensor:
    return torch.rand(1, size, size, 3, device=device, requires_grad=True)


def _encode_and_back(encode: Callable[..., Tensor], pixels: Tensor) -> None:
    flat = pixels[..., :1]
    latents = encode(Render(pixels, pixels, flat, flat), torch.Generator())
    torch.autograd.grad(latents.float().sum(), pixels)


def inputs(bench: Bench, number: int, device: torch.device | None = None) -> tuple[Tensor, Tensor, Condition]:
    """Noisy latents, timesteps and what a denoiser is told of so many views."""
    device, sizes = device or bench.device, bench.sizes
    z_t = torch.randn(number, 4, sizes.latent_px, sizes.latent_px, device=device)
    text = torch.randn(number, sd21.SD21_TOKENS, sizes.text_width, device=device)
    cameras = torch.eye(4, device=device).expand(number, 4, 4), torch.full((number,), 45.0, device=device)
    at = torch.full((number,), 500, device=device)
    return z_t, at, Condition(text, *cameras, torch.ones(number, device=device))


def passes(bench: Bench, frozen: DiffusersDenoiser, lora: LoraDenoiser, number: int) -> dict[str, Callable[[], object]]:
    """The three passes of VSD over so many views: frozen, with the LoRA, and forward and back through the LoRA."""
    given, learned = inputs(bench, number, frozen.unet.device), list(lora.trainable().values())

    def fit() -> object:
        loss = lora.predict(*given).float().square().mean()
        return torch.autograd.grad(loss, learned, allow_unused=True)

    return {
        "frozen": torch.no_grad()(lambda: frozen.eps(*given)),
        "LoRA": torch.no_grad()(lambda: lora.eps(*given)),
        "fit": fit,
    }


def least_tflop(bench: Bench) -> dict[str, float]:
    """What each of ``passes`` takes for one view at the least."""
    config, found = bench.sizes.unet, dict[str, float]()
    for name in ("frozen", "LoRA", "fit"):
        meta = sd21.random_denoiser(config, torch.float32, _META)
        found[name] = tflop_of(passes(bench, meta, _lora(meta), 1)[name])
    return found


def unet(bench: Bench, found: Found) -> None:
    """Each pass at each batch size, as it is, channels-last, and as a CUDA graph; rates on the least operations."""
    sizes, least = bench.sizes, least_tflop(bench)
    for order in (torch.contiguous_format, torch.channels_last):
        frozen, base = (sd21.random_denoiser(sizes.unet, bench.half, bench.device) for _ in range(2))
        for model in (frozen.unet, base.unet):
            model.to(memory_format=order)  # type: ignore[call-arg]
        lora, word = _lora(base), "" if order == torch.contiguous_format else ", channels-last"
        for number in sizes.batches:
            for name, work in passes(bench, frozen, lora, number).items():
                told = bench.rate(number * least[name], bench.seconds_of(work)) | {"peak_gib": bench.peak_gib(work)}
                found[f"{name}, B {number}{word}"] = told
        if not word:
            _as_graphs(bench, found, {"frozen": frozen, "LoRA": lora}, least)


def _lora(base: DiffusersDenoiser) -> LoraDenoiser:
    return LoraDenoiser(base, _RANK, seed=0)


def _as_graphs(
    bench: Bench, found: Found, models: dict[str, DiffusersDenoiser | LoraDenoiser], least: dict[str, float]
) -> None:
    if bench.device.type != "cuda":
        found["graphs"] = "skipped: recorded on a CUDA device only"
        return
    record = CudaRecorder()
    for name, model in models.items():
        for number in bench.sizes.batches:
            graphed, given = GraphedDenoiser(name, model, record), inputs(bench, number)
            work = lambda graphed=graphed, given=given: graphed.eps(*given)  # noqa: E731
            found[f"{name}, B {number}, graph"] = bench.rate(number * least[name], bench.seconds_of(work))


def gradients(bench: Bench, found: Found) -> None:
    """Of the LoRA in half precision, tensor by tensor, beside those in float32 of the same weights and inputs."""
    torch.manual_seed(0)
    exact = _lora(sd21.random_denoiser(bench.sizes.unet, torch.float32, bench.device))
    with torch.no_grad():
        for name, value in exact.trainable().items():
            if ".lora_B." in name:
                value.copy_(0.01 * torch.randn_like(value))
    state, given = exact.frozen.unet.state_dict(), inputs(bench, 1)
    truth = _gradients(exact, given, 1.0)
    for dtype, scale in ((torch.float16, 1.0), (torch.float16, HALF_LOSS_SCALE), (torch.bfloat16, 1.0)):
        half = _lora(sd21.random_denoiser(bench.sizes.unet, dtype, bench.device))
        half.frozen.unet.load_state_dict(state)
        own = dict(half.trainable())
        for name, value in exact.trainable().items():
            own[name].data.copy_(value.data)
        cosines = [
            float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))
            for a, b in zip(truth, _gradients(half, given, scale))
            if a.any()
        ]
        tensor = torch.tensor(cosines).nan_to_num()
        told = {"median": float(tensor.median()), "least": float(tensor.min()), "tensors": len(cosines)}
        name = f"{str(dtype).removeprefix('torch.')}, loss times {scale:g}"
        found[name] = told | {"below 0.9": int((tensor < 0.9).sum())}


def _gradients(lora: LoraDenoiser, given: tuple[Tensor, Tensor, Condition], scale: float) -> list[Tensor]:
    learned = list(lora.trainable().values())
    loss = (lora.predict(*given) - given[0]).square().mean()
    parts = torch.autograd.grad(loss * scale, learned, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.float() / scale for p, g in zip(learned, parts)]
