"""The learned reference of VSD: a camera-conditioned LoRA on top of the frozen UNet, without a second copy of it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn import Parameter

from raydream.diffusion import conditioned_unet
from raydream.diffusion.conditioned_unet import ADAPTER
from raydream.diffusion.denoiser import DiffusersDenoiser
from raydream.diffusion.half_copies import HalfCopies
from raydream.diffusion.layout import PredictionType
from raydream.types import Condition, Latents

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
MATRIX_WIDTH = 16  # a flattened camera-to-world matrix


class LoraDenoiser:
    """The frozen denoiser plus rank-``rank`` updates of its attention projections and an MLP of the camera.

    Between calls the UNet *is* the frozen model, bit for bit: the updates and the camera are attached only inside this
    class's own passes. So a backward pass may run at any time after ``predict``, but two threads must not use one UNet
    at once. At the start it equals the frozen model, since the last layer of each part is zero. What is trained is kept
    in float32 and drawn on the CPU from ``seed``, so it starts the same on every device. Where ``hastened``,
    as by default on all devices but a CPU, passes without gradients add the updates to the weights instead of to the
    activations, and a UNet in half precision computes with ``HalfCopies`` of them.
    """

    def __init__(self, frozen: DiffusersDenoiser, rank: int, seed: int, hastened: bool | None = None) -> None:
        unet = frozen.unet
        self._camera = conditioned_unet.make_camera(unet, MATRIX_WIDTH)
        conditioned_unet.add_updates(unet, rank, TARGETS)
        self.frozen = frozen
        self._layers: list[Any] = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        self._trainable = self._collect()
        conditioned_unet.initialise(self._trainable, self._camera, seed)
        self._hastened = unet.device.type != "cpu" if hastened is None else hastened
        updates = [module for name, module in unet.named_modules() if name.endswith(f".{ADAPTER}")]
        self._copies = HalfCopies(updates if self._hastened and unet.dtype != torch.float32 else [], unet.dtype)
        self._attach(False)

    @property
    def prediction_type(self) -> PredictionType:
        return self.frozen.prediction_type

    @property
    def dtype(self) -> torch.dtype:
        return self.frozen.unet.dtype

    def eps(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        """The predicted noise, one conditional pass (the learned reference is used at guidance scale 1)."""
        return self.frozen.to_eps(self.predict(z_t, t, cond), z_t, t)

    def predict(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        """The answer in the model's own parametrisation, to be compared with ``guidance.lora_target``.

        Differentiable by ``trainable()``. A view of ``camera_weight`` 0 sees the zero matrix instead of its camera.
        """
        camera = (cond.c2w * cond.camera_weight[:, None, None]).flatten(1).float()
        with self._attached():
            return self.frozen.run(z_t, t, cond.text, camera)

    def trainable(self) -> dict[str, Parameter]:
        """The parameters to optimise, sorted by name: the same order in every process. Those under ``unet.`` are what
        diffusers itself loads as a LoRA.
        """
        return dict(self._trainable)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        merged = self._hastened and not torch.is_grad_enabled()
        with ExitStack() as stack:
            stack.callback(self._attach, False)
            self._attach(True, updates=not merged)
            stack.enter_context(self._copies.placed())
            if merged:
                stack.enter_context(self._merged())
            yield

    @contextmanager
    def _merged(self) -> Iterator[None]:
        """Inside, each layer's weight is the sum of it and its update."""
        places = [layer.get_base_layer()._parameters for layer in self._layers]
        weights = [place["weight"] for place in places]
        try:
            for place, weight, layer in zip(places, weights, self._layers):
                down, up, scale = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.scaling[ADAPTER]
                place["weight"] = torch.addmm(weight, up.weight, down.weight, alpha=scale)
            yield
        finally:
            for place, weight in zip(places, weights):
                place["weight"] = weight

    def _attach(self, attached: bool, updates: bool = True) -> None:
        # peft's public switch also freezes what it disables, so that a backward yet to come would lose its gradients,
        # and takes 20 ms at Stable Diffusion's size; the flag alone is what its layers look at
        for layer in self._layers:
            layer._disable_adapters = not (attached and updates)
        self.frozen.unet.class_embedding = self._camera if attached else None  # type: ignore[assignment]

    def _collect(self) -> dict[str, Parameter]:
        named = {f"camera.{name}": parameter for name, parameter in self._camera.named_parameters()}
        for name, parameter in self.frozen.unet.named_parameters():
            if f".{ADAPTER}." in name:
                parameter.data = parameter.data.float()  # the base may be half precision, an optimiser should not be
                named[f"unet.{name.replace(f'.{ADAPTER}.', '.')}"] = parameter
        return dict(sorted(named.items()))
