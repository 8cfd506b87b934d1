"""The notebooks: what they share, their form; and, in a set of its own, that all of them run.

    python -m pytest                 what they share and what form (pytest.ini leaves the rest out)
    python -m pytest -m notebooks    runs them (notebooks/requirements.txt); -k 7_features: one name
"""

import ast
import json
import re
import sys

import matplotlib
import numpy as np
import pytest
import torch
from helpers import ROOT, small_model, small_tokenizer, write_images
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map_only

from randar import save_randar
from support.border import UserError
from tokenizer import save_tokenizer

FOLDER = ROOT / "notebooks"
sys.path.insert(0, str(FOLDER))
with matplotlib.rc_context():  # its settings are for the notebooks, not for other tests
    import course

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))


def number(path):
    return path.name.split("_")[0]


LESSONS = [path for path in NOTEBOOKS if number(path) not in ("0", "8", "11")]


def named(path):
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def opened(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path, kind):
    cells = [cell for cell in opened(path)["cells"] if cell["cell_type"] == kind]
    return ["".join(cell["source"]) for cell in cells]


all_of_them = pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=named)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=named)

# ------------------------------------------------------------------------------------------------
# What the notebooks share


def test_the_toy_world_opens_without_paths(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # other tests may want more
    world = course.open_course("toy")
    tokens, classes, pixels = world.examples(3, seed=1)
    assert world.grid == (8, 8) and world.num_tokens == 64 and world.steps == 22
    assert (world.randar.order, world.raster.order) == ("random", "raster")
    assert tokens.shape == (3, 64) and pixels.shape == (3, 32, 32, 3) and len(world.names) == 10
    rebuilt = course.pixels_of(world.tokenizer, tokens)
    assert rebuilt.dtype == np.uint8 and abs(rebuilt.astype(int) - pixels).mean() < 5


@pytest.fixture
def other(tmp_path):
    """PATHS of another model; four images of three of ImageNet's classes, in WordNet's folders."""
    paths = {"randar": tmp_path / "randar.pt", "tokenizer": tmp_path / "tokenizer.pt"}
    save_randar(small_model(num_classes=1000), paths["randar"])
    save_tokenizer(small_tokenizer(), paths["tokenizer"])
    folders = ("n01443537", "n02099601", "n04266014")
    return paths | {"images": write_images(tmp_path / "images", folders, 4, size=(20, 24))}


def test_images_of_a_few_imagenet_folders_have_their_classes(other):
    world = course.open_course("L", **other)
    tokens, classes, pixels = world.examples(12)
    assert tokens.shape == (12, 16) and pixels.shape == (12, 16, 16, 3) and world.raster is None
    assert sorted(set(classes.tolist())) == [1, 207, 812] and world.names[207] == "golden retriever"
    assert torch.equal(world.examples(5, seed=2)[0], world.examples(5, seed=2)[0])


def test_what_is_missing_is_said(other):
    with pytest.raises(UserError, match="needs its files"):
        course.open_course("L", randar=other["randar"])
    with pytest.raises(UserError, match="13 images are needed, .* has 12"):
        course.open_course("L", **other).examples(13)
    (other["images"] / "n01443537" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match="unreadable image .*0.png"):
        course.open_course("L", **other).examples(12)


def test_images_are_cut_in_the_centre_as_in_training_not_stretched(other, tmp_path):
    (tmp_path / "wide" / "n01443537").mkdir(parents=True)
    strip = np.zeros((16, 48, 3), np.uint8)
    strip[:, 16:32] = 255  # the middle is white, left and right are black
    Image.fromarray(strip).save(tmp_path / "wide" / "n01443537" / "0.png")
    world = course.open_course("L", **other | dict(images=tmp_path / "wide"))
    assert (world.examples(1)[2] == 255).all()


def test_relative_paths_start_at_the_repository(other, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(course, "ROOT", tmp_path)
    paths = dict(randar="randar.pt", tokenizer="tokenizer.pt", raster="randar.pt", images="images")
    world = course.open_course("L", **paths)
    assert world.raster is not None and len(world.examples(12)[0]) == 12


def test_without_images_the_model_draws_its_own_examples(other):
    world = course.open_course("L", **other | dict(images=None))
    tokens, classes, pixels = world.examples(20, seed=3)
    assert tokens.shape == (20, 16) and tokens.min() >= 0 and len(classes.unique()) == 20
    assert classes.max() >= 900 and pixels.shape == (20, 16, 16, 3)
    assert abs(course.pixels_of(world.tokenizer, tokens).astype(int) - pixels).max() <= 1
    assert torch.equal(world.examples(20, seed=3)[0], tokens)
    assert not torch.equal(world.examples(20, seed=4)[0], tokens)


# ------------------------------------------------------------------------------------------------
# What form a notebook has


@each_lesson
def test_a_lesson_begins_with_its_aims_and_its_model_and_ends_with_exercises_and_solutions(path):
    prose, code = "\n".join(sources(path, "markdown")), sources(path, "code")
    assert "After this notebook you can explain" in prose and "Sec. " in prose
    assert code[0].startswith("import course\n") and '\nMODEL, PATHS = "toy", {}' in code[0]
    assert "\nworld = course.open_course(MODEL, **PATHS)" in code[0]

    _, exercises = prose.split("\n## Exercises\n")
    assert "\n## " not in exercises and f"solutions/{path.name}" in exercises
    assert 3 <= len(re.findall(r"^\d+\. ", exercises, re.MULTILINE)) <= 5
    assert FOLDER / "solutions" / path.name in SOLUTIONS


@all_of_them
def test_it_is_a_notebook_of_format_4_with_its_number_in_the_title(path):
    notebook = opened(path)
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert re.match(rf"# (Solutions: )?{number(path)}\. \w", sources(path, "markdown")[0])


@all_of_them
def test_its_code_compiles_and_what_it_imports_exists(path):
    for source in sources(path, "code"):
        compile(source, path.name, "exec")
        statements = ast.walk(ast.parse(source))
        imports = [x for x in statements if isinstance(x, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), path.name, "exec"), {})


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS + SOLUTIONS if number(path) != "0"], ids=named)
def test_a_cell_has_twenty_lines_at_most_so_that_it_fits_on_a_screen(path):
    assert max(source.count("\n") + 1 for source in sources(path, "code")) <= 20


