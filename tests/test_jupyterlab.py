"""The explorer in JupyterLab, in a real Chromium with a server of its own"""
import math
import re
import time

import pytest
from test_explorer import able, context, end, home, leave  # noqa: F401, three of them are fixtures

from browser import OPENING, Explorer, Watch, picture, serve_lab


@pytest.fixture(scope="module")
def lab(home):
    server = serve_lab(home / "lab")
    yield server
    server.stop()


def menu(page, name, item, **waiting):
    page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{name}$")).click(**waiting)
    page.locator(".lm-Menu-item", has_text=re.compile(item)).first.click(**waiting)


def answer_dialog(page) -> bool:
    "Accept what JupyterLab asks, such as the kernel of a notebook that has none yet"
    accept = page.locator(".jp-Dialog .jp-mod-accept")
    if not accept.count(): return False
    print("JupyterLab asked:", page.locator(".jp-Dialog").first.inner_text())
    accept.first.click(timeout=5_000)
    return True


def run_all(page) -> Explorer:
    """Run All until the explorer stands there

    While its kernel connects, JupyterLab drops what is asked for, marks the cells and then forgets
    them, or asks for a kernel. So this accepts the kernel it offers, and asks again whenever
    nothing runs and a cell has not been run.
    """
    from playwright.sync_api import TimeoutError as Late
    prompts = page.locator(".jp-Cell.jp-CodeCell .jp-InputPrompt")
    video = page.locator(".tnb-explorer .tnb-videos img").first
    until = time.monotonic() + OPENING / 1000
    ran, quiet = False, math.inf # whether cells were seen at work; s of rest since then
    while True:
        said = prompts.all_inner_texts()
        busy = any("*" in text for text in said)
        ran, quiet = ran or busy, 0 if busy else quiet
        complete = ran and not busy and all(re.search(r"[0-9]", text) for text in said)
        if complete and video.is_visible(): break
        if time.monotonic() > until:
            picture(page, "lab_run_desk")
            raise AssertionError(f"no video {OPENING / 1000:.0f} s after Run All; cells: {said}")
        if answer_dialog(page): quiet = 0
        if quiet > 5 and not complete:
            try: menu(page, "Run", r"^Run All Cells$", timeout=5_000)
            except Late: page.keyboard.press("Escape") # a dialog came between
            ran, quiet = False, 0
        page.wait_for_timeout(100)
        quiet += .1
    picture(page, "lab_run_desk")
    return Explorer(page).wait(timeout=OPENING)


def test_in_jupyterlab_with_a_kernel_restarted(context, lab):
    watch = Watch()
    page = watch(context.new_page())
    page.goto(f"{lab.base}/lab/tree/explorer.ipynb?token={lab.token}", timeout=OPENING)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=OPENING)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=OPENING)
    explorer = run_all(page)
    end(explorer)
    end(explorer, "ArrowLeft")
    explorer.root.scroll_into_view_if_needed()
    picture(page, "lab_ready_desk")
    assert not (found := explorer.crowded()), "\n".join(found)
    menu(page, "Kernel", r"^Restart Kernel…")
    page.locator(".jp-Dialog button", has_text="Restart").click()
    said = (
        """(root) => {
      const badges = root.querySelectorAll(".jupyter-widgets-disconnected")
      const content = (node, place) => getComputedStyle(node, place).content
      const around = (node) => [content(node, "::before"), content(node, "::after")]
      return [root.innerText, ...[root, ...badges].flatMap(around)].join(" ")
    }"""
    )
    explorer.until(
        lambda: re.search(r"kernel|Python", explorer.root.evaluate(said))
        and re.search(r"[Rr]un", explorer.root.evaluate(said)),
        complaint="the page does not say that its kernel is gone",
    )
    picture(page, "lab_restarted_desk")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=OPENING)
    explorer = run_all(page)
    end(explorer)
    leave(page)
    assert not watch.unexpected(), "\n".join(watch.unexpected())
