"""What a person looks at: grids of renders while a run goes on, and one self-contained page when it is over.

The page loads nothing: pictures and short videos are data URIs, curves are inline SVG, and its content security policy
forbids the rest. All text that is not ours, above all the prompt, is escaped where it is put in.
"""

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from raydream import __version__
from raydream.report.chart import Point, format_number, line_chart
from raydream.report.progress import format_duration
from raydream.store.run_folder import (
    MESH,
    PARTICLES,
    PREVIEW,
    PREVIEWS,
    REPORT,
    TURNTABLE,
    VERSIONS,
    RunFolder,
    Scalar,
    particle_file,
)

_MAX_EMBEDDED_VIDEO_BYTES = 2_000_000
_MAX_HISTORY = 12
_GRID_GAP_PX = 4
_NOT_CURVES = frozenset({"step", "time_s"})
_LOSS_NOTE = (
    "loss/rgb is half the squared length of the guidance's gradient, not an objective that falls: in a healthy VSD run "
    "it climbs, because the sharper the pictures are, the more there is to pull on. loss/fit is a loss."
)
_SCRIPT = (
    "if(!matchMedia('(prefers-reduced-motion: reduce)').matches)"
    "document.querySelectorAll('video').forEach(v=>v.play().catch(()=>{}))"
)


@dataclass(frozen=True)
class ReportFacts:
    """What the page tells beyond the run folder's own files; durations in seconds.

    ``summary`` are the few facts under the title, ``phase_s`` the parts of the run in their order, ``step_part_s``
    the mean times of its actors' parts of a step, ``particles`` one mapping of statistics for each particle.
    """

    prompt: str
    summary: Mapping[str, str]
    phase_s: Mapping[str, float]
    step_part_s: Mapping[str, float]
    machine: Mapping[str, str]
    particles: Sequence[Mapping[str, Scalar]]


def preview_grid(images: Sequence[UInt8[np.ndarray, "h w 3"]], columns: int, labels: Sequence[str] = ()) -> bytes:
    """PNG of images of one size, row by row; where there are ``labels``, one stands under each image."""
    assert images
    assert len({image.shape for image in images}) == 1
    assert not labels or len(labels) == len(images)
    height, width, _ = images[0].shape
    font_px = max(11, width // 12)
    font = ImageFont.load_default(font_px)
    cell_height = height + (font_px + 8 if labels else 0)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * (width + _GRID_GAP_PX) + _GRID_GAP_PX, rows * (cell_height + _GRID_GAP_PX) + _GRID_GAP_PX)
    sheet = Image.new("RGB", size, "#18181b")
    for number, pixels in enumerate(images):
        cell = Image.new("RGB", (width, cell_height), "#18181b")
        cell.paste(Image.fromarray(pixels))
        if labels:
            middle = (width / 2, height + (cell_height - height) / 2)
            ImageDraw.Draw(cell).text(middle, labels[number], fill="#f4f4f5", font=font, anchor="mm")
        row, column = divmod(number, columns)
        place = (_GRID_GAP_PX + column * (width + _GRID_GAP_PX), _GRID_GAP_PX + row * (cell_height + _GRID_GAP_PX))
        sheet.paste(cell, place)
    return _encoded(sheet, "PNG")


def write_report(run: RunFolder, facts: ReportFacts) -> str:
    """Write ``report.html`` from the run folder's artefacts and ``facts``; returns its name.

    What a run that was stopped has not made is said to be missing, so this may be called at any time.
    """
    versions = json.loads(run.read_bytes(VERSIONS)) if run.exists(VERSIONS) else {}
    sizes = run.list_files(PARTICLES)
    cards = (_particle(run, sizes, index, stats) for index, stats in enumerate(facts.particles))
    sections = [
        _section("Particles", f'<div class="cards">{"".join(cards)}</div>'),
        _section("While it ran", _history(run)),
        _section("Curves", _curves(run.read_metrics())),
        _section("Time", _times(facts)),
        _section("Settings", _folded("All settings", _table(_flattened(json.loads(run.read_config()))))),
        _section("Where it ran", _folded("Machine", _table(facts.machine)) + _folded("Versions", _table(versions))),
    ]
    run.write_text(REPORT, _page(facts, "".join(sections)))
    return REPORT


