"""Pictures of the page for the README, of a service that runs and has no keys: its newest generation.

python tests/support/page_pictures.py http://127.0.0.1:8000 docs  page.png, page_dark.png, ..
python tests/support/page_pictures.py http://127.0.0.1:8000 docs --growing  page_growing.png, while one runs
"""

import argparse
import io
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from page_visit import CHROMIUM, FLAGS, LOOKS, first_turn_button, playwright
from PIL import Image

Look = dict[str, Any]
DESKTOP: Look = {"viewport": {"width": 1100, "height": 800}}
GAP_PX = 20


def newest(address: str, state: str) -> dict[str, Any]:
    """The newest generation in that state."""
    with urllib.request.urlopen(f"{address}/v1/generations?limit=100") as response:
        return next(item for item in json.load(response)["items"] if item["state"] == state)


def front(page: Any, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.locator(".cover img").first.wait_for()


def particles(page: Any, number: int) -> None:
    page.wait_for_function(
        "n => [...document.querySelectorAll('main img')].filter(i => i.naturalWidth > 1).length === n", arg=number
    )
    page.get_by_role("img", name="running mean").first.wait_for()


def model(page: Any, index: int) -> None:
    first_turn_button(page).wait_for()
    page.get_by_role("button", name=f"Turn in 3D: particle {index}").click()
    page.get_by_text("triangles").wait_for()
    page.wait_for_timeout(1000)  # it has turned a little


def taken(browser: Any, address: str, look: Look, show: Callable[[Any], None], whole: bool = False) -> Image.Image:
    """What the page looks like after ``show``; all of it, or the part that a screen holds."""
    context = browser.new_context(**look)
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(address)
    show(page)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=whole)))
    context.close()
    return picture.convert("RGB")


def beside(pictures: list[Image.Image]) -> Image.Image:
    """One row, on grey."""
    width = sum(picture.width for picture in pictures) + GAP_PX * (len(pictures) - 1)
    row, left = Image.new("RGB", (width, max(picture.height for picture in pictures)), (128, 128, 128)), 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + GAP_PX
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--growing", action="store_true")
    parser.add_argument("--particle", type=int, default=0, help="the one whose model is shown")
    args = parser.parse_args()
    made = newest(args.address, "running" if args.growing else "finished")
    place = f"{args.address}/#/g/{made['id']}"
    light, dark, phone = (LOOKS[name] for name in ("light", "dark", "phone"))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def show_all(page: Any) -> None:
            particles(page, made["n"])

        if args.growing:
            taken(browser, place, DESKTOP | dark, show_all, whole=True).save(args.folder / "page_dark.png")
            return
        taken(browser, place, DESKTOP | light, show_all, whole=True).save(args.folder / "page.png")
        views = [
            taken(browser, args.address, phone, lambda page: front(page, made["prompt"])),
            taken(browser, place, phone, lambda page: model(page, args.particle)),
        ]
        beside(views).save(args.folder / "page_phone.png")
        browser.close()


if __name__ == "__main__":
    main()
