"""What `make explorer` serves, asked for by plain GET and without a browser: nothing of an address
becomes markup, and kernels are bounded in number. The notebook is a small one."""
import asyncio
import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import jupyter_server.auth.login
import nbformat
import pytest
import voila
from websockets.asyncio.client import connect

from browser import serve_voila

PATIENCE = 240 # Seconds until a test gives up
LIMIT = 2 # kernels of the bounded server: the warm one and one more
PAYLOAD = "tnb\"'><script>hacked()</script>"
ELSEWHERE = r"""(?:src|href)=["'](?:https?:)?//""" # an address on another host
READ = r"""get(?:_query|_body)?_arguments?\(\s*["']([\w-]+)["']""" # how handlers read an address
SOURCES = [*Path(voila.__file__).parent.rglob("*.py"), Path(jupyter_server.auth.login.__file__)]
FOUND = {name for path in SOURCES for name in re.findall(READ, path.read_text())}
PARAMETERS = sorted(FOUND | {"token", "voila-theme", "voila-template", "reveal"})
PATHS = (
    "/{}", "/{}.ipynb", "/voila/files/{}.png", "/voila/static/{}", "/voila/labextensions/{}",
    "/voila/templates/explorer/static/{}", "/voila/render/{}", "/voila/tree/{}", "/voila/query/{}",
    "/voila/api/themes/{}", "/voila/api/contents/{}", "/api/kernels/{}",
    "/login?next={}", "/login?next=/{}",
)
CONFIG = re.compile(r'id="jupyter-config-data"[^>]*>(.*?)</script>', re.DOTALL)


class Page(NamedTuple):
    "What came back"
    status: int
    text: str

    @property
    def kernel(self) -> str|None:
        "The id of its kernel, where it has one"
        found = CONFIG.search(self.text)
        return json.loads(found.group(1))["kernelId"] if found else None

    def check(self):
        "Nothing of the payload is markup"
        assert PAYLOAD not in self.text and "<script>hacked" not in self.text


def ask(address:str, data:bytes|None=None) -> Page:
    "GET, or POST where there are data; redirects are followed"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(address, data), timeout=PATIENCE) as answer:
            return Page(answer.status, answer.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return Page(error.code, error.read().decode(errors="replace"))


def goodbye(server, page:Page) -> Page:
    "What a page sends when it is left"
    return ask(f"{server.base}/voila/api/shutdown/{page.kernel}?token={server.token}", b"")


def within(seconds:float, holds) -> bool:
    "Whether something comes true in time"
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until: return False
        time.sleep(.2)
    return True


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    path = tmp_path_factory.mktemp("notebook") / "small.ipynb"
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    cells = [nbformat.v4.new_code_cell("1 + 1")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture(scope="module")
def server(notebook, tmp_path_factory):
    server = serve_voila(tmp_path_factory.mktemp("server"), notebook)
    yield server
    server.stop()


def start_bounded(folder, notebook):
    "A server of few kernels, with its warm one"
    server = serve_voila(folder, notebook, KERNELS=str(LIMIT))
    assert within(PATIENCE, lambda: len(server.kernels()) == 1)
    return server


@pytest.fixture
def bounded(notebook, tmp_path):
    "A server of its own for each test that starts kernels"
    server = start_bounded(tmp_path, notebook)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def untouched(notebook, tmp_path_factory):
    "One for the tests that start none"
    server = start_bounded(tmp_path_factory.mktemp("untouched"), notebook)
    yield server
    server.stop()


def test_the_parameters_are_found():
    assert {"theme", "template", "classic-tree", "next"} <= FOUND


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_nothing_of_a_parameter_becomes_markup(server, parameter):
    for token in (f"token={server.token}&", ""):
        for path in ("", "login", "nowhere"):
            page = ask(f"{server.base}/{path}?{token}{parameter}={quote(PAYLOAD)}")
            page.check()
            if page.kernel: goodbye(server, page)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_of_a_path_becomes_markup(server, path):
    place = path.format(quote(PAYLOAD))
    for token in (f"{'&' if '?' in place else '?'}token={server.token}", ""):
        page = ask(server.base + place + token)
        page.check()
        assert page.kernel is None or path.startswith("/login"), "a place that is none has a kernel"
        if page.kernel: goodbye(server, page)


def test_the_page_is_served_as_the_file_says(server):
    page = ask(server.address)
    assert page.status == 200 and "Starting Python" in page.text and "1 + 1" not in page.text
    assert 'data-jp-theme-name="JupyterLab Light"' in page.text
    assert not re.search(ELSEWHERE, page.text), "something is fetched from another host"
    assert ask(f"{server.base}/voila/files/nothing.png?token={server.token}").status == 403
    goodbye(server, page)


@pytest.mark.parametrize("query", ["", "?token=", "?token=0123", f"?theme={quote(PAYLOAD)}"])
def test_without_the_token_no_kernel_starts(untouched, query):
    page = ask(f"{untouched.base}/{query}")
    assert page.kernel is None
    assert len(untouched.kernels()) == 1


def test_one_page_too_many_is_refused_until_another_is_closed(bounded):
    pages = [ask(bounded.address) for _ in range(LIMIT + 1)]
    assert [page.status for page in pages] == [200] * LIMIT + [503]
    assert len(bounded.kernels()) == LIMIT
    assert "Too many explorers are open" in pages[-1].text and "Close one" in pages[-1].text
    assert not re.search(ELSEWHERE, pages[-1].text)
    assert ask(f"{bounded.address}&theme=dark").status == 503 # the warm kernel does not serve it
    assert goodbye(bounded, pages[0]).status == 204
    again = ask(bounded.address)
    assert again.status == 200 and len(bounded.kernels()) == LIMIT
    for page in (pages[1], again): goodbye(bounded, page)
    assert within(PATIENCE, lambda: len(bounded.kernels()) == 1), "no page is kept warm again"
    assert ask(bounded.address).status == 200


def test_many_at_once_are_counted(bounded):
    with ThreadPoolExecutor(5) as pool: pages = list(pool.map(ask, [bounded.address] * 5))
    assert sorted(page.status for page in pages) == [200] * LIMIT + [503] * (5 - LIMIT)
    assert len(bounded.kernels()) == LIMIT


def test_a_page_that_is_loaded_again_is_not_refused(bounded):
    pages = [ask(bounded.address) for _ in range(LIMIT)]
    with ThreadPoolExecutor(2) as pool: # the new page's request arrives first
        again = pool.submit(ask, bounded.address)
        time.sleep(.5)
        pool.submit(goodbye, bounded, pages[0]).result()
    assert again.result().status == 200


def test_a_page_that_went_without_goodbye_gives_its_place(bounded):
    pages = [ask(bounded.address) for _ in range(LIMIT)]
    place = f"{bounded.base.replace('http', 'ws')}/api/kernels/{pages[0].kernel}/channels"
    async def visit():
        async with connect(f"{place}?token={bounded.token}", proxy=None):
            return await asyncio.to_thread(ask, bounded.address)
    assert asyncio.run(visit()).status == 503
    assert ask(bounded.address).status == 200
    assert len(bounded.kernels()) == LIMIT
