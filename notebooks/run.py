"""Run notebooks from top to bottom and save what they print and draw: python notebooks/run.py [FILE ...]

Jupyter does the same and more; this needs nothing that the project does not need anyway, and the tests use
it. With no argument: all notebooks and solutions. A cell's output is what it prints, the value of its last
line (unless a semicolon ends it), and the figures that it leaves open. A notebook of which a cell fails is
left as it was. With --check, all of them are.
"""

import ast
import base64
import contextlib
import io
import json
import linecache
import os
import pathlib
import sys
import time

if __name__ == "__main__":  # before tqdm is imported: no bars between what this says
    os.environ.setdefault("TQDM_DISABLE", "1")
import matplotlib  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import common  # noqa: E402


class CellError(Exception):
    """A cell failed: the message says which one. No ValueError: who mends it wants to see the traceback."""


def execute(path):
    """The notebook at `path` as a dict, its code cells run and their outputs replaced.

    Raises CellError for the first cell that fails, ValueError for a file that is no notebook.
    """
    path = pathlib.Path(path).resolve()
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no notebook ({error})") from None
    names = {"__name__": "__main__"}
    pyplot.close("all")
    before = os.getcwd()
    os.chdir(HERE)
    try:
        for count, (cell, source) in enumerate(zip(cells, sources), start=1):
            where = f"{path.parent.name}/{path.name}, cell {count}"
            try:
                cell["outputs"] = run_cell(source, names, where, count)
            except (Exception, SystemExit) as error:
                raise CellError(f"{where}: {type(error).__name__}: {error}") from error
            cell["execution_count"] = count
    finally:
        os.chdir(before)
        pyplot.close("all")
    return notebook


def run_cell(source, names, where, count):
    """Run one cell in the namespace `names`; returns its outputs as a notebook file holds them."""
    linecache.cache[where] = len(source), None, source.splitlines(keepends=True), where  # for tracebacks
    tree, last = ast.parse(source, where), None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(last, where, "eval"), names)
    if source.rstrip().endswith(";"):  # as in Jupyter
        value = None
    outputs, buffer = [], io.BytesIO()
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout",
                        "text": printed.getvalue().splitlines(keepends=True)})
    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]  # what Jupyter's inline pictures do
    if isinstance(value, Image.Image):
        value.save(buffer, "PNG")
        outputs.append(picture(buffer))
    elif isinstance(value, Figure):
        figures += [value] * (value not in figures)
    elif value is not None:
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {},
                        "data": {"text/plain": repr(value).splitlines(keepends=True)}})
    for figure in figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight")
        outputs.append(picture(buffer))
    pyplot.close("all")
    return outputs


def picture(buffer):
    return {"output_type": "display_data", "metadata": {},
            "data": {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": ["<picture>"]}}


def main():
    parser = common.command_line(__doc__)
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="(default: all)")
    parser.add_argument("--check", action="store_true", help="run them, but leave the files as they are")
    args = parser.parse_args()
    with common.one_line_errors():
        for path in args.files or sorted(HERE.glob("*.ipynb")) + sorted(HERE.glob("solutions/*.ipynb")):
            if not path.is_file():
                raise FileNotFoundError(f"no notebook {path}: give the path of an .ipynb file")
            started = time.perf_counter()
            text = json.dumps(execute(path), indent=1, ensure_ascii=False) + "\n"
            if not args.check:
                common.write_safely(path, lambda partial: partial.write_text(text, encoding="utf-8"))
            print(f"{path}: {time.perf_counter() - started:.0f} s, {len(text) / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
