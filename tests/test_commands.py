"""The commands as users type them: README's parse, mistakes are one line, bugs keep their traceback."""

import importlib
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL, files_of, typed

import randar
from support import border

# ------------------------------------------------------------------------------------------------
# Every command that the documents show


def documents():
    return [ROOT / "README.md", ROOT / "notebooks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """{line: document} of the lines of fenced blocks and of `...` that run one of the project's files."""
    found = {}
    for document in documents():
        text = document.read_text().replace("\\\n", " ")
        blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M))
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
        for line in [*blocks.splitlines(), *inline]:
            for part in line.split("&&"):
                part = part.split("#")[0].strip()
                if re.match(r"(python|torchrun) ", part) and "..." not in part:
                    found[part] = document.name
    return found


def test_the_page_to_step_through_is_its_template_with_data_and_nothing_from_elsewhere():
    page = (ROOT / "docs" / "step.html").read_text()
    before, after = (ROOT / "docs" / "step_template.html").read_text().split("{{DATA}}")
    assert page.startswith(before) and page.endswith(after)
    assert len(page) < 2e6 and page.count("\n") <= 600 and not re.search(r"https?:|@import|<link|src=", page)
    for run in json.loads(page[len(before) : -len(after)])["runs"]:  # the picture's tokens are patches 0 .. 63
        decided = [patch for step in run["steps"] for patch in step["drawn"][: step["decides"]]]
        assert decided == list(range(64)) and sorted(run["turns"]) == decided


class Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("line", sorted(commands()))
def test_every_command_in_the_documents_parses(line, monkeypatch):
    words = shlex.split(line)
    while words and not words[0].endswith(".py") and not (words[0].count(".") and "/" not in words[0]):
        words.pop(0)  # python, -m, torchrun and its flags
    if "pytest" in line or not words:
        pytest.skip("not a command of ours")
    module = words[0].removesuffix(".py").replace("/", ".")
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"there is no {words[0]}"

    original = border.OneLineParser.parse_args

    def parse_args(self, *arguments):
        original(self, *arguments)
        raise Parsed

    monkeypatch.setattr(border.OneLineParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit if "--help" in line else Parsed):
        importlib.import_module(module).main()


def test_the_documents_show_commands_of_every_file():
    said = " ".join(commands())
    for name in ("train.py", "sample.py", "apps.py inpaint", "apps.py extrapolate", "tokenizer.py encode",
                 "studies.bench", "studies.evaluate", "studies.miniature", "support.toy"):
        assert name in said, name


def test_every_picture_and_file_that_the_documents_link_to_exists():
    for document in documents():
        for paths in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", document.read_text()):
            path = "".join(paths)  # one of the two
            assert path.startswith("http") or (document.parent / path).exists(), (document.name, path)


# ------------------------------------------------------------------------------------------------
# Mistakes of the user: one line, exit code 2, nothing written. One of each kind.

MISTAKES = {
    "sample.py --ckpt nowhere.pt": "nowhere.pt",  # a missing file
    "sample.py --ckpt tok.pt": "holds no weights of RandAR or RAR",  # a wrong file
    "sample.py --ckpt trained/randar.pt --steps 0": "--steps",  # a number out of range
    "sample.py --ckpt trained/randar.pt --steps many": "--steps",  # no number
    "sample.py --ckpt trained/randar.pt --classes bird": "no class 'bird'.*cat, dog",  # an unknown name
    "sample.py --ckpt trained/randar.pt --order zigzag": "zigzag.*random",  # an unknown choice
    "sample.py --ckpt trained/randar.pt --out photos/cat/1.png/a.png": "cannot write",  # no such place
    "sample.py --ckpt trained/randar.pt --device nonsense": "device 'nonsense'.*--device cpu",
    "studies/bench.py --seconds -1": "--seconds",
    "train.py --data nowhere": "nowhere",
    "train.py --size L": "tokens",  # a large model wants tokens, not the toy world
    "train.py --data photos": "tokenizer.py encode --images",  # tokens come first
    "tokenizer.py encode --images nowhere --out new": "nowhere",
    "tokenizer.py": "train|encode",  # a part of the command is missing
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_two_and_no_trace(here, run, capsys, line):
    before = files_of(here)
    with pytest.raises(SystemExit) as stop:
        run(line)
    out, errors = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and len(errors.splitlines()) == 1
    assert re.search(MISTAKES[line], errors), errors
    assert files_of(here) == before


def test_a_mistake_typed_for_real_is_no_traceback(workshop):
    process = subprocess.run(**typed("train.py --data nowhere --out new", workshop), timeout=120)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# Mistakes in the code: a student who edits the model must see file and line of his own bug


@pytest.mark.parametrize("line", [f"train.py --data tokens --steps 1 {SMALL} --out new",
                                  "sample.py --ckpt trained/randar.pt --steps 2"])
def test_a_programming_error_keeps_its_traceback(here, run, monkeypatch, line):
    def rotate(x, cos_sin):
        a, b = (1, 2, 3)

    monkeypatch.setattr(randar, "rotate", rotate)
    with pytest.raises(ValueError, match="too many values to unpack") as error:
        run(line)
    assert pathlib.Path(error.traceback[-1].path).name == "test_commands.py"
