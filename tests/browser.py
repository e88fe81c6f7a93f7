"""A real browser for the tests of the explorer: Chromium by Playwright, against a Voila and a
JupyterLab on this machine that end with the session."""
import contextlib, ctypes, os, re, shutil, signal, socket, subprocess, sys, time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "runs" / "explorer"
# pixels: the two widths that the explorer promises
WIDTHS = {"desk": (1280, 900), "tablet": (820, 1100)}
NOTEBOOK = Path(os.environ.get("EXPLORER_NOTEBOOK", ROOT / "nbs" / "explorer.ipynb"))
# milliseconds until a test gives up: many times what two busy cores need; nothing waits longer than
# it must
OPENING, PATIENCE = 300_000, 120_000
# nothing but this machine has an address
CHROMIUM = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions", "--mute-audio",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)

# What a page may say without failing a test: pattern, and whose it is
ALLOWED = ()


def chromium() -> str | None:
    "Path of a Chromium of this machine, if there is one"
    named = os.environ.get("EXPLORER_CHROMIUM")
    return named or next(
        (
            path
            for name in ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
            if (path := shutil.which(name))
        ),
        None,
    )


def missing() -> str:
    "Why no browser test can run here, in words; empty where one can"
    if not NOTEBOOK.exists(): return f"{NOTEBOOK.name} does not exist"
    if not chromium():
        return (
            "no chromium on this machine: apt-get install chromium, or name one in "
            "EXPLORER_CHROMIUM"
        )
    try: import playwright.sync_api, voila # noqa: F401
    except ImportError as error: return f"{error.name} is not installed: make setup"
    return ""


def free_port() -> int:
    "A port of 127.0.0.1 that nobody listens on"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def fresh_environment(home: Path) -> dict[str, str]:
    "Environment in which Jupyter finds no setting, history or server of this machine's user"
    home.mkdir(parents=True, exist_ok=True)
    own = {
        name: str(home / name.lower())
        for name
        in (
            "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
            "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR",
        )
    }
    dropped = {
        "JUPYTER_TOKEN", "JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "BROWSER", "DISPLAY", "MAKEFLAGS",
        "MAKELEVEL", "MFLAGS", "PYTEST_CURRENT_TEST", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy",
        "https_proxy", "all_proxy", "ALL_PROXY",
    }
    return {
        **{name: value for name, value in os.environ.items() if name not in dropped}, **own,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1",
    }


@dataclass
class Server:
    "A running Voila or JupyterLab, and the address with its token"
    process: subprocess.Popen
    log: Path
    address: str = ""

    @property
    def base(self) -> str: return "{0.scheme}://{0.netloc}".format(urlsplit(self.address))

    @property
    def token(self) -> str: return self.address.partition("token=")[2]

    def kernels(self) -> list[psutil.Process]:
        "Kernel processes of this server, oldest first"
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ipykernel_launcher" in " ".join(child.cmdline()): found.append(child)
        return sorted(found, key=lambda kernel: kernel.create_time())

    def stop(self):
        "End the server, then whatever of its group is left"
        family = [
            psutil.Process(self.process.pid),
            *psutil.Process(self.process.pid).children(recursive=True),
        ] if self.process.poll() is None else []
        with contextlib.suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGTERM)
        gone, left = psutil.wait_procs(family, timeout=10)
        for process in left:
            with contextlib.suppress(psutil.Error): process.kill()
        self.process.wait(10)


def end_with_us():
    "Runs in a new server: ask the system to end it when whoever started it is gone, killed or not"
    # 1: PR_SET_PDEATHSIG of <linux/prctl.h>
    if sys.platform == "linux": ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def serve(
    command:list[str], # What starts the server
    home:Path, # Folder for its settings, log and runtime files; made when missing
    says:str, # Pattern of the address in what it prints; the first group is the address
    seconds:float=240.,
    **environment, # Added to the fresh environment
) -> Server:
    "Start a server and wait until it prints its address"
    surroundings = {**fresh_environment(home), **environment}
    log = home / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=surroundings, stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_us,
        )
    server, until = Server(process, log), time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        found = re.search(says, log.read_text())
        if found:
            server.address = found.group(1)
            return server
        time.sleep(.1)
    if process.poll() is None: server.stop()
    raise RuntimeError(
        f"{command[0]} printed no address in {seconds:g} s:\n{log.read_text()[-3000:]}"
    )


