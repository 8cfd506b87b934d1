"""What training reads: folders of images, and the folders of tokens that they become.

Images lie in class folders, CLASS/picture.jpg, as ImageNet's do. Each is turned into tokens once, before
training, so that training never waits for a JPEG. A *token folder* holds

    tokens.npy   uint16 [n, crops, N], N tokens in raster order for each crop of each of the n files
    labels.npy   int64 [n], the class of each; -1 for an unreadable file, whose tokens are all 0
    meta.json    {"grid": [h, w], "codes": V, "classes": [names], "tokenizer": path, "images": path}

ImageNet in ten crops is a tokens.npy of 6.6 GB. Nothing here holds it, or anything that grows with it but the
file names and labels, in memory: it is written batch by batch, and read through a memory map.

    list_images, read_files, read_all   from files to pixels; damaged files are skipped and named
    encode_images, pack_tokens          from pixels, or from the released token files, to a token folder
    TokenFolder                         a token folder, opened for training
"""

import functools
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import pathlib
import shutil
import signal
import threading
import time

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import common

# ------------------------------------------------------------------------------------------------------------
# Folders of files
#
# A million file names in a Python list are a million objects, and each process that looks at one of them
# writes to it (its reference count): workers forked to read files would soon copy the whole list. File names
# are therefore kept as a numpy array of bytes, 65 MB for ImageNet, which stays shared.

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
NOTHING_READABLE = "none of the images is readable: give a folder of PNG or JPEG photographs"


def list_images(folder):
    """The images in a folder of class folders: (paths, labels, class names), classes in alphabetical order.

    paths: numpy array of bytes [n] (os.fsdecode makes them strings); labels: int64 [n]. Raises
    FileNotFoundError for a missing folder, ValueError for one without class folders or images.
    """
    return list_files(folder, IMAGE_ENDINGS, "images", "CLASS/picture.jpg")


def list_files(folder, endings, kind, example):
    """As list_images, for files of other endings; kind and example say in errors what was looked for."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give one of class folders, {folder}/{example}")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise ValueError(f"{folder} has no class folders: put the {kind} of each class into a folder of its "
                         f"own, {folder}/{example}")
    paths = []  # an array for each class
    for name in tqdm(names, "listing", unit="class", delay=2, leave=False, dynamic_ncols=True):
        found = [os.path.join(place, file) for place, _, files in os.walk(folder / name) for file in files
                 if file.lower().endswith(endings)]
        paths.append(np.array(sorted(map(os.fsencode, found)), dtype=np.bytes_))
    labels = np.repeat(np.arange(len(names)), [len(found) for found in paths])
    if not len(labels):
        raise ValueError(f"{folder} has class folders but no {kind} in them ({', '.join(endings)}); released "
                         "tokens become a token folder by python tokenizer.py pack")
    return np.concatenate(paths), labels, names


def read_image(path, size):
    """uint8 [size, size, 3]: the shorter edge resized to `size`, the centre cut out. Raises OSError.

    Resized by bicubic interpolation with antialiasing, as ImageNet is for the released tokenizers.
    """
    image = common.open_picture(path)
    while min(image.size) >= 2 * size:  # halved first, as ADM and all after it did
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    return np.asarray(ImageOps.fit(image, (size, size), Image.BICUBIC))


class ImageFiles(torch.utils.data.Dataset):
    """Image files for read_files: item i is uint8 [size, size, 3], or None if unreadable."""
    kind = "unreadable image"

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return read_image(self.paths[i], self.size)
        except OSError:
            return None


def read_files(files, first=0, batch_size=64, workers=None):
    """Iterates over (readable, contents) of batches of consecutive files, from number `first` on.

    files: a Dataset whose items are arrays of one shape, or None for an unreadable file; readable: bool [k],
    which of the batch's k files are; contents: these, stacked, or None where there are none. workers:
    processes that read (default: as many as there are cores, at most 16; none for what is in memory already).
    """
    workers = min(16, os.cpu_count()) if workers is None else workers
    workers = 0 if isinstance(files, np.ndarray) or len(files) - first <= batch_size else workers
    return torch.utils.data.DataLoader(files, batch_size, sampler=range(first, len(files)),
                                       num_workers=workers, collate_fn=stack_readable,
                                       worker_init_fn=follow_the_command)


def stack_readable(items):
    good = [item for item in items if item is not None]
    return np.array([item is not None for item in items]), np.stack(good) if good else None


def follow_the_command(worker):
    """What a reading process does first: leave Ctrl-C to the command that it works for, but end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    command = os.getppid()

    def watch():  # a command that was killed cannot send its workers home
        while os.getppid() == command:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_all(paths, size):
    """All images in memory, uint8 [n, size, size, 3]; unreadable ones are left out and named."""
    batches = tqdm(read_files(ImageFiles(paths, size)), "reading", unit="batch", dynamic_ncols=True)
    readable, pixels = zip(*batches)
    report_skipped(paths[~np.concatenate(readable)], ImageFiles.kind)
    if not np.concatenate(readable).any():
        raise ValueError(NOTHING_READABLE)
    return np.concatenate([batch for batch in pixels if batch is not None])