def _page(facts: ReportFacts, body: str) -> str:
    allowed = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    summary = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.summary.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(facts.prompt[:80])} · raydream</title><style>\n{style}</style></head><body>"
        f'<header><p class="kicker">raydream · {len(facts.particles)} particles</p><h1>{escape(facts.prompt)}</h1>'
        f'<dl class="summary">{summary}</dl></header><main>{body}</main>'
        f"<footer>Written by raydream {escape(__version__)}.</footer><script>{_SCRIPT}</script></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def _particle(run: RunFolder, sizes: Mapping[str, int], index: int, stats: Mapping[str, Scalar]) -> str:
    name = f"particle {index}"
    mesh, turntable, preview = (particle_file(index, file) for file in (MESH, TURNTABLE, PREVIEW))
    poster = _picture(run.read_bytes(preview)) if preview in sizes else None
    links = []
    if turntable in sizes and sizes[turntable] <= _MAX_EMBEDDED_VIDEO_BYTES:
        video = _data_uri(run.read_bytes(turntable), "video/mp4")
        first = f' poster="{poster}"' if poster else ""
        media = f'<video src="{video}"{first} controls loop muted playsinline aria-label="Turntable of {name}"></video>'
    elif poster:
        media = f'<img src="{poster}" alt="Render of {name}">'
    else:
        media = '<p class="missing">no picture</p>'
    if turntable in sizes and sizes[turntable] > _MAX_EMBEDDED_VIDEO_BYTES:
        links.append(f'<a href="{turntable}">{TURNTABLE}</a> <small>{_size(sizes[turntable])}</small>')
    if mesh in sizes:
        links.append(f'<a href="{mesh}">{MESH}</a> <small>{_size(sizes[mesh])}</small>')
    else:
        links.append('<span class="missing">no mesh was exported</span>')
    return (
        f'<article class="card">{media}<h3>Particle {index}</h3><p class="links">{" · ".join(links)}</p>'
        f"{_table(stats)}</article>"
    )


def _history(run: RunFolder) -> str:
    names = [name for name in run.list_files(PREVIEWS) if name.endswith(".png")]
    if not names:
        return ""
    last = len(names) - 1
    count = min(_MAX_HISTORY, len(names))
    chosen = [names[round(k * last / max(1, count - 1))] for k in range(count)]
    figures = []
    for name in chosen:
        step = int(name.rpartition("_")[2].removesuffix(".png"))
        source = _picture(run.read_bytes(name))
        image = f'<img src="{source}" alt="All particles at step {step}">' if source else "not readable"
        figures.append(f"<figure>{image}<figcaption>step {step}</figcaption></figure>")
    return f'<div class="strip" role="region" aria-label="Previews by step" tabindex="0">{"".join(figures)}</div>'


def _curves(rows: Iterable[Mapping[str, Scalar]]) -> str:
    """A chart for each group of metrics: ``loss/rgb`` and ``loss/lora`` are two lines of the chart ``loss``."""
    groups: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and key not in _NOT_CURVES:
                group, _, name = key.partition("/")
                point = (float(cast(int, row["step"])), float(value))
                groups.setdefault(group, {}).setdefault(name or group, []).append(point)
    charts = "".join(
        line_chart(group.replace("_", " "), series, f"chart-{number}")
        for number, (group, series) in enumerate(groups.items())
    )
    note = f"<p>{_LOSS_NOTE}</p>" if charts and "rgb" in groups.get("loss", {}) else ""
    return f'<div class="charts">{charts}</div>{note}' if groups else ""


def _times(facts: ReportFacts) -> str:
    tables = _bars("The run", facts.phase_s) + _bars("One step, all actors added up", facts.step_part_s)
    return f'<div class="pair">{tables}</div>' if tables else ""


def _bars(caption: str, seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    total = sum(seconds.values()) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{_duration(value)}</td>'
        f'<td class="number">{100 * value / total:.0f} %</td>'
        f'<td class="bar" aria-hidden="true"><i style="width:{100 * value / total:.1f}%"></i></td></tr>'
        for name, value in seconds.items()
    )
    cells = f'<td class="number">{_duration(total)}</td><td></td><td></td>'
    whole = f'<tr class="total"><th scope="row">all</th>{cells}</tr>'
    return f"<div><table><caption>{escape(caption)}</caption><tbody>{rows}{whole}</tbody></table></div>"


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_text(value))}</td></tr>'
        for name, value in values.items()
    )
    return f"<table><tbody>{rows}</tbody></table>" if rows else ""


def _text(value: Scalar) -> str:
    if isinstance(value, float):
        return format_number(value)
    return "none" if value is None else str(value)


def _flattened(value: Any, name: str = "") -> dict[str, Any]:
    """``{"a": {"b": [1]}}`` to ``{"a.b.0": 1}``."""
    match value:
        case dict():
            items = value.items()
        case list() if any(isinstance(item, dict | list) for item in value):
            items = {str(index): item for index, item in enumerate(value)}.items()
        case list():
            return {name: ", ".join(_text(item) for item in value) or "none"}
        case _:
            return {name: value}
    rows: dict[str, Any] = {}
    for key, item in items:
        rows |= _flattened(item, f"{name}.{key}" if name else key)
    return rows


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 60 else format_duration(seconds)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:.1f} kB"


def _picture(data: bytes, max_px: int = 640) -> str:
    """A data URI of a picture, made smaller where it is larger than a page needs; empty for one that is damaged."""
    try:
        image = Image.open(io.BytesIO(data))
        if max(image.size) <= max_px:
            return _data_uri(data, "image/png")
        smaller = image.convert("RGB")
    except OSError:  # one picture less is no reason to have no page
        return ""
    smaller.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    return _data_uri(_encoded(smaller, "JPEG"), "image/jpeg")


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=88, optimize=True)
    return buffer.getvalue()


def _data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