def serve_voila(home:Path, notebook:Path=NOTEBOOK, port:int|None=None, **environment) -> Server:
    """`make explorer`, as a user types it; the environment is there already, so make does not look
    at it again"""
    return serve(
        [
            "make", "--no-print-directory", "-o", ".venv/.ready", "explorer",
            f"PORT={port or free_port()}", f"EXPLORER={notebook}",
        ],
        home, r"(http://127\.0\.0\.1:\d+/\?token=\w+)", **environment,
    )


def serve_lab(home:Path, notebook:Path=NOTEBOOK, **environment) -> Server:
    "JupyterLab on a folder that holds a copy of the notebook: what a test saves there is nobody's"
    (home / "work").mkdir(parents=True, exist_ok=True)
    copy = home / "work" / "explorer.ipynb"
    shutil.copy(notebook, copy)
    options = [
        "--no-browser", "--ip=127.0.0.1", f"--port={free_port()}",
        f"--ServerApp.root_dir={copy.parent}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]
    (home / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension").mkdir(
        parents=True, exist_ok=True,
    )
    (
        home / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
        / "notification.jupyterlab-settings"
    ).write_text('{"fetchNews": "false", "checkForUpdates": false}')
    root = ["--allow-root"] * (hasattr(os, "geteuid") and os.geteuid() == 0)
    return serve(
        [sys.executable, "-m", "jupyterlab", *options, *root], home,
        r"(http://127\.0\.0\.1:\d+/lab\?token=\w+)", **environment,
    )


@dataclass
class Watch:
    "What a page complained of, and whom it asked beside this machine"
    complaints: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list) # Patterns that one test expects

    def __call__(self, page):
        "Listen to a page"
        page.on(
            "console",
            lambda message: self.note(
                f"console: {message.text} ({message.location.get('url', '')})"
            ) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: self.note(f"page error: {error}"))
        page.on(
            "request",
            lambda request: self.note(f"request to another host: {request.url[:200]}")
            if elsewhere(request.url) else None,
        )
        page.on(
            "websocket",
            lambda socket: self.note(f"socket to another host: {socket.url[:200]}")
            if elsewhere(socket.url) else None,
        )
        return page

    def note(self, complaint:str): self.complaints.append(complaint)

    def unexpected(self) -> list[str]:
        "Complaints that no allowance covers"
        return [
            complaint
            for complaint in self.complaints
            if not any(
                re.search(pattern, complaint)
                for pattern in (*[allowed for allowed, _ in ALLOWED], *self.allowed)
            )
        ]


def elsewhere(url:str) -> bool:
    "Whether an address leaves this machine"
    parts = urlsplit(url)
    return parts.scheme not in (
        "data", "blob", "about", "chrome", "chrome-error",
    ) and parts.hostname != "127.0.0.1"


def picture(page, name:str):
    "Keep a screenshot of the whole page in `runs/explorer/`"
    PICTURES.mkdir(parents=True, exist_ok=True)
    size = page.viewport_size
    hidden = page.evaluate(
        "() => Math.max(0, ...[...document.querySelectorAll('*')].filter((node) => ['auto', "
        "'scroll'].includes(getComputedStyle(node).overflowY)).map((node) => node.scrollHeight - "
        "node.clientHeight))"
    )
    # Voila and JupyterLab scroll inside themselves
    page.set_viewport_size(
        {"width": size["width"], "height": min(size["height"] + hidden + 20 * (hidden > 0), 5000)}
    )
    page.wait_for_timeout(200)
    page.screenshot(path=PICTURES / f"{name}.png", animations="allow")
    page.set_viewport_size(size)


def pictures(explorer, name:str):
    """Keep a state of the explorer at each width, and make sure that nothing in it overlaps or is
    cut"""
    before = explorer.page.viewport_size
    try:
        for width, size in WIDTHS.items():
            explorer.page.set_viewport_size(dict(zip(("width", "height"), size)))
            picture(explorer.page, f"{name}_{width}")
            assert not (found := explorer.crowded()), f"{name} at {width}:\n" + "\n".join(found)
    finally: explorer.page.set_viewport_size(before)


