"""The learned reference of VSD: a camera-conditioned LoRA on top of the frozen UNet, without a second copy of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.models.embeddings import TimestepEmbedding
from jaxtyping import Float, Int
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import Parameter

from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.layout import PredictionType
from raydream.types import Condition

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
CAMERA_WIDTH = 16  # a flattened camera-to-world matrix
_ADAPTER = "default"


class LoraDenoiser:
    """The frozen denoiser plus rank-``rank`` updates of its attention projections and an MLP of the camera.

    Between calls the UNet *is* the frozen model, bit for bit: the updates and the camera are attached only inside this
    class's own passes. So a backward pass may run at any time after ``predict``, but two threads must not use one UNet
    at once. At the start it equals the frozen model, since the last layer of each part is zero. What is trained is kept
    in float32 and drawn on the CPU from ``seed``, so it starts the same on every device.
    """

    def __init__(self, frozen: DiffusersDenoiser, rank: int, seed: int) -> None:
        unet = frozen.unet
        if getattr(unet, "class_embedding", None) is not None or getattr(unet, "peft_config", None):
            raise ValueError("prior: its UNet already has a class embedding or adapters; load a plain copy of it")
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)), adapter_name=_ADAPTER)
        self._frozen = frozen
        self._layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        width = unet.time_embedding.linear_2.out_features
        self._camera = TimestepEmbedding(CAMERA_WIDTH, width).to(unet.device)
        self._trainable = self._collect()
        self._initialise(torch.Generator().manual_seed(seed))
        self._attach(False)

    @property
    def prediction_type(self) -> PredictionType:
        return self._frozen.prediction_type

    @property
    def alphas_cumprod(self) -> Float[Tensor, "1000"]:
        return self._frozen.alphas_cumprod

    def eps(
        self, z_t: Float[Tensor, "view latent h w"], t: Int[Tensor, " view"], cond: Condition
    ) -> Float[Tensor, "view latent h w"]:
        """The predicted noise, one conditional pass (the learned reference is used at guidance scale 1)."""
        return self._frozen.to_eps(self.predict(z_t, t, cond), z_t, t)

    def predict(
        self, z_t: Float[Tensor, "view latent h w"], t: Int[Tensor, " view"], cond: Condition
    ) -> Float[Tensor, "view latent h w"]:
        """The answer in the model's own parametrisation, to be compared with ``guidance.lora_target``.

        Differentiable by ``trainable()``. A view of ``camera_weight`` 0 sees the zero matrix instead of its camera.
        """
        camera = (cond.c2w * cond.camera_weight[:, None, None]).flatten(1).float()
        with self._attached():
            return self._frozen.run(z_t, t, cond.text, camera)

    def trainable(self) -> dict[str, Parameter]:
        """The parameters to optimise, sorted by name: the same order in every process."""
        return dict(self._trainable)

    def state(self) -> dict[str, Tensor]:
        """A copy of what was learned, on the CPU; the ``unet.`` part is a LoRA file that diffusers itself can load."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self._trainable.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what ``state`` gave. Raises ``ValueError`` where names or shapes are not those of this model."""
        here = {name: tuple(value.shape) for name, value in self._trainable.items()}
        there = {name: tuple(value.shape) for name, value in state.items()}
        if here != there:
            odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            raise ValueError(
                f"learner: this state is of another LoRA; {len(odd)} tensors differ, the first is {odd[0]!r}"
            )
        with torch.no_grad():
            for name, value in self._trainable.items():
                value.copy_(state[name])

    @contextmanager
    def _attached(self) -> Iterator[None]:
        self._attach(True)
        try:
            yield
        finally:
            self._attach(False)

    def _attach(self, attached: bool) -> None:
        # peft's public switch also freezes what it disables, so that a backward yet to come would lose its gradients,
        # and takes 20 ms at Stable Diffusion's size; the flag alone is what its layers look at
        for layer in self._layers:
            layer._disable_adapters = not attached
        self._frozen.unet.class_embedding = self._camera if attached else None  # type: ignore[assignment]

    def _collect(self) -> dict[str, Parameter]:
        named = {f"camera.{name}": parameter for name, parameter in self._camera.named_parameters()}
        for name, parameter in self._frozen.unet.named_parameters():
            if f".{_ADAPTER}." in name:
                parameter.data = parameter.data.float()  # the base may be half precision, an optimiser should not be
                named[f"unet.{name.replace(f'.{_ADAPTER}.', '.')}"] = parameter
        return dict(sorted(named.items()))

    def _initialise(self, generator: torch.Generator) -> None:
        """Zero for each part's last layer; elsewhere uniform within 1 / sqrt(fan-in), peft's and torch's default."""
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                if name.endswith("lora_B.weight") or name.startswith("camera.linear_2."):
                    parameter.zero_()
                    continue
                fan_in = CAMERA_WIDTH if name.startswith("camera.") else parameter.shape[1]
                uniform = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((2 * uniform - 1) / fan_in**0.5)
