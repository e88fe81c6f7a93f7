"""From the README to a first insight, each click made in a real Chromium and counted.

    # about a minute; prints clicks, seconds, and the folder of the pictures
    python benchmarks/explorer_walk.py
    python benchmarks/explorer_walk.py --install  # the same; the pictures go to docs/pictures/

The text of the walk is docs/explorer.md. What it says of the page is checked here, so that it
cannot say what is not there."""
import argparse, re, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import CHROMIUM, OPENING, WIDTHS, Explorer, Watch, chromium, missing, serve_voila
from playwright.sync_api import sync_playwright

PICTURES = ROOT / "docs" / "pictures" # as shipped
# seconds after which the page that `make explorer` keeps warm is ready; a reader takes about as
# long to find the address
KEPT = 20


class Walk:
    "Clicks so far, and the time since the address was clicked"
    def __init__(self, page, folder:Path):
        self.page, self.folder, self.clicks, self.began = page, folder, 0, time.monotonic()

    def click(self, what:str, call):
        "One click of a person, whatever it takes here"
        call()
        self.clicks += 1
        print(f"{time.monotonic() - self.began:6.1f} s   click {self.clicks}: {what}")

    def picture(self, name:str):
        self.page.wait_for_timeout(600)
        self.page.screenshot(path=self.folder / f"explorer_{name}.png", animations="allow")


def choose(explorer, name, pattern):
    select = explorer.control(name, "select")
    texts = select.locator("option").all_inner_texts()
    select.select_option(index=next(k for k, text in enumerate(texts) if re.search(pattern, text)))


def says(explorer, pattern:str):
    "Until the line on what is going on says something"
    explorer.until(
        lambda: re.search(pattern, explorer.words),
        complaint=lambda: f"the page says {explorer.words!r}, and the walk promises {pattern!r}",
    )


def walk(page, address:str, folder:Path):
    page.set_viewport_size(dict(zip(("width", "height"), WIDTHS["desk"])))
    page.goto(address, timeout=OPENING, wait_until="commit")
    steps = Walk(page, folder)
    steps.click(
        "the address that `make explorer` printed",
        lambda: page.wait_for_selector(".tnb-explorer .tnb-steered", timeout=OPENING),
    )
    explorer = Explorer(page).wait()
    says(explorer, r"“blue” went from < \.01 to > \.99")
    steps.picture("open")

    track = explorer.part("strength", ".noUi-target").first
    box = track.bounding_box()
    # a third of 1.5 is 0.5
    steps.click(
        "the middle of the slider",
        lambda: page.mouse.click(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2),
    )
    explorer.until(lambda: explorer.strengths and abs(explorer.strengths[0] - .5) < .06)
    explorer.wait()
    # red it says to the last shred
    says(explorer, r"“blue” went from < \.01 to < \.01.*large → small, ball → cone")
    explorer.until(
        lambda: explorer.part("answers", "tr").nth(1).inner_text().count("> .99") == 4,
        complaint="p(red) is not above .99 of both clips",
    )
    steps.picture("half")

    steps.click(
        "two thirds of the slider's way, strength 1",
        lambda: page.mouse.click(box["x"] + box["width"] * 2 / 3, box["y"] + box["height"] / 2),
    )
    explorer.until(lambda: explorer.strengths and abs(explorer.strengths[0] - 1) < .06)
    explorer.wait()
    steps.click("the menu Word, on: slowly", lambda: choose(explorer, "word", "slowly"))
    steps.click("the button Add this change", lambda: explorer.control("add").click())
    explorer.until(lambda: len(explorer.strengths) == 2)
    explorer.wait()
    says(explorer, r"“quickly” went from < \.01 to > \.99")
    steps.picture("two")

    steps.click("the button Check this explanation", lambda: explorer.control("check").click())
    explorer.until(
        lambda: "the VLM" in explorer.part("certificate").first.inner_text(), 60_000,
        "no certificate",
    )
    explorer.part("check").first.scroll_into_view_if_needed()
    steps.picture("certificate")

    steps.click(
        "Remove, beside slowly",
        lambda: explorer.control("remove").page.locator(
            ".tnb-concept", has_text="slowly",
        ).get_by_role("button").click(),
    )
    explorer.until(lambda: len(explorer.strengths) == 1)
    explorer.wait()
    steps.click("the menu VLM, on: videollama3, misled", lambda: choose(explorer, "vlm", "misled"))
    explorer.until(lambda: "misled" in explorer.words and explorer.state == "ready", 60_000)
    # the ball is blue, and it does not say so
    says(explorer, r"“blue” went from < \.01 to (< \.01|\.0\d)")
    page.evaluate("document.querySelector('.tnb-explorer').scrollIntoView()")
    steps.picture("misled")
    steps.click(
        "the menu Decided by, on: this VLM's answers",
        lambda: choose(explorer, "direction", r"this\sVLM"),
    )
    explorer.until(
        lambda: explorer.state == "ready"
        and re.search(r"“blue” went from < \.01 to (> \.99|\.[89])", explorer.words),
        60_000, lambda: explorer.words,
    )
    steps.picture("found")
    steps.click("the button Check this explanation", lambda: explorer.control("check").click())
    explorer.until(
        lambda: "shared association" in explorer.part("certificate").first.inner_text(), 60_000,
        "no certificate",
    )
    print(explorer.part("certificate").first.inner_text()[:400])
    explorer.part("check").first.scroll_into_view_if_needed()
    steps.picture("found_certificate")
    return steps


if __name__ == "__main__":
    if reason := missing(): sys.exit(reason)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--install", action="store_true", help="put the pictures in the place of the shipped ones",
    )
    folder = PICTURES if parser.parse_args().install else Path(
        tempfile.mkdtemp(prefix="explorer_walk_")
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        server = serve_voila(Path(home))
        try:
            time.sleep(KEPT)
            with playwright.chromium.launch(
                executable_path=chromium(), headless=True, args=list(CHROMIUM),
            ) as browser:
                watch = Watch()
                steps = walk(watch(browser.new_page()), server.address, folder)
                print(
                    f"{steps.clicks} clicks, {time.monotonic() - steps.began:.0f} s; complaints of "
                    f"the browser: {watch.unexpected() or 'none'}"
                )
                print(f"pictures: {folder}")
        finally: server.stop()
