"""Weights that the authors released, by one word: fetched once, then at hand."""

import http.client
import importlib.util
import os
import pathlib
from urllib.request import urlopen

import torch
import torch.distributed as dist

from support import border
from support.border import UserError

HUB = "https://huggingface.co/{}/resolve/main/{}"  # repository, file

# word: (repository, file, its tokenizer, how its authors draw from it, as decode's arguments)
RELEASED = {
    "randar-L": ("ziqipang/RandAR", "randar_0.3b_llamagen_360k_bs_1024_lr_0.0004.safetensors",
                 "llamagen", dict(cfg=(1.0, 3.4))),
    "randar-XL": ("ziqipang/RandAR", "randar_0.7b_llamagen_360k_bs_1024_lr_0.0004.safetensors",
                  "llamagen", dict(cfg=(1.0, 4.0))),
    "randar-L-maskgit": ("ziqipang/RandAR",
                         "randar_0.3b_maskgit_360k_bs_1024_lr_0.0004.safetensors",
                         "maskgit", dict(cfg=(1.0, 4.0))),
    "rar-B": ("yucornetto/RAR", "rar_b.bin", "maskgit", dict(cfg=(1.0, 16.0), power=2.75)),
    "rar-L": ("yucornetto/RAR", "rar_l.bin", "maskgit",
              dict(cfg=(1.0, 15.5), power=2.5, temperature=1.02)),
    "rar-XL": ("yucornetto/RAR", "rar_xl.bin", "maskgit",
               dict(cfg=(1.0, 6.9), power=1.5, temperature=1.02)),
    "rar-XXL": ("yucornetto/RAR", "rar_xxl.bin", "maskgit",
                dict(cfg=(1.0, 8.0), power=1.2, temperature=1.02)),
    "llamagen": ("FoundationVision/LlamaGen", "vq_ds16_c2i.pt", None, {}),
    "maskgit": ("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin", None, {}),
}


def known_of(word):
    """(the word for its tokenizer, how its authors draw: arguments of decode) of released weights.

    (None, {}) for anything else.
    """
    return RELEASED[word][2:] if word in RELEASED else (None, {})


def file_of(word):
    """The path of what a word names, fetched if it is not at hand; any other path as it is.

    Raises UserError, which says what to put where by hand, if it cannot be fetched.
    """
    if word not in RELEASED:
        return word
    repository, name, *_ = RELEASED[word]
    path = pathlib.Path(torch.hub.get_dir(), "released", name)
    if not path.is_file() and os.environ.get("LOCAL_RANK", "0") == "0":
        if name.endswith(".safetensors") and importlib.util.find_spec("safetensors") is None:
            raise UserError(f"{word} needs the package safetensors: pip install safetensors")
        address = HUB.format(repository, name)
        border.say(f"fetching {address}, once, to {path}")
        border.write_safely(path, lambda partial: fetch(address, partial, path))
    if dist.is_initialized():
        dist.barrier()  # one process a machine fetches, the others wait
    return str(path)


def fetch(address, partial, path):
    """Write the file at an address to `partial`, all of it; path: where it will lie in the end."""
    try:
        with urlopen(address, timeout=30) as answer:  # of a transfer cut short, nobody else tells
            size = answer.headers["Content-Length"]
        torch.hub.download_url_to_file(address, str(partial))
        if size not in (None, str(partial.stat().st_size)):
            raise OSError("the transfer was cut short")
    except (OSError, http.client.HTTPException) as error:  # offline, no such address, a full disk
        raise UserError(f"cannot fetch {path.name} ({error}): try again, or download {address} by "
                        f"hand, as {path}") from None
