"""``raydream COMMAND``, also as ``python -m raydream.console``: what the files in ``jobs/`` do, and ``doctor``."""

import importlib
import sys
from collections.abc import Sequence

from raydream import __version__
from raydream.config.checks import near

COMMANDS = {
    "run": "Text to n different 3D assets: n NeRF particles under one shared score model (VSD).",
    "render": "An asset library to Parquet shards of views: colours, depth, normals, coordinate maps, captions.",
    "train-prior": "Trains the embedded text-to-image prior on rendered views: VAE, then text encoder and UNet.",
    "finetune-agp": "Fine-tunes a prior to draw canonical coordinate maps for a given camera (the geometric prior).",
    "evaluate": "Measures finished runs: does the prompt win, do particles differ, have they one front.",
    "serve": "The service with its page and API, on one machine or as a job of a cluster.",
    "doctor": "What this machine has and lacks for all of these.",
}
_MODULES = {
    "run": "raydream.launch",
    "render": "raydream.views.command",
    "train-prior": "raydream.train.prior.job",
    "finetune-agp": "raydream.train.agp.job",
    "evaluate": "raydream.evaluate.command",
    "serve": "serve.__main__",
    "doctor": "raydream.console.doctor",
}
_BAD_INPUT = 2


def main(words: Sequence[str] | None = None) -> int:
    """Hands the words after a command's name to it and returns its exit code; imports only what that command needs."""
    name, *rest = list(sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("--help", "-h"):
        print(_help())
        return 0
    if name == "--version":
        print(f"raydream {__version__}")
        return 0
    if name not in COMMANDS:
        hint = near(name, COMMANDS) or f"choose one of {', '.join(COMMANDS)}"
        print(f"error: {name!r} is no command; {hint}", file=sys.stderr)
        return _BAD_INPUT
    sys.argv = [f"raydream {name}", *rest]  # what argparse calls a program
    command = importlib.import_module(_MODULES[name])
    return command.main(rest) if name == "serve" else command.main(COMMANDS[name], rest)


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:{width}}{text}" for name, text in COMMANDS.items())
    return (
        "usage: raydream COMMAND ...\n\nOne prompt, several different 3D assets.\n\n"
        f"{commands}\n\nraydream COMMAND --help teaches its flags; raydream --version says which raydream this is."
    )


if __name__ == "__main__":
    sys.exit(main())
