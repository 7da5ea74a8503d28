"""The command line of ``jobs/render_ccm.py``."""

import argparse
import json
import sys
from collections.abc import Sequence

from raydream.config import strict_json
from raydream.config.render import RenderJobConfig, make_recipe


def main(description: str, words: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 open for now, 2 bad input, 130 stopped."""
    args = _parser(description).parse_args(words)
    named = {"library.source": args.assets, "pool.workers": args.workers}
    overrides = [f"{field}={value}" for field, value in named.items() if value is not None]
    overrides += [f"library.subsets={json.dumps(args.subset)}"] if args.subset else []
    try:
        config = strict_json.apply_overrides(make_recipe(args.recipe), overrides + args.set)
        from raydream.views.pool import render_library  # Ray and torch only for what can be done

        report = render_library(config, args.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a storage that is away, a disk that is full
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(json.dumps(report, indent=2))
    if report["open_shards"]:
        print(f"error: {report['open_shards']} shards are open; the same command tries them again", file=sys.stderr)
    return 1 if report["open_shards"] else 0


def _parser(description: str) -> argparse.ArgumentParser:
    fields = ", ".join(strict_json.field_names(RenderJobConfig))
    parser = argparse.ArgumentParser(
        description=description, epilog=f"settings: {fields}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder or pyarrow.fs URI for the shards")
    parser.add_argument("--recipe", default="ccm", help="ccm (SweetDreamer's cameras) or prior (whole objects, 64 px)")
    parser.add_argument("--assets", "--source", help='any folder or URI of assets, an Objaverse cache, or "procedural"')
    parser.add_argument("--subset", action="append", default=[], help="a name in subsets.json (repeatable)")
    parser.add_argument("--workers", help="at most so many processes; 0 is one for each core")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="any setting (repeatable)")
    return parser
