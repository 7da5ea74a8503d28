"""The last parts on a GPU: training of the embedded prior and of its AGP in the time that is left, with the settings of
any other machine, saved every minute.
"""

from pathlib import Path

from raydream.bench.parts import Bench, Found

_OVERHEAD_S = 15.0  # opening views, the last save


def prior(bench: Bench, found: Found) -> None:
    """``jobs/train_prior.py --no-ray``; a pack that was brought along needs no Parquet."""
    from raydream.train.prior.job import main

    words = _words(bench, "prior", found)
    if words:
        found["exit"] = main("", [*words, "--set", f"save_every_s={_save_every_s(bench)}"])


def agp(bench: Bench, found: Found) -> None:
    """``jobs/finetune_agp.py --no-ray``, from the prior that ``prior`` made or, without one, the embedded one. Its
    views are read with pyarrow.
    """
    words = _words(bench, "agp", found)
    if not words:
        return
    try:
        from raydream.train.agp.job import main
    except ImportError as error:
        found["skipped"] = f"{error}"
        return
    own = Path(bench.out) / "prior" / "prior"
    start = str(own) if (own / "model_index.json").is_file() else "embedded"
    found |= {"prior": start, "exit": main("", [*words, "--prior", start])}


def _words(bench: Bench, model: str, found: Found) -> list[str]:
    """The command line; empty where there is nothing to train on."""
    if model not in bench.views:
        found["skipped"] = f"no --{model}-views"
        return []
    minutes = (1.0 if bench.is_small else max(bench.seconds - _OVERHEAD_S, 1.0)) / 60
    words = ["--views", bench.views[model], "--out", str(Path(bench.out) / model), "--no-ray"]
    words += ["--device", bench.device.type, "--minutes", f"{minutes}"]
    return words + (["--config", bench.settings[model]] if model in bench.settings else [])


def _save_every_s(bench: Bench) -> float:
    return min(60.0, bench.seconds / 4)
