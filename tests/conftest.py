"""Makes the files importable, wherever pytest is started from; and what many tests start from."""

import contextlib
import importlib
import pathlib
import shlex
import shutil
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402  (after the path)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from helpers import SMALL, N, V, seeded, small_model, small_tokenizer, write_images  # noqa: E402

from randar import generation_order  # noqa: E402
from support import border  # noqa: E402
from tokenizer import save_tokenizer  # noqa: E402


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def batch():
    """tokens [3, N], classes [3], order [3, N]."""
    tokens = torch.randint(V, (3, N), generator=seeded(0))
    return tokens, torch.tensor([0, 3, 4]), generation_order("random", 3, (4, 4), seeded(1))


@pytest.fixture
def attention_calls(monkeypatch):
    """A list to which every call of attention adds (query, key, value, keyword arguments)."""
    calls, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, *arguments, **options):
        calls.append((q, k, v, options))
        return attention(q, k, v, *arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with photographs, a tokenizer, tokens, a training and its pictures, made by commands."""
    folder = tmp_path_factory.mktemp("workshop")
    write_images(folder / "photos", names=("dog", "cat"), number=4, size=(24, 20))
    (folder / "photos" / "cat" / "0.png").write_text("no image")
    save_tokenizer(small_tokenizer(), folder / "tok.pt")
    with in_this_process() as run, contextlib.chdir(folder):
        run("tokenizer.py encode --images photos --out tokens --tokenizer tok.pt")
        run(f"train.py --data tokens --size tiny --steps 4 --picture-every 2 {SMALL} --out trained")
        run("sample.py --ckpt trained/randar.pt --out pictures/drawn.png --gif --steps 5")
    return folder


@pytest.fixture
def here(workshop, tmp_path, monkeypatch):
    """A copy of the workshop as the current folder."""
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def in_this_process():
    """Gives a function that runs a command line here: a new process needs seconds to start."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore Ctrl-C
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(border, "can_compile", lambda device: False)

        def run(line):
            script, *arguments = shlex.split(line)
            patch.setattr(sys, "argv", [script, *arguments])
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()

        yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run():
    with in_this_process() as run:
        yield run
