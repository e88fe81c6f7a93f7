"""The explorer as people meet it: Voila in a real Chromium, moved by mouse and keyboard, read from
the page. Screenshots lie in `runs/explorer/`. JupyterLab has a file of its own."""
import os, re, urllib.error, urllib.request
from urllib.parse import urlsplit

import pytest

from browser import (
    CHROMIUM, OPENING, PATIENCE, WIDTHS, Explorer, Watch, chromium, missing, picture, pictures,
    serve_voila,
)

HOSTILE = {
    "markup": '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>',
    "long": ("one large red ball " * 527)[:10_000],
    "emoji": "one large red 🎈 slides left slowly over a stone floor", "empty": "",
}
UNSHIPPED = ("ball", "cone") # No concept of the shipped bank leads there


@pytest.fixture(scope="module", autouse=True)
def able():
    why = missing()
    if why and os.environ.get("EXPLORER_BROWSER") == "required":
        pytest.fail(f"EXPLORER_BROWSER=required, but {why}", pytrace=False)
    if why: pytest.skip(why)


@pytest.fixture(scope="module")
def home(able, tmp_path_factory): return tmp_path_factory.mktemp("jupyter")


@pytest.fixture(scope="module")
def context(home):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        width, height = WIDTHS["desk"]
        context = play.chromium.launch_persistent_context(
            str(home / "user"), executable_path=chromium(), headless=True, args=list(CHROMIUM),
            viewport={"width": width, "height": height},
        )
        context.set_default_timeout(PATIENCE)
        yield context
        context.close()


@pytest.fixture(scope="module")
def voila(home):
    server = serve_voila(home / "voila")
    yield server
    server.stop()


# Voila ends the kernel of a page that says goodbye
def leave(page): page.close(run_before_unload=True)


def open_voila(context, voila, watch=None) -> Explorer:
    page = (watch or Watch())(context.new_page())
    page.goto(voila.address, timeout=OPENING)
    page.wait_for_selector(".tnb-explorer .tnb-videos img", timeout=OPENING)
    return Explorer(page).wait()


@pytest.fixture(scope="module")
def shared(context, voila):
    "One open page for the tests that leave it as they found it"
    kept = {}
    yield kept
    if kept: leave(kept["explorer"].page)


@pytest.fixture
def explorer(shared, context, voila):
    "The explorer in Voila, as it opens; complaints of the page fail the test"
    if shared and not as_opened(shared): leave(shared.pop("explorer").page)
    if "explorer" not in shared:
        shared["watch"] = Watch()
        shared["explorer"] = open_voila(context, voila, shared["watch"])
        shared["caption"] = shared["explorer"].control("caption", "input").input_value()
        shared["rows"] = shared["explorer"].part("concept").count()
    yield shared["explorer"]
    complaints = shared["watch"].unexpected()
    shared["watch"].complaints.clear(), shared["watch"].allowed.clear()
    assert not complaints, "\n".join(complaints)


def as_opened(shared) -> bool:
    explorer = shared["explorer"]
    return explorer.state == "ready" and explorer.control(
        "caption", "input",
    ).input_value() == shared["caption"] and explorer.part("concept").count() == shared["rows"]


def choose(explorer, name, pattern):
    "Take the first option of a select whose text fits"
    select = explorer.control(name, "select")
    explorer.until(
        lambda: any(
            re.search(pattern, text) for text in select.locator("option").all_inner_texts()
        ),
        complaint=lambda: f"no option of {name} fits {pattern!r}: "
            f"{select.locator('option').all_inner_texts()}",
    )
    select.select_option(
        index=next(
            k
            for k, text in enumerate(select.locator("option").all_inner_texts())
            if re.search(pattern, text)
        )
    )


def end(explorer, key="End", **which):
    strength = explorer.press(key, **which)
    explorer.shown(which.get("which", 0), strength)
    return strength


def reply(url):
    "Status and where one lands; redirects are followed"
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            url, timeout=PATIENCE / 1000,
        ) as answer:
            return answer.status, answer.url
    except urllib.error.HTTPError as error: return error.code, url


def test_without_the_token_there_is_no_page(voila):
    for query in ("", "?token=", "?token=0123"):
        status, landed = reply(f"{voila.base}/{query}")
        assert status in (
            401, 403,
        ) or "/login" in landed, f"{query!r} was let in: {status} {landed}"
    assert reply(f"{voila.base}/voila/files/fig1.png")[0] == 403
    assert reply(f"{voila.base}/api/kernels/00000000-0000-0000-0000-000000000000")[0] in (401, 403)


