"""The aligned geometric prior (SweetDreamer, arXiv 2310.02596): a denoiser whose latent *is* a canonical coordinate
map.

A text-to-image prior's UNet goes on being trained on maps as ``ccm.encode_ccm`` codes them (three coordinates and
opacity, no VAE) and is told the camera. It keeps the prior's own parametrisation, eps or v, and its noise schedule.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import Parameter

from raydream.diffusion import conditioned_unet, layout
from raydream.diffusion.conditioned_unet import ADAPTER
from raydream.diffusion.denoiser import DiffusersDenoiser, load_unet
from raydream.precision import memory_format
from raydream.priors import find
from raydream.priors.find import AGP_FACTS, AGP_WEIGHTS, AgpFacts
from raydream.store.tensors import odd_names
from raydream.types import Condition, Latents

CAMERA_WIDTH = 13  # the upper 3 x 4 of a camera-to-world matrix, and the tangent of half the field of view


class AgpDenoiser:
    """A ``types.Denoiser`` of canonical coordinate maps: UNet, optional LoRA, and an MLP of the camera whose output is
    added to the time embedding. A view of ``camera_weight`` 0 sees zeros instead of its camera.
    """

    def __init__(self, unet: UNet2DConditionModel, scheduler: Mapping[str, Any], facts: AgpFacts, seed: int) -> None:
        """Changes ``unet``, a plain prior's, into the AGP's. It starts as the prior, blind to the camera."""
        camera = conditioned_unet.make_camera(unet, CAMERA_WIDTH).to(unet.dtype)
        self.unet, self.scheduler, self.facts = unet, dict(scheduler), facts
        self.model = DiffusersDenoiser(unet, scheduler)
        unet.requires_grad_(facts.rank == 0)
        if facts.rank:
            _add_updates(unet, facts.rank)
        unet.class_embedding = camera  # type: ignore[assignment]
        conditioned_unet.initialise(self.trainable(), camera, seed)

    @classmethod
    def from_prior(cls, prior: Path, rank: int, seed: int, device: torch.device) -> "AgpDenoiser":
        """An untrained AGP of the prior in a folder, float32; ValueError naming ``prior`` where that cannot be one."""
        unet, scheduler = _load_unet(prior)
        return cls(unet.to(device), scheduler, AgpFacts(rank, fingerprint(unet)), seed)  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: Path, prior: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> "AgpDenoiser":
        """A trained AGP, frozen, its updates merged into the weights; ``prior`` is the one that it was made from.

        Raises ValueError naming ``agp`` where the folder is no AGP or is one of another prior.
        """
        facts = find.read_facts(folder)
        unet, scheduler = _load_unet(prior)
        check_same_prior(facts.prior_sha256, fingerprint(unet), f"agp: {folder}")
        denoiser = cls(unet, scheduler, facts, seed=0)
        denoiser.load_state(safetensors.torch.load_file(folder / AGP_WEIGHTS))
        for module in unet.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        nn.Module.to(unet, device=device, dtype=dtype)  # its own warns about no modules
        nn.Module.to(unet, memory_format=memory_format(dtype, device))  # type: ignore[call-overload]
        denoiser.model = DiffusersDenoiser(unet, scheduler)
        return denoiser

    def eps(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        """The predicted noise of maps seen from ``cond``'s cameras."""
        return self.model.to_eps(self.predict(z_t, t, cond), z_t, t)

    def predict(self, z_t: Latents, t: Int[Tensor, " view"], cond: Condition) -> Latents:
        """The answer in the prior's own parametrisation, to be compared with ``guidance.lora_target``."""
        camera = camera_features(cond.c2w, cond.fov_y_deg) * cond.camera_weight[:, None]
        return self.model.run(z_t, t, cond.text, camera.to(self.unet.dtype))

    def trainable(self) -> dict[str, Parameter]:
        """The parameters to optimise, sorted by name: the same order in every process."""
        named = self.unet.named_parameters()
        return {name: value for name, value in sorted(named) if value.requires_grad}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes values for all of ``trainable()``. Raises ``ValueError`` where names or shapes are not this model's."""
        named = self.trainable()
        odd = odd_names(named, state)
        if odd:
            raise ValueError(
                f"agp: these weights are another model's; {len(odd)} tensors differ, the first is {odd[0]!r}"
            )
        for name, parameter in named.items():
            parameter.copy_(state[name])

    def files(self, facts: AgpFacts) -> dict[str, bytes]:
        """The files of a folder that ``load`` reads, weights in float16."""
        weights = {name: value.detach().half().cpu().contiguous() for name, value in self.trainable().items()}
        about = json.dumps(asdict(facts), indent=1) + "\n"
        return {AGP_WEIGHTS: safetensors.torch.save(weights), AGP_FACTS: about.encode()}

    def save(self, folder: Path) -> None:
        """Writes the AGP into a folder, its facts last."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files(self.facts).items():
            (folder / name).write_bytes(content)

    def whole_state(self) -> dict[str, Tensor]:
        """All weights of a trained AGP as ``load`` gives it, its updates merged, under the names that rank 0 has."""
        named = self.unet.state_dict().items()
        return {name.replace(".base_layer.", "."): value for name, value in named if ".lora_" not in name}

    def load_nearest(self, state: Mapping[str, Tensor]) -> None:
        """Takes the weights of an AGP of rank 0 as near as this one's rank allows: of each layer's change since the
        prior the nearest matrix of that rank (Eckart and Young 1936), half of each singular value in either factor.
        """
        values = {name: state[name.replace(".base_layer.", ".")] for name in self.trainable() if ".lora_" not in name}
        for name, module in self.unet.named_modules():
            if isinstance(module, BaseTunerLayer):
                base = self.unet.get_parameter(f"{name}.base_layer.weight")
                change = (state[f"{name}.weight"].to(base) - base.detach()).float()
                up, down = _factors(change.flatten(1), self.facts.rank)
                values[f"{name}.lora_A.{ADAPTER}.weight"] = down.view(-1, *change.shape[1:])
                values[f"{name}.lora_B.{ADAPTER}.weight"] = up.view(*up.shape, *(1,) * (change.dim() - 2))
        self.load_state(values)


def camera_features(c2w: Float[Tensor, "view 4 4"], fov_y_deg: Float[Tensor, " view"]) -> Float[Tensor, "view feature"]:
    """What the camera's MLP reads. The object lies in [-1, 1]^3, as in a particle's scene."""
    tangent = torch.tan(torch.deg2rad(fov_y_deg) / 2)
    return torch.cat([c2w[:, :3].flatten(1), tangent[:, None]], dim=1)


def fingerprint(unet: UNet2DConditionModel) -> str:
    """A hash of a plain UNet's shape and weights; the same for a float32 and a float16 copy."""
    shape = {name: value for name, value in sorted(unet.config.items()) if not name.startswith("_")}
    content = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, value in sorted(unet.state_dict().items()):
        content.update(name.encode())
        content.update(value.half().cpu().numpy().tobytes())
    return content.hexdigest()


