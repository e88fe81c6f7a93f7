"""Links that lead nowhere: python .ci/links.py [SITE]

Without SITE the sources: Markdown files and the Markdown cells of notebooks. With SITE a built
site: links, anchors, pictures, and whatever a page would load from another host by itself. Links
to other hosts are not followed.
"""
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", re.DOTALL)
LOADS = {  # tag -> attributes that a browser follows by itself
    "img": ("src", "srcset"), "source": ("src", "srcset"), "video": ("src", "poster"),
    "audio": ("src",), "script": ("src",), "iframe": ("src",), "embed": ("src",),
    "input": ("src",), "object": ("data",),
    "image": ("href", "xlink:href"), "use": ("href", "xlink:href"),
}
LISTED = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
CSS_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


def is_elsewhere(target: str) -> bool:
    return bool(urlsplit(target).scheme or urlsplit(target).netloc)


# Sources

@cache
def kept_files() -> set[Path]:
    """What a clone will hold: everything that git does not ignore"""
    listed = subprocess.run(LISTED, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # not a clone
        return {path for path in ROOT.rglob("*") if path.is_file()}
    return {ROOT / name for name in listed.stdout.split("\0") if name}


@cache
def kept_folders() -> set[Path]:
    return {folder for path in kept_files() for folder in path.parents}


@cache
def prose(path: Path) -> str:
    """The Markdown of a file, without code and formulas"""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    def without(match):  # a heading keeps the words of its code
        return "" if match[0].startswith("```") else re.sub(r"[\[\]()]", "", match[0])
    return CODE.sub(without, text)


@cache
def anchors(path: Path) -> set[str]:
    """What a `#` may lead to: headings as GitHub spells them"""
    headings = re.findall(r"^#{1,6}\s+(.+?)\s*$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_in(path: Path) -> Iterator[str]:
    for target in LINK.findall(prose(path)):
        if is_elsewhere(target): continue
        place, _, anchor = unquote(target).partition("#")
        found = (path.parent / place).resolve() if place else path
        if found not in kept_files() | kept_folders():
            yield f"{path.relative_to(ROOT)}: {target} does not exist, or git ignores it"
        elif anchor and found.suffix in (".md", ".ipynb") and anchor not in anchors(found):
            yield f"{path.relative_to(ROOT)}: {target} has no such heading"


def broken_sources() -> list[str]:
    sources = sorted(path for path in kept_files() if path.suffix in (".md", ".ipynb"))
    return [line for path in sources if path.exists() for line in broken_in(path)]


# A built site

def styles_of(css: str) -> list[str]:
    """What a style sheet loads"""
    return [first or second for first, second in CSS_URL.findall(css)]


def from_elsewhere(targets: list[str]) -> list[str]:
    return [target for target in targets if is_elsewhere(target) and not target.startswith("data:")]


class Page(HTMLParser):
    """Anchors of a page, its links, and what it loads by itself"""

    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.links, self.loaded = {"", "top"}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag in ("a", "link") and "href" in given:
            named = {"canonical", "alternate"} & set(given.get("rel", "").split())
            (self.links if tag == "a" or named else self.loaded).append(given["href"])
        for name in LOADS.get(tag, ()):
            value = given.get(name, "")
            parts = value.split(",") if name == "srcset" else [value]
            self.loaded += [part.split()[0] for part in parts if part.strip()]
        self.loaded += styles_of(given.get("style", ""))


def broken_link(target: str, path: Path, pages: dict[Path, Page]) -> str:
    """Why a link of the page at `path` is broken; empty where it is not"""
    place, anchor = unquote(urlsplit(target).path), unquote(urlsplit(target).fragment)
    there = (path.parent / place).resolve() if place else path
    if there.is_dir(): there /= "index.html"
    if not there.is_file(): return f"{target} does not exist"
    if there in pages and anchor not in pages[there].anchors: return f"{target} has no such anchor"
    return ""


def broken_site(site: Path) -> list[str]:
    site, found = site.resolve(), []
    paths = sorted(site.rglob("*.html"))
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in paths}
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name} loads {target}" for target in from_elsewhere(page.loaded)]
        inside = sorted({target for target in page.links + page.loaded if not is_elsewhere(target)})
        reasons = [broken_link(target, path, pages) for target in inside]
        found += [f"{name}: {reason}" for reason in reasons if reason]
    for path in sorted(site.rglob("*.css")):
        targets = from_elsewhere(styles_of(path.read_text(encoding="utf-8")))
        found += [f"{path.relative_to(site)} loads {target}" for target in targets]
    return found


if __name__ == "__main__":
    problems = broken_site(Path(sys.argv[1])) if sys.argv[1:] else broken_sources()
    print(*problems, sep="\n")
    sys.exit(f"{len(problems)} links lead nowhere or to another host." if problems else 0)
