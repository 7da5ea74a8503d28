"""The cameras of whole runs: where those of a step stand, and at which resolution they look."""

from pathlib import Path

import numpy as np
import pytest
from small_runs import WatchedRuntime, new_run, small_config, train

from raydream.config.actors import particle_config
from raydream.distill.particle import step_cameras

pytestmark = pytest.mark.slow


def test_all_azimuths_of_a_step_are_stratified_over_all_particles(tmp_path: Path) -> None:
    views = 2
    config = small_config(f"stages.0.camera.views_per_particle={views}", "stages.0.branches.0.method=sds", steps=4)
    runtime = WatchedRuntime()
    train(new_run(tmp_path / "run", config), config, runtime)
    total = views * config.n
    for step in range(4):
        messages = runtime.rendered[step]
        azimuths = np.sort(np.concatenate([messages[i]["azimuth_deg"] for i in range(config.n)]).astype(np.float64))
        # one in each of six equal sectors, wherever the first sector begins
        phases = azimuths[:, None] - np.arange(total) * 360 / total
        assert len(azimuths) == total
        assert any(
            sorted(np.floor((azimuths - start) % 360 * total / 360)) == list(range(total))
            for start in (phases[:, 0] + 1e-4).tolist() + (phases[:, 0] - 1e-4).tolist()
        )
        assert all(np.abs(np.diff(messages[i]["azimuth_deg"])) > 1 for i in range(config.n))


def test_resolution_milestones_change_what_is_rendered_not_what_is_sent(tmp_path: Path) -> None:
    image_px = 'stages.0.camera.image_px={"kind": "steps", "points": [[0, 8], [2, 16]]}'
    config, runtime = small_config(image_px, "stages.0.branches.0.method=sds", steps=4), WatchedRuntime()
    run = new_run(tmp_path / "run", config)
    train(run, config, runtime)
    assert [step_cameras(particle_config(config, 0, 0), step).height_px for step in range(4)] == [
        8, 8, 16, 16,
    ]  # fmt: skip
    samples = [row["scene/samples"] for row in run.read_metrics()]
    assert min(samples[2:]) > 2.5 * max(samples[:2])  # four times the rays
    assert {message["latents/rgb"].shape for step in runtime.rendered.values() for message in step.values()} == {
        (1, 4, 16, 16)
    }
