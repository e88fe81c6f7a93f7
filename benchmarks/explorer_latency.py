"""How fast the explorer follows: Voila in a real Chromium, from input event to painted picture.

    # about six minutes of two free cores; writes explorer_latency.json here
    python benchmarks/explorer_latency.py
    python benchmarks/explorer_latency.py --install     # the same, into figures/
    # fewer moves timed, and fewer in all: a try, nothing is written
    python benchmarks/explorer_latency.py 60 100

A move is a key on the slider or a click on its track; it ends when the page holds the clip of the
strength asked for, every image of it is decoded and a frame was painted after that. A clip counts
as cached where the page did not have to say "making" on the way. Each 50 moves the seed changes, so
that clips are made anew; the explorer makes the rest of a grid meanwhile, on the same cores."""
import argparse, json, os, random, sys, time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import CHROMIUM, OPENING, WIDTHS, Explorer, Watch, chromium, missing, serve_voila

# moves timed; moves in all; moves a seed; pages opened; seconds between moves, as of a hand;
# seconds until a page is warm again
TIMED, MOVES, EACH, OPENINGS, PAUSE, KEPT = 200, 500, 50, 5, .25, 15
SHIPPED = (
    ("ball", "ring"), ("large", "small"), ("slides", "bounces"), ("left", "right"),
    ("slowly", "quickly"), ("red", "blue"),
)
# learned alone, and learned while the slider moves
UNSHIPPED = (("ball", "cone"), ("slides", "climbs"))

# Runs in the page before its own scripts: when the controls were there, when the first steered clip
# was painted, and how long a move took
CLOCK = (
    r"""
(() => {
  const afterPaint = (done) => {
    const port = new MessageChannel()
    port.port1.onmessage = () => done(performance.now())
    port.port2.postMessage(0)
  }
  const painted = () => new Promise((done) => requestAnimationFrame(() => afterPaint(done)))
  const images = () => [...document.querySelectorAll(".tnb-explorer .tnb-videos img")]
  const decoded = () => Promise.all(images().map((image) => image.decode().catch(() => null)))
  const clock = window.clock = {root: null, first: null}

  const early = new MutationObserver(() => {
    const controls = document.querySelector(".tnb-explorer .tnb-caption input")
    if (controls) clock.root ??= performance.now()
    const steered = document.querySelector(".tnb-explorer .tnb-videos img.tnb-steered")
    if (!steered) return
    early.disconnect()
    decoded().then(painted).then((now) => { clock.first = now })
  })
  early.observe(document, {childList: true, subtree: true})

  window.arm = ({slider, strengths}) => {
    window.measured = new Promise((done) => {
      let began = null
      let made = false
      let ending = false
      const root = document.querySelector(".tnb-explorer")
      const handle = root.querySelectorAll(".tnb-strength .noUi-target")[slider ?? 0]
      const kinds = ["keydown", "pointerdown"]
      const asked = () => handle && [handle.noUiSlider.get(true)].flat()[0]
      const from = asked()
      // at the event itself the slider has not moved yet
      const input = (event) => {
        began ??= event.timeStamp
        setTimeout(look)
      }
      for (const kind of kinds) window.addEventListener(kind, input, {capture: true})

      const here = () => {
        const said = root.querySelector(".tnb-videos [data-strengths]")?.dataset.strengths
        if (strengths !== undefined) return said === strengths
        if (asked() === from || said === undefined) return false
        return Math.abs(Number(said.split(",")[slider]) - asked()) < 1e-6
      }
      const look = () => {
        if (began === null || ending) return
        const state = root.querySelector(".tnb-status [data-state]")?.dataset.state
        made ||= state === "making"
        if (!here()) return
        ending = true
        watch.disconnect()
        for (const kind of kinds) window.removeEventListener(kind, input, {capture: true})
        decoded().then(painted).then((now) => done({milliseconds: now - began, made}))
      }
      const watch = new MutationObserver(look)
      const attributeFilter = ["data-strengths", "data-state"]
      watch.observe(root, {childList: true, subtree: true, attributes: true, attributeFilter})
    })
  }
})()
"""
)


def timed(explorer:Explorer, act, **wanted) -> dict:
    """Milliseconds from the input event of `act` to the painted picture, and whether it had to be
    made"""
    explorer.page.evaluate("(wanted) => { window.arm(wanted) }", wanted)
    act()
    return explorer.page.evaluate(
        "() => Promise.race([window.measured, new Promise((done, failed) => setTimeout(() => "
        "failed(new Error('no picture within 90 s')), 90000))])"
    )


def open_page(context, server) -> tuple[Explorer, dict]:
    "A fresh page, and when it came to what (milliseconds since navigation)"
    page = context.new_page()
    watch = Watch()
    watch(page)
    page.add_init_script(CLOCK)
    page.goto(server.address, timeout=OPENING)
    page.wait_for_function("() => window.clock.first", timeout=OPENING)
    when = page.evaluate(
        "() => ({...window.clock, paint: "
        "performance.getEntriesByName('first-contentful-paint')[0].startTime})"
    )
    return Explorer(page).wait(), when | {"complaints": watch}


