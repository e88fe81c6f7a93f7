"""papermill without a kernel: the cells of a notebook in this process, with its patches"""
import ast
import warnings

import matplotlib.pyplot as plt
import papermill
import torch
from papermill.engines import Engine, papermill_engines


def show(value):
    "What a notebook does with the value of a cell's last line"
    for way in ("_repr_mimebundle_", "_repr_html_", "_repr_png_", "__repr__"):
        if not isinstance(value, type) and hasattr(value, way): return getattr(value, way)()


def run_cell(source, name, space):
    "One cell: its statements, and the value of its last line"
    body = ast.parse(source, name).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), name, "exec"), space)
    if last is not None: show(eval(compile(ast.Expression(last.value), name, "eval"), space))


class InThisProcess(Engine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        space = {"__name__": "__main__", "In": [""]}
        cls.last = space
        for k, cell in enumerate(nb_man.nb.cells):
            if cell.cell_type != "code": continue
            space["In"].append(cell.source)
            cell.execution_count = len(space["In"]) - 1
            try: run_cell(cell.source, f"cell {k} of the notebook", space)
            except SystemExit as end: # a notebook may end before its last cell, as papermill allows
                if end.code: raise
                break


papermill_engines.register("here", InThisProcess)


def run(notebook, out, **parameters):
    "Run a notebook as papermill does; the names that it leaves"
    with warnings.catch_warnings():
        # a backend without a screen warns at plt.show
        warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
        # random weights may say any bytes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        try:
            papermill.execute_notebook(
                str(notebook), str(out), parameters, engine_name="here", kernel_name="python3",
                progress_bar=False)
        finally:
            plt.close("all")
            torch.set_grad_enabled(True) # a notebook may have turned gradients off, as for itself
    return InThisProcess.last
