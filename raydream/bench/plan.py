"""The order of the first minutes on a GPU, the time of each part, and the lines that they leave; no torch."""

import argparse
import json
from pathlib import Path
from typing import Any, Literal, get_args

from raydream.config.checks import one_of

PartName = Literal[
    "card", "rates", "tests", "kernels", "particle", "vae", "unet", "score", "gradients", "composition", "prior", "agp"
]
PARTS: tuple[PartName, ...] = get_args(PartName)
WHOLE_MINUTES = 10.0
# Seconds of ten minutes. What steers everything else comes first, what fills the time that is left comes last.
SECONDS: dict[PartName, float] = {
    "card": 10, "rates": 20, "tests": 60, "kernels": 75, "particle": 60, "vae": 30, "unet": 75, "score": 60,
    "gradients": 30, "composition": 50, "prior": 80, "agp": 50,
}  # fmt: skip
LINES = "first_gpu.jsonl"
Line = dict[str, Any]


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags of the script, which its processes have too."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--parts", nargs="+", type=one_of(*PARTS), default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--minutes", type=float, default=WHOLE_MINUTES, help="of all parts together (default 10)")
    parser.add_argument("--out", default="outputs/first_gpu", help=f"folder for {LINES} and what is trained")
    parser.add_argument("--small", action="store_true", help="everything in little on the CPU, to see that it works")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the lines of --out as a table")
    for model, what in (("prior", "packed set or folder"), ("agp", "folder")):
        parser.add_argument(f"--{model}-views", help=f"{what} of views to train the {model} on")
        parser.add_argument(f"--{model}-settings", help="its JSON file of settings")
    return parser


def write_line(out: Path, line: Line) -> None:
    """To the file and to the terminal."""
    text = json.dumps(line)
    with (out / LINES).open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text, flush=True)


def read_lines(out: Path) -> list[Line]:
    """What was written so far."""
    path = out / LINES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
