"""What is wrong with the input of a training is told in one line, before Ray or a model: which filter, which file."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray import cloudpickle
from small_agp import view_recipe, write_prior, write_views
from small_views import small_config, small_views

from raydream.assets.libraries import AssetFilter, AssetRecord, read_manifest_folder, why_not
from raydream.assets.licences import spdx_licence
from raydream.assets.procedural import procedural_records
from raydream.config import strict_json
from raydream.config.agp import AgpDataConfig
from raydream.config.train import WordsConfig
from raydream.train import workers as train_workers
from raydream.train.agp import job as agp_job
from raydream.train.agp.samples import check_kept
from raydream.train.prior import job as train_job
from raydream.train.prior.check import check_training
from raydream.train.prior.word_choice import assign_nouns, choose_nouns
from raydream.views.dataset import iterate_cards
from raydream.views.view_set import ABOUT, ObjectCard, ViewSet, pack, read_cards, read_views, unpack

COLOURS = ("rgb", "alpha", "shade")


@pytest.mark.parametrize(
    ("word", "identifier"),
    [
        ("by", "CC-BY-4.0"),
        ("by-sa", "CC-BY-SA-4.0"),
        ("by-nc", "CC-BY-NC-4.0"),
        ("by-nc-sa", "CC-BY-NC-SA-4.0"),
        ("by-nd", "CC-BY-ND-4.0"),
        ("by-nc-nd", "CC-BY-NC-ND-4.0"),
        ("cc0", "CC0-1.0"),
        ("CC0 Public Domain", "CC0-1.0"),
        ("Creative Commons - Public Domain Dedication", "CC0-1.0"),
        ("Creative Commons Zero v1.0 Universal", "CC0-1.0"),
        ("Public Domain", "CC-PDM-1.0"),
        ("CC Attribution", "CC-BY-4.0"),
        ("CC Attribution-NonCommercial-ShareAlike", "CC-BY-NC-SA-4.0"),
        ("Creative Commons - Attribution - No Derivatives", "CC-BY-ND-4.0"),
        ("Attribution 4.0 International (CC BY 4.0)", "CC-BY-4.0"),
        ("cc-by-sa-3.0", "CC-BY-SA-3.0"),
        ("https://creativecommons.org/licenses/by/4.0/deed.en", "CC-BY-4.0"),
        ("http://creativecommons.org/licenses/by-nc/3.0/us/", "CC-BY-NC-3.0-US"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("https://creativecommons.org/publicdomain/mark/1.0/", "CC-PDM-1.0"),
        ("CC-BY-3.0-US", "CC-BY-3.0-US"),
        ("LicenseRef-studio", "LicenseRef-studio"),
        ("Apache-2.0", "Apache-2.0"),
        ("by hand", "by hand"),
        (" ", None),
        (None, None),
    ],
)
def test_licences_have_one_vocabulary(word: str | None, identifier: str | None) -> None:
    assert spdx_licence(word) == identifier
    assert spdx_licence(identifier) == identifier


def test_a_filter_of_licences_speaks_any_words(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"uid": "u", "file": "a.glb", "license": "CC Attribution"}))
    assert read_manifest_folder(tmp_path)[0].licence == "CC-BY-4.0"
    record = AssetRecord("u", Path("x"), licence="CC-BY-4.0")
    for word in ("by", "CC-BY-4.0", "CC BY 4.0"):
        assert why_not(record, AssetFilter(licences=frozenset({word}))) is None
    assert why_not(record, AssetFilter(licences=frozenset({"cc0"}))) == "licence"
    assert why_not(replace(record, licence=None), AssetFilter(licences=frozenset({"unknown"}))) is None
    assert {record.licence for record in procedural_records()} == {"CC0-1.0"}


def _card(uid: str, noun: str = "chair", licence: str = "CC0-1.0", *warnings: str) -> ObjectCard:
    return ObjectCard(uid, (f"a {noun}",) if noun else (), (), licence, False, warnings)


def _cards(count: int, noun: str = "chair", licence: str = "CC0-1.0", *warnings: str) -> list[ObjectCard]:
    return [_card(f"{noun}-{number}", noun, licence, *warnings) for number in range(count)]


@pytest.mark.parametrize(
    ("cards", "words", "told"),
    [
        (
            [*_cards(30, "chair", "CC-BY-4.0"), *_cards(2, "lamp", "unknown")],
            WordsConfig(),
            "words.licences: 0 of 32 assets are CC0-1.0; the folder has 30 CC-BY-4.0, 2 unknown; if you may use them, "
            """allow them by --set 'words.licences=["CC0-1.0", "CC-BY-4.0"]'""",
        ),
        (_cards(2, "lamp", "unknown"), WordsConfig(), """--set 'words.licences=["CC0-1.0", "unknown"]'"""),
        (
            [*_cards(5), *_cards(3, "lamp"), *_cards(9, "tree", "by")],
            WordsConfig(),
            "words.min_assets: no noun has 8 objects: of 17 objects 8 are CC0-1.0, 8 of them kept their colours, 8 of "
            "those have a noun; the most frequent are chair (5), lamp (3); ask for fewer by --set words.min_assets=5",
        ),
        ([_card("a"), _card("b", "lamp")], WordsConfig(), "at least 2 are needed: render more"),
        (_cards(9, ""), WordsConfig(), "views: of 9 objects 9 are CC0-1.0, 9 of them kept their colours, 0 of those"),
        (_cards(9, "box"), WordsConfig(), "words.left_out: it leaves no noun: of 9 objects"),
        (_cards(9), WordsConfig(nouns=("dragon",)), "called dragon (0): of 9 objects 9 are CC0-1.0"),
        (_cards(9, "chair", "CC0-1.0", "texture_missing"), WordsConfig(), "--set words.colour_warnings=true"),
    ],
)
def test_the_filter_that_leaves_nothing_is_named(cards: list[ObjectCard], words: WordsConfig, told: str) -> None:
    with pytest.raises(ValueError, match=r"^(words|views)") as error:
        choose_nouns(cards, words)
    assert told in str(error.value)
    assert "[]" not in str(error.value)


def test_objects_that_lost_colours_are_left_out_unless_asked_for() -> None:
    cards = [*_cards(4), *_cards(4, "chair", "CC0-1.0", "texture_missing"), _card("x", "chair", "CC0-1.0", "no_faces")]
    assert list(assign_nouns(cards, ("chair",), WordsConfig())) == [0, 1, 2, 3, 8]
    assert len(assign_nouns(cards, ("chair",), WordsConfig(colour_warnings=True))) == 9


def test_each_noun_needs_objects_of_its_own_and_something_to_hold_out() -> None:
    with pytest.raises(ValueError, match=r"^views: no object that may be trained is called lamp and by no rarer"):
        assign_nouns(_cards(4), ("chair", "lamp"), WordsConfig())
    with pytest.raises(ValueError, match=r"^views: each of 2 nouns has one object"):
        assign_nouns([_card("a"), _card("b", "lamp")], ("chair", "lamp"), WordsConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four made-up objects of one noun in two shards, with what a prior is trained on."""
    recipe = view_recipe()
    views = replace(recipe.views, images=COLOURS)
    return Path(write_views(tmp_path_factory.mktemp("inputs") / "views", replace(recipe, views=views)))


