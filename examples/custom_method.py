"""A method of your own: one pure function, tried on flat pictures before it has a name in the tree.

python examples/custom_method.py --out methods.png         SDS, CSD and the one below; about a minute

SDS is what the text adds (classifier score distillation, arXiv 2310.19415) and what the prior says without it. The
method below takes as much of the second as there is signal in the noisy picture. One that runs are to have by name is
the same function and row in ``diffusion/methods.py``, and its name in ``config/names.py``: see docs/extending.md.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from custom_scene import distil, picture_run
from PIL import Image

from raydream.config.names import MethodName
from raydream.config.run import RunConfig
from raydream.diffusion import guidance
from raydream.diffusion.methods import METHODS, Eps, Method
from raydream.types import Latents, PerView

BORROWED: MethodName = "sjc"  # the list of names does not know it yet: it stands in the row of another


def fading(eps: Eps, w_t: PerView) -> Latents:
    """``w(t) (guided - negative + abar_t (negative - noise))``: CSD where all is noise, SDS where nothing is."""
    assert eps.negative is not None
    signal = eps.abar_t[:, None, None, None]
    reference = eps.negative + signal * (eps.noise - eps.negative)
    return guidance.distillation_gradient(eps.guided, reference, w_t)


def with_method(run: RunConfig, method: MethodName) -> RunConfig:
    """The same run by another method."""
    return dataclasses.replace(run, stages=tuple(stage.with_method(method) for stage in run.stages))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a red chair")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="methods.png")
    args = parser.parse_args()
    if not Path(args.out).resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {Path(args.out).resolve().parent}")
    METHODS[BORROWED] = Method(fading, needs_negative=True)
    run = picture_run(args.prompt, "sds", args.n, args.steps)
    methods: tuple[MethodName, ...] = ("sds", "csd", BORROWED)
    rows = [torch.cat([*distil(with_method(run, method))], dim=1) for method in methods]
    Image.fromarray((torch.cat(rows) * 255).round().to(torch.uint8).numpy()).save(args.out)
    print(f"from above SDS, CSD and the one between them: {args.out}")


if __name__ == "__main__":
    main()
