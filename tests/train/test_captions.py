"""Words of captions, colours and tokens: true of the image, known to the tokenizer, and never a held-out pair."""

from collections import Counter
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_views import SHAPES, small_config, small_views

from raydream import seeds
from raydream.assets.nouns import head_noun
from raydream.assets.recolour import (
    CLASSES,
    COLOURS,
    PROTOTYPES,
    colour_classes,
    draw_targets,
    measure_palette,
    oklab_from_srgb,
    recolour,
    srgb_from_oklab,
)
from raydream.config.train import WordsConfig
from raydream.train.batches import BatchMaker, Shot
from raydream.train.captions import (
    CaptionedObject,
    Draw,
    Lexicon,
    compose,
    describe,
    make_lexicon,
    most_typical,
    object_palette,
    phrase,
    side_of,
    split_objects,
    split_views,
    with_other_word,
)
from raydream.train.prior.train import make_sets
from raydream.train.word_tokenizer import save_tokenizer, vocabulary, word_tokenizer

NEVER = Draw(dropped=0.99, template=0.99, own=0.99, alias=0.99, colour=0.99, view=0.99)


@pytest.mark.parametrize(
    ("caption", "noun"),
    [
        ("a dark red chair by the sea", "chair"),
        ("a snow covered dead tree, mostly grey", "tree"),
        ("a man covering the eyes", "man"),
        ("two wooden crates", "crate"),
        ("a hot dog", "hotdog"),
        ("a television set on a table", "television"),
        ("a rock made of stone", "rock"),
        ("", None),
    ],
)
def test_head_noun(caption: str, noun: str | None) -> None:
    assert head_noun(caption) == noun


def test_oklab_agrees_with_its_published_values_and_inverts() -> None:
    # Ottosson's page: linear-light XYZ examples restated as sRGB corners (white, red, green, blue)
    corners = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    expected = torch.tensor(
        [[1.0, 0, 0], [0.62796, 0.22486, 0.12585], [0.86644, -0.23389, 0.17950], [0.45201, -0.03246, -0.31153]],
        dtype=torch.float64,
    )
    assert torch.allclose(oklab_from_srgb(corners), expected, atol=1e-4)
    colours = torch.rand(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(srgb_from_oklab(oklab_from_srgb(colours)), colours, atol=1e-6)


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((255, 0, 0), "red"), ((139, 0, 0), "red"), ((255, 255, 0), "yellow"), ((0, 128, 0), "green"),
        ((0, 0, 255), "blue"), ((30, 60, 140), "blue"), ((128, 0, 128), "purple"), ((255, 105, 180), "pink"),
        ((255, 192, 203), "pink"), ((139, 69, 19), "brown"), ((90, 60, 40), "brown"), ((250, 250, 250), "white"),
        ((128, 128, 128), "grey"), ((20, 20, 20), "black"), ((255, 140, 0), "orange"), ((210, 180, 140), "tan"),
        ((0, 128, 128), "teal"),
    ],
)  # fmt: skip
def test_colours_have_the_names_that_people_give_them(rgb: tuple[int, int, int], word: str) -> None:
    assert CLASSES[int(colour_classes(oklab_from_srgb(torch.tensor(rgb) / 255)))] == word


def test_every_drawn_target_and_every_recoloured_object_is_called_by_its_word(generator: torch.Generator) -> None:
    words = torch.arange(len(COLOURS)).repeat_interleave(64)
    targets = draw_targets(words, generator)
    assert torch.equal(colour_classes(oklab_from_srgb(srgb_from_oklab(targets))), words)
    wood = torch.tensor([0.55, 0.35, 0.2]) + 0.05 * torch.randn(len(words), 3, generator=generator)
    main = oklab_from_srgb(torch.tensor([[0.55, 0.35, 0.2]])).expand_as(wood)
    for whole in (False, True):
        changed = recolour(wood.clamp(0, 1), main, targets, torch.full((len(words),), whole))
        hits = colour_classes(oklab_from_srgb(changed)) == words
        assert hits.float().mean() > 0.85, whole


