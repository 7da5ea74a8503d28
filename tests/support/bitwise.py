"""Are two versions of the code the same to the bit? Seeded CPU runs of the presets, their metrics and their meshes.

python tests/support/bitwise.py record before.json      # with the code as it was
python tests/support/bitwise.py compare before.json     # with the code as it is: exit 1 where anything differs

A record holds for one machine and one torch: processors add in other orders.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["output.turntable_frames=4", "output.texture_px=128", "output.checkpoint_every=5"]
RUNS = {
    "exhibit": ["--preset", "exhibit", "--n", "2", "--steps", "12", "--seed", "3", "--prompt", "a chair"],
    "exhibit_sds": ["--preset", "exhibit", "--n", "1", "--steps", "6", "--method", "sds", "--prompt", "a chair"],
    "embedded": ["--preset", "embedded", "--n", "2", "--steps", "8", "--seed", "3", "--prompt", "a red chair"],
}
_CLOCKS = ("time/", "cpu/", "wall")


def measure(root: Path) -> dict[str, dict[str, str]]:
    """For each run a digest of each metric's column and of each mesh, made by the checkout at ``root``."""
    found = {}
    for name, words in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            settings = ["prior.exhibit.assets=procedural", *SMALL] if name.startswith("exhibit") else SMALL
            flags = [word for setting in settings for word in ("--set", setting)]
            command = [sys.executable, "jobs/vsd_particles.py", "--runtime", "local", *words, *flags, "--out", str(out)]
            subprocess.run(command, cwd=root, check=True)
            found[name] = _metrics(out / "metrics.jsonl") | _meshes(out)
    return found


def _metrics(path: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = sorted({name for row in rows for name in row if not name.startswith(_CLOCKS)})
    return {name: _digest(json.dumps([row.get(name) for row in rows]).encode()) for name in names}


def _meshes(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): _digest(path.read_bytes()) for path in sorted(out.glob("particles/*/mesh.glb"))}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def main() -> int:
    """Records or compares; the exit code says whether all is the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    now = measure(ROOT)
    if args.what == "record":
        args.file.write_text(json.dumps(now, indent=1))
        return 0
    before = json.loads(args.file.read_text())
    differing = [
        f"{run}: {name}"
        for run in before.keys() | now.keys()
        for name in before.get(run, {}).keys() | now.get(run, {}).keys()
        if before.get(run, {}).get(name) != now.get(run, {}).get(name)
    ]
    print("\n".join(sorted(differing)) or f"the same bits: {sum(map(len, now.values()))} metrics and meshes")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
