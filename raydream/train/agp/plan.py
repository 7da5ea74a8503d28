"""What a large fine-tuning takes, before anything is rented: memory by ZeRO stage, hours, storage, workers.

Pure arithmetic with its sources; measured figures are arguments.
"""

from dataclasses import dataclass

SD21_PARAMETERS = 865_910_724  # UNet2DConditionModel with Stable Diffusion 2.1's shapes
SD21_CAMERA_PARAMETERS = 1_657_600  # the camera's MLP: 13 -> 1280 -> 1280, with biases
SD21_TFLOP_FORWARD = 0.804  # one 64 x 64 latent, counted by torch's FlopCounterMode
_GIB = 2**30
_BYTES_BF16, _BYTES_FP32 = 2, 4
_ADAM_BYTES = 12  # the float32 weight and Adam's two moments
_PACKING = (
    0.22  # of raw float16 maps and byte coverage: 1,586 of 7,168 bytes a view, 47,980 views of real assets at 32 px
)


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes on each GPU for weights, gradients, optimiser and running average, without activations."""

    stage: int
    weights_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    average_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes


@dataclass(frozen=True)
class CostPlan:
    """A rendering job and the fine-tuning on what it renders."""

    render_core_hours: float
    render_hours: float
    storage_gb: float
    train_hours: float
    gpu_hours: float
    epochs: float


def zero_memory(num_parameters: int, num_gpus: int, stage: int, num_trained: int | None = None) -> ZeroMemory:
    """Mixed precision with Adam: weights and gradients 2 bytes a parameter each, optimiser 12; stage 1 shares out the
    optimiser, stage 2 the gradients too, stage 3 the weights too (ZeRO, arXiv 1910.02054, section 3 and figure 1). The
    average is 4 bytes a trained parameter, always shared out (``learner``). ``num_trained`` is less with LoRA.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage: must be 0, 1, 2 or 3, got {stage}")
    trained = num_parameters if num_trained is None else num_trained
    return ZeroMemory(
        stage,
        _BYTES_BF16 * num_parameters / (num_gpus if stage >= 3 else 1),
        _BYTES_BF16 * trained / (num_gpus if stage >= 2 else 1),
        _ADAM_BYTES * trained / (num_gpus if stage >= 1 else 1),
        _BYTES_FP32 * trained / num_gpus,
    )


def cost_plan(
    num_objects: int = 270_000,
    views_per_object: int = 8,
    image_px: int = 128,
    views_per_core_s: float = 100.0,
    render_cores: int = 64,
    num_gpus: int = 8,
    train_samples: int = 50_000_000,
    gpu_tflops: float = 300.0,
) -> CostPlan:
    """Hours and storage. ``views_per_core_s`` is what ``render_ccm.py`` does on one core (its own report tells it for
    the assets at hand; Objaverse's are heavier than ours); a training step takes three forward passes' arithmetic;
    ``gpu_tflops`` is what a GPU sustains, well under its data sheet.
    """
    views = num_objects * views_per_object
    raw_bytes = views * image_px**2 * (3 * 2 + 1)
    core_hours = views / views_per_core_s / 3600
    gpu_hours = train_samples * 3 * SD21_TFLOP_FORWARD / gpu_tflops / 3600
    return CostPlan(
        core_hours,
        core_hours / render_cores,
        raw_bytes * _PACKING / 1e9,
        gpu_hours / num_gpus,
        gpu_hours,
        train_samples / views,
    )


def report(num_gpus: int = 8) -> str:
    """Both calculations for Stable Diffusion 2.1, as a Markdown table and a paragraph."""
    total = SD21_PARAMETERS + SD21_CAMERA_PARAMETERS
    lines = [
        f"GiB on each of {num_gpus} GPUs, without activations; all {total / 1e6:.1f} M parameters trained in bf16:",
        "",
        "| ZeRO stage | weights | gradients | optimiser | average | sum |",
        "|---|---|---|---|---|---|",
    ]
    for stage in (0, 1, 2, 3):
        memory = zero_memory(total, num_gpus, stage)
        parts = (memory.weights_bytes, memory.gradient_bytes, memory.optimizer_bytes, memory.average_bytes)
        cells = " | ".join(f"{part / _GIB:.2f}" for part in (*parts, memory.total_bytes))
        lines.append(f"| {stage} | {cells} |")
    plan = cost_plan(num_gpus=num_gpus)
    lines += [
        "",
        f"270,000 objects, 8 views of 128 px: {plan.render_core_hours:.1f} core hours of rendering at 100 views/s "
        f"({plan.render_hours * 60:.0f} minutes on 64 cores), {plan.storage_gb:.0f} GB of Parquet; 50 million samples "
        f"({plan.epochs:.0f} times each view) take {plan.gpu_hours:.0f} GPU hours at 300 TFLOP/s, "
        f"{plan.train_hours:.0f} h on {num_gpus} GPUs.",
    ]
    return "\n".join(lines)
