"""The page in a real browser: headless Chromium against the canned service, or against RAYDREAM_PAGE_URL.

For a service that runs: ``RAYDREAM_PAGE_URL=http://127.0.0.1:8000 pytest tests/serve/test_page.py`` (and
RAYDREAM_PAGE_KEY where it asks for one). What needs answers that only the canned service gives is skipped then.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trimesh
from page_visit import (
    LOOKS,
    NUM_PARTICLES,
    PATIENCE_S,
    PROMPT,
    STEPS,
    Visit,
    address,
    browser,
    canned_only,
    finished,
    first_turn_button,
    held,
    needs_chromium,
    order,
    run,
    service,
    take_away,
    turn_in_3d,
    visit,
    wait_for_pictures,
)
from service_fake import FakeService, serving

pytestmark = [pytest.mark.browser, needs_chromium]
__all__ = ["address", "browser", "finished", "held", "run", "service", "visit"]  # fixtures


# --- what people come for ---------------------------------------------------------------------------------------------


def test_a_prompt_becomes_models_to_turn_and_to_take_away(
    visit: Visit, address: str, held: FakeService, tmp_path: Path
) -> None:
    page = visit(address)
    order(page)
    page.get_by_text(re.compile(r"Step \d+ of \d+")).wait_for()
    wait_for_pictures(page, NUM_PARTICLES)
    assert page.get_by_role("progressbar").count() == 1, "previews came before the end"
    held.hold_step = None
    first_turn_button(page).wait_for()
    assert page.get_by_role("img", name=re.compile("running mean")).count() >= 1  # curves

    turn_in_3d(page)
    take_away(page, tmp_path, NUM_PARTICLES)


def test_films_stand_side_by_side_at_one_angle(visit: Visit, address: str, finished: str) -> None:
    page = visit(f"{address}/#/g/{finished}")
    page.get_by_role("button", name="Compare all").click()
    page.wait_for_function(
        "n => [...document.querySelectorAll('video')].filter(v => v.readyState > 1).length === n", arg=NUM_PARTICLES
    )
    page.get_by_role("slider", name="Angle").fill("90")
    page.wait_for_function(
        "() => [...document.querySelectorAll('video')].every(v => Math.abs(v.currentTime / v.duration - 0.25) < 0.01)"
    )
    assert page.get_by_role("button", name="Spin").get_attribute("aria-pressed") == "false"


def test_the_gallery_leads_to_what_was_made(visit: Visit, address: str, finished: str) -> None:
    page = visit(address)
    cover = page.locator(f"a[href='#/g/{finished}']")
    cover.locator("img").first.wait_for()
    assert PROMPT in cover.inner_text()
    cover.click()
    first_turn_button(page).wait_for()
    assert page.title() == f"{PROMPT} · raydream"
    page.go_back()
    page.get_by_role("heading", name="Made here").wait_for()


def test_a_word_that_was_begun_is_ended(visit: Visit, address: str) -> None:
    page = visit(address)
    prompt = page.get_by_label("Prompt")
    prompt.fill("a xylophone")
    page.get_by_text("knows none of these words").wait_for()
    prompt.fill("a red chai")
    page.get_by_role("button", name="chair", exact=True).click()
    assert prompt.input_value() == "a red chair"
    assert prompt.evaluate("input => input === document.activeElement")
    assert page.get_by_text("knows none of these words").count() == 0


def test_a_generation_can_be_cancelled(visit: Visit, address: str, held: FakeService) -> None:
    page = visit(address)
    page.on("dialog", lambda dialog: dialog.accept())
    order(page)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled", exact=True).first.wait_for()
    assert page.get_by_role("button", name="Cancel").count() == 0


def test_what_was_cancelled_can_be_tried_again(visit: Visit, address: str, held: FakeService) -> None:
    """And is seen to grow again."""
    page = visit(address)
    page.on("dialog", lambda dialog: dialog.accept())
    order(page)
    page.get_by_text(re.compile(r"Step \d+ of \d+")).wait_for()
    assert page.get_by_role("button", name=re.compile("Try again|Delete")).count() == 0, "only for what has ended"
    page.get_by_role("button", name="Cancel").click()
    tab_to(page, "Try again")
    page.keyboard.press("Enter")
    page.get_by_text(re.compile(r"Step \d+ of \d+")).wait_for()
    held.hold_step = None
    first_turn_button(page).wait_for()
    assert page.get_by_role("button", name="Try again").count() == 0


def test_what_has_ended_is_deleted_once_that_is_confirmed(visit: Visit, address: str) -> None:
    page, asked, answers = visit(address), [], [False, True]

    def answer(dialog: Any) -> None:
        asked.append(dialog.message)
        dialog.accept() if answers.pop(0) else dialog.dismiss()

    page.on("dialog", answer)
    order(page)
    first_turn_button(page).wait_for()
    here = page.url.partition("#")[2]
    tab_to(page, "Delete")
    page.keyboard.press("Enter")
    assert page.url.endswith(here), "it was not confirmed"
    page.get_by_role("button", name="Delete").press("Enter")
    page.get_by_role("heading", name="Made here").wait_for()
    assert asked == [f"Delete “{PROMPT}” with all its models? This cannot be undone."] * 2
    assert page.locator("p[role=status].unseen").inner_text() == f"{PROMPT}: Deleted"
    assert page.locator(f"a[href='#{here}']").count() == 0
    assert page.evaluate("document.activeElement.tagName") == "H1"


@canned_only
def test_why_the_queue_waits_is_said(visit: Visit, address: str, service: FakeService) -> None:
    service.paused = "waiting for room on the service's disk"
    page = visit(address)
    order(page)
    page.get_by_text(service.paused).wait_for()
    service.paused = ""
    first_turn_button(page).wait_for()


def test_without_events_the_page_asks_again(visit: Visit, address: str) -> None:
    page = visit(address, expected="net::ERR_FAILED")
    page.route("**/events", lambda route: route.abort())
    order(page)
    first_turn_button(page).wait_for()


# --- everybody --------------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.05)


def tab_to(page: Any, name: str) -> None:
    """Presses Tab until the focus is on what a screen reader would call ``name``."""
    for _ in range(80):
        page.keyboard.press("Tab")
        words = page.evaluate(
            "(e => e.getAttribute('aria-label') ?? e.labels?.[0]?.innerText ?? e.innerText)(document.activeElement)"
        )
        if (words or "").replace("\n", " ").strip() == name:
            return
    raise AssertionError(f"no Tab leads to {name!r}")


def test_a_keyboard_is_enough(visit: Visit, address: str, held: FakeService) -> None:
    page = visit(address)
    page.get_by_role("button", name="chair", exact=True).wait_for()
    tab_to(page, "Skip to content")
    page.keyboard.press("Enter")
    tab_to(page, "Prompt")
    page.keyboard.type(PROMPT)
    tab_to(page, "How many")
    page.keyboard.type(str(NUM_PARTICLES))
    tab_to(page, "More")
    page.keyboard.press("Enter")
    tab_to(page, "Steps")
    page.keyboard.type(str(STEPS))
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.activeElement.tagName === 'H1' && location.hash.startsWith('#/g/')")
    page.get_by_text(re.compile(r"Step \d+ of \d+")).wait_for()

    held.hold_step = None
    first_turn_button(page).wait_for()
    announced = page.locator("p[role=status].unseen")
    assert re.search(f"{PROMPT}: Finished", announced.inner_text())
    tab_to(page, "Turn in 3D: particle 0")
    page.keyboard.press("Enter")
    page.get_by_text(re.compile("triangles")).wait_for()
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    tab_to(page, f"3D model of {PROMPT}, particle 0")
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("button", name="Spin").get_attribute("aria-pressed") == "false"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.innerText").startswith("Turn in 3D"), "the focus is back"


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing(visit: Visit, address: str, finished: str, look: str) -> None:
    """The front page with a note about a word, a finished generation, the model and the films."""
    axe_module = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    )
    axe = axe_module.Axe()
    page = visit(address, reduced_motion="reduce", **LOOKS[look])

    def check(view: str) -> None:
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, f"{view} is {overflow} px too wide"
        found = axe.run(page).response["violations"]
        assert not found, "\n".join(f"{view}: {v['id']} {[n['html'] for n in v['nodes']]}" for v in found)

    page.get_by_text("More", exact=True).click()
    page.get_by_label("Prompt").fill("a purple xylophone")
    page.locator(".cover img").first.wait_for()
    check("front page")
    page.goto(f"{address}/#/g/{finished}")
    page.get_by_role("checkbox", name="Compare particle 0").check()
    wait_for_pictures(page, NUM_PARTICLES)
    check("generation")
    first_turn_button(page).click()
    page.get_by_text(re.compile("triangles")).wait_for()
    check("model")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Compare all").click()
    page.locator("video").first.wait_for()
    check("films")


def test_axe_sees_what_is_missing(visit: Visit, address: str) -> None:
    axe_module = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    )
    page = visit(address)
    page.get_by_label("How many").evaluate("input => input.labels[0].remove()")
    assert "label" in [violation["id"] for violation in axe_module.Axe().run(page).response["violations"]]


def test_the_theme_is_the_systems_until_it_is_chosen(visit: Visit, address: str) -> None:
    page = visit(address, color_scheme="dark")

    def lightness() -> int:
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    assert lightness() < 100
    page.get_by_role("button", name="Dark").click()
    page.get_by_role("button", name="Dark", pressed=False).wait_for()
    wait_until(lambda: lightness() > 600)  # the colours change gently
    page.reload()
    page.get_by_role("button", name="Dark", pressed=False).wait_for()
    wait_until(lambda: lightness() > 600)


def test_nothing_moves_for_who_wants_stillness(visit: Visit, address: str, finished: str) -> None:
    page = visit(f"{address}/#/g/{finished}", reduced_motion="reduce")
    first_turn_button(page).click()
    page.get_by_text(re.compile("triangles")).wait_for()
    still = page.locator("canvas").screenshot()
    page.wait_for_timeout(300)
    assert page.locator("canvas").screenshot() == still
    assert page.evaluate("document.getAnimations().length") == 0


# --- what goes wrong --------------------------------------------------------------------------------------------------


@canned_only
def test_a_refused_order_says_which_field(visit: Visit, address: str) -> None:
    page = visit(address, expected="status of 422")
    page.get_by_label("Preset").select_option("sd21")
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_role("button", name="Create").click()
    page.get_by_role("alert").get_by_text("preset: sd21 needs a GPU").wait_for()
    preset = page.get_by_label("Preset")
    assert preset.evaluate("e => e === document.activeElement && e.getAttribute('aria-invalid') === 'true'")
    assert page.get_by_role("alert").get_attribute("id") == preset.get_attribute("aria-describedby")


@canned_only
def test_a_key_is_asked_for_and_forgotten_with_the_tab(visit: Visit, run: Path, tmp_path: Path) -> None:
    service = FakeService(run, NUM_PARTICLES, key="secret")
    with serving(service) as closed:
        page = visit(closed, expected="status of 401")
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("does not know this key").wait_for()
        page.keyboard.press("Escape")
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        order(page)
        first_turn_button(page).wait_for()
        wait_for_pictures(page, NUM_PARTICLES)  # pictures are asked for with the key too
        with page.expect_download() as coming:
            page.get_by_role("link", name="GLB: particle 1").click()
        coming.value.save_as(tmp_path / "particle.glb")
        assert len(trimesh.load_mesh(tmp_path / "particle.glb").faces) > 0
        assert page.evaluate("[sessionStorage['raydream-key'], JSON.stringify(localStorage)]") == ["secret", "{}"]
        assert "secret" not in page.url
        page.close()  # before its service goes


@canned_only
def test_what_does_not_exist_is_said(visit: Visit, address: str) -> None:
    page = visit(f"{address}/#/g/nowhere", expected="status of 404")
    page.get_by_text("there is no such generation").wait_for()
    page.get_by_role("link", name="All models").click()
    page.get_by_role("heading", name="What shall we make?").wait_for()
