"""The page in a real browser, on the real service: Ray Serve, supervisor, runner, actors, and a generation of
theirs.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from page_visit import (
    NUM_PARTICLES,
    Visit,
    browser,
    first_turn_button,
    needs_chromium,
    order,
    take_away,
    turn_in_3d,
    visit,
    wait_for_pictures,
)
from service_kills import running_service

pytestmark = [pytest.mark.ray, pytest.mark.browser, needs_chromium]
__all__ = ["browser", "visit"]  # fixtures
NUM_STEPS = 200  # time enough to see it grow
PIXELS = """image => {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL();
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service(tmp_path_factory.mktemp("service"), f"WARM_PARTICLES={NUM_PARTICLES}") as (client, _):
        yield str(client.base_url).rstrip("/")


def test_a_prompt_becomes_models_to_turn_and_to_take_away(visit: Visit, address: str, tmp_path: Path) -> None:
    page = visit(address)
    order(page, steps=NUM_STEPS)
    wait_for_pictures(page, NUM_PARTICLES)
    page.get_by_text(re.compile(rf"Step \d+ of {NUM_STEPS}")).wait_for()
    assert page.get_by_role("progressbar").count() == 1, "previews came before the end"
    untrained = page.locator("main img").first.evaluate(PIXELS)
    first_turn_button(page).wait_for()
    page.wait_for_function(f"before => ({PIXELS})(document.querySelector('main img')) !== before", arg=untrained)
    assert page.get_by_role("img", name=re.compile("running mean")).count() >= 1  # curves
    turn_in_3d(page)
    take_away(page, tmp_path, NUM_PARTICLES)
