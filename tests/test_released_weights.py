"""Released weights by one word: fetched once, here from a server on this machine, and drawn from."""

import functools
import http.server
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import files_of

import sample
import tokenizer
from rar import RAR, RARConfig
from support import border, released
from tokenizer import Tokenizer, TokenizerConfig

WEIGHTS = "yucornetto/RAR/rar_b.bin"  # in the folder hub
TOKENIZER = "fun-research/TiTok/maskgit-vqgan-imagenet-f16-256.bin"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server of what lies in hub/; hub.asked: paths asked for; hub.cut: transfers lack the last byte."""

    class Hub(http.server.SimpleHTTPRequestHandler):
        asked, cut = [], False

        def do_GET(self):
            self.asked.append(self.path[1:])
            super().do_GET()

        def copyfile(self, source, output):
            content = source.read()
            output.write(content[: len(content) - self.cut])

        def log_message(self, *_):
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "cache")
    handler = functools.partial(Hub, directory="hub")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        Hub.address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(released, "HUB", Hub.address + "{}/{}")
        yield Hub
        server.shutdown()


def upload(path, state):
    """Put weights onto the server, as torch writes them."""
    Path("hub", path).parent.mkdir(parents=True)
    torch.save(state, Path("hub", path))


def test_one_word_fetches_weights_and_tokenizer_once_and_draws_as_their_authors_do(hub, run, capsys,
        monkeypatch):
    small = RARConfig(dim=32, n_layer=1, n_head=2, mlp=64)  # all else as in the released file
    upload(WEIGHTS, RAR(small).state_dict())
    bricks = TokenizerConfig(8, (1, 1, 1, 1, 1), 1, 16, 1024, 16, maskgit=True)  # the real ones: slow
    monkeypatch.setattr(tokenizer, "MASKGIT_VQ16", bricks)
    upload(TOKENIZER, Tokenizer(bricks).state_dict())

    run("sample.py --ckpt rar-B --classes 207 --number 1")
    out, said = capsys.readouterr()
    assert "256 steps, order raster, cfg 1 to 16, " in out and Path("samples.png").is_file()
    assert f"fetching {hub.address}{WEIGHTS}, once, to cache/released/rar_b.bin" in said
    assert set(hub.asked) == {WEIGHTS, TOKENIZER}
    for path in (WEIGHTS, TOKENIZER):
        assert Path("cache/released", Path(path).name).read_bytes() == Path("hub", path).read_bytes()

    hub.asked.clear()
    sample.load_models("rar-B", "maskgit")
    assert hub.asked == []


@pytest.mark.parametrize("word, expected", [
    ("randar-L", dict(cfg=(1, 3.4), power=None, temperature=1)),
    ("rar-XL", dict(cfg=(1, 6.9), power=1.5, temperature=1.02)),
    ("rar-XL --cfg 2 3 --temperature 1", dict(cfg=[2, 3], power=1.5, temperature=1)),
    ("own.pt", dict(cfg=(1, 4), power=None, temperature=1))])
def test_guidance_is_the_authors_where_the_user_gives_none(monkeypatch, word, expected):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", *word.split()])
    assert sample.decoding_options(sample.parse()).items() >= expected.items()


@pytest.mark.parametrize("trouble", ["404", "cut short", "Connection refused"])
def test_what_cannot_be_fetched_is_one_line_with_the_place_for_it_and_no_half_file(
        hub, monkeypatch, trouble):
    if trouble == "cut short":
        upload(WEIGHTS, {})
        hub.cut = True
    if trouble == "Connection refused":
        monkeypatch.setattr(released, "HUB", "http://127.0.0.1:1/{}/{}")
    with pytest.raises(border.UserError, match=trouble) as error:
        released.file_of("rar-B")
    by_hand = f"download {released.HUB.format(*released.RELEASED['rar-B'])} by hand, as cache/released/rar_b"
    assert by_hand in str(error.value) and "\n" not in str(error.value)
    assert files_of(Path("cache/released")) == {}


def test_the_package_that_a_file_needs_is_missed_before_it_is_fetched(hub, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(border.UserError, match="pip install safetensors"):
        released.file_of("randar-L")
    assert hub.asked == []