# Visible text that is cut, siblings that lie on each other, a page that scrolls sideways. In the
# page's own words: tag, classes and text.
CROWDED = (
    r"""
(root) => {
  const name = (node) => {
    const classes = [...node.classList].join(".")
    const text = (node.textContent || "").trim().slice(0, 40)
    return `${node.tagName.toLowerCase()}.${classes} "${text}"`
  }
  const style = (node) => getComputedStyle(node)
  const box = (node) => node.getBoundingClientRect()
  const hides = (overflow) => ["hidden", "clip"].includes(overflow)
  const scrolls = (overflow) => ["auto", "scroll"].includes(overflow)
  const inline = (node) => style(node).display === "inline"
  const seen = (node) => {
    const {width, height} = box(node)
    return width > 1 && height > 1
      && node.checkVisibility({opacityProperty: true, visibilityProperty: true})
      && style(node).clipPath === "none"
  }
  const floats = (node) =>
    ["absolute", "fixed"].includes(style(node).position) || node.closest(".noUi-target, svg")
  const writes = (child) => child.nodeType === Node.TEXT_NODE && child.textContent.trim()
  const own = (node) => [...node.childNodes].some(writes)
  const found = []
  const cut = (node, needs, has, side) => {
    found.push(`cut: ${name(node)} needs ${needs} px of ${side}, has ${has}`)
  }

  const all = [...root.querySelectorAll("*")].filter(seen)
  for (const node of all) {
    const {overflowX, overflowY} = style(node)
    const holdsText = own(node) || node.tagName === "BUTTON"
    if (holdsText && !scrolls(overflowX) && !node.closest("svg") && !inline(node)) {
      const {scrollWidth, clientWidth, scrollHeight, clientHeight} = node
      if (scrollWidth > clientWidth + 1) cut(node, scrollWidth, clientWidth, "width")
      if (hides(overflowY) && scrollHeight > clientHeight + 2)
        cut(node, scrollHeight, clientHeight, "height")
    }

    if (node.tagName === "SELECT") {
      const text = document.createElement("span")
      const font = `font: ${style(node).font}`
      text.style.cssText = `${font}; position: absolute; visibility: hidden; white-space: pre`
      text.textContent = node.selectedOptions[0]?.textContent ?? ""
      document.body.append(text)
      const [needs, has] = [text.offsetWidth, node.clientWidth]
      const which = `chosen "${text.textContent}" of ${name(node).slice(0, 40)}`
      if (needs > has + 1) found.push(`cut: ${which} needs ${needs} px, has ${has}`)
      text.remove()
    }

    const laid = (child) => seen(child) && !floats(child) && !inline(child)
    const children = [...node.children].filter(laid)
    for (const [i, a] of children.entries()) {
      for (const b of children.slice(i + 1)) {
        const [p, q] = [box(a), box(b)]
        const across = Math.min(p.right, q.right) - Math.max(p.left, q.left)
        const down = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top)
        const size = `${Math.round(across)} x ${Math.round(down)} px`
        if (across > 2 && down > 2) found.push(`overlap of ${size}: ${name(a)} and ${name(b)}`)
      }
    }

    const frame = clip(node)
    const edge = frame ? box(frame).right : innerWidth
    const {right} = box(node)
    if (right > edge + 1 && !node.closest("svg, .noUi-target")) {
      const where = `${Math.round(right)} of ${Math.round(edge)} px`
      found.push(`cut at the right: ${name(node)} ends at ${where}`)
    }
  }

  // The nearest box around a node that cuts it off; the document where one can scroll to it
  function clip(node) {
    while ((node = node.parentElement)) {
      const {overflowX} = style(node)
      if (hides(overflowX)) return node
      if (scrolls(overflowX)) {
        const reachable = node.scrollWidth > node.clientWidth + 1 && root.contains(node)
        return reachable ? document.documentElement : node
      }
    }
    return null
  }

  const panels = document.querySelectorAll(".jp-WindowedPanel-outer")
  for (const page of [document.scrollingElement, document.body, ...panels]) {
    const {scrollWidth, clientWidth} = page
    if (scrollWidth > clientWidth + 1)
      found.push(`the page scrolls sideways: ${scrollWidth} px in ${clientWidth}`)
  }
  return [...new Set(found)].slice(0, 30)
}
"""
)