@pytest.fixture
def spoiled(folder: Path, tmp_path: Path) -> Path:
    """A copy of it for a test to break."""
    copy = tmp_path / "views"
    for path in folder.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    return copy


def _last_shard(views: Path) -> Path:
    return sorted((views / "views").iterdir())[-1]


def _change(shard: Path, change: str) -> None:
    content, table = shard.read_bytes(), pq.read_table(shard)
    match change:
        case "truncated":
            shard.write_bytes(content[: len(content) // 2])
        case "empty":
            shard.write_bytes(b"")
        case "a pointer":
            shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        case "without shade":
            pq.write_table(table.drop_columns(["shade"]), shard, row_group_size=4)
        case "a view short":
            pq.write_table(table.slice(1), shard, row_group_size=4)
        case "in its pages":
            column = pq.ParquetFile(shard).metadata.row_group(0).column(table.schema.names.index("rgb"))
            for number in range(pq.ParquetFile(shard).metadata.num_columns):
                column = pq.ParquetFile(shard).metadata.row_group(0).column(number)
                if column.path_in_schema.startswith("rgb"):
                    break
            first, size = column.data_page_offset, column.total_compressed_size
            shard.write_bytes(content[:first] + b"\xff" * size + content[first + size :])


@pytest.mark.slow
@pytest.mark.parametrize("change", ["truncated", "empty", "a pointer", "without shade", "a view short"])
def test_a_broken_shard_is_named_before_anything_is_started(
    spoiled: Path, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train_job, "_train_on_ray", lambda *request: pytest.fail("Ray was asked"))
    _change(_last_shard(spoiled), change)
    assert train_job.main("", ["--views", str(spoiled), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: views: ")
    assert str(_last_shard(spoiled)) in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_broken_inside_is_named_when_it_is_read(spoiled: Path) -> None:
    _change(_last_shard(spoiled), "in its pages")
    assert len(read_cards(str(spoiled)).objects) == 4  # no image is read
    with pytest.raises(ValueError, match=f"^views: {_last_shard(spoiled)} cannot be read"):
        read_views(str(spoiled))


def test_a_folder_is_trained_from_with_words_of_before(spoiled: Path, tmp_path: Path) -> None:
    """Rows that were rendered with Objaverse's words for licences, and without the column of warnings."""
    for shard in (spoiled / "views").iterdir():
        table = pq.read_table(shard)
        place = table.schema.names.index("licence")
        table = table.set_column(place, table.schema.field("licence"), pa.array(["cc0"] * table.num_rows))
        table = table.drop_columns([name for name in table.schema.names if name == "warnings"])
        pq.write_table(table, shard, row_group_size=4)
    cards = read_cards(str(spoiled))
    assert {card.licence for card in cards.objects} == {"CC0-1.0"}
    assert (cards.num_views, cards.image_px) == (4, 16)
    views = read_views(str(spoiled))
    assert views.objects == cards.objects
    assert views.rgb.shape == (4, 4, 16, 16, 3)


def _ready(config_words: WordsConfig | None = None) -> str:
    config = small_config(1, 1)
    return strict_json.dumps(replace(config, words=config_words or WordsConfig(min_assets=2)))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--views", "/nowhere"), "views: no rendering job in '/nowhere'"),
        (("--views", "/nowhere.zip"), "views: "),
        (("--set", "words.min_assets=50"), "words.min_assets: no noun has 50 objects"),
        (("--set", 'words.licences=["by"]'), "words.licences: 0 of 4 assets are by; the folder has 4 CC0-1.0"),
        (("--set", "words.held_out_views=0.1"), "held_out_views: "),
        (("--set", "start=/nowhere"), "start: "),
        (("--set", "unet.norm_groups=7"), "unet.channels: "),
        (("--set", "vae.channels=[8, 8, 8, 8, 8, 8]"), "views: images of 16 px"),
        (("--out", "/proc/nowhere"), "out: cannot be written to"),
        (("--out", "s3://bucket/prior"), "out: "),
    ],
)
@pytest.mark.parametrize("more", [(), ("--no-ray",)])
def test_bad_input_of_a_prior_is_told_in_a_line(
    folder: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    more: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(train_job, "_train_on_ray", lambda *request: pytest.fail("Ray was asked"))
    (tmp_path / "settings.json").write_text(_ready())
    given = ["--views", str(folder), "--out", str(tmp_path / "out"), "--config", str(tmp_path / "settings.json")]
    assert train_job.main("", [*given, *words, *more, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_views_without_light_are_refused_with_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    views = write_views(tmp_path / "ccm", view_recipe())
    assert train_job.main("", ["--views", views, "--out", str(tmp_path / "out")]) == 2
    assert "was rendered without rgb and shade; render it again with" in capsys.readouterr().err


def test_a_training_of_other_settings_is_told_before_the_workers(folder: Path, tmp_path: Path) -> None:
    config = strict_json.loads(type(small_config(1, 1)), _ready())
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(strict_json.dumps(config))
    assert check_training(str(folder), config, out) == config
    with pytest.raises(ValueError, match=r"^out: .* other words, looks or models"):
        check_training(str(folder), replace(config, seed=1), out)
    (out / "config.json").write_text("{}}")
    with pytest.raises(ValueError, match=r"^out: .*config.json is not of a training"):
        check_training(str(folder), config, out)


def test_the_start_of_a_training_travels_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(small_views(), tmp_path / "views.zip")
    write_prior(tmp_path / "prior")
    monkeypatch.chdir(tmp_path)
    config = replace(small_config(1, 1), start="prior")
    assert check_training("views.zip", config, tmp_path / "out").start == str(tmp_path / "prior")
    (tmp_path / "prior" / "lexicon.json").unlink()
    with pytest.raises(ValueError, match=r"^start: .* has no valid lexicon.json"):
        check_training("views.zip", config, tmp_path / "out")


def test_a_packed_set_keeps_warnings_and_one_of_before_has_none(tmp_path: Path) -> None:
    views = small_views()
    warned = tuple(replace(card, warnings=("texture_missing",)) for card in views.objects)
    some = ViewSet(warned, views.rgb, views.alpha, views.shade, views.azimuth_deg, views.elevation_deg)
    pack(some, tmp_path / "views.zip")
    assert unpack(tmp_path / "views.zip").objects == warned == read_cards(str(tmp_path / "views.zip")).objects


def test_an_agp_of_no_object_is_told_with_what_there_is(tmp_path: Path) -> None:
    views = write_views(tmp_path / "views", view_recipe())
    check_kept(views, AgpDataConfig())
    (noun,) = {row["nouns"][0] for rows in iterate_cards(views, ABOUT) for row in rows}
    check_kept(views, AgpDataConfig(nouns=(noun,)))
    with pytest.raises(ValueError, match=rf"^data.nouns.* of the 4 objects .*zeppelin; .* {noun} \(4\)"):
        check_kept(views, AgpDataConfig(nouns=("zeppelin",)))
    prior = write_prior(tmp_path / "prior")
    _change(_last_shard(Path(views)), "truncated")
    given = ["--views", views, "--prior", str(prior), "--out", str(tmp_path / "out"), "--no-ray", "--device", "cpu"]
    assert agp_job.main("", given) == 2
    assert not (tmp_path / "out").exists()


@pytest.fixture
def cluster() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests
    ray.shutdown()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
def test_bad_input_that_only_a_worker_sees_is_tried_once(cluster: None, tmp_path: Path) -> None:
    def work() -> None:
        with (tmp_path / "attempts").open("a") as file:
            file.write("x")
        raise ValueError("views: shard-00002.parquet cannot be read")

    with pytest.raises(ValueError, match=r"^views: shard-00002.parquet cannot be read$"):
        train_workers.run_workers(work, str(tmp_path), 1, on_gpu=False)
    assert (tmp_path / "attempts").read_text() == "x"
