"""Does a prior know its words? Measured on renders that it was never trained on, before anything is distilled from it.

P[loss(right caption) < loss(wrong caption)] with the same noise: 0.5 knows nothing, 1 knows the word. Two kinds of
held-out render are judged: trained objects from angles, in colours and under a light that were never trained, which
decide; and objects that were never trained, which tell a prior that has not learned from one that does not generalise.
"side" compares views that are clearly front or side, "side_any" also those from a corner, by the side that is nearer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from raydream import seeds
from raydream.camera import ViewBin
from raydream.config.train import GateConfig
from raydream.train.batches import BatchMaker, Shot
from raydream.train.captions import phrase, side_of
from raydream.train.prior.models import PriorModels, sample_latents

THRESHOLDS = {"noun": 0.9, "colour": 0.95, "side": 0.8, "psnr_db": 28.0, "composed": 0.8}
_CHUNK = 64
_NUM_CANDIDATES = 10
# How badly captions explain noised latents, one for each: (latents, captions, t, noise); smaller is better.
CaptionLoss = Callable[[Tensor, Sequence[str], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pairs:
    """Held-out renders with a right and a wrong caption each."""

    images: Float[Tensor, "view 3 h w"]
    right: tuple[str, ...]
    wrong: tuple[str, ...]


def prior_loss(models: PriorModels) -> CaptionLoss:
    """A prior's own v-prediction error."""

    @torch.no_grad()
    def loss(latents: Tensor, captions: Sequence[str], t: Tensor, noise: Tensor) -> Tensor:
        known = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
        texts = models.encode_text(list(known))[[known[caption] for caption in captions]]
        return models.v_loss(latents, texts, t, noise)

    return loss


def evaluate(models: PriorModels, views: BatchMaker, objects: BatchMaker, config: GateConfig) -> dict[str, Any]:
    """All figures of the gate as JSON values over held-out ``views`` of trained objects and held-out ``objects``, with
    the thresholds and whether each was reached on the held-out views.
    """
    loss = prior_loss(models)
    results: dict[str, Any] = {}
    for name, maker in (("held_out_views", views), ("held_out_objects", objects)):
        rows: dict[str, Any] = {"psnr_db": round(psnr_db(models, maker, config.num_renders), 2)}
        for test, pairs in make_pairs(maker, config.num_renders).items():
            latents = torch.cat([models.encode_images(part) for part in pairs.images.split(_CHUNK)])
            rows[test] = preference(loss, latents, pairs, config) | {"renders": len(pairs.right)}
        results[name] = rows
    results["composed"] = classify_own_samples(models, loss, config, views.seed)
    results["thresholds"] = dict(THRESHOLDS)
    results["passed"] = _verdict(results)
    return results


def make_pairs(maker: BatchMaker, count: int) -> dict[str, Pairs]:
    """The tests "noun", "colour", "side" and "side_any" over one maker's renders; one without material is left out."""
    generator = seeds.generator(maker.seed, "gate pairs", 0, 0)
    made: dict[str, list[tuple[Shot, str, str]]] = {"noun": [], "colour": [], "side": [], "side_any": []}

    def draw(upper: int) -> int:
        return int(torch.randint(upper, (), generator=generator))

    with_sides = [i for i, subject in enumerate(maker.subjects) if subject.has_sides]
    for round_index in range(count):
        index = round_index % len(maker.subjects)
        subject, view = maker.subjects[index], draw(maker.pixels.shape[1])
        colours = [colour for colour in maker.lexicon.colours if maker.lexicon.allows(subject.noun, colour)]
        colour = colours[draw(len(colours))]
        shot = Shot(index, view, colour, recoloured=True)
        others = [noun for noun in maker.lexicon.nouns if noun != subject.noun]
        right = phrase(subject.noun, colour)
        if others:
            made["noun"].append((shot, right, phrase(others[draw(len(others))], colour)))
        other_colours = [word for word in maker.lexicon.colours if word != colour]
        made["colour"].append((shot, right, phrase(subject.noun, other_colours[draw(len(other_colours))])))
        for test, margin_deg in (("side", maker.words.side_margin_deg), ("side_any", 0.0)) if with_sides else ():
            made[test] += _side_pair(maker, with_sides[round_index % len(with_sides)], margin_deg, draw)
    pairs = {}
    for test, rows in made.items():
        if rows:
            shots, right_captions, wrong_captions = zip(*rows)
            pairs[test] = Pairs(maker.render(shots, generator), right_captions, wrong_captions)
    return pairs


def _side_pair(
    maker: BatchMaker, index: int, margin_deg: float, draw: Callable[[int], int]
) -> list[tuple[Shot, str, str]]:
    """A render from the front or a side, if one of a few draws is, with the other word as the wrong one."""
    subject = maker.subjects[index]
    opposite: dict[ViewBin | None, ViewBin] = {"front": "side", "side": "front"}
    for _ in range(8):
        view = draw(maker.pixels.shape[1])
        angles = float(maker.azimuth_deg[index, view]), float(maker.elevation_deg[index, view])
        side = side_of(subject, *angles, margin_deg)
        if side in opposite:
            words = (phrase(subject.noun, None, side), phrase(subject.noun, None, opposite[side]))
            return [(Shot(index, view, None, recoloured=False), *words)]
    return []


def preference(
    loss: CaptionLoss, latents: Float[Tensor, "view 4 h w"], pairs: Pairs, config: GateConfig
) -> dict[str, float]:
    """P[loss(right) < loss(wrong)] for each timestep, and over all; a tie counts one half."""
    wins = {t: compare(loss, latents, pairs, t, config.num_noises) for t in config.timesteps}
    shares = {f"t{t}": round(float(win.mean()), 4) for t, win in wins.items()}
    return shares | {"all": round(float(torch.stack(list(wins.values())).mean()), 4)}


