"""What several test files share: small models with weights far from zero, images, commands as typed."""

import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import torch
from golden import fill
from PIL import Image

import rar
from randar import Config, RandAR
from tokenizer import Tokenizer, TokenizerConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
N, V, C = 16, 32, 5  # tokens, codes and classes of the small model
SMALL = "--batch-size 4 --report 1"  # for train.py
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONUNBUFFERED": "1"}


def small_model(**changes):
    """Two layers with weights that are far from zero, so that everything has an influence; in eval mode."""
    settings = dict(grid=(4, 4), vocab_size=V, num_classes=C, dim=32, n_layer=2, n_head=2) | changes
    model = RandAR(Config(**settings))
    model.load_state_dict(fill.state_for({name: p.shape for name, p in model.named_parameters()}))
    return model.eval()


def small_model_of(kind):
    """A model of another kind, as training begins; in eval mode."""
    model_class, config_class = rar.KINDS[kind]
    more = dict(mlp=64) if kind == "rar" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = dict(grid=(4, 4), vocab_size=V, num_classes=C, dim=32, n_layer=2, n_head=2)
        return model_class(config_class(**settings, **more)).eval()


def small_tokenizer(**changes):
    """4 x 4 pixels a token, 16 x 16 images, with weights from a fixed seed; in eval mode."""
    settings = dict(channels=8, multipliers=(1, 1, 2), latent_channels=8, codebook_size=V, code_dim=4,
                    image_size=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tokenizer(TokenizerConfig(**settings | changes)).eval()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def inputs_of(module):
    """A list to which every call of the module adds its first input."""
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def write_images(folder, names=("cat", "dog"), number=3, size=(16, 16)):
    """A folder of class folders with `number` PNG images of noise each; size: (width, height)."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(number):
            pixels = rng.integers(256, size=(*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def files_of(folder):
    """All that is below a folder: {path: content, None for a folder}."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def typed(line, folder, processes=None):
    """The command line for subprocess, in a new process; relative paths are those of `folder`.

    processes: torchrun starts that many.
    """
    script, *arguments = shlex.split(line)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes else []), str(ROOT / script), *arguments]
    return dict(args=command, cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE)


def run_typed(line, folder, processes=None):
    """Run a command to its end; returns what it wrote to stdout."""
    process = subprocess.run(**typed(line, folder, processes), timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def arguments_of(golden):
    """Tokens, classes and orders of a reference output (an .npz), as models take them."""
    return [torch.from_numpy(golden[name]) for name in ("tokens", "classes", "order")]
