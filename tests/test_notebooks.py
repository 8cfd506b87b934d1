"""The notebooks: how they are run, what form they have; and, in a set of its own, that all of them run.

    python -m pytest                 how and what form (pytest.ini leaves the rest out)
    python -m pytest -m notebooks    runs every notebook and every solution; -k 7_features: those of one name
"""

import base64
import io
import json
import os
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, ROOT, small_model, small_tokenizer, write_images
from PIL import Image

import common
from randar import save_randar
from vqgan import save_tokenizer

FOLDER = ROOT / "notebooks"
sys.path.insert(0, str(FOLDER))
with matplotlib.rc_context():  # its settings are for the notebooks, not for other tests
    import course  # noqa: E402
import run as runner  # noqa: E402

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))
LESSONS = range(1, 8)  # those with exercises


def named(path):
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def number_of(path):
    return int(path.name.split("_")[0])


def opened(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sources(notebook, kind):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


# ------------------------------------------------------------------------------------------------------------
# How a notebook is run


def write_notebook(path, *code):
    """A notebook of these code cells, after a cell of prose."""
    cells = [{"cell_type": "markdown", "id": "prose", "metadata": {}, "source": ["# Prose, ", "as it is"]}]
    cells += [{"cell_type": "code", "id": f"code-{i}", "metadata": {}, "execution_count": None, "outputs": [],
               "source": source.splitlines(keepends=True)} for i, source in enumerate(code)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture
def executed(tmp_path):
    """A function that runs code cells: for each, a list of (kind of output, text or size of the picture)."""
    def executed(*code):
        notebook = runner.execute(write_notebook(tmp_path / "some.ipynb", *code))
        return [[content_of(output) for output in cell["outputs"]] for cell in notebook["cells"][1:]]
    return executed


def content_of(output):
    data = output.get("data", {})
    if "image/png" in data:
        return "picture", Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size
    return output["output_type"], "".join(output.get("text", data.get("text/plain")))


def test_what_a_cell_prints_and_its_last_value_are_its_output(executed):
    assert executed("print('one')\nprint('two')\n1 + 1") == [
        [("stream", "one\ntwo\n"), ("execute_result", "2")]]


@pytest.mark.parametrize("code", ["x = 1", "1;", "1 ; \n\n", "None", "print()\n'text';", "# nothing", ""])
def test_statements_a_semicolon_and_none_show_no_value(executed, code):
    assert "execute_result" not in [kind for kind, _ in executed(code)[0]]


def test_a_later_cell_knows_the_names_of_earlier_ones(executed):
    assert executed("def double(x):\n    return 2 * x", "seven = 7", "double(seven)")[2] == [
        ("execute_result", "14")]


def test_figures_left_open_become_pictures_of_the_cell_that_drew_them(executed):
    draw = "from matplotlib import pyplot\npyplot.figure(figsize=(2, 1)), pyplot.figure();"
    assert [[kind for kind, _ in cell] for cell in executed(draw, "print(pyplot.get_fignums())")] == [
        ["picture", "picture"], ["stream"]]


@pytest.mark.parametrize("last, pictures", [
    ("pyplot.figure()", 1), ("figure = pyplot.figure()\nfigure", 1), ("pyplot.figure();", 1),
    ("Figure()", 1), ("Figure();", 0), ("Image.new('RGB', (3, 4))", 1), ("Image.new('RGB', (3, 4));", 0)])
def test_a_last_value_that_is_a_figure_or_an_image_is_shown_once(executed, last, pictures):
    imports = "from matplotlib import pyplot\nfrom matplotlib.figure import Figure\nfrom PIL import Image\n"
    assert [kind for kind, _ in executed(imports + last)[0]] == ["picture"] * pictures


def test_an_image_keeps_its_pixels(executed):
    assert executed("from PIL import Image\nImage.new('RGB', (3, 4))") == [[("picture", (3, 4))]]


def test_cells_are_numbered_and_prose_and_the_file_stay_as_they_are(tmp_path):
    path = write_notebook(tmp_path / "some.ipynb", "1", "2")
    before = path.read_bytes()
    notebook = runner.execute(path)
    assert [cell.get("execution_count") for cell in notebook["cells"]] == [None, 1, 2]
    assert notebook["cells"][0] == opened(path)["cells"][0] and path.read_bytes() == before


@pytest.mark.parametrize("code, reason", [
    ("1 / 0", "ZeroDivisionError: division by zero"), ("open('nowhere')", "FileNotFoundError"),
    ("raise ValueError('too few')", "ValueError: too few"), ("if:", "SyntaxError"),
    ("import sys; sys.exit(0)", "SystemExit: 0"), ("%matplotlib inline", "SyntaxError")])
def test_an_error_says_in_which_notebook_and_cell(tmp_path, code, reason):
    path = write_notebook(tmp_path / "solutions" / "3_some.ipynb", "x = 1", code, "print(x)")
    with pytest.raises(runner.CellError, match=f"^solutions/3_some.ipynb, cell 2: {reason}"):
        runner.execute(path)


def test_code_runs_in_the_folder_of_the_notebooks_and_leaves_no_trace(executed):
    before = os.getcwd()
    assert executed("import os\nprint(os.getcwd())\nimport course") == [[("stream", f"{FOLDER}\n")]]
    with pytest.raises(runner.CellError):
        executed("from matplotlib import pyplot\npyplot.figure()\n1 / 0")
    assert os.getcwd() == before and not runner.pyplot.get_fignums()


@pytest.fixture
def typed_run(monkeypatch, capsys):
    """A function that runs python notebooks/run.py ... in this process; returns what it said."""
    def typed_run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        runner.main()
        return capsys.readouterr().out
    return typed_run


def test_the_command_saves_the_outputs(tmp_path, typed_run):
    paths = [write_notebook(tmp_path / name, "print('gräßlich')", "1") for name in ("a.ipynb", "b.ipynb")]
    said = typed_run(*paths)
    for path in paths:
        assert content_of(opened(path)["cells"][1]["outputs"][0]) == ("stream", "gräßlich\n")
        assert f"{path}: " in said and runner.execute(path) == opened(path)
    assert sorted(tmp_path.iterdir()) == paths


def test_check_runs_and_saves_nothing(tmp_path, typed_run):
    path = write_notebook(tmp_path / "a.ipynb", "print(1)")
    before = path.read_bytes()
    assert str(path) in typed_run("--check", path) and path.read_bytes() == before


def test_a_failing_cell_and_a_full_disk_leave_the_file_as_it_was(tmp_path, typed_run, monkeypatch, capsys):
    path = write_notebook(tmp_path / "a.ipynb", "print(1)", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(runner.CellError):
        typed_run(path)
    assert path.read_bytes() == before
    before = write_notebook(path, "print(1)").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(SystemExit):
        typed_run(path)
    assert "no space left" in capsys.readouterr().err
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content, message", [
    (None, "no notebook"), ("{", "is no notebook"), ("[]", "is no notebook"),
    ('{"cells": [{}]}', "is no notebook")])
def test_what_is_no_notebook_is_one_line(tmp_path, typed_run, capsys, content, message):
    if content is not None:
        (tmp_path / "a.ipynb").write_text(content)
    with pytest.raises(SystemExit):
        typed_run(tmp_path / "a.ipynb")
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# What the notebooks share


def test_the_toy_world_opens_without_paths():
    world = course.open_models("toy")
    tokens, classes, pixels = world.examples(3, seed=1)
    assert world.grid == (8, 8) and world.number == 64 and world.steps == 22 and len(world.names) == 10
    assert world.randar.order == "random" and world.raster.order == "raster"
    assert tokens.shape == (3, 64) and pixels.shape == (3, 32, 32, 3)
    rebuilt = course.pixels_of(world.tokenizer, tokens)
    assert rebuilt.dtype == np.uint8 and abs(rebuilt.astype(int) - pixels).mean() < 5


@pytest.fixture
def other(tmp_path):
    """PATHS of another model, with three of ImageNet's classes of four images, in folders of their names."""
    paths = {"randar": tmp_path / "randar.pt", "tokenizer": tmp_path / "tokenizer.pt"}
    save_randar(small_model(num_classes=1000), paths["randar"])
    save_tokenizer(small_tokenizer(), paths["tokenizer"])
    folders = ("n01443537", "n02099601", "n04266014")
    return paths | {"images": write_images(tmp_path / "images", folders, 4, size=(20, 24))}


def test_images_of_a_few_imagenet_folders_have_their_classes(other):
    world = course.open_models("L", **other)
    tokens, classes, pixels = world.examples(12)
    assert tokens.shape == (12, 16) and pixels.shape == (12, 16, 16, 3) and world.raster is None
    assert sorted(set(classes.tolist())) == [1, 207, 812] and world.names[207] == "golden retriever"
    assert torch.equal(world.examples(5, seed=2)[0], world.examples(5, seed=2)[0])


def test_what_is_missing_is_said(other):
    with pytest.raises(ValueError, match="needs its files"):
        course.open_models("L", randar=other["randar"])
    with pytest.raises(ValueError, match="13 images are needed, .* has 12"):
        course.open_models("L", **other).examples(13)
    with pytest.raises(ValueError, match="PATHS"):
        course.open_models("L", **other | dict(images=None)).examples(1)


# ------------------------------------------------------------------------------------------------------------
# What form a notebook has


def test_there_are_seven_lessons_with_a_number_each():
    numbers = [number_of(path) for path in NOTEBOOKS]
    assert set(LESSONS) <= set(numbers) and len(set(numbers)) == len(numbers)


lessons = pytest.mark.parametrize("path", [p for p in NOTEBOOKS if number_of(p) in LESSONS], ids=named)


@lessons
def test_a_lesson_says_first_what_one_can_explain_after_it_and_is_short(path):
    notebook = opened(path)
    beginning = "".join(notebook["cells"][0]["source"])
    assert "After this notebook you can explain" in beginning and "Sec. " in beginning
    assert len(notebook["cells"]) <= 25


@lessons
def test_another_model_is_one_line_away(path):
    beginning = sources(opened(path), "code")[0]
    assert beginning.startswith("import course\n")
    assert '\nMODEL, PATHS = "toy", {}' in beginning
    assert "\nworld = course.open_models(MODEL, **PATHS)" in beginning


@lessons
def test_a_lesson_ends_with_exercises_and_their_solutions_exist(path):
    _, *exercises = "\n".join(sources(opened(path), "markdown")).split("\n## Exercises\n")
    assert len(exercises) == 1, "one section '## Exercises'"
    assert "\n## " not in exercises[0], "nothing comes after them"
    assert 3 <= len(re.findall(r"^\**\d+\. ", exercises[0], re.MULTILINE)) <= 5
    assert path.parent / "solutions" / path.name in SOLUTIONS


@pytest.mark.parametrize("path", SOLUTIONS, ids=named)
def test_solutions_belong_to_a_lesson_and_find_the_project_under_jupyter(path):
    assert FOLDER / path.name in NOTEBOOKS
    beginning = sources(opened(path), "code")[0]
    assert 'sys.path.append("..")' in beginning and 'MODEL, PATHS = "toy", {}' in beginning


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=named)
def test_outputs_are_saved_from_one_run_and_show_no_more_than_they_should(path):
    notebook, text = opened(path), path.read_text(encoding="utf-8")
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    if path in NOTEBOOKS:
        assert any("image/png" in output.get("data", {}) for output in outputs)
    assert len(text) < 1.5e6
    words = "\n".join(content_of(output)[1] for output in outputs if content_of(output)[0] != "picture")
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|usr|mnt|content)/|[A-Z]:\\\\", words)
    assert str(ROOT) not in text and str(pathlib.Path.home()) not in words


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=named)
def test_a_notebook_is_one_of_format_4_with_its_number_in_the_title(path):
    notebook = opened(path)
    assert notebook["nbformat"] == 4 and notebook["cells"][0]["cell_type"] == "markdown"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    title = "".join(notebook["cells"][0]["source"]).splitlines()[0]
    assert re.match(rf"# (Solutions: )?{number_of(path)}\. \w", title)


# ------------------------------------------------------------------------------------------------------------
# That they run: the slow set
#
# Each in a process of its own, as Jupyter starts each: seeds, settings of matplotlib and modules that another
# notebook has changed are not there, and memory comes back. Starting one costs seconds, but lets as many run
# at a time as there are cores, on one thread each.


@pytest.fixture(scope="session")
def processes(request):
    """Of each chosen notebook, its run: a future of what subprocess.run returns."""
    paths = [item.callspec.params["path"] for item in request.session.items
             if "processes" in getattr(item, "fixturenames", ())]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {path: pool.submit(
            subprocess.run, [sys.executable, FOLDER / "run.py", "--check", path], env=ENVIRONMENT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=900) for path in paths}
        pool.shutdown(cancel_futures=True)


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=named)
def test_it_runs(path, processes):
    process = processes[path].result()
    assert process.returncode == 0, process.stderr
    print(process.stdout)
