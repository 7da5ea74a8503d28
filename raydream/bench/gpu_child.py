"""The process that runs parts of the first minutes on a GPU: each in its own try, each with its own time, a line of
JSON after each. ``first_gpu`` starts it, and again where a part has taken the device with it.
"""

import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from raydream.bench import gpu_basics, gpu_models, gpu_steps, gpu_training
from raydream.bench.parts import Bench, Found
from raydream.bench.plan import PARTS, SECONDS, WHOLE_MINUTES, PartName, make_parser, read_lines, write_line

WORK: dict[PartName, Callable[[Bench, Found], None]] = {
    "card": gpu_basics.card,
    "rates": gpu_basics.rates,
    "tests": gpu_basics.tests,
    "kernels": gpu_basics.kernels,
    "particle": gpu_models.particle,
    "vae": gpu_models.vae,
    "unet": gpu_models.unet,
    "score": gpu_steps.score,
    "gradients": gpu_models.gradients,
    "composition": gpu_steps.composition,
    "prior": gpu_training.prior,
    "agp": gpu_training.agp,
}
BROKEN = 3  # the exit code where the rest needs a new process


class _TimeIsOver(Exception):
    """Raised in a part by the clock."""


def main(words: Sequence[str]) -> int:
    """Runs the parts that are named; 0 where all were run, ``BROKEN`` where those after the last line were not."""
    args = make_parser("").parse_args(words)
    device = torch.device("cpu" if args.small else "cuda")
    bench = Bench(device, args.small, _known_rate(Path(args.out)), out=args.out)
    bench.views = {name: value for name in ("prior", "agp") if (value := getattr(args, f"{name}_views"))}
    bench.settings = {name: value for name in ("prior", "agp") if (value := getattr(args, f"{name}_settings"))}
    for name in args.parts:
        bench.seconds = SECONDS[name] * args.minutes / WHOLE_MINUTES
        if not run_part(name, bench, Path(args.out)):
            return BROKEN
    return 0


def run_part(name: PartName, bench: Bench, out: Path) -> bool:
    """One part and its line; whether the process can go on after it. What failed is in the line, with what was found
    before.
    """
    found, begin, error = Found(), time.monotonic(), None
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, bench.seconds)
    try:
        WORK[name](bench, found)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as reason:  # whatever goes wrong in one part, the others are still to be had
        error = f"{type(reason).__name__}: {str(reason)[:500]}"
        traceback.print_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    line = {"part": name, "seconds": round(time.monotonic() - begin, 2), "error": error, "found": found}
    write_line(out, line)
    return error is None or bench.device.type != "cuda" or _still_works()


def _known_rate(out: Path) -> float:
    """The rate that a process before this one measured."""
    rates = [
        line["found"].get("bfloat16", {}).get("tflops", 0.0) for line in read_lines(out) if line["part"] == "rates"
    ]
    return rates[-1] if rates else 0.0


def _still_works() -> bool:
    """Whether the device answers: after some errors it never does again in this process."""
    try:
        torch.cuda.empty_cache()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except RuntimeError:
        return False


def _ring(*_: object) -> None:
    raise _TimeIsOver("the time of this part is over")


if __name__ == "__main__":
    assert set(WORK) == set(PARTS)
    sys.exit(main(sys.argv[1:]))