def test_recolouring_a_part_leaves_what_has_another_colour() -> None:
    trunk, leaves = torch.tensor([[0.40, 0.26, 0.13]]), torch.tensor([[0.1, 0.6, 0.1]])
    red = torch.tensor([PROTOTYPES["red"][0], 0.17, 0.09])[None]
    main = oklab_from_srgb(leaves)
    part = torch.tensor([False])
    assert (recolour(trunk, main, red, part) - trunk).abs().max() < 0.12
    assert colour_classes(oklab_from_srgb(recolour(leaves, main, red, part))).item() == CLASSES.index("red")


def test_palette_names_the_larger_part_and_stays_silent_about_a_mixture() -> None:
    red, blue = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.1, 0.2, 0.8])
    mostly_red = torch.stack([red] * 7 + [blue] * 3)
    mixture = torch.stack([red] * 4 + [blue] * 3 + [torch.tensor([0.1, 0.6, 0.1])] * 3)
    palette = measure_palette(torch.stack([mostly_red, mixture]), torch.ones(2, 10))
    assert (palette.word(0), palette.word(1)) == ("red", None)
    assert torch.allclose(palette.lab[0], oklab_from_srgb(red), atol=1e-5)
    assert palette.share.tolist() == pytest.approx([0.7, 0.4])


def test_captions_say_what_was_drawn() -> None:
    words = WordsConfig(aliases=(("box", "crate"),))
    crate = CaptionedObject(0, "crate", "brown", ("an old crate",), has_sides=True)
    assert compose(crate, "red", True, "front", NEVER, words) == "a red crate"
    assert compose(crate, "brown", False, None, NEVER, words) == "a crate"
    assert compose(crate, "brown", False, None, replace(NEVER, colour=0.1), words) == "a brown crate"
    assert compose(crate, "red", True, "back", replace(NEVER, view=0.1), words) == "a red crate, back view"
    assert compose(crate, "red", True, None, replace(NEVER, alias=0.1), words) == "a red box"
    assert compose(crate, "brown", False, "side", replace(NEVER, own=0.0, view=0.0), words) == "an old crate, side view"
    assert compose(crate, "red", True, None, replace(NEVER, own=0.0), words) == "a red crate"
    assert compose(crate, "red", True, None, replace(NEVER, template=0.0), words) == "a photo of a red crate"
    assert compose(crate, "red", True, "side", replace(NEVER, dropped=0.05), words) == ""
    assert phrase("axe") == "an axe"


def test_another_word_is_told_only_where_one_is() -> None:
    lexicon = Lexicon(("crate", "car"), ("red", "blue"), (), (), ())
    caption = "a red crate, front view"
    assert [with_other_word(caption, lexicon, which, 0.6) for which in (0.0, 0.3, 0.6, 0.9)] == [
        "a red crate, back view",
        "a red crate, back view",
        "a blue crate, front view",
        "a red car, front view",
    ]
    assert with_other_word("a crate, side view", lexicon, 0.0, 0.0) == "a crate, front view"
    assert with_other_word("a car on a carpet", lexicon, 0.5, 0.5) == "a crate on a carpet"
    assert with_other_word("", lexicon, 0.5, 0.5) is None
    assert with_other_word("a red thing", Lexicon((), ("red",), (), (), ()), 0.5, 0.5) is None


def test_view_words_need_a_known_front_and_sides_that_differ() -> None:
    views = small_views()
    config = small_config(1, 1)
    palette = object_palette(views)
    subjects = describe(views, palette, make_lexicon(views, palette, config.words), config.words)
    sided = [subject for subject in subjects if subject.has_sides]
    assert [views.objects[subject.index].uid for subject in sided] == ["crate-0", "crate-2", "crate-4"]
    assert [side_of(sided[0], azimuth, 0.0) for azimuth in (10.0, 90.0, -95.0, 170.0)] == [
        "front",
        "side",
        "side",
        "back",
    ]
    corners = (29.0, 31.0, 59.0, 61.0, -119.0, -121.0, -149.0, 151.0)
    assert [side_of(sided[0], azimuth, 0.0, 15.0) for azimuth in corners] == [
        "front", None, None, "side", "side", None, None, "back",
    ]  # fmt: skip
    ball = next(subject for subject in subjects if subject.noun == "ball")
    assert side_of(ball, 10.0, 0.0) is None
    assert side_of(ball, 10.0, 70.0) == "overhead"


