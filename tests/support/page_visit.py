"""A browser and a service for the page's tests: fixtures, and a visitor who notices what goes wrong behind the
scenes.
"""

import json
import os
import re
import shutil
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trimesh
from service_fake import FakeService, make_run, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--disable-gpu", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
]
URL, KEY = os.environ.get("RAYDREAM_PAGE_URL", ""), os.environ.get("RAYDREAM_PAGE_KEY", "")
PATIENCE_S = 1200 if URL else 150
PROMPT, NUM_PARTICLES, STEPS = "a chair", 2, 40
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}, "has_touch": True},
}
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
canned_only = pytest.mark.skipif(bool(URL), reason="needs answers that only the canned service gives")
Visit = Callable[..., Any]


# --- a service, a browser, a visitor ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, NUM_PARTICLES)
    return folder


@pytest.fixture(scope="module")
def service(run: Path) -> FakeService:
    return FakeService(run, NUM_PARTICLES)


@pytest.fixture(scope="module")
def address(service: FakeService) -> Iterator[str]:
    if URL:
        yield URL.rstrip("/")
        return
    with serving(service) as found:
        yield found


@pytest.fixture
def held(service: FakeService) -> Iterator[FakeService]:
    """The canned service, in which generations stop half way until ``hold_step`` is None; a real one takes its time."""
    service.hold_step = STEPS // 2
    yield service
    service.hold_step = None


@pytest.fixture(scope="module")
def finished(address: str) -> str:
    """Id of a generation that is over, made over HTTP without the page."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {KEY}"} if KEY else {})

    def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(address + path, data, headers)) as response:
            return json.load(response)

    preset = next(item["name"] for item in ask("/v1/priors")["items"] if item["default"])
    order = {"prompt": PROMPT, "n": NUM_PARTICLES, "preset": preset, "method": "vsd", "seed": 1, "steps": STEPS}
    made = ask("/v1/generations", order)
    deadline_s = time.monotonic() + PATIENCE_S
    while made["state"] in ("queued", "running"):
        assert time.monotonic() < deadline_s, made
        time.sleep(0.2)
        made = ask(made["links"]["self"])
    assert made["state"] == "finished", made["error"]
    return made["id"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Opens an address in a fresh profile; in the end nothing may have gone wrong behind the visitor's back."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_page(url: str, key: str = KEY, expected: str = "", **look: Any) -> Any:
        context = browser.new_context(accept_downloads=True, **look)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_S * 1000)
        host = urlsplit(url).netloc
        page.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective, e.blockedURI));"
            + (f"sessionStorage.setItem('raydream-key', {json.dumps(key)})" if key else "")
        )
        page.on("request", lambda r: _note(complaints, "request", "" if _is_own(r.url, host) else r.url))
        page.on("console", lambda m: _note(complaints, "console", _told(m, expected)))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints, complaints


def _note(complaints: list[str], kind: str, words: str) -> None:
    if words:
        complaints.append(f"{kind}: {words}")


def _is_own(url: str, host: str) -> bool:
    return urlsplit(url).scheme in ("blob", "data") or urlsplit(url).netloc == host


def _told(message: Any, expected: str) -> str:
    """Errors, and warnings but those of the graphics driver, whose own name for itself is WebGL."""
    is_driver = "GL Driver Message" in message.text
    is_expected = bool(expected) and expected in message.text
    return message.text if message.type in ("error", "warning") and not is_driver and not is_expected else ""


def order(page: Any, num_particles: int = NUM_PARTICLES, steps: int = STEPS) -> None:
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("How many").fill(str(num_particles))
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Steps").fill(str(steps))
    page.get_by_role("button", name="Create").click()
    page.get_by_role("heading", name=PROMPT, level=1).wait_for()


def first_turn_button(page: Any) -> Any:
    return page.get_by_role("button", name="Turn in 3D: particle 0")


def wait_for_pictures(page: Any, num_pictures: int) -> None:
    page.wait_for_function(
        "n => [...document.querySelectorAll('main img')].filter(i => i.naturalWidth > 1).length === n",
        arg=num_pictures,
    )


def turn_in_3d(page: Any) -> None:
    """Opens the first particle's model, which shows itself and turns."""
    first_turn_button(page).click()
    page.get_by_text(re.compile("triangles")).wait_for()
    page.get_by_role("button", name="Spin").click()
    still = page.locator("canvas").screenshot()
    assert page.locator("canvas").screenshot() == still
    page.get_by_role("application").press("ArrowRight")
    page.wait_for_timeout(200)
    assert page.locator("canvas").screenshot() != still, "the model turned"


def take_away(page: Any, folder: Path, num_meshes: int) -> None:
    """Downloads the model that is open, which has the triangles that were told, and then everything."""
    num_triangles = int(page.get_by_text(re.compile("triangles")).inner_text().split()[0].replace(",", ""))
    with page.expect_download() as coming:
        page.get_by_role("dialog").get_by_role("link", name="GLB").click()
    glb = folder / coming.value.suggested_filename
    coming.value.save_as(glb)
    assert glb.suffix == ".glb"
    assert len(trimesh.load_mesh(glb).faces) == num_triangles > 0
    page.get_by_role("button", name="Close").click()
    with page.expect_download() as coming:
        page.get_by_role("link", name="Everything as zip").click()
    coming.value.save_as(folder / "all.zip")
    with zipfile.ZipFile(folder / "all.zip") as packed:
        assert packed.testzip() is None
        assert len([name for name in packed.namelist() if name.endswith("mesh.glb")]) == num_meshes
