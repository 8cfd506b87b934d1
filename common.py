"""What every command shares, and none of the method: errors in one line, files that are never half-written,
pictures.

    command_line, one_line_errors   a user's mistake ends in one line that names the remedy, and exit code 2
    join_processes                  which of torchrun's processes this is, and on which device it works
    Linear, product, matrix_rate    matrix products, twice as fast on some CPUs; how fast they are here
    save, load, write_safely        checkpoints and pictures, written beside their place and then renamed
    read_picture, picture_grid      what people would rather see than read
"""

import argparse
import contextlib
import os
import pathlib
import pickle
import shutil
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

CHECKPOINTS = pathlib.Path(__file__).resolve().parent / "checkpoints"  # the small trained weights that ship


# ------------------------------------------------------------------------------------------------------------
# The border: a mistake on the command line


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake prints one line instead of the whole usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def command_line(docstring):
    """A parser whose --help shows the file's own docstring and the default of each option."""
    return OneLineParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


@contextlib.contextmanager
def one_line_errors():
    """Functions raise ValueError or OSError for a caller's mistake; a command prints it and exits with 2."""
    try:
        yield
    except OSError as error:  # its own text starts with "[Errno 13]", which helps nobody
        where = f": {os.fsdecode(error.filename)}, check the path" if error.filename else ""
        sys.exit(_complain(f"{error.strerror}{where}" if error.strerror else str(error)))
    except ValueError as error:
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        _say("stopped")
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _complain(text):
    _say("error: " + " ".join(text.split()))
    return 2


def _say(text):
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the same in each of many processes, a machine says it once
        print(text, file=sys.stderr)


def pick_device(name=None):
    """The torch.device of that name; None is the GPU where there is one, else the CPU. Raises ValueError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot use device {name!r} ({reason}): try --device cpu") from None
    return torch.device(name)


def join_processes(name=None):
    """(rank, number of processes, torch.device) of this process: (0, 1, pick_device(name)) if it is alone.

    Started by torchrun, it joins the others: each GPU process takes a device of its own. Raises ValueError.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, pick_device(name)
    if name == "cuda" or name is None and torch.cuda.is_available():
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus > 0:
            raise ValueError(f"{here} processes for {gpus} GPUs: give torchrun --nproc-per-node {gpus}")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def fast_precision(device):
    """The dtype for matrix products in training: bfloat16 where the hardware has it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    faster = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if faster else torch.float32


def can_compile(device):
    """Whether torch.compile works here: on a CPU it writes C++ and needs a compiler for it."""
    return device.type == "cuda" or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl")))


# ------------------------------------------------------------------------------------------------------------
# Matrix products on a CPU
#
# PyTorch leaves those in float32 to the library MKL, which on AMD uses half of what the processor can do.
# oneDNN, which PyTorch has on board as well (for bfloat16, and for what torch.compile makes), uses all of it:
# it is twice as fast on an EPYC, with a few dozen rows as with thousands. Results differ by rounding only.


class Linear(nn.Linear):
    """nn.Linear, with its product in float32 on a CPU left to oneDNN."""

    def forward(self, x):
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not uses_onednn(x):
            return super().forward(x)
        return Product.apply(x, self.weight, self.bias)


def uses_onednn(x):
    here = x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return here and x.dtype is torch.float32 and x.numel() > 0


def product(x, weight, bias=None):
    """x [..., k] times weight [n, k] transposed, plus bias [n]: [..., n], in float32 by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """`product` with its gradients, two products more."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, len(weight))  # [rows, n]
        return (product(gradient, weight.t()) if needs_x else None,
                product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None,
                rows.sum(0) if needs_bias else None)


def matrix_rate(device, dtype, side=8192, repeats=10):
    """Operations a second that this device reaches in large matrix products: the peak to measure by."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    multiply = product if uses_onednn(a) else torch.matmul  # what Linear takes
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        multiply(a, b)[0, 0].item()  # which waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / sorted(seconds)[repeats // 2]


def stop_at_signal():
    """A list that is empty until Ctrl-C (or SIGTERM, a cluster's way to say the same) is pressed.

    A loop that looks at it stops between two steps, never within one. A second Ctrl-C ends the program at
    once; not under torchrun, which passes every signal on to processes that have had it from the terminal.
    """
    stop, many = [], "WORLD_SIZE" in os.environ

    def ask_to_stop(number, frame):
        if not stop:
            _say("\nstopping after this step" + " (once more: at once)" * (not many))
        if not many:
            signal.signal(number, signal.SIG_DFL)
        stop.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    return stop


# ------------------------------------------------------------------------------------------------------------
# Files: a power cut, a full disk or Ctrl-C must not cost the last good version


