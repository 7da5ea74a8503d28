"""What a prior's UNet is given to learn more: low-rank updates of its layers and an MLP of the camera, whose output is
added to the time embedding. VSD's learned reference and the aligned geometric prior are made of it.
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig
from torch.nn import Parameter

ADAPTER = "default"  # the name under which peft keeps the updates


def add_updates(unet: UNet2DConditionModel, rank: int, layers: Sequence[str]) -> None:
    """Adds updates of a rank to the layers of these names, or of names that end so."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers)), adapter_name=ADAPTER)


def make_camera(unet: UNet2DConditionModel, width: int) -> TimestepEmbedding:
    """An MLP for the class embedding's place in a plain UNet, of a camera told in ``width`` numbers; ValueError naming
    ``prior`` where that place is taken or updates are there already.
    """
    if getattr(unet, "class_embedding", None) is not None or getattr(unet, "peft_config", None):
        raise ValueError("prior: its UNet already has a class embedding or adapters; load a plain copy of it")
    return TimestepEmbedding(width, unet.time_embedding.linear_2.out_features).to(unet.device)


@torch.no_grad()
def initialise(named: Mapping[str, Parameter], camera: TimestepEmbedding, seed: int) -> None:
    """Sets updates and camera so that the UNet answers as before: zero for each one's last layer; elsewhere uniform
    within 1 / sqrt(fan-in), peft's and torch's default. Drawn on the CPU in the order of ``named``, so it starts the
    same on every device; what is neither stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    first, last = ({id(each) for each in layer.parameters()} for layer in (camera.linear_1, camera.linear_2))
    for name, parameter in named.items():
        if ".lora_B." in name or id(parameter) in last:
            parameter.zero_()
        elif ".lora_A." in name or id(parameter) in first:
            fan_in = camera.linear_1.in_features if id(parameter) in first else parameter[0].numel()
            uniform = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * uniform - 1) / fan_in**0.5)
