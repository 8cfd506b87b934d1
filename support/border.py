"""Where a user meets the code: the command line, files, devices.

A *user's mistake* is a wrong command line, file or argument. It is a UserError, raised where the
input is checked, and ends a command in one line: what was wrong, what was expected, what to do.
Every other exception is a mistake in the code and keeps its traceback: a student must see file and
line of his own bug.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import pathlib
import shutil
import signal
import sys
import sysconfig
import tempfile

import torch
import torch.distributed as dist

MARK = b"drawn by RandAR"  # in all our pictures, near the beginning
held = contextlib.ExitStack()  # locks of the command that runs
CHECKPOINTS = pathlib.Path(__file__).resolve().parent.parent / "checkpoints"  # weights that ship


# --------------------------------------------------------------------------------------------------
# Mistakes on the command line


class UserError(ValueError):
    """A user's mistake: wrong command line, file or argument. Its message names the remedy."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake prints one line instead of the whole usage."""

    def error(self, message):
        """End the program with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def command_line(docstring):
    """A parser whose --help shows the file's own docstring, line by line."""
    return OneLineParser(description=docstring,
                         formatter_class=argparse.RawDescriptionHelpFormatter)


@contextlib.contextmanager
def one_line_errors(smaller=None):
    """Around a command: UserError -> one line, exit code 2; Ctrl-C or SIGTERM -> "stopped", 130.

    smaller: what to lower when the memory is too small, a flag for example.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how a cluster says Ctrl-C
    with contextlib.suppress(AttributeError):  # no terminal, but a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # of names that it cannot show
    try:
        yield
        if dist.is_initialized():
            dist.barrier()  # none leaves while another one may still be sending
    except UserError as error:  # all others pass: theirs is the traceback
        say("error: " + " ".join(str(error).split()))
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(130)  # as shells say it: 128 + the number of the signal
    except (MemoryError, RuntimeError) as error:  # torch, on CPUs, has no class of its own for it
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not full and "DefaultCPUAllocator" not in str(error):
            raise
        say(f"error: out of memory: {f'lower {smaller}' if smaller else 'end other programs'}")
        sys.exit(2)
    finally:
        held.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def say(text):
    """Print to stderr. Of torchrun's processes, which all say the same, one a machine does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


def number_type(kind, fits, expected):
    """An argparse type. kind: int or float; fits(number) -> bool; expected: what an error names."""

    def parse(text):
        with contextlib.suppress(ValueError):  # no number at all
            if fits(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")

    return parse


positive_int = number_type(int, lambda n: n >= 1, "a whole number of at least 1")
whole_number = number_type(int, lambda n: n >= 0, "a whole number of at least 0")
step_count = number_type(int, lambda n: n == -1 or n >= 1, "a whole number of at least 1, or -1")
seed = number_type(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 4294967295")
finite_float = number_type(float, math.isfinite, "a number")
positive_float = number_type(float, lambda x: 0 < x < math.inf, "a number above 0")
fraction = number_type(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
probability = number_type(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")


# --------------------------------------------------------------------------------------------------
# Devices, processes, signals


def pick_device(name=None):
    """The torch.device of that name; None is the GPU where there is one, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # raises what is wrong with it
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise UserError(f"cannot use device {name!r} ({error}): try --device cpu") from None
    return torch.device(name)


def join_processes(name=None):
    """(rank, processes, torch.device): the processes that torchrun started meet here."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, pick_device(name)

    # Each process takes a GPU of its own, where there are any.
    if name == "cuda" or (name is None and torch.cuda.is_available()):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL works on the current one
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")  # gloo: for CPUs
    torch._dynamo.config.optimize_ddp = False  # to compile a model as one graph, not as some 50
    return dist.get_rank(), dist.get_world_size(), device


def fast_precision(device):
    """The dtype for matrix products in training: bfloat16 where there is hardware for it."""
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = torch.cpu.get_capabilities().get("avx512_bf16")  # elsewhere it is emulated
    return torch.bfloat16 if faster else torch.float32


def decoding_precision(device):
    """bfloat16 on a GPU: half the bytes to read. Elsewhere float32, the same on all machines."""
    return fast_precision(device) if device.type == "cuda" else torch.float32


def can_compile(device):
    """Whether torch.compile works here; says what is missing. On GPUs Triton wants a C compiler."""
    if device.type != "cuda":
        missing = [] if shutil.which(os.environ.get("CXX", "g++")) else ["a C++ compiler"]
    else:
        headers = pathlib.Path(sysconfig.get_path("include"), "Python.h")
        compilers = filter(None, [os.environ.get("CC"), "gcc", "clang"])  # as Triton looks for them
        there = {"a C compiler": any(map(shutil.which, compilers)),
                 "Python's headers (python3-dev)": headers.is_file(),
                 "the package triton": importlib.util.find_spec("triton")}
        missing = [name for name, found in there.items() if not found]
    if missing:
        say(f"not compiled, so slower: install {', '.join(missing)}")
    return not missing


def stop_at_signal():
    """A list, empty until Ctrl-C or SIGTERM: a loop that looks at it stops between two steps."""
    stop = []

    def ask_to_stop(number, frame):
        # A second Ctrl-C ends the program at once. Under torchrun it is the first one, repeated.
        if stop and "WORLD_SIZE" not in os.environ:
            raise KeyboardInterrupt
        say("\nstopping after this step")
        stop.append(number)

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)
    return stop


# --------------------------------------------------------------------------------------------------
# Files: a full disk, a power cut or Ctrl-C must not cost the last good version


def write_safely(path, write):
    """Call write(temporary path), then put the file in its place in one step; makes its folder.

    UserError where it cannot be written: no permission, a full disk.
    """
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)  # a crash from here on leaves the old file as it is
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # all of it is on the disk before the old one goes
        os.replace(partial, path)  # at any moment there is a whole file of that name
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}): make room or give another place; what was "
                        "there is as it was") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def writable_folder(path, option="--out"):
    """The folder `path`, made if missing. UserError, with `option`, *before* hours of work."""
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # to try is the only way to know
    except OSError as error:
        raise UserError(f"cannot write into {path} ({error}): give another {option}") from None
    return path