def test_a_taken_port_is_no_obstacle(voila, home):
    other = serve_voila(home / "other", port=urlsplit(voila.base).port)
    try:
        assert other.base != voila.base
        assert other.token != voila.token
        assert reply(other.base)[1].startswith(other.base)
    finally: other.stop()


def test_it_listens_on_this_machine_only(voila):
    import psutil
    family = [
        psutil.Process(voila.process.pid),
        *psutil.Process(voila.process.pid).children(recursive=True),
    ]
    listening = {
        line.laddr.ip
        for process in family
        for line in process.net_connections("inet")
        if line.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1"} and listening


def test_it_opens_with_a_video_and_without_code(explorer):
    assert explorer.words and explorer.strengths
    assert explorer.page.locator(".jp-InputArea-editor").count() == 0, "code is on the page"
    for name in ("base", "steered"):
        width = explorer.part("videos", f"img.tnb-{name}").first.evaluate(
            "(image) => image.decode().then(() => image.naturalWidth)"
        )
        assert width > 0
    pictures(explorer, "voila_ready")


def test_the_slider_moves_video_and_answer_by_keyboard(explorer):
    base = explorer.part("videos", "img.tnb-base").first
    assert end(explorer, "Home") == 0 and explorer.steered == base.get_attribute(
        "src"
    ), "at strength 0 both videos are the same"
    still = explorer.part("answers").first.inner_html()
    top = end(explorer)
    assert top > 0 and explorer.steered != base.get_attribute("src")
    explorer.until(
        lambda: explorer.part("answers").first.inner_html() != still,
        complaint="the answers did not follow",
    )
    step = end(explorer, "ArrowLeft")
    assert 0 < step < top
    picture(explorer.page, "voila_stepped_desk")


def test_the_slider_moves_by_mouse(explorer):
    end(explorer, "Home")
    track = explorer.part("strength", ".noUi-base").first.bounding_box()
    explorer.page.mouse.click(track["x"] + track["width"] * .6, track["y"] + track["height"] / 2)
    explorer.until(lambda: explorer.asked() > 0, complaint="a click on the track moves nothing")
    explorer.until( # the handle glides
        lambda: abs(explorer.strengths[0] - explorer.asked()) < 1e-6 and explorer.state == "ready",
        complaint="the video does not follow the handle",
    )


def test_every_control_has_a_name_and_is_reached_by_tab(explorer):
    controls = explorer.controls()
    assert len(controls) >= 10
    assert not [control for control in controls if not control["name"]], "controls without a name"
    page = explorer.page
    page.evaluate(
        "() => { window.visited = new Set(); document.activeElement?.blur(); "
        "window.getSelection()?.removeAllRanges() }"
    )
    for _ in range(len(controls) + 25):
        page.keyboard.press("Tab")
        page.evaluate("() => window.visited.add(document.activeElement)")
    left = explorer.root.evaluate(
        """(root) => {
      const kinds = "button, select, input, textarea, a[href], summary, [role=slider]"
      const offered = (node) =>
        node.checkVisibility({visibilityProperty: true}) && !node.disabled && node.type !== "hidden"
      return [...root.querySelectorAll(kinds)]
        .filter((node) => offered(node) && !window.visited.has(node))
        .map((node) => node.outerHTML.slice(0, 160))
    }"""
    )
    assert not left, left


def test_pictures_have_descriptions(explorer):
    without = explorer.root.locator(
        "img:not([alt]), svg:not([aria-label]):not([aria-hidden]):not([role])"
    ).evaluate_all("(nodes) => nodes.map((node) => node.outerHTML.slice(0, 120))")
    assert not without, without


def test_start_step_window_seed_and_direction_make_new_videos(explorer):
    end(explorer)
    for move, back in (
        (
            lambda: explorer.press("ArrowRight", "start"),
            lambda: explorer.press("ArrowLeft", "start"),
        ),
        (
            lambda: explorer.press("ArrowRight", "window"),
            lambda: explorer.press("ArrowLeft", "window"),
        ),
        (lambda: number(explorer, "seed", 5), lambda: number(explorer, "seed", 0)),
    ):
        before = explorer.steered
        move()
        explorer.until(
            lambda: explorer.steered != before and explorer.state == "ready",
            complaint="the video did not follow",
        )
        back()
        explorer.until(
            lambda: explorer.steered == before and explorer.state == "ready",
            complaint="the video did not come back",
        )
    options = explorer.control("direction", "select").locator("option").all_inner_texts()
    assert len(options) > 1
    first = explorer.control("direction", "select").input_value()
    for k in range(len(options)):
        explorer.control("direction", "select").select_option(index=k)
        explorer.page.wait_for_timeout(200)
        explorer.wait()
    explorer.control("direction", "select").select_option(first)
    explorer.page.wait_for_timeout(200)
    explorer.wait()


def number(explorer, name, value):
    field = explorer.control(name, "input")
    field.fill(str(value))
    field.press("Enter")


def test_a_second_concept_comes_and_goes(explorer):
    rows = explorer.part("concept").count()
    choose(explorer, "word", "large")
    choose(explorer, "into", "small")
    explorer.control("add").click()
    explorer.until(
        lambda: explorer.part("concept").count() == rows + 1
        and len(explorer.strengths) == rows + 1,
        complaint="no second concept",
    )
    explorer.wait()
    end(explorer, "Home", which=rows)
    end(explorer, "End", which=rows)
    pictures(explorer, "voila_two_concepts")
    explorer.part("concept").nth(rows).locator(
        "button.tnb-remove, .tnb-remove button"
    ).first.click()
    explorer.until(
        lambda: explorer.part("concept").count() == rows and len(explorer.strengths) == rows,
        complaint="the concept stays",
    )
    explorer.wait()


def test_videos_run_in_step_and_pause(explorer):
    read = (
        "(images) => images.map((image) => ({state: image.getAnimations()[0]?.playState, time: "
        "image.getAnimations()[0]?.currentTime, place: getComputedStyle(image).objectPosition}))"
    )
    images = explorer.part("videos", "img")
    running = images.evaluate_all(read)
    assert {one["state"] for one in running} == {"running"}
    assert max(one["time"] for one in running) - min(
        one["time"] for one in running
    ) < 20, "the videos are out of step"
    explorer.control("play-button").click()
    explorer.until(
        lambda: {one["state"] for one in images.evaluate_all(read)} == {"paused"},
        complaint="nothing pauses",
    )
    places = [one["place"] for one in images.evaluate_all(read)]
    explorer.page.wait_for_timeout(700)
    assert [one["place"] for one in images.evaluate_all(read)] == places and len(set(places)) == 1
    explorer.control("play-button").click()
    explorer.until(
        lambda: {one["state"] for one in images.evaluate_all(read)} == {"running"},
        complaint="nothing plays again",
    )


def test_a_word_of_the_caption_opens_its_contrasts(explorer):
    words = explorer.root.locator("button.tnb-token")
    explorer.until(lambda: words.count() > 0, complaint="the VLM says nothing that can be clicked")
    for k in range(words.count()):
        if (said := words.nth(k).inner_text().strip()) in ("ball", "large", "red"): break
    else: raise AssertionError(f"none of the words can be explained: {words.all_inner_texts()}")
    words.nth(k).click()
    explorer.until(
        lambda: said
        in explorer.control("word", "select").evaluate(
            "(select) => select.selectedOptions[0].textContent"
        ),
        complaint=lambda: f"{said!r} was clicked, but the word is "
            f"{explorer.control('word', 'select').input_value()!r}",
    )
    choose(explorer, "word", "red")
    end(explorer, "Home")


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_captions_are_text(explorer, kind):
    field = explorer.control("caption", "input")
    before, shown = field.input_value(), explorer.strengths
    field.fill(HOSTILE[kind])
    explorer.until(
        lambda: explorer.part("problem").first.inner_text().strip(),
        complaint=f"no message about {kind}",
    )
    message = explorer.part("problem").first.inner_text().strip()
    assert "Traceback" not in message and len(message) < 500, message
    explorer.page.wait_for_timeout(500) # an image that fails to load would have said so by now
    assert explorer.page.evaluate("window.hacked") is None
    assert explorer.root.locator("img[src=x], script").count() == 0
    if kind == "markup":
        assert "<img" in message or "img" not in message, "the markup is not shown as it was typed"
    assert explorer.strengths == shown, "the last good video stays"
    pictures(explorer, f"voila_hostile_{kind}")
    field.fill(before)
    explorer.until(
        lambda: not explorer.part("problem").first.inner_text().strip(),
        complaint="the message stays",
    )
    explorer.wait()


def test_learning_shows_progress_lets_sliders_move_and_is_cancelled(explorer, voila):
    rows, shown, learning = explorer.part("concept").count(), len(
        explorer.strengths
    ), explorer.part("learning", "[data-state=learning]").first
    for _ in range(2): # cancelled, the bank is as before: asked again, it learns again
        choose(explorer, "word", UNSHIPPED[0])
        choose(explorer, "into", UNSHIPPED[1])
        explorer.control("add").click()
        explorer.until(
            learning.is_visible,
            complaint=lambda: f"no learning: {explorer.state}, {explorer.words}",
        )
        if _ == 0:
            pictures(explorer, "voila_learning")
        asked = explorer.press("Home" if _ else "End")
        explorer.until(
            lambda: abs(explorer.strengths[0] - asked) < 1e-6,
            complaint="the slider is frozen while a concept is learned",
        )
        assert learning.is_visible(), "the slider waited for the end of learning"
        explorer.control("cancel").click()
        explorer.until(lambda: not learning.is_visible(), complaint="learning goes on")
        explorer.wait()
        assert explorer.part("concept").count() == rows and len(explorer.strengths) == shown
        explorer.until(
            lambda: not [
                child for kernel in voila.kernels() for child in kernel.children(recursive=True)
            ],
            complaint="a process goes on learning what was cancelled",
        )
    pictures(explorer, "voila_cancelled")


def test_without_a_change_the_page_says_what_to_do(explorer):
    explorer.root.locator(".tnb-concept button.tnb-remove").first.click()
    explorer.wait("empty")
    assert (
        "Add this change" in explorer.words and explorer.strengths == []
        and not explorer.root.locator("img.tnb-steered").count()
    )
    pictures(explorer, "voila_empty")
    choose(explorer, "word", "red")
    choose(explorer, "into", "blue")
    explorer.control("add").click()
    explorer.wait()


def test_while_a_vlm_loads_nothing_can_be_chosen(explorer):
    menu = explorer.control("vlm", "select")
    menu.select_option(
        label=next(text for text in menu.locator("option").all_inner_texts() if "gemma3" in text)
    )
    explorer.wait("loading", "making", "ready")
    if explorer.state == "loading": pictures(explorer, "voila_loading")
    explorer.until(lambda: "gemma3" in explorer.words and explorer.state == "ready")
    menu.select_option(
        label=next(text for text in menu.locator("option").all_inner_texts() if "phi4" in text)
    )
    explorer.until(lambda: "phi4" in explorer.words and explorer.state == "ready")


def test_saving_and_the_line_that_makes_it_again(explorer):
    recipe = explorer.part("recipe").first.text_content()
    assert "papermill" in recipe and "Transporter" in recipe
    explorer.control("save").click()
    links = explorer.part("files", "a[download]")
    explorer.until(lambda: links.count() >= 3, complaint="nothing was saved")
    names = [link.get_attribute("download") for link in links.all()]
    assert {name.rsplit(".")[-1] for name in names} >= {"png", "gif", "mp4"}, names
    with explorer.page.expect_download() as download: links.first.click()
    assert download.value.path().stat().st_size > 100
    explorer.wait()


def test_the_certificate_is_asked_for(explorer):
    explorer.control("check").click()
    explorer.wait("making", "ready")
    explorer.wait()
    assert explorer.part("certificate").first.inner_text().strip()
    pictures(explorer, "voila_certificate")


def test_memory_is_bounded(explorer, voila):
    kernels, sizes = voila.kernels(), [] # this page's, and one that is kept warm and does nothing
    end(explorer)
    for k in range(60):
        asked = explorer.press("ArrowLeft" if k % 20 < 10 else "ArrowRight")
        explorer.until(
            lambda: abs(explorer.strengths[0] - asked) < 1e-6, complaint="a move is lost",
        )
        if k in (19, 59):
            sizes.append(
                sum(kernel.memory_info().rss for kernel in kernels if kernel.is_running()) / 2**20
            )
    explorer.wait()
    told = f"{sizes[0]:.0f} MiB became {sizes[1]:.0f} MiB in 40 moves along the same way"
    assert sizes[1] - sizes[0] < 50, told


def test_two_pages_do_not_disturb_each_other(explorer, context, voila):
    here = end(explorer)
    watch = Watch()
    other = open_voila(context, voila, watch)
    kernels = {kernel.pid for kernel in voila.kernels()}
    there = end(other, "Home")
    assert explorer.strengths[0] == here != there
    assert end(explorer, "ArrowLeft") != here and other.strengths[0] == there
    leave(other.page)
    explorer.until(
        lambda: kernels - {kernel.pid for kernel in voila.kernels()}, 20_000,
        "the kernel of a page that was left lives on",
    )
    assert not watch.unexpected()
