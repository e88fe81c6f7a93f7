"""Results go to the folder a run was started from, under names of their own; what the repository
ships and what a reader has stays"""
import hashlib
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from transporter_nb.core.base import write_aside


ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
EXPERIMENTS = {path.stem: path for folder in ("", "training", "studies")
               for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))}
ENDINGS = (".csv", ".gif", ".json", ".mp4", ".pdf", ".png")
CAPTIONS = [
    "one small green cone climbs left slowly over a sandy floor",
    "one large red ball slides left slowly over a stone floor",
]


def notebook(name):
    return nbformat.read(EXPERIMENTS[name], as_version=4)


def code_of(name):
    return "\n".join(cell.source for cell in notebook(name).cells if cell.cell_type == "code")


SAVING = sorted(name for name in EXPERIMENTS
                if re.search(r"\bsave_(figure|table|record)\(", code_of(name)))


# ---- whole notebooks, started from a folder of a reader

# Figure 1 of one word is the cheapest figure. That no caption of a reader shares a name with the
# default is asked of every notebook below.
RUNS = {
    "default": ("fig7", {}),
    "one caption": ("fig1", {"caption": CAPTIONS[0], "source": "small", "target": "large"}),
    "another caption": ("fig1", {"caption": CAPTIONS[1], "source": "large", "target": "small"}),
    "a clip": ("explain_clip", {"clip": "mine.mp4"}),
}


