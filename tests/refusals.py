"""Many short papermill runs without a kernel each: python refusals.py CASES.json ANSWERS.json

The libraries that every notebook imports are imported once. Each run is a fork with papermill's
own command line; only its last part, the kernel, is IPython in the same process.
"""
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import diffusers, matplotlib.pyplot, scipy.stats, torch, transformers  # noqa: before the forks
from IPython.core.interactiveshell import InteractiveShell
from nbformat.v4 import new_output
from papermill.cli import papermill
from papermill.engines import Engine, papermill_engines

import transporter_nb.evaluate.comparison, transporter_nb.explain.transporter  # noqa: as above

torch.set_num_threads(1)


class WithoutKernel(Engine):
    "Cells run by IPython here, up to the first error"
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **settings):
        shell = InteractiveShell.instance(history_load_length=0)
        for index, cell in enumerate(nb_man.nb.cells):
            nb_man.cell_start(cell, index)
            if cell.cell_type == "code":
                done = shell.run_cell(cell.source, store_history=True)
                if not done.success:
                    error = done.error_before_exec or done.error_in_exec
                    name, said = type(error).__name__, str(error)
                    lines = traceback.format_exception(error)
                    cell.outputs = [new_output("error", ename=name, evalue=said, traceback=lines)]
                    return nb_man.cell_exception(cell, index)
            nb_man.cell_complete(cell, index)


papermill_engines.register("without_kernel", WithoutKernel)


def attempt(words: list[str], said: Path) -> int:
    "Status of one run in a fork; what it writes to stdout and stderr goes to two files"
    child = os.fork()
    if not child:
        status = 1
        try:
            for stream, suffix in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(said.with_suffix(suffix), os.O_CREAT | os.O_WRONLY), stream)
            papermill.main(words, standalone_mode=False)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(cases: Path, answers: Path):
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for k, words in enumerate(json.loads(cases.read_text())):
            said = Path(folder) / str(k)
            status = attempt(["--engine", "without_kernel", *words], said)
            found.append((status, said.with_suffix(".err").read_text()))
    answers.write_text(json.dumps(found))


if __name__ == "__main__": main(*map(Path, sys.argv[1:]))