# Controls below a root that keyboard and screen readers must reach: what they are, and the name
# that is read out
NAMELESS = (
    r"""
(root) => {
  const word = (id) => document.getElementById(id)?.textContent ?? ""
  const words = (ids) => ids.split(/\s+/).map(word).join(" ")
  const labels = (node) => [...(node.labels || [])].map((label) => label.textContent).join(" ")
  const speaks = (node) => ["BUTTON", "A", "SUMMARY"].includes(node.tagName)
  const named = (node) => {
    const name = node.getAttribute("aria-label")
      || words(node.getAttribute("aria-labelledby") || "")
      || labels(node)
      || (speaks(node) ? node.textContent : "")
      || node.title
      || ""
    return name.trim()
  }

  const offered = (node) =>
    node.checkVisibility({visibilityProperty: true}) && !node.disabled && node.type !== "hidden"
  const kinds =
    "button, select, input, textarea, a[href], summary, [role=slider], [tabindex]"
  const controls = [...root.querySelectorAll(kinds)].filter(offered)

  return controls.map((node) => {
    const tag = node.tagName.toLowerCase()
    const around = [...(node.closest("[class*=tnb-]")?.classList ?? [])]
    const parts = around.filter((part) => part.startsWith("tnb-"))
    return {
      what: `${tag}.${[...node.classList, ...parts].join(".")}`,
      role: node.getAttribute("role") || tag,
      name: named(node),
      tab: node.tabIndex,
    }
  })
}
"""
)


class Explorer:
    "The explorer on a page, through the hooks it offers: classes and `data-` attributes"
    def __init__(self, page, root:str=".tnb-explorer"):
        self.page, self.root = page, page.locator(root).first

    def part(self, name:str, inside:str=""):
        "A part by its class: `part('strength', '[role=slider]')`"
        return self.root.locator(f".tnb-{name} {inside}" if inside else f".tnb-{name}")

    def control(self, name:str, tag:str="button"):
        "The element that takes clicks and keys: the one with the class, or the first such within"
        return self.root.locator(f"{tag}.tnb-{name}, .tnb-{name} {tag}").first

    def handle(self, name:str, which:int=0): return self.part(name, "[role=slider]").nth(which)

    @property
    def state(self) -> str:
        return self.part("status", "[data-state]").first.get_attribute("data-state") or ""

    @property
    def words(self) -> str: return self.part("status").first.inner_text().strip()

    @property
    def strengths(self) -> list[float]:
        "Strengths of the video on screen, one a concept"
        return [
            float(number)
            for number
            in (
                self.part("videos", "[data-strengths]").first.get_attribute("data-strengths") or ""
            ).split(",")
            if number
        ]

    @property
    def steered(self) -> str:
        return self.part("videos", "img.tnb-steered").first.get_attribute("src")

    def wait(self, *states:str, timeout:float=PATIENCE) -> "Explorer":
        "Until the status says one of these"
        self.until(
            lambda: self.state in (states or ("ready",)), timeout,
            lambda: f"the explorer stays {self.state!r}: {self.words!r}, instead of "
                f"{states or ('ready',)}",
        )
        return self

    def until(self, holds, timeout:float=PATIENCE, complaint=lambda: "it does not come to pass"):
        "Until a condition read from the page holds"
        began = time.monotonic()
        while not holds():
            if time.monotonic() - began > timeout / 1000:
                raise AssertionError(complaint() if callable(complaint) else complaint)
            self.page.wait_for_timeout(50)

    def asked(self, name:str="strength", which:int=0) -> float:
        "The number a slider stands at; `aria-valuenow` has only one decimal"
        return float(
            self.part(name, ".noUi-target").nth(which).evaluate(
                "(slider) => [slider.noUiSlider.get(true)].flat()[0]"
            )
        )

    def press(self, key:str, name:str="strength", which:int=0) -> float:
        "A key on a slider's handle; the number it then asks for"
        self.handle(name, which).press(key)
        return self.asked(name, which)

    def shown(self, which:int, strength:float, timeout:float=PATIENCE) -> "Explorer":
        """Until the video on screen has this strength for one concept, and nothing else is being
        made"""
        self.until(
            lambda: len(self.strengths) > which and abs(self.strengths[which] - strength) < 1e-6
            and self.state == "ready",
            timeout,
            lambda: f"strength {strength} was asked of concept {which}; on screen are "
                f"{self.strengths}, {self.state}: {self.words}",
        )
        return self

    def crowded(self) -> list[str]: return self.root.evaluate(CROWDED)

    def controls(self) -> list[dict]: return self.root.evaluate(NAMELESS)
