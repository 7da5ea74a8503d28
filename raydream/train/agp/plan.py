"""What a large fine-tuning takes, before anything is rented: memory by ZeRO stage, hours, storage.

Pure arithmetic with its sources.
"""

SD21_PARAMETERS = 865_910_724  # UNet2DConditionModel with Stable Diffusion 2.1's shapes
SD21_CAMERA_PARAMETERS = 1_657_600  # the camera's MLP: 13 -> 1280 -> 1280, with biases
SD21_TFLOP_FORWARD = 0.804  # one 64 x 64 latent, counted by torch's FlopCounterMode
_OBJECTS, _VIEWS_PER_OBJECT, _IMAGE_PX, _SAMPLES = 270_000, 8, 128, 50_000_000
_RENDER_CORES = 64
_VIEWS_PER_CORE_S = 100.0  # of our assets, as ``render_ccm.py`` reports; Objaverse's are heavier
_GPU_TFLOPS = 300.0  # what a GPU sustains, well under its data sheet
_PACKING = (
    0.22  # of raw float16 maps and byte coverage: 1,586 of 7,168 bytes a view, 47,980 views of real assets at 32 px
)


def zero_memory(num_parameters: int, num_gpus: int, stage: int) -> dict[str, float]:
    """Bytes on each GPU by their purpose, without activations, for mixed precision with Adam: weights and gradients 2
    bytes a parameter each, optimiser 12 (the float32 weight and two moments); stage 1 shares out the optimiser, stage 2
    the gradients too, stage 3 the weights too (ZeRO, arXiv 1910.02054, section 3 and figure 1). The running average is
    4 bytes a parameter, always shared out (``learner``).
    """
    return {
        "weights": 2 * num_parameters / (num_gpus if stage >= 3 else 1),
        "gradients": 2 * num_parameters / (num_gpus if stage >= 2 else 1),
        "optimiser": 12 * num_parameters / (num_gpus if stage >= 1 else 1),
        "average": 4 * num_parameters / num_gpus,
    }


def report(num_gpus: int) -> str:
    """Memory, and the cost of rendering and training on it, for Stable Diffusion 2.1: a Markdown table, a paragraph."""
    total = SD21_PARAMETERS + SD21_CAMERA_PARAMETERS
    lines = [
        f"GiB on each of {num_gpus} GPUs, without activations; all {total / 1e6:.1f} M parameters trained in bf16:",
        "",
        "| ZeRO stage | weights | gradients | optimiser | average | sum |",
        "|---|---|---|---|---|---|",
    ]
    for stage in (0, 1, 2, 3):
        parts = list(zero_memory(total, num_gpus, stage).values())
        lines.append(f"| {stage} | {' | '.join(f'{part / 2**30:.2f}' for part in (*parts, sum(parts)))} |")
    views = _OBJECTS * _VIEWS_PER_OBJECT
    core_hours = views / _VIEWS_PER_CORE_S / 3600
    storage_gb = views * _IMAGE_PX**2 * (3 * 2 + 1) * _PACKING / 1e9
    gpu_hours = _SAMPLES * 3 * SD21_TFLOP_FORWARD / _GPU_TFLOPS / 3600  # a step is three forward passes' arithmetic
    lines += [
        "",
        f"{_OBJECTS:,} objects, {_VIEWS_PER_OBJECT} views of {_IMAGE_PX} px: {core_hours:.1f} core hours of rendering "
        f"at {_VIEWS_PER_CORE_S:g} views/s ({core_hours / _RENDER_CORES * 60:.0f} minutes on {_RENDER_CORES} cores), "
        f"{storage_gb:.0f} GB of Parquet; {_SAMPLES // 10**6} million samples ({_SAMPLES / views:.0f} times each view) "
        f"take {gpu_hours:.0f} GPU hours at {_GPU_TFLOPS:g} TFLOP/s, {gpu_hours / num_gpus:.0f} h on {num_gpus} GPUs.",
    ]
    return "\n".join(lines)