def stray(explorer:Explorer, chance:random.Random):
    "A step or a jump to elsewhere, by key or by mouse"
    now, track = explorer.asked(), explorer.part("strength", ".noUi-target").first
    low, top = track.evaluate(
        "(slider) => [slider.noUiSlider.options.range.min, slider.noUiSlider.options.range.max]"
    )
    if chance.random() < .5: # one step
        key = chance.choice(["ArrowLeft", "ArrowRight"])
        return lambda: explorer.handle("strength").press(
            "ArrowRight" if now <= low + 1e-6 else "ArrowLeft" if now >= top - 1e-6 else key
        )
    box = track.locator(".noUi-base").bounding_box()
    goal = chance.choice(
        [
            part
            for part in np.linspace(.03, .97, 12)
            if abs(part * (top - low) + low - now) > .1 * (top - low)
        ]
    )
    return lambda: explorer.page.mouse.click(
        box["x"] + box["width"] * goal, box["y"] + box["height"] / 2,
    )


def sow(explorer:Explorer, seed:int):
    "Another seed, until its first clip is there"
    before, field = explorer.steered, explorer.control("seed", "input")
    field.fill(str(seed))
    field.press("Enter")
    explorer.until(
        lambda: explorer.steered != before and explorer.state == "ready", 60_000,
        "no clip of another seed",
    )


def interval(values, of, seed:int=0) -> tuple[float, float]:
    "95 % bootstrap interval of a statistic"
    chance = np.random.default_rng(seed)
    drawn = [of(chance.choice(values, len(values))) for _ in range(2000)]
    return float(np.quantile(drawn, .025)), float(np.quantile(drawn, .975))


def fact(what:str, values, of=np.median, target=None, vlm="phi4") -> dict:
    "A row of the scorecard: less is better everywhere here"
    values = [float(value) for value in values]
    low, high = interval(values, of) if len(values) > 2 else (None, None)
    return {
        "what": what, "vlm": vlm, "value": float(of(values)) if values else None, "target": target,
        "better": "lower", "n": len(values), "low": low, "high": high,
    }


def p95(values) -> float: return float(np.quantile(values, .95))


def heap(explorer:Explorer) -> float:
    "MiB of the page's own objects, garbage taken out"
    session = explorer.page.context.new_cdp_session(explorer.page)
    session.send("HeapProfiler.collectGarbage")
    session.send("Performance.enable")
    used = {
        metric["name"]: metric["value"]
        for metric in session.send("Performance.getMetrics")["metrics"]
    }["JSHeapUsedSize"]
    session.detach()
    return used / 2**20


def resident(server) -> float:
    return max(kernel.memory_info().rss for kernel in server.kernels()) / 2**20


def explain_shipped(explorer:Explorer) -> list[float]:
    """Seconds from the click that asks for a shipped concept to its picture, one change after the
    other"""
    seconds = []
    for word, other in SHIPPED:
        explorer.root.locator("button.tnb-remove").first.click()
        explorer.until(
            lambda: explorer.part("concept").count() == 0 and explorer.strengths == [], 30_000,
            "a change stays",
        )
        choose(explorer, word, other)
        seconds.append(
            timed(explorer, lambda: explorer.control("add").click(), strengths="1")["milliseconds"]
            / 1000
        )
        explorer.wait()
    return seconds


def choose(explorer:Explorer, word:str, other:str):
    "Set the two menus of a change"
    for name, text in (("word", word), ("into", other)):
        select = explorer.control(name, "select")
        explorer.until(
            lambda: any(text in option for option in select.locator("option").all_inner_texts()),
            complaint=f"{text} is not offered",
        )
        select.select_option(
            index=next(
                k
                for k, option in enumerate(select.locator("option").all_inner_texts())
                if text in option
            )
        )


def learn(
    explorer:Explorer, pair:tuple[str, str], chance:random.Random|None=None,
) -> tuple[float, list[dict]]:
    """Seconds until a concept that is not shipped is learned and shown, and how the first slider
    answers meanwhile if somebody moves it"""
    rows, moves = explorer.part("concept").count(), []
    choose(explorer, *pair)
    began = time.monotonic()
    explorer.control("add").click()
    explorer.until(
        lambda: explorer.part("learning").first.is_visible(), complaint="nothing is learned",
    )
    while explorer.part("concept").count() == rows:
        if time.monotonic() - began > 300: raise TimeoutError("not learned within 300 s")
        if chance: moves.append(timed(explorer, stray(explorer, chance), slider=0))
        explorer.page.wait_for_timeout(1000 * PAUSE)
    explorer.until(
        lambda: len(explorer.strengths) == rows + 1 and explorer.state == "ready", 60_000,
        "learned, but not shown",
    )
    return time.monotonic() - began, moves


