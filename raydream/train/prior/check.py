"""What can be wrong with a training of the embedded prior, found in seconds before any worker or image is there."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from raydream.config import strict_json
from raydream.config.train import StageSettings, TrainConfig
from raydream.diffusion.layout import LEXICON
from raydream.priors.find import resolve_prior
from raydream.train.captions import Lexicon, split_views
from raydream.train.prior.word_choice import assign_nouns, choose_nouns
from raydream.views.view_set import read_cards

CONFIG = "config.json"


def check_training(views: str, config: TrainConfig, out: Path | None) -> TrainConfig:
    """The settings as a worker in any folder can use them, after a look at all that they and the command name.

    ValueError naming ``views``, ``start``, ``out`` or a setting. A folder ``out`` is made where there is none; without
    one, only the others are looked at.
    """
    start = _check_start(config.start) if config.start else None
    cards = read_cards(views)
    nouns = choose_nouns(cards.objects, config.words) if start is None else _start_lexicon(start).nouns
    assign_nouns(cards.objects, nouns, config.words)
    split_views(cards.num_views, config.words.held_out_views)
    smallest_px = 2 ** (len(config.vae.channels) - 1)
    if start is None and cards.image_px % smallest_px:
        raise ValueError(
            f"views: images of {cards.image_px} px; a VAE of {len(config.vae.channels)} levels (vae.channels) needs a "
            f"multiple of {smallest_px}"
        )
    if out is not None:
        _check_out(out, config)
    return config if start is None else replace(config, start=str(start))


def check_same_training(config: TrainConfig, out: Path) -> None:
    """ValueError naming ``out`` where it holds a training with other settings than the stages' lengths and paces."""
    path = out / CONFIG
    if not path.is_file():
        return
    try:
        saved = strict_json.loads(TrainConfig, path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"out: {path} is not of a training ({error}); give another folder") from error
    if _essence(saved) != _essence(config):
        raise ValueError(
            f"out: {out} holds a prior with other words, looks or models; give another folder, or change only "
            "vae.stage.*, unet.stage.*, gate.* and how often it is saved"
        )


@contextmanager
def training_lock(out: Path) -> Iterator[None]:
    """Held by the one process that writes to the folder; it goes with the process, however that dies."""
    with (out / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"out: another process trains in {out}") from error
        yield


def _check_start(start: str) -> Path:
    try:
        folder = resolve_prior(start)
    except ValueError as error:
        raise ValueError(f"start: {str(error).removeprefix('prior: ')}") from error
    _start_lexicon(folder)
    return folder


def _start_lexicon(folder: Path) -> Lexicon:
    try:
        return Lexicon.loads((folder / LEXICON).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"start: {folder} has no valid {LEXICON}; give a prior that jobs/train_prior.py made, or embedded"
        ) from error


def _check_out(out: Path, config: TrainConfig) -> None:
    if "://" in str(out) or ":/" in str(out):
        raise ValueError(f"out: {out} is a URI; give a folder that all workers reach")
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_same_training(config, out)
        with training_lock(out):
            pass
    except OSError as error:
        raise ValueError(f"out: cannot be written to ({error})") from error


def _essence(config: TrainConfig) -> TrainConfig:
    """The settings that a training in progress cannot change."""
    plain, stage = TrainConfig(), StageSettings(1, 1, 1.0)
    return replace(
        plain,
        seed=config.seed,
        words=config.words,
        look=config.look,
        vae=replace(config.vae, stage=stage),
        unet=replace(config.unet, stage=stage),
    )