def test_held_out_pairs_and_objects_are_never_trained() -> None:
    views = small_views()
    # red balls exist, and are held out all the same: such a ball has to be recoloured
    sets = make_sets(views, small_config(1, 1), torch.device("cpu"))
    lexicon = replace(sets.train.lexicon, held_out=(("ball", "red"), ("crate", "blue")))
    maker = copy(sets.train)
    maker.lexicon = lexicon
    held_uids = {views.objects[subject.index].uid for subject in sets.held_out.subjects}
    assert {uid.split("-")[0] for uid in held_uids} == set(SHAPES)
    seen = set()
    for step in range(40):
        batch = maker.batch(16, "test", 0, step)
        for shot, caption in zip(batch.shots, batch.captions):
            subject = maker.subjects[shot.subject]
            assert views.objects[subject.index].uid not in held_uids
            seen.add((subject.noun, shot.colour))
            assert not ("red" in caption and "ball" in caption)
    assert not seen & {("ball", "red"), ("crate", "blue")}
    assert {("ball", "blue"), ("crate", "red"), ("sword", "red")} <= seen


def test_images_wear_the_colour_of_their_caption_on_a_grey_ground() -> None:
    sets = make_sets(small_views(), small_config(1, 1), torch.device("cpu"))
    maker = copy(sets.train)
    maker.look = replace(maker.look, ambient=(1.0, 1.0))
    shots = [Shot(i % len(maker.subjects), 0, colour, True) for i, colour in enumerate(COLOURS)]
    images = maker.render(shots, seeds.generator(0, "test", 0, 0)) / 2 + 0.5
    middle = images[:, :, 15, 15]
    assert [CLASSES[c] for c in colour_classes(oklab_from_srgb(middle)).tolist()] == list(COLOURS)
    corner = images[:, :, 0, 0]
    assert torch.allclose(corner, corner[:, :1].expand(-1, 3))
    assert corner.min() >= 0.5 - 1e-6


def test_the_same_step_gives_the_same_batch_and_another_step_another() -> None:
    maker = make_sets(small_views(), small_config(1, 1), torch.device("cpu")).train
    first, again, other = (maker.batch(8, "test", 0, step) for step in (3, 3, 4))
    assert torch.equal(first.images, again.images)
    assert first.captions == again.captions
    assert not torch.equal(first.images, other.images)


def test_words_are_chosen_by_licence_and_number() -> None:
    views = small_views(assets_per_noun=5)
    palette = object_palette(views)
    lexicon = make_lexicon(views, palette, WordsConfig(min_assets=5))
    assert set(lexicon.nouns) == set(SHAPES)
    assert Lexicon.loads(lexicon.dumps()) == lexicon
    assert all(noun in lexicon.nouns and colour in COLOURS for noun, colour in lexicon.held_out)
    assert make_lexicon(small_views(5, licence="by-nc"), palette, WordsConfig(min_assets=5, licences=("CC BY-NC 4.0",)))


def test_split_holds_out_some_of_every_noun() -> None:
    views = small_views(assets_per_noun=10)
    config = WordsConfig(min_assets=5)
    palette = object_palette(views)
    subjects = describe(views, palette, make_lexicon(views, palette, config), config)
    train, held_out = split_objects(subjects, views, 0.2)
    assert [sum(s.noun == noun for s in held_out) for noun in SHAPES] == [2, 2, 2]
    assert {s.index for s in train} | {s.index for s in held_out} == set(range(30))
    assert not {s.index for s in train} & {s.index for s in held_out}


