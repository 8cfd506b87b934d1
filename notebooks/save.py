"""Run notebooks and save what they print and draw: python notebooks/save.py notebooks/4*.ipynb

As `jupyter execute --inplace` does it, with two differences that keep the repository small and its
history readable: pictures get a palette (a third of the bytes), and nothing is kept that changes
from run to run, such as the time of each cell.
"""

import base64
import io
import pathlib
import sys

import nbformat
from nbclient import NotebookClient
from PIL import Image


def with_palette(png):
    """A PNG as base64 text -> the same with 256 colours."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    smaller = io.BytesIO()
    small = picture.quantize(256, kmeans=1, dither=Image.Dither.NONE)  # kmeans: greys stay grey
    small.save(smaller, "png", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def joined(outputs):
    """Outputs with texts that follow each other as one: where they are split is chance."""
    kept = []
    for output in outputs:
        if kept and output["output_type"] == kept[-1]["output_type"] == "stream":
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def save(path):
    """Run the notebook at `path` in its folder, and write it there, outputs and all."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=1800, resources=resources).execute()

    notebook.metadata["language_info"] = {"name": "python"}  # not which version of it
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = with_palette(output.data["image/png"])
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        save(pathlib.Path(name).resolve())
