"""Whole runs of the default preset for several numbers of particles and score replicas."""

import os
import sys
from collections.abc import Sequence

from raydream.bench.figures import RunCost
from raydream.bench.whole_run import LOOK_AHEAD, measure_run
from raydream.cluster.runtime import LocalRuntime, Runtime
from raydream.config import strict_json
from raydream.config.presets import exhibit
from raydream.config.run import RunConfig, cluster_config
from raydream.generate import check_run

_WARM_STEPS = 10
_NEVER = 10**9
_REPLICAS = (1, 2)


def sweep(counts: Sequence[int], num_steps: int, runtime: str, overrides: Sequence[str]) -> list[RunCost]:
    """The cost of a step for each number of particles and 1 and 2 score replicas, in a cluster of its own."""
    os.environ.pop("RAY_ADDRESS", None)  # only descendants of this process can be counted
    costs = []
    for n in counts:
        for replicas in _REPLICAS:
            if replicas <= n:
                print(f"measuring n = {n} with {replicas} score replica(s)", file=sys.stderr)
                config = run_config(n, replicas, num_steps, runtime, overrides)
                costs.append(measure_run(config, make_runtime, _WARM_STEPS))
    return costs


def run_config(n: int, replicas: int, num_steps: int, runtime: str, overrides: Sequence[str]) -> RunConfig:
    """The default preset at its full size from the first step on, without previews and checkpoints in between."""
    settings = [
        f"n={n}",
        f"cluster.score_replicas={replicas}",
        f"cluster.runtime={runtime}",
        "stages.0.camera.image_px=64",
        "stages.0.learner.warm_up_fits=0",
        f"output.checkpoint_every={_NEVER}",
        f"output.preview_every={_NEVER}",
    ]
    steps = _WARM_STEPS + num_steps + LOOK_AHEAD + 1
    return check_run(strict_json.apply_overrides(exhibit(steps), [*settings, *overrides]))


def make_runtime(config: RunConfig) -> Runtime:
    """The runtime that the run asks for."""
    if config.cluster.runtime == "local":
        return LocalRuntime()
    from raydream.cluster.ray_runtime import RayRuntime

    return RayRuntime(cluster_config(config), config.n)