def check_same_prior(expected: str, found: str, what: str) -> None:
    """ValueError that begins with ``what`` unless two fingerprints agree."""
    if expected != found:
        raise ValueError(
            f"{what} was made from another prior (its UNet's fingerprint is {expected[:12]}, this one's "
            f"{found[:12]}); give the prior that it was made from"
        )


def _load_unet(prior: Path) -> tuple[UNet2DConditionModel, dict[str, Any]]:
    find.check_prior(prior)
    return load_unet(prior, torch.float32), layout.scheduler_config(prior)


def _add_updates(unet: UNet2DConditionModel, rank: int) -> None:
    ends = ("conv_in", "conv_out")
    targets = [
        name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d) and name not in ends
    ]
    conditioned_unet.add_updates(unet, rank, targets)
    for name, module in unet.named_modules():
        if name in ends or isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.requires_grad_(True)
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None and name.endswith(".base_layer"):
            module.bias.requires_grad_(True)


def _factors(
    matrix: Float[Tensor, "row column"], rank: int
) -> tuple[Float[Tensor, "row rank"], Float[Tensor, "rank column"]]:
    """Two factors whose product is the nearest matrix of a rank; zeros fill them up where it has a lower one."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    count, root = min(rank, len(values)), values.sqrt()
    up, down = matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
    up[:, :count] = left[:, :count] * root[:count]
    down[:count] = root[:count, None] * right[:count]
    return up, down