def report_skipped(paths, kind):
    """Say which files were skipped, and why: the first ten by name, the others by their number."""
    if len(paths):
        names = ", ".join(map(os.fsdecode, paths[:10])) + (", ..." if len(paths) > 10 else "")
        print(f"skipped {len(paths)} {kind}{'s' * (len(paths) > 1)}: {names}")


# ------------------------------------------------------------------------------------------------------------
# From images to tokens


def square_side(size, crops):
    """The side of the square from which crops of `size` pixels come: the paper's ten from one 10% larger."""
    return int(1.1 * size) if crops == 10 else size


def crops_of(images, size, number):
    """The crops of images [b, 3, side, side], side = square_side(size, number): list of [b, 3, size, size].

    number: 1, the image; 2, and its mirror image; 10, four corners and the centre, and their mirror images.
    """
    views = [images]
    if number == 10:
        far = images.shape[-1] - size
        places = (0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2)
        views = [images[:, :, top : top + size, left : left + size] for top, left in places]
    return views if number == 1 else views + [view.flip(3) for view in views]


def encode_images(images, labels, class_names, source, tokenizer, tokenizer_path, out, size, crops=2,
                  batch_size=64, workers=None):
    """Turn images into a token folder; started again after an interruption it goes on where it was.

    images: paths [n] from list_images, or pixels, uint8 [n, side, side, 3], side = square_side(size, crops).
    labels: the class of each; source: where they come from, a path; size: of a crop, in pixels; crops: 1, 2
    or 10, see crops_of; batch_size: images at a time; workers: see read_files. Says which it skipped.
    """
    config, f = tokenizer.config, tokenizer.config.downsampling
    if size < f or size % f:
        raise ValueError(f"image size {size} is not a multiple of {f}, the tokenizer's pixels per token: "
                         f"try {max(size // f * f, f)}")
    device = next(tokenizer.parameters()).device

    def encode(pixels):  # uint8 [k, side, side, 3] -> [k, crops, N]
        views = crops_of(common.from_uint8(pixels).to(device), size, crops)
        return torch.stack([tokenizer.encode(view) for view in views], dim=1).cpu().numpy()

    files = images if images.ndim == 4 else ImageFiles(images, square_side(size, crops))
    weights = fingerprint(x.cpu().numpy().tobytes() for x in tokenizer.state_dict().values())
    settings = {"tokenizer": f"{pathlib.Path(tokenizer_path).name} ({weights})", "image size": size,
                "crops": crops}
    meta = {"grid": [size // f, size // f], "codes": config.codes, "classes": class_names,
            "tokenizer": str(pathlib.Path(tokenizer_path).resolve()), "images": str(source)}
    write_tokens(files, encode, crops, labels, meta, settings, out, batch_size, workers)


# ------------------------------------------------------------------------------------------------------------
# From the released tokens to ours: a folder for each class number, in it a file for each image


class TokenFiles(torch.utils.data.Dataset):
    """.npy files for read_files: item i is uint16 [crops, N], or None if unusable.

    Usable are integers from 0 to codes - 1 in the shape of the first usable file, which may have any number
    of crops and N tokens of a square grid. Raises ValueError where there is none.
    """

    kind, __len__ = "unusable token file", ImageFiles.__len__

    def __init__(self, paths, codes):
        self.paths, self.codes, self.shape = paths, codes, None
        for i in range(min(1000, len(paths))):  # if none of so many can be used, something else is wrong
            if (tokens := self[i]) is not None:
                self.shape = tokens.shape
                return
        raise ValueError(f"{os.fsdecode(paths[0])} and those after it are no tokens: expected .npy files of "
                         f"integers [crops, N], N a square, below {codes}, the codes of the --tokenizer")

    def __getitem__(self, i):
        try:
            tokens = np.load(os.fsdecode(self.paths[i]), allow_pickle=False)
            crops, number = self.shape or tokens.shape
            good = tokens.shape == (crops, number) and math.isqrt(number) ** 2 == number
            good = good and tokens.dtype.kind in "iu" and 0 <= tokens.min() <= tokens.max() < self.codes
            return tokens.astype(np.uint16) if good else None
        except Exception:  # numpy's for damaged files are as many as Pillow's
            return None


def pack_tokens(folder, tokenizer, tokenizer_path, out, workers=None):
    """Turn the released tokens, CLASS/*.npy with CLASS a number, into a token folder; as encode_images.

    The classes' names are their numbers, from "0" on. Raises FileNotFoundError, ValueError if nothing fits.
    """
    paths, labels, names = list_files(folder, (".npy",), "token files", "0/image.npy")
    for name in names:
        if not (name.isascii() and name.isdecimal()):
            raise ValueError(f"{folder}/{name} is no class number: expected folders 0, 1, ... of .npy files")
    numbers = np.array(names, np.int64)
    files = TokenFiles(paths, tokenizer.config.codes)
    crops, side = files.shape[0], math.isqrt(files.shape[1])
    settings = {"codes": files.codes, "crops": crops, "tokens": files.shape[1]}
    meta = {"grid": [side, side], "codes": files.codes, "classes": [str(i) for i in range(numbers.max() + 1)],
            "tokenizer": str(pathlib.Path(tokenizer_path).resolve()),
            "images": str(pathlib.Path(folder).resolve())}
    write_tokens(files, np.asarray, crops, numbers[labels], meta, settings, out, 256, workers)


# ------------------------------------------------------------------------------------------------------------
# The one way into a token folder
#
# Hours of work must survive Ctrl-C, a crash and a power cut. Tokens are appended to tokens.npy.partial; from
# time to time they are forced onto the disk, and only then does progress.json say how many there are. What
# lies beyond is written again, in the same batches, so that the result is the same to the last bit. The files
# get their names when all is done, meta.json last: a token folder is never half-written.

SECONDS_BETWEEN_SAVES = 30


def write_tokens(files, convert, crops, labels, meta, settings, out, batch_size, workers):
    """Read files, turn them into tokens, and write the token folder `out`, or go on where it was interrupted.

    files: as for read_files; convert: their contents, stacked -> tokens [k, crops, N]; labels: int [n]; meta:
    the content of meta.json; settings: what must be as it was before an interruption, beside the files. Says
    which files it skipped. Raises ValueError if none is readable, if the disk is too small, or if `out` was
    begun with other settings.
    """
    number, shape = len(files), (crops, math.prod(meta["grid"]))
    row = 2 * math.prod(shape)  # bytes
    labels = np.array(labels, np.int64)
    names = (os.path.basename(path) + b"/" for path in getattr(files, "paths", ()))
    listed = fingerprint([json.dumps(meta["classes"]).encode(), labels], names)
    settings = {"images": meta["images"], "files": f"{number} ({listed})"} | settings
    if finished(pathlib.Path(out), settings):
        print(f"{out} is complete already")
        return
    done, skipped = unfinished(pathlib.Path(out), number, row, settings)
    out = common.writable_folder(out)
    needed, free = (number - done) * row / 1e9, shutil.disk_usage(out).free / 1e9
    if needed > free:
        raise ValueError(f"{out} needs {needed:.1f} GB, {free:.1f} GB are free: give another place, --out")

    partial, progress = out / "tokens.npy.partial", out / "progress.json"
    if done < number:
        with (open(partial, "r+b" if done else "wb") as file,
              tqdm(initial=done, total=number, desc="tokens", unit="image", dynamic_ncols=True) as bar):
            header = {"descr": "<u2", "fortran_order": False, "shape": (number, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            file.seek(done * row, os.SEEK_CUR)
            file.truncate()

            def save():
                file.flush()
                os.fsync(file.fileno())
                state = {"settings": settings, "done": done, "skipped": [i for i in skipped if i < done]}
                common.write_safely(progress, lambda path: path.write_text(json.dumps(state)))

            try:
                saved = time.monotonic()
                for readable, contents in read_files(files, done, batch_size, workers):
                    rows = np.zeros((len(readable), *shape), "<u2")
                    if readable.any():
                        rows[readable] = convert(contents)
                    file.write(rows)
                    skipped += (done + np.flatnonzero(~readable)).tolist()
                    done += len(readable)
                    bar.update(len(readable))
                    if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                        save()
                        saved = time.monotonic()
            finally:
                save()
                if done < number:
                    bar.close()
                    print(f"{done:,} of {number:,} images are kept: the same command goes on from there")
    if len(skipped) == number:
        partial.unlink()
        progress.unlink()
        raise ValueError(NOTHING_READABLE)
    (out / "meta.json").unlink(missing_ok=True)  # of what is replaced now
    if partial.is_file():
        os.replace(partial, out / "tokens.npy")
    labels[skipped] = -1
    with io.BytesIO() as file:
        np.save(file, labels)
        common.write_safely(out / "labels.npy", lambda path: path.write_bytes(file.getvalue()))
    meta = json.dumps(meta | {"settings": settings}, indent=1)
    common.write_safely(out / "meta.json", lambda path: path.write_text(meta))
    progress.unlink()
    if skipped:
        report_skipped(files.paths[skipped], files.kind)


def finished(out, settings):
    """Whether `out` holds what these settings make; a ValueError where others made it."""
    if not (out / "meta.json").is_file() or (out / "progress.json").is_file():
        return False
    same_settings(out, TokenFolder(out).settings or {}, settings, "give another --out, or delete it")
    return True


def same_settings(out, then, now, remedy):
    """Raises ValueError for different settings, rather than lose what hours of work have made."""
    differences = ", ".join(f"{name}: {then.get(name, 'none')} then, {now.get(name, 'none')} now"
                            for name in then | now if then.get(name) != now.get(name))
    if differences:
        raise ValueError(f"{out} was begun with other settings ({differences}): {remedy}")


def unfinished(out, number, row, settings):
    """(files done, numbers of the unreadable ones) of an interrupted write_tokens, (0, []) if there is none.

    number: of files; row: bytes of each. Raises ValueError where other settings began it.
    """
    partial, progress = out / "tokens.npy.partial", out / "progress.json"
    if not progress.is_file() or (out / "meta.json").is_file() and not partial.is_file():
        return 0, []
    try:
        state = json.loads(progress.read_text())
        done, skipped, then = state["done"], state["skipped"], state["settings"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{progress} is damaged: delete it to start anew") from None
    if done:
        same_settings(out, then, settings, "finish it with the first, give another --out, or delete "
                      f"{progress} to start anew")
    whole = partial.stat().st_size > done * row if partial.is_file() else done == number
    return (done, skipped) if whole else (0, [])


def fingerprint(*parts):
    """Twelve letters that change with the parts, iterables of bytes."""
    digest = hashlib.sha256()
    for part in itertools.chain(*parts):
        digest.update(part)
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------
# Reading tokens


class TokenFolder:
    """A token folder, memory-mapped: only the rows of a batch are read.

    Attributes: tokens uint16 [files, crops, N], of all files; rows int64 [n], which of them are readable, and
    labels int64 [n], their classes; grid (h, w), codes, class_names, tokenizer and source (paths), settings.
    Raises FileNotFoundError or ValueError where the folder is none, or its parts contradict each other.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        for name in ("meta.json", "tokens.npy", "labels.npy"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is no token folder, {name} is missing: make one with "
                                        "python tokenizer.py encode --images DIR --out DIR")
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.grid, self.codes = tuple(meta["grid"]), meta["codes"]
            self.class_names, self.tokenizer = meta["classes"], meta["tokenizer"]
            self.source, self.settings = meta.get("images"), meta.get("settings")
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
            labels = np.load(folder / "labels.npy")
            damaged = labels.min() < -1 or not -1 < labels.max() < len(self.class_names)
        except (KeyError, TypeError, AttributeError, ValueError, EOFError) as error:
            raise ValueError(f"{folder} is damaged ({error}): encode the images again") from None
        shape = self.tokens.shape
        if len(shape) != 3 or shape[0] != len(labels) or shape[2] != math.prod(self.grid) or damaged:
            raise ValueError(f"{folder} contradicts itself: tokens {list(shape)}, {len(labels)} labels "
                             f"of {len(self.class_names)} classes, grid {list(self.grid)}: encode the images "
                             "again")
        self.rows = np.flatnonzero(labels >= 0)
        self.labels = labels[self.rows]
        if hasattr(mmap, "MADV_RANDOM"):  # else each row of half a kilobyte drags 128 of its neighbours along
            self.tokens.base.madvise(mmap.MADV_RANDOM)

    def __len__(self):
        return len(self.rows)

    def batch(self, number, size, seed=0, part=slice(None)):
        """Batch `number` of an endless walk: (tokens [size, N], classes [size]), int64; of it, `part` only.

        Every image comes once in each epoch, in an order of its own, in a random crop. The batch depends on
        the arguments alone, so a training that is resumed sees the very images it would have seen, and many
        processes, each with a part of its own, see together what one would see. Any thread may ask.
        """
        places = np.arange(number * size, (number + 1) * size)[part]
        epochs = places // len(self)
        chosen = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = epoch_order(len(self), seed, epoch)[places[here] % len(self)]
        crops = np.random.default_rng([seed, number, 1]).integers(self.tokens.shape[1], size=size)[part]
        tokens = self.tokens[self.rows[chosen], crops].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(self.labels[chosen])


@functools.lru_cache(maxsize=2)  # a batch may lie in two epochs; a million images take a tenth of a second
def epoch_order(number, seed, epoch):
    """The order in which an epoch visits the images, int64 [number]; not to be changed, it is kept."""
    return np.random.default_rng([seed, epoch]).permutation(number)
