"""Evaluate a run: everything that can be measured of its meshes with what is at hand."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raydream.assets.exhibit import asset_folder, available_nouns
from raydream.assets.procedural import PROCEDURAL
from raydream.backend import load_backend
from raydream.config import strict_json
from raydream.config.evaluate import NUM_VIEWS, EvaluateConfig
from raydream.device import own_device
from raydream.diffusion.layout import LEXICON
from raydream.diffusion.prompts import VIEW_WORDS
from raydream.evaluate.agreement import ccm_agreement
from raydream.evaluate.diversity import Diversity, feature_distances, measure_diversity, picture_distances
from raydream.evaluate.facing import Facing, JudgeCheck, judge_facing, twin_ratio
from raydream.evaluate.meshes import ParticleMesh, RunMeshes, read_meshes
from raydream.evaluate.nearest import NearestAsset
from raydream.evaluate.references import (
    Frontness,
    ReferenceAsset,
    check_judge,
    check_references,
    judge_by_references,
    load_references,
)
from raydream.evaluate.results import Evaluation, ParticleEvaluation, Recognition
from raydream.evaluate.sheet import verdict_sheet
from raydream.evaluate.turntable import Turntable, standard_cameras, take_turntable
from raydream.evaluate.word_judges import ClipJudge, PriorJudge, WordJudge, distractors, word_frontness
from raydream.priors.find import resolve_prior
from raydream.scene.mesh_checks import check_mesh
from raydream.train.captions import Lexicon
from raydream.types import Backend

EVALUATION, SHEET = "evaluation.json", "evaluation.png"
_MIN_COUNT = 2  # a noun of one asset alone may be a name


@dataclass(frozen=True)
class _Panel:
    """All judges that are at hand for a prompt, and what they were found to be worth."""

    words: tuple[WordJudge, ...]
    candidates: tuple[str, ...]
    nearest: NearestAsset | None
    references: tuple[ReferenceAsset, ...]
    checks: tuple[JudgeCheck, ...]


def evaluate_run(uri: str, settings: EvaluateConfig) -> Evaluation:
    """Measures a run folder, or a folder of meshes, and writes ``evaluation.json`` and ``evaluation.png`` into it.

    Without ``prior``, ``clip`` or assets about the prompt's object the measures that need them are left out. Raises
    ValueError naming ``run``, ``prompt``, ``prior``, ``clip``, ``assets`` or ``captions`` before anything is measured.
    """
    meshes = read_meshes(uri, settings)
    settings = replace(settings, prior=settings.prior or meshes.prior)
    backend = load_backend("auto", "cpu")
    panel = _assemble(meshes, settings, backend)
    tables: dict[str, Turntable] = {}
    for mesh in meshes.particles:
        if mesh.asset is not None:
            tables[mesh.name] = take_turntable(mesh.asset, settings, backend, mesh.name)
    particles = tuple(
        _evaluate_particle(mesh, tables.get(mesh.name), meshes.prompt, panel, settings, backend)
        for mesh in meshes.particles
    )
    evaluation = Evaluation(
        meshes.uri,
        meshes.label,
        meshes.prompt,
        meshes.method,
        meshes.seed,
        panel.candidates,
        particles,
        _diversity(list(tables.values()), panel.words, settings),
        panel.checks,
    )
    values = {
        **strict_json.to_json(evaluation),
        "summary": evaluation.summary(),
        "settings": strict_json.to_json(settings),
    }
    meshes.write(EVALUATION, json.dumps(values, indent=2, allow_nan=False).encode())
    if tables:
        meshes.write(SHEET, verdict_sheet(evaluation, tables))
    return evaluation


def _assemble(meshes: RunMeshes, settings: EvaluateConfig, backend: Backend) -> _Panel:
    prompt, device = meshes.prompt, own_device()
    folder = asset_folder(settings.assets or (meshes.exhibit.assets if meshes.exhibit else ""))
    plain_captions = [prompt + words for words in ("", VIEW_WORDS["front"], VIEW_WORDS["back"])]
    candidates: tuple[str, ...] = ()
    judges: list[WordJudge] = []
    if settings.clip or settings.prior:
        candidates = (prompt, *_wrong_captions(prompt, folder, settings))
    if settings.clip:
        judges.append(ClipJudge.load(Path(settings.clip).expanduser(), device))
    if settings.prior:
        judges.append(PriorJudge.load([*candidates, *plain_captions], settings, device))
    nearest = None
    if meshes.exhibit is not None:
        nearest = NearestAsset(prompt, meshes.exhibit, standard_cameras(settings), backend)
    references = load_references(prompt, folder, settings, backend) if folder else ()
    checks = [check_references(references)] if references else []
    checked = references[: settings.checked_assets]
    for judge in judges if checked else ():
        checks.append(check_judge(judge.name, checked, _frontness_of(judge, prompt, settings)))
    return _Panel(tuple(judges), candidates, nearest, references, tuple(checks))


def _wrong_captions(prompt: str, folder: Path | None, settings: EvaluateConfig) -> tuple[str, ...]:
    """The settings' captions; else made from the prior's own nouns, or from those of the assets."""
    if settings.captions:
        wrong = tuple(dict.fromkeys(caption for caption in settings.captions if caption != prompt))
        if not wrong:
            raise ValueError("captions: none of them differs from the prompt; give at least one wrong caption")
        return wrong
    lexicon = resolve_prior(settings.prior) / LEXICON if settings.prior else None
    if lexicon is not None and lexicon.is_file():
        nouns = Lexicon.loads(lexicon.read_text(encoding="utf-8")).nouns
    else:
        source = str(folder) if folder else PROCEDURAL
        nouns = tuple(noun for noun, count in available_nouns(source).items() if count >= _MIN_COUNT)
    return distractors(prompt, nouns, settings.num_candidates - 1)


def _evaluate_particle(
    mesh: ParticleMesh, table: Turntable | None, prompt: str, panel: _Panel, settings: EvaluateConfig, backend: Backend
) -> ParticleEvaluation:
    if mesh.asset is None or table is None:
        return ParticleEvaluation(mesh.name, mesh.note)
    recognitions = [_recognise(judge, table, panel.candidates, settings) for judge in panel.words]
    if panel.nearest is not None:
        recognitions.append(panel.nearest.recognise(table))
    facings: list[Facing] = []
    if panel.references:
        facings.append(judge_by_references(table, panel.references))
    for judge in panel.words:
        facings.append(judge_facing(judge.name, _frontness_of(judge, prompt, settings)(table)))
    return ParticleEvaluation(
        mesh.name,
        "; ".join(mesh.asset.warnings),
        tuple(recognitions),
        tuple(facings),
        twin_ratio(table),
        ccm_agreement(table.views.ccm, table.views.alpha, table.cameras, table.box),
        check_mesh(mesh.asset, mesh.file_bytes, backend),
    )


def _frontness_of(judge: WordJudge, prompt: str, settings: EvaluateConfig) -> Frontness:
    return lambda table: word_frontness(judge, table.images(settings.background), prompt)


def _recognise(judge: WordJudge, table: Turntable, candidates: Sequence[str], settings: EvaluateConfig) -> Recognition:
    """The candidates' mean scores over evenly spread views; the prompt is the first of them, and a tie is a loss."""
    images = table.images(settings.background)[:: NUM_VIEWS // settings.judged_views]
    scores = judge.scores(images, candidates)
    mean = scores.mean(0)
    rank = 1 + int((mean[1:] >= mean[0]).sum())
    best = candidates[0 if rank == 1 else 1 + int(mean[1:].argmax())]
    right_views = (scores[:, 0] > scores[:, 1:].amax(1)).float().mean()
    return Recognition(judge.name, rank == 1, rank, best, float(right_views), len(candidates))


def _diversity(
    tables: Sequence[Turntable], judges: Sequence[WordJudge], settings: EvaluateConfig
) -> tuple[Diversity, ...]:
    measured = [measure_diversity("picture", picture_distances([table.rgba for table in tables]))]
    for judge in judges:
        features = [judge.features(table.images(settings.background)) for table in tables]
        measured.append(measure_diversity(judge.name, feature_distances(features)))
    return tuple(diversity for diversity in measured if diversity is not None)