def compare(
    loss: CaptionLoss, latents: Float[Tensor, "view 4 h w"], pairs: Pairs, timestep: int, num_noises: int
) -> Float[Tensor, " view"]:
    """1 where the right caption has the smaller loss, 0 where the wrong one has, 0.5 for a tie."""
    totals = torch.zeros(2, len(latents))
    for index in range(num_noises):
        noise = torch.randn(latents.shape, generator=seeds.generator(0, "gate noise", index, timestep)).to(latents)
        for start in range(0, len(latents), _CHUNK):
            part = slice(start, start + _CHUNK)
            t = torch.full((len(latents[part]),), timestep, device=latents.device)
            for row, captions in enumerate((pairs.right, pairs.wrong)):
                totals[row, part] += loss(latents[part], captions[part], t, noise[part]).cpu()
    return (totals[0] < totals[1]).float() + 0.5 * (totals[0] == totals[1])


@torch.no_grad()
def psnr_db(models: PriorModels, maker: BatchMaker, count: int) -> float:
    """The VAE's peak signal-to-noise ratio over renders, from their mean squared error."""
    errors = []
    for index in range(-(-count // _CHUNK)):
        images = maker.batch(_CHUNK, "gate psnr", 0, index).images
        answer = models.decode(models.encode_images(images))
        errors.append(F.mse_loss(answer / 2, images / 2))
    return float(-10 * torch.log10(torch.stack(errors).mean()))


def classify_own_samples(models: PriorModels, loss: CaptionLoss, config: GateConfig, seed: int) -> dict[str, float]:
    """How often samples of never trained (noun, colour) pairs are recognised among 10 captions by their losses.

    The others are 3 of the same noun, 3 of the same colour and 3 that share neither.
    """
    generator = seeds.generator(seed, "gate composed", 0, 0)
    pairs = models.lexicon.held_out
    chosen = [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]
    if not chosen:
        return {}
    asked = [chosen[i % len(chosen)] for i in range(config.num_classified)]
    candidates = [candidate_captions(models, noun, colour, generator) for noun, colour in asked]
    right = 0
    for start in range(0, len(asked), _CHUNK):
        part = candidates[start : start + _CHUNK]
        latents = sample_latents(models, [c[0] for c in part], config.cfg_scale, config.sample_steps, generator)
        right += int(classify(loss, latents, part, config).sum())
    return {"accuracy": round(right / len(asked), 4), "samples": len(asked), "pairs": len(set(asked))}


def candidate_captions(models: PriorModels, noun: str, colour: str, generator: torch.Generator) -> tuple[str, ...]:
    """The right caption first, then up to nine wrong ones."""
    lexicon = models.lexicon

    def shuffled(words: Sequence[str], avoid: str) -> list[str]:
        order = torch.randperm(len(words), generator=generator).tolist()
        return [words[i] for i in order if words[i] != avoid]

    nouns, colours = shuffled(lexicon.nouns, noun), shuffled(lexicon.colours, colour)
    same_noun = [phrase(noun, other) for other in colours[:3]]
    same_colour = [phrase(other, colour) for other in nouns[:3]]
    neither = [phrase(a, b) for a, b in zip(nouns[3:] or nouns, colours[3:])]
    return tuple([phrase(noun, colour), *same_noun, *same_colour, *neither][:_NUM_CANDIDATES])


def classify(
    loss: CaptionLoss, latents: Float[Tensor, "view 4 h w"], candidates: Sequence[tuple[str, ...]], config: GateConfig
) -> Bool[Tensor, " view"]:
    """Whether each latent's first caption explains it best (diffusion classifier, arXiv 2303.16203): the mean loss over
    the same noises and timesteps for all captions.
    """
    best = []
    for latent, captions in zip(latents, candidates):
        total = torch.zeros(len(captions))
        for t in config.classifier_timesteps:
            for index in range(config.classifier_noises):
                drawn = torch.randn(latent.shape, generator=seeds.generator(1, "classifier", index, t)).to(latent)
                repeated = latent.expand(len(captions), -1, -1, -1)
                times = torch.full((len(captions),), t, device=latent.device)
                total += loss(repeated, captions, times, drawn.expand_as(repeated)).cpu()
        best.append(int(total.argmin()) == 0)
    return torch.tensor(best)


def table(results: dict[str, Any]) -> str:
    """The gate as a Markdown table."""
    lines = ["| test | needed | held-out views of trained objects | objects never trained |", "|---|---|---|---|"]
    needs = {test: str(needed) for test, needed in THRESHOLDS.items() if test != "composed"}
    for test, needed in (needs | {"side_any": "-"}).items():
        cells = []
        for column in (results["held_out_views"], results["held_out_objects"]):
            value = column.get(test)
            if isinstance(value, dict):
                value = ", ".join(f"{v:.2f} ({k})" for k, v in value.items() if k != "renders")
            cells.append(str(value))
        lines.append(f"| {test} | {needed} | {' | '.join(cells)} |")
    composed = results["composed"]
    told = f"{composed['accuracy']:.2f} ({composed['samples']} samples, {composed['pairs']} pairs)" if composed else ""
    lines.append(f"| samples of unseen pairs, among {_NUM_CANDIDATES} | {THRESHOLDS['composed']} | {told} | |")
    return "\n".join(lines)


def _verdict(results: dict[str, Any]) -> dict[str, bool]:
    rows, composed = results["held_out_views"], results["composed"]
    values = {test: rows[test]["all"] if test in rows else None for test in ("noun", "colour", "side")}
    values |= {"psnr_db": rows["psnr_db"], "composed": composed.get("accuracy")}
    return {test: value is not None and value >= THRESHOLDS[test] for test, value in values.items()}
