"""Links that lead nowhere: python .ci/links.py [SITE]

Without SITE the sources: Markdown files and the Markdown cells of notebooks. With SITE a built site: links, anchors,
pictures, and whatever a page would load from another host by itself. Links to other hosts are not followed.
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
LOADS = {"img": ("src", "srcset"), "script": ("src",), "iframe": ("src",), "source": ("src", "srcset"), "video": ("src", "poster"),
         "audio": ("src",), "embed": ("src",), "object": ("data",), "input": ("src",), "image": ("href", "xlink:href"), "use": ("href", "xlink:href")}
CSS_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


def is_elsewhere(target: str) -> bool:
    return bool(urlsplit(target).scheme or urlsplit(target).netloc)


# Sources

@cache
def kept_files() -> set[Path]:
    """What a clone will hold: everything that git does not ignore"""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: return {path for path in ROOT.rglob("*") if path.is_file()}  # not a clone
    return {ROOT / name for name in listed.stdout.split("\0") if name}


@cache
def prose(path: Path) -> str:
    """The Markdown of a file, without code and formulas"""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return CODE.sub(lambda match: "" if match[0].startswith("```") else re.sub(r"[\[\]()]", "", match[0]), text)


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
        if found not in kept_files() and not (found.is_dir() and any(found in kept.parents for kept in kept_files())):
            yield f"{path.relative_to(ROOT)}: {target} does not exist, or git ignores it"
        elif anchor and found.suffix in (".md", ".ipynb") and anchor not in anchors(found):
            yield f"{path.relative_to(ROOT)}: {target} has no such heading"


def broken_sources() -> list[str]:
    sources = sorted(path for path in kept_files() if path.suffix in (".md", ".ipynb") and path.exists())
    return [line for path in sources for line in broken_in(path)]


# A built site

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
            styles = tag == "link" and not {"canonical", "alternate"} & set(given.get("rel", "").split())
            (self.loaded if styles else self.links).append(given["href"])
        for name in LOADS.get(tag, ()):
            parts = given.get(name, "").split(",") if name == "srcset" else [given.get(name, "")]
            self.loaded += [part.split()[0] for part in parts if part.strip()]
        self.loaded += [first or second for first, second in CSS_URL.findall(given.get("style", ""))]


def broken_site(site: Path) -> list[str]:
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name} loads {target}" for target in page.loaded if is_elsewhere(target) and urlsplit(target).scheme != "data"]
        for target in {*page.links, *page.loaded}:
            if is_elsewhere(target): continue
            place, anchor = unquote(urlsplit(target).path), unquote(urlsplit(target).fragment)
            there = (path.parent / place).resolve() if place else path
            if there.is_dir(): there /= "index.html"
            if not there.is_file(): found.append(f"{name}: {target} does not exist")
            elif there in pages and anchor not in pages[there].anchors: found.append(f"{name}: {target} has no such anchor")
    for path in site.rglob("*.css"):
        targets = [first or second for first, second in CSS_URL.findall(path.read_text(encoding="utf-8"))]
        found += [f"{path.relative_to(site)} loads {target}" for target in targets if is_elsewhere(target) and urlsplit(target).scheme != "data"]
    return found


if __name__ == "__main__":
    problems = broken_site(Path(sys.argv[1])) if sys.argv[1:] else broken_sources()
    print(*problems, sep="\n")
    sys.exit(f"{len(problems)} links lead nowhere or to another host." if problems else 0)
