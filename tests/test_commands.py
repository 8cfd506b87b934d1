"""The commands as users type them: documented ones parse, a mistake is one line, bugs keep a traceback."""

import importlib
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL, files_of, typed
from PIL import Image

import randar
from support import border, pictures

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
    script = (ROOT / "studies" / "gpu.sh").read_text().replace("\\\n", " ")
    return found | {line: "gpu.sh" for line in re.findall(r"python -m .*?(?= 2>)", script)}


def test_the_page_to_step_through_is_its_template_with_data_and_nothing_from_elsewhere():
    page = (ROOT / "docs" / "step.html").read_text()
    before, after = (ROOT / "docs" / "step_template.html").read_text().split("{{DATA}}")
    assert page.startswith(before) and page.endswith(after)
    assert len(page) < 2e6 and page.count("\n") <= 600 and not re.search(r"https?:|@import|<link|src=", page)
    for run in json.loads(page[len(before) : -len(after)])["runs"]:  # its own tokens are patches 0 .. 63
        decided = [patch for step in run["steps"] for patch in step["drawn"][: step["decides"]]]
        assert decided == list(range(64)) and sorted(run["turns"]) == decided


class Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("line", sorted(commands()))
def test_every_command_in_the_documents_parses(line, monkeypatch):
    words = shlex.split(line)
    while words and not words[0].endswith(".py") and not (words[0].count(".") and "/" not in words[0]):
        words.pop(0)  # python, -m, torchrun and its flags
    if "pytest" in line or "notebooks/save.py" in line or not words:  # save.py: nbclient may be missing
        pytest.skip("not a command of ours, or one with requirements of its own")
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
                 "studies.bench --size XXL", "studies.evaluate", "studies.miniature", "support.toy"):
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
    "sample.py --ckpt trained/randar.pt --classes bird": "no class 'bird'.*cat, dog",  # an unknown name
    "sample.py --ckpt trained/randar.pt --order zigzag": "zigzag.*random",  # an unknown choice
    "sample.py --ckpt trained/randar.pt --out photos/cat/1.png/a.png": "cannot write",  # no such place
    "sample.py --ckpt trained/randar.pt --device meta": "device 'meta'.*--device cpu",  # holds no numbers
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
# Nobody's work is overwritten

SAMPLE = "sample.py --ckpt trained/randar.pt --number 2 --steps 2"
KEPT = {  # a file that was there before, or a command's own input, stays
    f"{SAMPLE} --out photos/cat/1.png": "photos/cat/1.png is there already, .* another --out",
    f"{SAMPLE} --npz trained/training.pt": "training.pt is there already, .* another --npz",
    f"{SAMPLE} --gif --out a.gif": "a.gif is another file of this command",
    "apps.py inpaint --image pictures/drawn.png --out pictures/drawn.png": "another file of this command",
    "tokenizer.py train --data photos --steps 1 --out tok.pt": "tok.pt is there already",
    "tokenizer.py encode --images photos --tokenizer tok.pt --out shards": "shards was begun",
    "train.py --data tokens --steps 1 --out own": "own/log.jsonl is there already: give another --out",
    "train.py --data tokens --steps 1 --out other": "other/tokenizer.pt is another tokenizer",
    "train.py --size tiny --steps 1 --out my": "my/tokens holds tokens of .*photos: add --data my/tokens",
    "studies/evaluate.py --samples a.npz --out own/log.jsonl": "own/log.jsonl is there already",
    "train.py --size tiny --steps 1 --out other": "other/tokenizer.pt is another tokenizer",
    f"{SAMPLE} --out {'a' * 300}.png": "cannot write aaa.* too long",
    "studies/features.py --out photos/cat/1.png": "photos/cat/1.png is there already",
    "studies/bench.py --seconds 1 --out own": "own/bench.json is there already",
    "support/judge.py --steps 1 --out tok.pt": "tok.pt is there already"}


@pytest.mark.parametrize("line", KEPT)
def test_what_a_command_did_not_make_is_refused_before_the_work_and_stays(here, run, capsys, line):
    for file in ("own/log.jsonl", "own/bench.json", "other/tokenizer.pt", "shards/labels.npy"):
        (here / file).parent.mkdir(exist_ok=True)
        (here / file).write_text("somebody's")
    shutil.copytree("tokens", "my/tokens")
    before = files_of(here)
    with pytest.raises(SystemExit, match="2"):
        run(line)
    assert re.search(KEPT[line], capsys.readouterr().err) and files_of(here) == before


def test_a_picture_of_ours_is_replaced_by_the_next_one(here, run):
    drawn = []
    for seed in (1, 2):
        run(f"{SAMPLE} --gif --seed {seed}")
        drawn.append((here / "samples.gif").read_bytes())
    assert drawn[0] != drawn[1]


def test_a_training_that_was_killed_before_its_first_checkpoint_starts_again(here, run):
    pictures.save_picture(Image.new("RGB", (8, 8)), "new/samples.png")  # after 50 steps
    shutil.copy("tok.pt", "new/tokenizer.pt")
    run(f"train.py --data tokens --size tiny --steps 1 {SMALL} --out new")
    assert (here / "new/training.pt").is_file()


def test_what_another_process_is_writing_is_refused_until_that_one_has_ended(here, run, capsys):
    wait = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from support import border\n"
    wait += "with border.alone('new'): print('ready', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"ready\n"
    for line in (f"train.py --data tokens --size tiny --steps 1 {SMALL} --out new",
                 "tokenizer.py encode --images photos --tokenizer tok.pt --out new"):
        with pytest.raises(SystemExit, match="2"):
            run(line)
        assert f"process {other.pid} is writing {here}/new: wait" in capsys.readouterr().err
    other.kill()  # its lock file stays, which is no obstacle
    other.communicate()
    run(line)
    assert (here / "new" / "labels.npy").is_file() and not list(here.glob(".*.lock"))


# ------------------------------------------------------------------------------------------------
# What the machine lacks is one line, too


def test_a_full_disk_is_one_line_and_the_last_good_file_stays(here, monkeypatch):
    def full(content, file):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 946368 vs 946256")  # as torch covers it up

    before = files_of(here / "trained")
    monkeypatch.setattr(border.torch, "save", full)
    with pytest.raises(border.UserError, match="cannot write trained/training.pt .*No space left"):
        border.save({}, "trained/training.pt")
    assert files_of(here / "trained") == before


def test_too_little_memory_is_one_line_that_names_the_flag_to_lower(here, run, monkeypatch, capsys):
    monkeypatch.setattr(randar.RandAR, "decode", lambda *_, **__: randar.torch.empty(10**15))
    with pytest.raises(SystemExit, match="2"):
        run(SAMPLE)
    assert capsys.readouterr().err.endswith("error: out of memory: lower --batch-size\n")


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
