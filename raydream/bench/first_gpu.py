"""The first minutes on a GPU: starts the process that measures, and again where a part ends it or never ends, and turns
what was found into the table of ``docs/benchmarks.md``. No torch here: a device that hangs must not hang this.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from raydream.bench.plan import LINES, SECONDS, WHOLE_MINUTES, Line, PartName, make_parser, read_lines, write_line

GRACE_S = 30.0  # for imports, and for a part that does not hear that its time is over


def main(description: str, words: Sequence[str] | None = None) -> int:
    """0 where each part left a line without an error, else 1."""
    words = list(sys.argv[1:] if words is None else words)
    args = make_parser(description).parse_args(words)
    out, parser = Path(args.out), make_parser(description)
    if args.minutes <= 0:
        parser.error(f"--minutes: must be above 0, got {args.minutes:g}")
    if args.table:
        if not read_lines(out):
            parser.error(f"--out: {out} has no {LINES}; measure first, without --table")
        print(table(read_lines(out)))
        return 0
    if not args.small and not _sees_a_gpu():
        parser.error("torch sees no GPU here (`raydream doctor` says why); --small tries all of it on the CPU")
    out.mkdir(parents=True, exist_ok=True)
    before = len(read_lines(out))
    pending: list[PartName] = list(args.parts)
    while pending:
        said = len(read_lines(out))
        run = subprocess.Popen([sys.executable, "-m", "raydream.bench.gpu_child", *words, "--parts", *pending])
        _watch(run, out, pending, args.minutes / WHOLE_MINUTES)
        done = len(read_lines(out)) - said
        if done < len(pending) and run.returncode != 0 and (done == 0 or run.returncode < 0):
            why = "did not end" if run.returncode == -9 else f"ended its process with code {run.returncode}"
            write_line(out, {"part": pending[done], "seconds": None, "error": why, "found": {}})
            done += 1
        pending = pending[done:]
    return int(any(line["error"] for line in read_lines(out)[before:]))


def _sees_a_gpu() -> bool:
    import torch  # seconds, which a table need not wait for

    return torch.cuda.is_available()


def _watch(run: "subprocess.Popen[bytes]", out: Path, pending: list[PartName], pace: float) -> None:
    """Waits for the process, and ends it where a part takes much longer than its time."""
    said, began = len(read_lines(out)), time.monotonic()
    done = 0
    while run.poll() is None:
        time.sleep(0.1)
        now = len(read_lines(out)) - said
        if now > done:
            done, began = now, time.monotonic()
        if done < len(pending) and time.monotonic() - began > pace * SECONDS[pending[done]] + GRACE_S:
            run.kill()
            run.wait()


def table(lines: Sequence[Line]) -> str:
    """In Markdown, headed by the device's name; the last line of each part counts."""
    last = {line["part"]: line for line in lines}
    device = last.get("card", {}).get("found", {}).get("device", "an unknown device")
    rows = [f"Measured on {device}:", "", "| part | what | found |", "|---|---|---|"]
    for part, line in last.items():
        for what, value in line["found"].items():
            rows.append(f"| {part} | {what} | {_words(value)} |")
        if line["error"]:
            rows.append(f"| {part} | error | {line['error']} |")
    return "\n".join(rows)


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