def measure(timed_moves:int, all_moves:int) -> dict:
    "All rows"
    import tempfile
    from playwright.sync_api import sync_playwright
    chance = random.Random(0)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        server = serve_voila(Path(folder) / "voila")
        try:
            context = play.chromium.launch_persistent_context(
                f"{folder}/user", executable_path=chromium(), headless=True, args=list(CHROMIUM),
                viewport=dict(zip(("width", "height"), WIDTHS["desk"])),
            )
            openings = []
            for k in range(OPENINGS):
                if k:
                    explorer.page.close(run_before_unload=True)
                    time.sleep(KEPT)
                explorer, when = open_page(context, server)
                openings.append(when)
                print(
                    f"opening {k}: first paint {when['paint']:.0f} ms, controls {when['root']:.0f} "
                    f"ms, first explanation {when['first']:.0f} ms",
                    flush=True,
                )
            before, moves = (resident(server), heap(explorer)), []
            for k in range(all_moves):
                if k and k % EACH == 0: sow(explorer, k // EACH)
                move = timed(explorer, stray(explorer, chance), slider=0)
                if k < timed_moves: moves.append(move)
                explorer.page.wait_for_timeout(1000 * PAUSE)
                if (k + 1) % EACH == 0:
                    print(
                        f"{k + 1} moves: median "
                        f"{np.median([one['milliseconds'] for one in moves]):.0f} ms, kernel "
                        f"{resident(server):.0f} MiB",
                        flush=True,
                    )
            explorer.wait()
            after = (resident(server), heap(explorer))
            asked = explain_shipped(explorer)
            print("shipped concepts:", [f"{one:.2f} s" for one in asked], flush=True)
            learning, _ = learn(explorer, UNSHIPPED[0])
            print(f"learned in {learning:.1f} s", flush=True)
            moving, meanwhile = learn(explorer, UNSHIPPED[1], chance)
            print(f"learned in {moving:.1f} s with {len(meanwhile)} moves meanwhile", flush=True)
            complaints = openings[-1]["complaints"].unexpected()
            context.close()
        finally: server.stop()
    def spent(which): return [move["milliseconds"] for move in which]
    cached, made = [[move for move in moves if move["made"] == flag] for flag in (False, True)]
    rows = [
        fact("slider to new video, cached, milliseconds, median", spent(cached), target=300),
        fact("slider to new video, cached, milliseconds, 95th percentile", spent(cached), p95),
        fact("slider to new video, not cached, milliseconds, median", spent(made)),
        fact("slider to new video, not cached, milliseconds, 95th percentile", spent(made), p95),
        fact("slider to new video, all moves, milliseconds, median", spent(moves), target=300),
        fact("slider to new video, all moves, milliseconds, 95th percentile", spent(moves), p95),
        fact(
            "page opened: first paint, seconds since navigation",
            [when["paint"] / 1000 for when in openings],
        ),
        fact(
            "page opened: first explanation, seconds since navigation, one page kept warm",
            [when["first"] / 1000 for when in openings[1:]], target=3,
        ),
        fact(
            "page opened: first explanation, seconds since navigation, as soon as the server has "
            "an address",
            [openings[0]["first"] / 1000],
        ),
        fact("explanation with a shipped concept asked for on the page, seconds", asked, target=3),
        fact("concept that is not shipped, learned and shown, seconds", [learning], target=60),
        fact(
            "concept that is not shipped, learned and shown while the slider never rests, seconds",
            [moving],
        ),
        fact(
            "slider to new video while a concept is learned, milliseconds, median",
            spent(meanwhile), target=300,
        ),
        fact(
            "slider to new video while a concept is learned, milliseconds, 95th percentile",
            spent(meanwhile), p95,
        ),
        fact("kernel, resident MiB, before any move", [before[0]]),
        fact(
            f"kernel, resident MiB more after {all_moves} moves", [after[0] - before[0]],
            target=256,
        ),
        fact("page, MiB of JavaScript objects, before any move", [before[1]]),
        fact(
            f"page, MiB of JavaScript objects more after {all_moves} moves", [after[1] - before[1]],
            target=32,
        ),
    ]
    return {
        "rows": [row for row in rows if row["n"]],
        "moves": [
            {"milliseconds": round(move["milliseconds"], 1), "made": move["made"]} for move in moves
        ],
        "complaints": complaints, "cores": os.cpu_count(), "load_before": load,
        "targets": "300 ms, 3 s and 60 s are the explorer's promise; memory: two of its 128 MiB "
            "caches of clips, and 32 MiB (chosen)",
    }


def main():
    if why := missing(): sys.exit(f"No browser, no measurement: {why}")
    from transporter_nb.evaluate.results import figure_stem, save_record
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "numbers", nargs="*", type=int, help="moves timed, and moves in all, of a try",
    )
    parser.add_argument(
        "--install", action="store_true", help="put the record in the place of the shipped one",
    )
    given = parser.parse_args()
    if given.numbers and (given.install or len(given.numbers) != 2):
        parser.error(
            f"a try takes two numbers and writes nothing, got {given.numbers}. Leave out --install."
        )
    stem = None if given.numbers else figure_stem("explorer_latency", {}, {}, given.install)
    report = measure(*(given.numbers or (TIMED, MOVES)))
    for row in report["rows"]:
        print(
            f"{row['what']:90s} {row['value']:9.2f}  n = {row['n']}"
            + (f"   target {row['target']:g}" if row["target"] else "")
        )
    if stem: print(save_record(stem, report))


if __name__ == "__main__": main()
