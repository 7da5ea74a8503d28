"""An evaluation for people: a contact sheet with verdicts, and a table in the terminal."""

from collections.abc import Mapping

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from raydream.evaluate.results import Evaluation, ParticleEvaluation
from raydream.evaluate.turntable import Turntable
from raydream.report.page import preview_grid

_SHOWN = (0, 3, 6, 9)  # front, right, back, left
_PAPER = 0.96
_MAX_LABEL = 34


def verdict_sheet(evaluation: Evaluation, tables: Mapping[str, Turntable]) -> bytes:
    """PNG: each particle from four sides with its verdicts."""
    images, labels = [], []
    for particle in evaluation.particles:
        if particle.name in tables:
            strip = torch.cat(list(tables[particle.name].images(_PAPER)[list(_SHOWN)]), dim=1)
            images.append(np.asarray((strip * 255).round().byte().cpu().numpy()))
            labels.append(_label(particle))
    return preview_grid(images, columns=2, labels=labels)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """The particles and the run's figures as tables."""
    table = Table(title=f"{evaluation.prompt} · {evaluation.label}", title_justify="left")
    for column in ("particle", "recognised", "front", "twin", "mesh", "note"):
        table.add_column(column)
    for particle in evaluation.particles:
        table.add_row(*_row(particle))
    console.print(table)
    figures = Table(show_header=False)
    for name, value in evaluation.summary().items():
        figures.add_row(name, f"{value:.4g}")
    for check in evaluation.checks:
        worth = f"{check.consistent_on_real:.2f} of {check.num_assets} real assets, {check.janus_on_glued:.2f} of glued"
        figures.add_row(f"judge {check.judge} is right on", worth)
    console.print(figures)


def _row(particle: ParticleEvaluation) -> tuple[str, ...]:
    mesh = particle.mesh
    state = "none"
    if mesh is not None:
        state = f"{mesh.faces} faces, {mesh.components} parts, {'closed' if mesh.boundary_edges == 0 else 'open'}"
    return (
        particle.name,
        ", ".join(f"{r.judge} {r.rank}/{r.num_candidates} ({r.best})" for r in particle.recognitions),
        ", ".join(f"{f.judge} {f.verdict}" for f in particle.facings),
        "" if particle.twin_ratio is None else f"{particle.twin_ratio:.2f}",
        state,
        particle.note,
    )


def _label(particle: ParticleEvaluation) -> str:
    ranks = [f"#{recognition.rank}" for recognition in particle.recognitions[:1]]
    verdicts = [facing.verdict for facing in particle.facings[:1]]
    return " ".join([particle.name[:16], *ranks, *verdicts])[:_MAX_LABEL]
