"""The page that a person opens, its pictures and curves, and the TensorBoard files beside it."""

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from event_files import events
from PIL import Image
from pyarrow import fs

from raydream.report.chart import format_number, line_chart, linear_axis, log_axis, thin, value_axis
from raydream.report.page import ReportFacts, preview_grid, write_report
from raydream.report.tensorboard import TensorboardLog
from raydream.store.run_folder import RunFolder, particle_file, preview_file

EVIL = "<script>alert('x')</script> & \"><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "link", "br", "circle", "path"}


class Page(HTMLParser):
    """All elements with their attributes, and the text; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open_tags: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open_tags == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def image(value: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def facts(**changes) -> ReportFacts:
    values = {
        "prompt": "a red chair",
        "summary": {"steps": "100"},
        "phase_s": {"starting": 2.0, "steps": 198.0},
        "step_part_s": {"render": 0.25, "guide": 0.75},
        "machine": {"CPU cores": "2"},
        "particles": [{"faces": 12, "opacity": 0.5}, {"faces": 13, "opacity": None}],
    }
    return ReportFacts(**(values | changes))


def finished_run(tmp_path, config=None) -> RunFolder:
    run = RunFolder.create(str(tmp_path / "run"), json.dumps(config or {"n": 2, "stages": [{"distance": [2.5, 3.5]}]}))
    run.write_text("versions.json", '{"torch": "2.13.0"}')
    run.append_metrics(
        [{"step": step, "stage": "nerf", "loss/rgb": 1 / (step + 1), "loss/lora": 0.5} for step in range(50)]
    )
    for step in range(0, 2000, 100):
        run.write_bytes(preview_file(step), preview_grid([image(step // 10), image(90)], 2, ["0", "1"]))
    for index in range(2):
        run.write_bytes(particle_file(index, "mesh.glb"), b"glTF" * 50_000)
        run.write_bytes(particle_file(index, "preview.png"), preview_grid([image(40)], 1))
        run.write_bytes(particle_file(index, "turntable.mp4"), b"\0" * (1000 if index == 0 else 2_000_001))
    return run


def read(run: RunFolder) -> str:
    return run.read_bytes("report.html").decode()


# The grid


def test_a_grid_holds_every_image_unchanged():
    images = [image(10 * number) for number in range(5)]
    sheet = np.asarray(Image.open(io.BytesIO(preview_grid(images, columns=3))))
    assert sheet.shape == (2 * (24 + 4) + 4, 3 * (32 + 4) + 4, 3)
    for number, pixels in enumerate(images):
        top, left = 4 + (number // 3) * 28, 4 + (number % 3) * 36
        np.testing.assert_array_equal(sheet[top : top + 24, left : left + 32], pixels)


def test_a_grid_is_not_wider_than_its_images():
    sheet = Image.open(io.BytesIO(preview_grid([image(0), image(1)], columns=8)))
    assert sheet.size == (2 * 36 + 4, 28 + 4)


def test_labels_are_drawn_below_the_images_and_inside_their_cells():
    plain = [image(200, 64, 64), image(100, 64, 64)]
    sheet = np.asarray(Image.open(io.BytesIO(preview_grid(plain, 2, ["a", "W" * 99]))))
    np.testing.assert_array_equal(sheet[4:68, 4:68], plain[0])
    np.testing.assert_array_equal(sheet[4:68, 72:136], plain[1])
    for left in (4, 72):
        label = sheet[68:-4, left : left + 64]
        assert label.max() > 200  # light letters
        assert label.min() < 40  # on dark ground
    assert (sheet[:, 68:72] == sheet[0, 0]).all()  # the long label stays in its cell


# The chart


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (0, 999, (0, 200, 400, 600, 800)),
        (-0.013, 0.27, (0, 0.05, 0.1, 0.15, 0.2, 0.25)),
    ],
)
def test_linear_ticks_are_round_numbers(low, high, ticks):
    assert linear_axis(float(low), float(high)).ticks == ticks


@pytest.mark.parametrize(("low", "high"), [(3.0, 3.0), (0.0, 0.0), (-1e9, 1e9), (1e-12, 3e-12), (1e6, 1e6 + 1.0)])
def test_every_axis_has_ticks_inside_it(low, high):
    axis = linear_axis(low, high)
    assert 2 <= len(axis.ticks) <= 9
    assert all(-1e-6 <= axis.place(tick) <= 1 + 1e-6 for tick in axis.ticks)
    assert 0 <= axis.place(low) <= axis.place(high) <= 1


def test_log_axis_is_straight_in_the_exponent():
    axis = log_axis(0.02, 50.0)
    assert axis.ticks == pytest.approx((0.01, 0.1, 1, 10, 100))
    assert [axis.place(tick) for tick in axis.ticks] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert len(log_axis(1e-30, 1e3).ticks) <= 8
    assert log_axis(1.0, 1.0).high == 10


def test_only_positive_values_of_many_sizes_are_drawn_logarithmically():
    assert value_axis([0.001, 1.0]).log
    assert not value_axis([0.0, 1.0]).log
    assert not value_axis([-1.0, 1e6]).log
    assert not value_axis([1.0, 99.0]).log


def test_thinning_keeps_the_mean_and_the_ends_near():
    points = [(float(x), math.sin(x)) for x in range(10_000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert np.mean([y for _, y in thinned]) == pytest.approx(np.mean([y for _, y in points]))
    assert (thinned[0][0], thinned[-1][0]) == (49.5, 9949.5)
    assert thin(points[:7], 100) == points[:7]


def test_a_straight_line_is_drawn_straight_from_corner_to_corner():
    html = line_chart("loss", {"rgb": [(0.0, 0.0), (50.0, 0.5), (100.0, 1.0)]}, "c")
    points = [
        tuple(map(float, place.split(","))) for place in re.search(r'd="M([\d., ]+)" class="line"', html)[1].split()
    ]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, (y0 + y2) / 2), abs=0.11)
    assert x0 < x2
    assert y0 > y2  # up is less in SVG


def test_a_chart_is_well_formed_and_told_in_words():
    series = {f"<{name}>": [(0.0, 1.0), (10.0, 0.25 + name)] for name in range(20)} | {"one": [(5.0, 1.0)]}
    root = ElementTree.fromstring(line_chart("a & b", series, "c0"))
    assert "<3>: from 1 at step 0 to 3.25 at step 10, between 1 and 3.25." in root.find("svg/desc").text
    assert root.find("svg").get("aria-labelledby") == "c0-t c0-d"
    assert len(root.findall("ul/li")) == 21
    assert (
        len(
            {
                line.get("style", "") + line.get("stroke-dasharray", "")
                for line in root.findall("svg/path[@class='line']")
            }
        )
        == 20
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0.05, "0.05"), (1200.0, "1200"), (3e-5, "3e-05"), (-2.0, "-2"), (0.1 + 0.2, "0.3"), (0.0, "0")]
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


# The page


def test_the_page_shows_the_run(tmp_path):
    run = finished_run(tmp_path)
    assert write_report(run, facts()) == "report.html"
    page = Page(read(run))
    assert len(page.all("h1")) == 1
    for text in (
        "a red chair",
        "Particle 0",
        "Particle 1",
        "stages.0.distance",
        "2.5, 3.5",
        "2.13.0",
        "3 min 20 s",
        "750 ms",
        "loss/rgb is half the squared length",
    ):
        assert text in page.text
    links = [link["href"] for link in page.all("a")]
    assert links == ["particles/000/mesh.glb", "particles/001/turntable.mp4", "particles/001/mesh.glb"]
    assert len(page.all("video")) == 1  # the other turntable is too large to embed
    steps = [int(alt["alt"].rpartition(" ")[2]) for alt in page.all("img") if "at step" in alt["alt"]]
    assert len(steps) == 12
    assert (steps[0], steps[-1]) == (0, 1900)
    assert page.text.count("logarithmic") == 0
    assert [svg["viewbox"] for svg in page.all("svg") if svg.get("role") == "img"] == ["0 0 440 250"]


def test_the_page_is_self_contained(tmp_path):
    run = finished_run(tmp_path)
    write_report(run, facts())
    html = read(run)
    page = Page(html)
    for _, attributes in page.elements:
        for name in ("src", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not page.all("link")
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in page.all("meta")[1]["content"]


def test_every_picture_is_described_and_embedded_whole(tmp_path):
    run = finished_run(tmp_path)
    write_report(run, facts())
    page = Page(read(run))
    assert all(picture["alt"] for picture in page.all("img"))
    assert all(video["aria-label"] for video in page.all("video"))
    assert page.all("html")[0]["lang"] == "en"
    data = base64.b64decode(page.all("video")[0]["poster"].partition(",")[2])
    assert data == run.read_bytes(particle_file(0, "preview.png"))


def test_large_pictures_are_made_smaller(tmp_path):
    run = finished_run(tmp_path)
    run.write_bytes(particle_file(1, "preview.png"), preview_grid([image(40, 900, 1800)], 1))
    write_report(run, facts())
    poster = next(picture["src"] for picture in Page(read(run)).all("img") if picture["alt"] == "Render of particle 1")
    assert poster.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(poster.partition(",")[2]))).width == 640


def test_text_of_strangers_stays_text(tmp_path):
    run = finished_run(tmp_path, {"prompt": EVIL, EVIL: [EVIL, {"x": EVIL}]})
    run.write_text("versions.json", json.dumps({EVIL: EVIL}))
    run.append_metrics([{"step": 50, EVIL: 1.0, f"{EVIL}/{EVIL}": 2.0}])
    stats = {EVIL: EVIL}
    write_report(
        run,
        facts(
            prompt=EVIL, summary=stats, machine=stats, particles=[stats], phase_s={EVIL: 1.0}, step_part_s={EVIL: 1.0}
        ),
    )
    html = read(run)
    page = Page(html)
    assert len(page.all("script")) == 1
    assert "alert" not in html[html.index("<script>") : html.index("</script>")]
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert page.text.count(EVIL) >= 10


def test_only_our_script_may_run(tmp_path):
    import hashlib

    run = finished_run(tmp_path)
    write_report(run, facts())
    html = read(run)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    allowed = re.search(r"script-src 'sha256-([^']+)'", html)[1]
    assert base64.b64decode(allowed) == hashlib.sha256(script.encode()).digest()


def test_a_run_that_was_stopped_at_once_has_a_page(tmp_path):
    run = RunFolder.create(str(tmp_path / "run"), "{}")
    run.append_metrics([{"step": 0, "loss/rgb": math.nan}])
    write_report(run, facts(phase_s={}, step_part_s={}, summary={}, machine={}))
    page = Page(read(run))
    assert page.text.count("no mesh was exported") == 2
    assert page.text.count("no picture") == 2
    assert "Curves" not in page.text
    assert "loss/rgb" not in page.text


def test_a_damaged_picture_leaves_the_page_whole(tmp_path):
    run = finished_run(tmp_path)
    run.write_bytes(preview_file(0), b"\x89PNG and then nothing")
    run.write_bytes(particle_file(0, "preview.png"), b"")
    write_report(run, facts())
    assert "not readable" in Page(read(run)).text


# TensorBoard


@pytest.mark.parametrize("remote", [False, True])
def test_tensorboard_files_end_up_in_the_run_folder(tmp_path, remote):
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()) if remote else None
    run = RunFolder.create("run" if remote else str(tmp_path / "run"), "{}", filesystem)
    log = TensorboardLog(run, start_step=7)
    log.scalars(7, {"loss/rgb": 0.5, "loss/lora": 2})
    log.sync()
    log.picture(8, "particles", preview_grid([image(3)], 1))
    log.sync()
    names = run.list_files("tensorboard")
    assert len(names) == (2 if remote else 1)
    records = [record for name in names for record in events(run.read_bytes(name))]
    values = {(record.step, value.tag): value for record in records for value in record.summary.value}
    assert values[7, "loss/rgb"].simple_value == 0.5
    assert values[7, "loss/lora"].simple_value == 2
    assert values[8, "particles"].image.width == 40
    assert [record.step for record in records if record.session_log.status] == [7]  # the mark of a resumed run
