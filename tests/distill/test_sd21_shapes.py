"""Stable Diffusion 2.1's real shapes, with random weights, through two whole steps at 512 px on a CPU."""

import resource
from pathlib import Path

import numpy as np
import pytest
from small_runs import Watch
from tiny_prior import make_sd21_prior

from raydream.cluster.runtime import LocalRuntime
from raydream.config import strict_json
from raydream.config.presets import make_preset
from raydream.config.strict_json import apply_overrides
from raydream.distill.loop import RunLoop
from raydream.store import tensors
from raydream.store.run_folder import RunFolder

OVERRIDES = (
    "n=1",
    "cluster.runtime=local",
    "cluster.step_timeout_s=3600",
    "prior.dtype=bfloat16",
    "stages.0.camera.image_px=512",
    "stages.0.learner.lr_warm_up_steps=1",
    "stages.0.scene.samples_per_diagonal=128",  # numba on one core; the models are what this is about
)


@pytest.mark.slow
def test_two_steps_at_512_px(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prior = make_sd21_prior(tmp_path / "prior")
    config = apply_overrides(make_preset("sd21", 2), [*OVERRIDES, "stages.0.learner.prior=", f"prior.source={prior}"])
    run = RunFolder.create(str(tmp_path / "run"), strict_json.dumps(config))
    watch = Watch()
    loop = RunLoop(LocalRuntime(), run, config, watch)
    loop.start(0)
    assert loop.train(0, watch.stop) == 2
    rows = run.read_metrics()
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))
        assert not [name for name in row if name.startswith("non_finite/")]
    for name in ("score.safetensors", "particle_000.safetensors"):
        arrays, _ = tensors.unpack(run.read_checkpoint_file(2, name))
        moments = {key: array for key, array in arrays.items() if key.endswith("/exp_avg")}
        assert moments, "an optimiser has stepped"
        assert all(np.isfinite(array).all() for array in arrays.values())
        share = sum(bool(array.any()) for array in moments.values()) / len(moments)
        assert share > (0.9 if name.startswith("score") else 0.5), "a camera may be dropped, a backdrop be another"
    with capsys.disabled():
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        step_s = max(row["time/step_s"] for row in rows)
        print(f"\nSD 2.1 shapes, 512 px, n=1: {step_s:.0f} s a step, peak {peak_gib:.1f} GiB")