@contextlib.contextmanager
def alone(out, option="--out"):
    """Around the making of a file or folder: UserError if another process is making it.

    A lock file beside it holds the number of the process. The system forgets a lock when its
    process ends, however that happens: a file that was left behind is no obstacle.
    """
    out = pathlib.Path(out).resolve()
    path = out.parent / f".{out.name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            import fcntl  # not on Windows

            out.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "a+"))
            if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first writes
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stack.callback(path.unlink, missing_ok=True)
                file.truncate(0)
                print(os.getpid(), end="", file=file, flush=True)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"process {file.read()} is writing {out}: wait until it ends, or give "
                            f"another {option}") from None
        except (ImportError, OSError):
            pass  # nobody can lock anything here: go on without
        yield


def is_ours(path):
    """Whether a picture says that we drew it."""
    return path.is_file() and MARK in open(path, "rb").read(4096)


def output(path, option="--out", others=()):
    """Keep the file `path` for this command, *before* hours of work. UserError if that cannot be.

    others: paths that the command reads or writes too, or None. A file that is there already is
    somebody's work, unless it says that we drew it.
    """
    path = pathlib.Path(path)
    try:
        taken = path.exists() and not is_ours(path)
    except OSError as error:  # not to be read; a name that is too long
        raise UserError(f"cannot write {path} ({error}): give another {option}") from None
    if path.resolve() in [pathlib.Path(other).resolve() for other in others if other]:
        raise UserError(f"{path} is another file of this command: give another {option}")
    if taken:
        raise UserError(f"{path} is there already, and no picture of ours: give another {option}, "
                        "or delete it")
    writable_folder(path.parent, option)
    held.enter_context(alone(path, option))


def save(content, path):
    """torch.save, safely. content: a dict of tensors, numbers, strings and containers of them."""

    def write(partial):
        with open(partial, "wb") as file:  # by name, torch does not say that a disk is full
            try:
                torch.save(content, file)
            except RuntimeError as error:  # so torch covers up the disk's own error
                raise error.__context__ or error

    write_safely(path, write)


def load(path, device="cpu", parts=()):
    """What `save` or a .safetensors file holds, on `device`; never runs code from a file.

    UserError for a file that is missing or damaged or lacks one of parts, the names of what it must
    hold, or where the package safetensors is missing.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: give one of train.py, tokenizer.py or a release")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file  # nobody else needs the package

            return load_file(path, device=str(device))
        content = torch.load(path, map_location=device, weights_only=True)
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from None
    except Exception as error:  # a damaged file may raise anything in torch, pickle, zip
        raise UserError(f"{path} is not a readable checkpoint, it may be truncated "
                        f"({error!r:.120}): download or train it again") from None
    if not isinstance(content, dict):  # a bare tensor, say: nothing of ours
        content = {}
    missing = [part for part in parts if part not in content]
    if missing:
        raise UserError(f"{path} has no {missing[0]!r}, so it is none of train.py: give another")
    return content
