"""The command line of ``jobs/evaluate.py``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from raydream.config import strict_json
from raydream.config.evaluate import EvaluateConfig
from raydream.store.faults import StorageError


def main(description: str, arguments: Sequence[str] | None = None) -> int:
    """Evaluates each run; returns the exit code: 0 done, 1 where a storage is away, 2 bad input."""
    args = _parser(description).parse_args(arguments)
    try:
        settings = _settings(args)
        from raydream.evaluate.results import comparison_table  # torch only for what can be done
        from raydream.evaluate.run import evaluate_run
        from raydream.evaluate.sheet import print_evaluation

        evaluations = []
        for uri in args.run:
            evaluations.append(evaluate_run(uri, settings))
            print_evaluation(evaluations[-1], Console())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"error: {error}; try again when the storage answers", file=sys.stderr)
        return 1
    if len(evaluations) > 1:
        print(comparison_table(evaluations))
    return 0


def _parser(description: str) -> argparse.ArgumentParser:
    fields = ", ".join(strict_json.field_names(EvaluateConfig))
    parser = argparse.ArgumentParser(description=description, epilog=f"settings: {fields}")
    parser.add_argument("--run", nargs="+", required=True, help="run folders or URIs, or folders of mesh files")
    parser.add_argument("--prior", help="a diffusers folder or alias as the judge (default: the run's own)")
    parser.add_argument("--clip", help="a CLIP in transformers' layout as a judge")
    parser.add_argument("--assets", help="a folder of real objects that show what a front is ($RAYDREAM_ASSETS)")
    parser.add_argument("--prompt", help="what a folder of meshes should be")
    parser.add_argument("--label", help="the name of these runs in the table that compares them")
    parser.add_argument("--captions", help="a text file with a wrong caption on each line")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any setting (repeatable)")
    return parser


def _settings(args: argparse.Namespace) -> EvaluateConfig:
    given = {name: getattr(args, name) for name in ("prior", "clip", "assets", "prompt", "label")}
    captions: tuple[str, ...] = ()
    if args.captions is not None:
        try:
            lines = Path(args.captions).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"captions: cannot read {args.captions!r}: {error}") from error
        captions = tuple(line.strip() for line in lines if line.strip())
    settings = EvaluateConfig(captions=captions, **{name: value for name, value in given.items() if value})
    return strict_json.apply_overrides(settings, args.set)