def write_safely(path, write):
    """Call write(temporary path), then put the file in its place in one step. Makes a missing folder."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:  # on the disk, not only on its way there, before the old one goes
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def writable_folder(path, option="--out"):
    """The folder `path`, made where it is missing. Raises OSError *before* hours of work, not after.

    option: of the command, which gives another place.
    """
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable{os.getpid()}"  # processes that share the work may look at the same time
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write into {path} ({error.strerror}): give another place, {option}") from None
    return path


def save(content, path):
    """torch.save, safely. `content`: a dict of tensors, numbers, strings and containers of them."""
    write_safely(path, lambda partial: torch.save(content, partial))


def load(path, device="cpu"):
    """What `save` or a .safetensors file holds, on `device`; never runs code from a file.

    Raises FileNotFoundError, or ValueError where the file is damaged or the package safetensors is missing.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give a file that train.py or tokenizer.py made, "
                                "or a released one")
    if pathlib.Path(path).suffix == ".safetensors":
        return load_safetensors(path, device)
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = reason.split(". ")[0][:120]
        raise ValueError(f"{path} is not a readable checkpoint, it may be truncated ({reason}): "
                         "download or train it again") from None


def load_safetensors(path, device):
    try:
        from safetensors.torch import load_file
        return load_file(path, device=str(device))
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from None
    except Exception as error:  # safetensors raises a type of its own for a damaged file
        raise ValueError(f"{path} is not a readable safetensors file ({error}): download it again") from None


def half_precision(state_dict):
    """The state dict in float16: half the size on disk; load_state_dict turns it back into float32."""
    return {name: x.half() if x.is_floating_point() else x for name, x in state_dict.items()}


# ------------------------------------------------------------------------------------------------------------
# Pictures


def to_uint8(images):
    """[n, 3, h, w] float in [-1, 1] -> numpy uint8 [n, h, w, 3]."""
    pixels = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(pixels):
    """numpy uint8 [n, h, w, 3] -> [n, 3, h, w] float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def open_picture(path):
    """The picture in a file as PIL's Image, RGB and upright. Raises OSError for one missing or unreadable."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (FileNotFoundError, IsADirectoryError):
        raise
    except Exception as error:  # a damaged file may raise anything in Pillow, and must not end a long work
        raise OSError(f"unreadable image {os.fsdecode(path)}: {error}") from None


def read_picture(path):
    """The picture in a file, as large as it is: [3, H, W] in [-1, 1]. Raises OSError."""
    return from_uint8(np.array(open_picture(path))[None])[0]


def picture_grid(pixels, row_labels, title=""):
    """A labelled picture: one row of images for each label.

    pixels: uint8 [n, h, w, 3], row after row, n = rows * columns; row_labels: one string a row; title: one
    line on top. Small images are enlarged by a whole factor with hard pixel edges: what the model drew,
    nothing smoothed. Returns a PIL image.
    """
    rows = len(row_labels)
    columns = len(pixels) // rows
    height, width = pixels.shape[1:3]
    scale = max(1, 96 // max(height, width))
    gap = 6
    font = ImageFont.load_default(size=15)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = gap + int(max(measure.textlength(label, font=font) for label in row_labels)) + gap
    top = gap + (22 if title else 0)
    cell_height, cell_width = height * scale + gap, width * scale + gap
    size = (max(margin + columns * cell_width, int(measure.textlength(title, font=font)) + 2 * gap),
            top + rows * cell_height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap - 2), title, fill="black", font=font)
    for i, image in enumerate(pixels[: rows * columns]):
        row, column = divmod(i, columns)
        enlarged = Image.fromarray(image).resize((width * scale, height * scale), Image.NEAREST)
        sheet.paste(enlarged, (margin + column * cell_width, top + row * cell_height))
        if column == 0:
            middle = top + row * cell_height + height * scale // 2
            draw.text((margin - gap, middle), row_labels[row], fill="black", font=font, anchor="rm")
    return sheet


def picture_format(path):
    """The format that a picture's name asks for. Raises ValueError for one that we do not write."""
    kinds = {"": "png", ".png": "png", ".gif": "gif", ".jpg": "jpeg", ".jpeg": "jpeg"}
    kind = kinds.get(pathlib.Path(path).suffix.lower())
    if kind is None or pathlib.Path(path).is_dir():
        raise ValueError(f"cannot write a picture as {path}: give a name that ends in .png or .gif")
    return kind


def save_picture(picture, path, **options):
    """Write a PIL image as a PNG (or GIF, with its options), safely."""
    kind = picture_format(path)
    write_safely(path, lambda partial: picture.save(partial, format=kind, **options))