@all_of_them
def test_its_outputs_are_saved_from_one_run_and_show_no_errors_bars_or_paths(path):
    cells = [cell for cell in opened(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    kinds = {output.get("name", output["output_type"]) for output in outputs}
    assert kinds and kinds <= {"stdout", "display_data", "execute_result"}
    assert path.stat().st_size < 1.2e6
    words = "\n".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|usr|mnt)/|[A-Z]:\\\\", words)


# ------------------------------------------------------------------------------------------------
# That they run on a GPU: where there is none, tensors pretend to be on one, and refuse all others


class Far(torch.Tensor):  # a tensor that pretends to be on a GPU
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __format__(self, spec):
        return format(self.item(), spec) if spec else str(self)


class FarGenerator(torch.Generator):  # the CPU's, but it knows for which device it was asked
    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.far = str(device) == "cuda"
        return made


class TwoDevices(torch.overrides.TorchFunctionMode):  # what is made for a GPU is Far
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, given = getattr(function, "__name__", ""), tree_leaves((args, kwargs))
        if function == torch.Tensor.device.__get__:
            return torch.device("cuda" if isinstance(args[0], Far) else "cpu")
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        far = any(isinstance(x, Far) for x in tensors)
        near = any(x.ndim and not isinstance(x, Far) for x in tensors)  # a single number may mix
        if far and near and not (name == "__getitem__" and isinstance(args[0], Far)):
            raise RuntimeError(f"{name} of tensors on two devices")
        if far and name in ("numpy", "__array__"):
            raise TypeError("NumPy cannot read a tensor on a GPU")

        asked = ["cpu"] * (name == "cpu") + [str(x) for x in given if isinstance(x, torch.device)]
        far = asked == ["cuda"] if asked else far
        if any(x.far != far for x in given if isinstance(x, FarGenerator)):
            raise RuntimeError(f"{name} with the generator of another device")
        args, kwargs = tree_map_only(torch.device, lambda x: "cpu", (args, kwargs or {}))
        return tree_map_only(torch.Tensor, lambda x: x.as_subclass(Far if far else torch.Tensor),
                             function(*args, **kwargs))


@pytest.mark.parametrize("name", ["1_orders", "solutions/1_orders"])
def test_no_tensor_of_the_cpu_meets_one_of_the_gpu(name, monkeypatch):
    randar, tokenizer = small_model(num_classes=10, n_layer=1, grid=(2, 2)), small_tokenizer()
    for module in (*randar.modules(), *tokenizer.modules()):
        module._parameters |= {key: x if x is None else x.detach().as_subclass(Far)
                               for key, x in module._parameters.items()}
    monkeypatch.setattr(course, "load_randar", lambda path, device: randar)
    monkeypatch.setattr(course, "load_tokenizer", lambda path, device: tokenizer)
    monkeypatch.setattr(course.border, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "Generator", FarGenerator)
    world = course.open_course("L", randar="", tokenizer="", raster="")
    monkeypatch.setattr(course, "open_course", lambda model: world)

    with TwoDevices():
        names = {}
        for source in sources(FOLDER / f"{name}.ipynb", "code"):
            exec(source.replace('"toy", {}', '"L", {}'), names)  # only the toy world has a judge
        with pytest.raises(RuntimeError, match="two devices"):
            names["tokens"] + torch.arange(2)
    matplotlib.pyplot.close("all")


# ------------------------------------------------------------------------------------------------
# That they run: the slow set


@pytest.mark.notebooks
@all_of_them
def test_it_runs(path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
