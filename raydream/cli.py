"""From the words on the command line to a checked ``RunConfig``. No torch: ``--dry-run`` answers at once."""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from raydream.config import strict_json
from raydream.config.checks import near, one_of
from raydream.config.cluster import OutputConfig
from raydream.config.names import LEARNING_METHODS, METHOD_NAMES
from raydream.config.paths import with_absolute_folders
from raydream.config.presets import DEFAULT_PRESET, PRESETS, make_preset
from raydream.config.run import RunConfig
from raydream.store.run_folder import RunFolder

_EPILOG = """\
examples:
  python jobs/vsd_particles.py --n 8 --prompt "a chair"
  python jobs/vsd_particles.py --prior /models/my-sd-folder --prompt "a red vase" --steps 5000
  python jobs/vsd_particles.py --resume runs/20260131-120000-exhibit
  ray job submit --working-dir . -- python jobs/vsd_particles.py --n 8
  python jobs/vsd_particles.py --set output.texture_px=1024     every setting has such a name: see --dry-run
"""


@dataclass(frozen=True)
class Request:
    """What a person asked for: a run, where it lies, whether it goes on from there, or only its settings."""

    config: RunConfig
    out: str
    resume: bool
    dry_run: bool


def build_parser(description: str) -> argparse.ArgumentParser:
    """The flags of the main job; each stands for a field of ``RunConfig`` and the rest is reached by ``--set``."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--prompt", help="what to make")
    parser.add_argument("--negative-prompt", help="what to move away from (diffusers priors)")
    parser.add_argument("--n", type=int, help="number of particles: different assets from one prompt (default 8)")
    parser.add_argument(
        "--method",
        type=one_of(*METHOD_NAMES),
        metavar="|".join(METHOD_NAMES),
        help=f"{', '.join(LEARNING_METHODS)} learns a reference score, the others do not",
    )
    presets = ", ".join(PRESETS)
    parser.add_argument("--preset", help=f"a named starting point: {presets} (default {DEFAULT_PRESET})")
    parser.add_argument(
        "--prior", help="a folder in the diffusers layout or a known name, instead of the preset's prior"
    )
    parser.add_argument("--agp", help="aligned geometric prior against the Janus problem: embedded, a folder, or off")
    parser.add_argument("--steps", type=int, help="controller steps; the preset's schedules scale with it")
    parser.add_argument("--seed", type=int, help="everything random follows from it (default 0)")
    parser.add_argument("--faces", type=int, help="about so many faces for each mesh at most")
    parser.add_argument(
        "--lods", type=int, nargs="+", metavar="FACES", help="coarser meshes of so many faces beside it"
    )
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="files beside the GLB: obj, stl, ply, usdz")
    parser.add_argument("--out", help="the run folder: a new path or a URI such as s3://bucket/run")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run folder, from its last checkpoint")
    runtimes = ("ray", "local")
    parser.add_argument(
        "--runtime",
        type=one_of(*runtimes),
        metavar="|".join(runtimes),
        help="ray: actors in processes; local: all in this one",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any setting by its dotted name (repeatable)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings as JSON and stop")
    return parser


def parse(description: str, words: Sequence[str] | None = None) -> Request:
    """The request in the words; ``ValueError`` naming the field for whatever cannot be."""
    args = _parse_words(build_parser(description), words)
    if args.resume is not None:
        return _resumed(args)
    preset = args.preset or ("diffusers" if args.prior else DEFAULT_PRESET)
    config = with_absolute_folders(_changed(make_preset(preset, args.steps), args))
    if config.prior.lacks_source:
        raise ValueError("prior: the preset needs one; give --prior FOLDER")
    out = args.out or config.output.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.preset}"
    return Request(config, out, resume=False, dry_run=args.dry_run)


def changed_fields(old: RunConfig, new: RunConfig) -> list[str]:
    """The dotted names of settings that differ but those of ``cluster``: where a run goes on may change, not what."""
    return [name for name, a, b in _differences(strict_json.to_json(old), strict_json.to_json(new), "") if a != b]


def _parse_words(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    try:
        args, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from error
    if unknown:
        flag = unknown[0].partition("=")[0]
        flags = ["--" + name.replace("_", "-") for name in vars(args)]
        hint = near(flag, flags) or "see --help"
        raise ValueError(f"{flag}: unknown flag; {hint}" if flag.startswith("-") else f"{flag!r}: belongs to no flag")
    meshes = {"mesh_max_faces": args.faces, "mesh_lods": args.lods, "mesh_formats": args.formats}
    named = [f"output.{name}={json.dumps(value)}" for name, value in meshes.items() if value is not None]
    args.set = [*named, *args.set]  # what a run leaves behind may change when it goes on, so it comes by one way
    return args


def _resumed(args: argparse.Namespace) -> Request:
    for name in ("preset", "steps", "out"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}: cannot be given with --resume; the run folder says it already")
    saved, config = _with_changes(RunFolder.open(args.resume).read_config(), args)
    changed = changed_fields(saved, config)
    if changed:
        raise ValueError(
            f"resume: {', '.join(changed)} would differ from the run in {args.resume!r}; leave them, or start "
            "a new run with --out (only cluster.* and output.* settings may change, and not output.out)"
        )
    return Request(config, args.resume, resume=True, dry_run=args.dry_run)


def _with_changes(text: str, args: argparse.Namespace) -> tuple[RunConfig, RunConfig]:
    """A run's saved settings without and with what the words change. What it is to leave behind counts as changed in
    both, and before anything is checked: an earlier release took settings that no export can use.
    """
    raw = strict_json.parse(text)
    if isinstance(raw, dict) and "method" in raw:  # whose checkpoints are of another form, too
        remedy = "start a new run, or go on with the release that began it"
        raise ValueError(
            f"resume: {args.resume!r} was begun by an earlier release, which this one cannot go on with; {remedy}"
        )
    output = raw.get("output")
    if isinstance(output, dict):
        for override in args.set:
            name, _, value = override.removeprefix("output.").partition("=")
            if override.startswith("output.") and name in strict_json.field_names(OutputConfig) and name != "out":
                output[name] = strict_json.parse_value(OutputConfig, name, value)
    saved = with_absolute_folders(strict_json.from_json(RunConfig, raw))
    return saved, with_absolute_folders(_changed(saved, args))


def _flags(args: argparse.Namespace) -> list[str]:
    named = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "n": args.n,
        "seed": args.seed,
        "cluster.runtime": args.runtime,
        "prior.source": args.prior,
    }
    overrides = [f"{name}={value}" for name, value in named.items() if value is not None]
    return overrides if args.prior is None else ["prior.kind=diffusers", *overrides]


def _changed(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The settings with all that the flags say, and then with those of ``--set``."""
    # a preset's AGP is one of its own prior, which knows other words
    geometric_prior = args.agp or ("off" if args.prior is not None else None)
    if geometric_prior is not None:
        config = config.with_geometric_prior(geometric_prior)
    config = strict_json.apply_overrides(config, _flags(args))
    if args.method is not None:
        config = config.with_method(args.method)
    return strict_json.apply_overrides(config, args.set)


def _differences(old: object, new: object, path: str) -> list[tuple[str, object, object]]:
    if path == "cluster":
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [
            entry
            for key in keys
            for entry in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [entry for i, (a, b) in enumerate(zip(old, new)) for entry in _differences(a, b, f"{path}.{i}")]
    return [(path, old, new)]
