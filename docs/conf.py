"""The documentation site, built by `make docs` from the notebooks: no Quarto, nothing is run.

Sphinx with myst-nb: it reads notebooks with their stored outputs, has a search that needs no
server and an index of every function, and checks its links while it builds. mkdocs-jupyter with
Material does most of this too, but it has no directive for a signature, and its formulas want a
script from another host. Formulas become MathML here: browsers draw it without a script.
"""
import configparser
import re
import sys
import unicodedata
from html import escape
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))  # `notebooks`, which turns a notebook into a page
logger = logging.getLogger(__name__)
# of ziamath only the font is used: a browser stretches brackets in a mathematical font only
MATH_FONT = Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
settings.read(ROOT / "settings.ini", encoding="utf-8")
about = settings["DEFAULT"]

project, release = about["lib_name"], about["version"]
author, copyright = about["author"], about["copyright"]
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "nbs/**.ipynb", "README.md", "CHANGELOG.md"]
exclude_patterns = [
    ".*", "_*", "**/.ipynb_checkpoints", "**/_*",
    project, "tests", "figures", "benchmarks", "runs", "build",  # not searched for pages
]

nb_execution_mode = "off"
nb_custom_formats = {".ipynb": ["notebooks.read", {}, False]}
nb_mime_priority_overrides = [
    ("html", "image/gif", 15),
    ("html", "application/vnd.jupyter.widget-view+json", None),
]
nb_ipywidgets_js = {}  # no page shows a live widget, whose scripts lie on another host
nb_code_prompt_show, nb_code_prompt_hide = "Code", "Hide the code"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "fieldlist"]
myst_dmath_double_inline = True  # our displayed formulas stand inside paragraphs
myst_dmath_allow_labels = False
myst_heading_anchors = 3
add_module_names = False
toc_object_entries = False
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = project
html_static_path = ["site.css", str(MATH_FONT)]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "friendly", "native"


ALPHABETS = {
    "script": "SCRIPT CAPITAL {}",
    "double-struck": "DOUBLE-STRUCK CAPITAL {}",
    "bold": "BOLD CAPITAL {}",
}
STYLED = re.compile(rf'<mi mathvariant="({"|".join(ALPHABETS)})">([A-Z])</mi>')


def styled(match: re.Match) -> str:
    """A script, double-struck or bold letter as a character of its own.

    Browsers ignore the attribute that latex2mathml writes.
    """
    name = ALPHABETS[match[1]].format(match[2])
    for known in ("MATHEMATICAL " + name, name):  # Unicode calls some of them without the prefix
        try: return f"<mi>{unicodedata.lookup(known)}</mi>"
        except KeyError: pass
    return match[0]


def mathml(formula: str, display: str) -> str:
    """A formula of LaTeX as MathML; `\\tag` becomes a number at its right"""
    formula = re.sub(r"\\tag\{(.*?)\}", r"\\qquad(\1)", formula)
    drawn = STYLED.sub(styled, convert(formula, display=display))
    drawn = re.sub(r"<mo[^>]*>\\[lr]Vert</mo>", '<mo stretchy="false">‖</mo>', drawn)
    drawn = re.sub(r">\\([{}])<", r">\1<", drawn)
    unknown = re.findall(r">(\\\w+)<", drawn)
    if unknown: raise ValueError(f"latex2mathml does not know {', '.join(unknown)}")
    return drawn


def draw_formula(translator, node, display: str):
    formula = node.astext()
    try: translator.body.append(mathml(formula, display))
    except Exception as error:
        logger.warning("this formula cannot be drawn (%r): %s", error, formula, location=node)
        translator.body.append(escape(formula))


def draw_inline(translator, node):
    draw_formula(translator, node, "inline")
    raise nodes.SkipNode


def draw_block(translator, node):
    translator.body.append('<div class="formula">')
    draw_formula(translator, node, "block")
    translator.body.append("</div>")
    raise nodes.SkipNode


class LinkNames(SphinxPostTransform):
    """A name in code font leads to what it names, where only one thing has that name"""

    default_priority = 5
    formats = ("html",)

    def run(self, **kwargs):
        places, here = known_places(self.app), self.env.docname
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext()
            place = places.get(name) or places.get(name.removesuffix("()"))
            if not place or isinstance(literal.parent, (nodes.reference, nodes.title)): continue
            docname, anchor = place
            if docname == here and not anchor: continue
            uri = self.app.builder.get_relative_uri(here, docname)
            if anchor: uri += f"#{anchor}"
            literal.replace_self(
                nodes.reference("", "", literal.deepcopy(), internal=True, refuri=uri))


METHODS = ("method", "classmethod", "staticmethod", "property")


def names_of(full: str, kind: str) -> set[str]:
    """How prose may call what `full` is; a plain lower-case word counts with brackets only"""
    short = full.removeprefix(project + ".")
    if kind == "module": return {full, short}
    last = short.rpartition(".")[2]
    if kind in METHODS: return {full, short, ".".join(short.split(".")[-2:])}
    return {full, short, last if re.search(r"[A-Z_]", last) else last + "()"}


def known_places(app) -> dict[str, tuple[str, str]]:
    """Name to page and anchor: what the modules define, modules, experiments"""
    if hasattr(app, "known_places"): return app.known_places
    found, objects = {}, app.env.domains.python_domain.objects
    for full, entry in objects.items():
        place = (entry.docname, "" if entry.objtype == "module" else entry.node_id)
        for name in names_of(full, entry.objtype): found.setdefault(name, set()).add(place)
    taken = {full.rpartition(".")[2] for full in objects}  # `explain` is the method
    for docname in app.env.found_docs:
        name = docname.rpartition("/")[2]
        if docname.startswith("nbs/") and name not in taken: found.setdefault(name, {(docname, "")})
    app.known_places = {name: places.pop() for name, places in found.items() if len(places) == 1}
    return app.known_places


def lead_in(app, error):
    """`index.html` leads to the first page"""
    if error: return
    first = "docs/index.html"
    (Path(app.outdir) / "index.html").write_text(
        f'<!doctype html><meta charset="utf-8"><title>{project}</title>'
        f'<meta http-equiv="refresh" content="0; url={first}"><a href="{first}">{project}</a>\n',
        encoding="utf-8")


def setup(app):
    app.add_html_math_renderer("mathml", (draw_inline, None), (draw_block, None))
    app.add_post_transform(LinkNames)
    app.connect("build-finished", lead_in)