def shipped():
    "Everything below figures/, and what git says of the whole clone"
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (ROOT / "figures").iterdir()
    }
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True,
    )
    return files, status.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    from transporter_nb.world.video import save_mp4
    from transporter_nb.world.words import render, sample_scenes
    folder, before = tmp_path_factory.mktemp("reader"), shipped()
    save_mp4(folder / "mine.mp4", render(sample_scenes(1, seed=5))[0], enlarge=8)

    def run(label):
        name, given = RUNS[label]
        words = [word for key, value in given.items() for word in ("-p", key, value)]
        out = folder / f"{label}.ipynb"
        done = subprocess.run(
            [BIN / "papermill", "--no-progress-bar", EXPERIMENTS[name], out, *words], cwd=folder,
            capture_output=True, text=True, timeout=1800,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = "\n".join(
            o.get("text", "")
            for cell in nbformat.read(out, as_version=4).cells
            for o in cell.get("outputs", [])
        )
        return {
            line.strip()
            for line in said.split("\n")
            if line.strip().endswith(ENDINGS) and " " not in line.strip()
        }
    with ThreadPoolExecutor(2) as pool: said = dict(zip(RUNS, pool.map(run, RUNS)))
    return folder, before, said


def test_runs_leave_what_the_repository_ships(ran):
    assert shipped() == ran[1]


@pytest.mark.parametrize("label", RUNS)
def test_a_run_prints_the_full_paths_of_what_it_saved(ran, label):
    folder, _, said = ran
    paths = [Path(text) for text in said[label]]
    assert sorted(path.suffix for path in paths) == [".gif", ".json", ".pdf", ".png"], said[label]
    for path in paths: assert path.is_absolute() and path.is_file() and path.parent == folder, path


def test_a_default_run_keeps_the_plain_name_and_no_two_runs_share_one(ran):
    names = {label: {Path(text).stem for text in said} for label, said in ran[2].items()}
    assert all(len(stems) == 1 for stems in names.values()), names
    stems = [next(iter(stems)) for stems in names.values()]
    assert len(set(stems)) == len(stems) and stems[0] == "fig7_phi4"
    for stem in stems[1:3]: assert re.fullmatch("fig1_phi4_[0-9a-f]{6}", stem)
    assert re.fullmatch("explain_clip_phi4_[0-9a-f]{6}", stems[3])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone")
def test_git_ignores_results_of_a_run_at_the_root_and_in_nbs():
    files = [
        f"{folder}{stem}{ending}"
        for folder in ("", "nbs/")
        for stem in ("fig7_phi4", "table1_phi4_3fa9c1")
        for ending in ENDINGS
    ]
    done = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == files


# ---- every notebook that saves, without running it

@pytest.mark.parametrize("name", SAVING)
def test_a_saving_notebook_takes_install_and_stem_and_saves_nowhere_else(name):
    parameters, = [
        cell.source
        for cell in notebook(name).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    assert re.search(r"^install *= False", parameters, re.M) and re.search(
        r'^stem *= ""', parameters, re.M,
    )
    code = code_of(name)
    assert re.search(r"figure_stem\((?:[^()]|\(\))*install(?:[^()]|\(\))*stem", code)
    assert not re.search(r'(repo_path\(|["\'])figures\b', code)
    assert "path.name for path in saved" not in code


def parameters_of(name, **passed):
    "Parameters as a run has them: the tagged cell, then what is passed"
    cell, = [
        cell.source
        for cell in notebook(name).cells
        if "parameters" in cell.metadata.get("tags", [])
    ]
    space = {}
    exec(cell, space)
    return space | passed


@pytest.mark.parametrize("name", SAVING)
def test_different_parameters_have_different_names_in_the_working_directory(
    name, tmp_path, monkeypatch,
):
    from transporter_nb.evaluate.results import figure_stem
    monkeypatch.chdir(tmp_path)
    ours = parameters_of(name)["ours"]
    other = {str: "something else", bool: True, int: 12_345, float: .123}
    stems = [figure_stem("x", parameters_of(name), ours)]
    assert stems[0].path == tmp_path / "x"
    for key, value in ours.items():
        stems.append(figure_stem("x", parameters_of(name, **{key: other[type(value)]}), ours))
        assert re.fullmatch("x_[0-9a-f]{6}", stems[-1].path.name)
        assert stems[-1].path.parent == tmp_path
        again = figure_stem("x", parameters_of(name, **{key: other[type(value)]}), ours)
        assert again == stems[-1]  # the same parameters, the same name
    assert len({stem.path for stem in stems}) == len({stem.run for stem in stems}) == len(ours) + 1


# ---- what is there already

OURS = {"caption": "a red ball", "seed": 0}


def save(stem):
    from matplotlib.figure import Figure
    from transporter_nb.evaluate.results import save_figure
    return save_figure(Figure((1, 1)), stem, {"parameters": OURS})


def test_files_of_another_run_or_of_the_reader_are_not_replaced(tmp_path, monkeypatch):
    from transporter_nb.evaluate.results import figure_stem
    monkeypatch.chdir(tmp_path)
    mine = figure_stem("fig3_phi4", OURS | {"seed": 3}, OURS, stem="mine")
    assert mine.path == tmp_path / "mine"
    saved = save(mine)
    assert figure_stem("fig3_phi4", OURS | {"seed": 3}, OURS, stem="mine") == mine  # the same again
    with pytest.raises(FileExistsError, match="mine.png.*-p stem"):
        figure_stem("fig3_phi4", OURS | {"seed": 4}, OURS, stem="mine")
    with pytest.raises(FileExistsError, match="mine.png"):
        figure_stem("fig7_phi4", OURS | {"seed": 3}, OURS, stem="mine")  # another notebook
    content = [path.read_bytes() for path in saved]
    (tmp_path / "fig3_phi4.pdf").write_text("a reader's own file")
    with pytest.raises(FileExistsError, match="fig3_phi4.pdf"): figure_stem("fig3_phi4", OURS, OURS)
    assert [path.read_bytes() for path in saved] == content and (
        tmp_path / "fig3_phi4.pdf"
    ).read_text() == "a reader's own file"


def test_a_link_that_leads_nowhere_is_a_file_of_the_reader(tmp_path, monkeypatch):
    from transporter_nb.evaluate.results import figure_stem
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fig3_phi4.png").symlink_to("elsewhere.png")
    with pytest.raises(FileExistsError, match="fig3_phi4.png"): figure_stem("fig3_phi4", OURS, OURS)


def test_only_install_reaches_the_figures_of_the_repository(tmp_path, monkeypatch):
    from transporter_nb.evaluate.results import figure_stem
    installed = figure_stem("fig3_phi4", OURS, OURS, install=True)
    assert installed.path == ROOT / "figures" / "fig3_phi4"
    assert installed.beside("effects").path == ROOT / "figures" / "fig3_phi4_effects"
    with pytest.raises(ValueError, match="seed=3"):
        figure_stem("fig3_phi4", OURS | {"seed": 3}, OURS, install=True)
    with pytest.raises(ValueError, match="mine"):
        figure_stem("fig3_phi4", OURS, OURS, install=True, stem="mine")
    with pytest.raises(ValueError, match="false"):
        figure_stem("fig3_phi4", OURS, OURS, install="no false")
    monkeypatch.chdir(ROOT / "figures")
    with pytest.raises(ValueError, match="-p install True"): figure_stem("fig3_phi4", OURS, OURS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="-p install True"):
        figure_stem("fig3_phi4", OURS, OURS, stem=str(ROOT / "figures" / "mine"))
    (tmp_path / "way").symlink_to(ROOT / "figures")
    with pytest.raises(ValueError, match="-p install True"):
        figure_stem("fig3_phi4", OURS, OURS, stem="way/mine")


def test_a_relative_name_is_saved_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [path for path in save("plain")] == [tmp_path / "plain.png", tmp_path / "plain.json"]


@pytest.mark.parametrize("target", ["figures", "tables", "faithfulness", "measure"])
def test_make_installs_what_the_repository_ships(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    runs = ("papermill", "evaluate.runs")
    lines = [line for line in done.stdout.split("\n") if any(run in line for run in runs)]
    asked = ("-p install True", "--install")
    assert lines and all(any(how in line for how in asked) for line in lines), done.stdout


def test_make_fig7_installs_nothing_and_shows_where_the_picture_is():
    done = subprocess.run(["make", "-n", "fig7"], cwd=ROOT, capture_output=True, text=True)
    line, = [
        line for line in done.stdout.split("\n") if "papermill nbs" in line or "papermill -" in line
    ]
    assert "install" not in line and "--stdout-file -" in line


# ---- what a writer that died left behind

def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left(folder, name, hours=2.):
    path = folder / name
    path.write_text("half")
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_dead_writers_left_is_swept_and_nothing_else(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        dead = dead_pid()
        stale = left(tmp_path, f".note.{dead}.part.png")
        kept = [left(tmp_path, name) for name in (
            f".note.{living.pid}.part.png", f".note.{os.getpid()}.part.csv",  # of the living
            f".other.{dead}.part.png", f".note.{dead}.part.pdf",  # of other files
            f"note.{dead}.part.png", f".note.{dead}.part.png.bak", f".note.x{dead}.part.png",
            f".note.0{dead}.part.png", ".note.part.png", ".note..part.png",
            ".note.0.part.png", f".my.note.{dead}.part.png", f".note.{10**30}.part.png")]
        kept += [left(tmp_path, f".young.{dead}.part.png", 0.)]
        with write_aside(tmp_path / "note.png") as aside: aside.write_text("whole")
        with write_aside(tmp_path / "young.png") as aside: aside.write_text("whole")
        assert not stale.exists()
        assert names(tmp_path) == sorted([*(path.name for path in kept), "note.png", "young.png"])
    finally:
        living.kill()
        living.wait()


def test_a_sweep_follows_no_link_and_removes_no_folder(tmp_path):
    dead = dead_pid()
    target = left(tmp_path, "precious.png")
    (tmp_path / f".note.{dead}.part.png").symlink_to(target)
    (tmp_path / f".page.{dead}.part.png").mkdir()
    then = time.time() - 7200
    os.utime(tmp_path / f".note.{dead}.part.png", (then, then), follow_symlinks=False)
    os.utime(tmp_path / f".page.{dead}.part.png", (then, then))
    for name in ("note.png", "page.png"):
        with write_aside(tmp_path / name) as aside: aside.write_text("whole")
    assert target.read_text() == "half" and (tmp_path / f".note.{dead}.part.png").is_symlink() and (
        tmp_path / f".page.{dead}.part.png"
    ).is_dir()


def test_a_killed_writer_is_swept_by_the_next(tmp_path):
    script = f"""
import os, signal
from transporter_nb.core.base import write_aside
with write_aside({str(tmp_path / "note.txt")!r}) as aside:
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=600).returncode == -9
    stale, = tmp_path.iterdir()
    then = time.time() - 7200
    os.utime(stale, (then, then))
    with write_aside(tmp_path / "note.txt") as aside: aside.write_text("whole")
    assert names(tmp_path) == ["note.txt"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone")
def test_no_temporary_file_is_tracked_and_git_ignores_them():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
    ).stdout.split("\n")
    assert not [
        name for name in listed if re.search(r"(^|/)\.[^/]*\.part", name) and (ROOT / name).exists()
    ]
    ignored = [".fig7_phi4.123.part.png", "figures/.fig7_phi4.123.part.png", "runs/.x.1.part"]
    assert subprocess.run(
        ["git", "check-ignore", *ignored], cwd=ROOT, capture_output=True, text=True,
    ).stdout.split() == ignored


# ---- benchmarks

@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem,
)
def test_a_benchmark_reaches_what_is_shipped_only_if_asked(path):
    code = path.read_text(encoding="utf-8")
    assert '"--install", action="store_true"' in code
    assert not re.search(r'(repo_path\(|/ )"figures"', code)
    shipped_folder = re.findall(r"PICTURES\b(?! =)[^\n]*", code)
    assert all(".install else" in line for line in shipped_folder)


def test_a_try_of_a_benchmark_is_saved_here(tmp_path):
    before = shipped()
    words = ["--only", "method=ours,N=256,d=64,P=50,mode=forward", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "transport.py", *words], cwd=tmp_path,
        capture_output=True, text=True, timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    saved = [Path(line) for line in done.stdout.split("\n") if line.endswith(ENDINGS)]
    assert sorted(path.suffix for path in saved) == [".json", ".png"]
    assert all(
        path.parent == tmp_path and re.fullmatch("transport_[0-9a-f]{6}", path.stem)
        for path in saved
    )
    assert shipped() == before
