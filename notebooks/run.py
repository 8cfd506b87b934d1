"""Run notebooks from top to bottom and save what they print and draw: python notebooks/run.py [FILE ...]

Jupyter does the same and more; this needs nothing that the project does not need anyway, and the tests use
it. With no argument: all notebooks and solutions. A cell's output is what it prints, the value of its last
line, and the figures that it leaves open.
"""

import ast
import base64
import contextlib
import io
import json
import os
import pathlib
import sys
import time

os.environ.setdefault("TQDM_DISABLE", "1")  # a progress bar in a saved page is noise
import matplotlib  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from PIL import Image  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import common  # noqa: E402


def execute(path):
    """The notebook at `path` as a dict, its code cells run and their outputs replaced. Errors are raised."""
    notebook = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    names, count = {"__name__": "__main__"}, 0
    pyplot.close("all")
    before = os.getcwd()
    os.chdir(HERE)
    try:
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                cell["execution_count"] = count
                where = f"{pathlib.Path(path).name}, cell {count}"
                cell["outputs"] = run_cell("".join(cell["source"]), names, where, count)
    finally:
        os.chdir(before)
        pyplot.close("all")
    return notebook


def run_cell(source, names, where, count):
    """Run one cell in the namespace `names`; returns its outputs as a notebook file holds them."""
    tree, last = ast.parse(source, where), None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    quiet = source.rstrip().endswith(";")  # as in Jupyter: a semicolon hides the last line's value
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(last, where, "eval"), names)
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout",
                        "text": printed.getvalue().splitlines(keepends=True)})
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        outputs.append(picture(buffer))
    elif value is not None and not quiet and not isinstance(value, matplotlib.figure.Figure):
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {},
                        "data": {"text/plain": repr(value).splitlines(keepends=True)}})
    for number in pyplot.get_fignums():  # what Jupyter's inline pictures do
        buffer = io.BytesIO()
        pyplot.figure(number).savefig(buffer, format="png", bbox_inches="tight")
        outputs.append(picture(buffer))
    pyplot.close("all")
    return outputs


def picture(buffer):
    return {"output_type": "display_data", "metadata": {},
            "data": {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": ["<picture>"]}}


def main():
    parser = common.command_line(__doc__)
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="(default: all)")
    with common.one_line_errors():
        for path in parser.parse_args().files or sorted(HERE.glob("**/*.ipynb")):
            if not path.is_file():
                raise FileNotFoundError(f"no notebook {path}: give the path of an .ipynb file")
            started = time.perf_counter()
            text = json.dumps(execute(path), indent=1, ensure_ascii=False) + "\n"
            common.write_safely(path, lambda partial: partial.write_text(text, encoding="utf-8"))
            print(f"{path.name}: {time.perf_counter() - started:.0f} s, {len(text) / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