def test_maker_draws_rare_nouns_more_often_than_their_share() -> None:
    views = small_views(assets_per_noun=10).select([*range(10), *range(10, 12), *range(20, 30)])
    palette = object_palette(views)
    config = WordsConfig(nouns=SHAPES)
    lexicon = make_lexicon(views, palette, config)
    subjects = describe(views, palette, lexicon, config)
    look = small_config(1, 1).look
    maker = BatchMaker(views, subjects, range(views.num_views), palette, lexicon, look, config, 0, torch.device("cpu"))
    weight = {noun: sum(w for s, w in zip(subjects, maker.weights.tolist()) if s.noun == noun) for noun in SHAPES}
    assert weight["ball"] / weight["crate"] == pytest.approx((10 / 2) ** 0.5, rel=1e-5)


def test_tokenizer_makes_one_token_of_each_known_word_and_survives_its_files(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    words = ["chair", "hair", "armchair", "red", "front", "view", "air", "photo", "of", "an"]
    tokenizer = word_tokenizer(words, 16)
    text = "an red Chair of hair, front view armchair air"
    expected = ["an", "red", "chair", "of", "hair", ",", "front", "view", "armchair", "air"]
    assert [token.removesuffix("</w>") for token in tokenizer.tokenize(text)] == expected
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(
        " ", ""
    ) == text.lower().replace(" ", "")
    save_tokenizer(tokenizer, words, tmp_path)
    reference = tokenizer(text, padding="max_length").input_ids
    assert len(reference) == 16
    assert CLIPTokenizer.from_pretrained(tmp_path)(text, padding="max_length").input_ids == reference
    (tmp_path / "tokenizer.json").unlink()  # what older versions of transformers read
    assert CLIPTokenizer.from_pretrained(tmp_path)(text, padding="max_length").input_ids == reference


def test_unknown_words_never_pass_for_known_ones() -> None:
    tokenizer = word_tokenizer(["chair", "red"], 32)
    known = {tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in ("chair", "red")}
    for text in ("wolfhound", "chairs", "redchairx", "стул", "7 8"):
        assert not known & set(tokenizer(text).input_ids), text
    # an ending that is a word is what is left of a compound, after its other letters
    assert tokenizer.tokenize("armchair")[0] == "a"
    with pytest.raises(ValueError, match="words"):
        vocabulary(["Not a word"])


def test_the_most_typical_objects_of_a_noun_have_the_mean_size_and_no_copies() -> None:
    """Balls of sizes 9, 10, 11, two of each: the middle ones are nearest to the mean, and the second is a copy."""
    views = small_views()
    balls = [CaptionedObject(i, "ball", None, (), False) for i in range(6)]
    assert [views.objects[i].uid for i in range(6)] == [f"ball-{i}" for i in range(6)]
    assert [subject.index for subject in most_typical(balls, views, 1)] == [1]
    three = [subject.index for subject in most_typical(balls, views, 6)]
    assert three == [0, 1, 2]
    others = [CaptionedObject(i, "crate", None, (), False) for i in range(6, 12)]
    both = most_typical([*balls, *others], views, 2)
    assert Counter(subject.noun for subject in both) == {"ball": 2, "crate": 2}


def test_held_out_views_are_never_trained_and_stay_even() -> None:
    views, config = small_views(), small_config(1, 1)
    config = replace(config, words=replace(config.words, held_out_views=0.25))
    sets = make_sets(views, config, torch.device("cpu"))
    assert sets.held_out_views.azimuth_deg[0].tolist() == [60.0, 180.0, 300.0]
    assert not set(sets.train.azimuth_deg[0].tolist()) & {60.0, 180.0, 300.0}
    assert sets.train.pixels.shape[1] == 9
    assert sets.train.subjects == sets.held_out_views.subjects
    assert split_views(12, 0.0) == (list(range(12)), [])
    with pytest.raises(ValueError, match=r"^held_out_views: a share of 0\.1 needs 10 views"):
        split_views(8, 0.1)
