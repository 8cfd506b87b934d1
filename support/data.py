"""Folders of images, and the folders of tokens that they become: what training reads.

Images lie in class folders, CLASS/picture.jpg, as ImageNet's do. Each becomes tokens once, so that
training never waits for a JPEG. A *token folder* holds

    meta.json        {"grid": [h, w], "codes": V, "classes": [names], "tokenizer": path, ...}: first
    tokens-0007.npy  uint16 [k, crops, N], a *shard*: N tokens in raster order, crops of k files
    labels.npy       int64 [n], the class of each file, -1 for an unreadable one: last

A shard that exists is done: an interrupted command goes on with the next. The tokens, 6.6 GB for
ImageNet in ten crops, are never in memory as a whole.
"""

import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from support.border import UserError, writable_folder, write_safely
from support.pictures import from_uint8, open_picture

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
SHARD = 250  # files, the least in a shard but the last
UNREADABLE = 65535  # fills the rows of a file that cannot be read: no token is as large


# --------------------------------------------------------------------------------------------------
# Files


def list_images(folder, endings=IMAGE_ENDINGS, kind="images"):
    """The images in a folder of class folders: (paths, labels int64 [n], class names), sorted.

    endings, kind: of other files, and what errors call them. UserError where there are none.
    """
    folder = pathlib.Path(folder)
    wanted = f"give a folder with a folder of {kind} for each class, {folder}/CLASS"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: {wanted}")
    names = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())

    paths, labels = [], []  # n each
    for label, name in enumerate(tqdm(names, "listing", unit="class", delay=2, leave=False)):
        walk = os.walk(folder / name)
        found = [os.path.join(place, file) for place, _, files in walk for file in files]
        found = sorted(path for path in found if path.lower().endswith(endings))  # of one class
        paths += found
        labels += [label] * len(found)

    if not paths:
        raise UserError(f"{folder} has no {kind} in class folders ({', '.join(endings)}): {wanted}")
    return paths, np.array(labels, np.int64), names


def read_image(path, size):
    """uint8 [size, size, 3]: the shorter edge resized, the centre cut out. None if unreadable."""
    try:
        image = open_picture(path)
    except UserError:
        return None
    while min(image.size) >= 2 * size:  # halved first, as ADM and all after it did
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    return np.asarray(ImageOps.fit(image, (size, size), Image.BICUBIC))


def read_tokens(path, codebook_size, shape=None):
    """uint16 [crops, N] of a released token file, of that shape if given. None if unusable."""
    try:
        tokens = np.load(path, allow_pickle=False)
        crops, num_tokens = shape or tokens.shape  # two axes, else a ValueError
        good = tokens.shape == (crops, num_tokens) and math.isqrt(num_tokens) ** 2 == num_tokens
        good = good and tokens.dtype.kind in "iu"
        good = good and 0 <= tokens.min() <= tokens.max() < codebook_size
    except Exception:  # numpy's for damaged files are as many as Pillow's
        return None
    return tokens.astype(np.uint16) if good else None


def read_ahead(read, batches, workers=None):
    """For each batch, a list of items: [read(item), ...]. Threads read the next one meanwhile.

    Threads suffice: Pillow decodes without Python's lock. workers: how many, None: one a core.
    """
    workers = min(16, os.cpu_count()) if workers is None else workers  # more would wait for disks
    with ThreadPoolExecutor(max(1, workers)) as pool:
        current = None
        for batch in batches:
            ahead = pool.map(read, batch)  # starts at once
            if current is not None:
                yield list(current)
            current = ahead
        yield list(current)


def read_all(paths, size):
    """All images in memory, uint8 [n, size, size, 3]; unreadable ones are left out and named."""
    batches = [paths[i : i + 64] for i in range(0, len(paths), 64)]
    batches = tqdm(read_ahead(functools.partial(read_image, size=size), batches), "reading")
    images = [image for batch in batches for image in batch]
    report_skipped([path for path, image in zip(paths, images) if image is None], len(paths))
    return np.stack([image for image in images if image is not None])


def report_skipped(skipped, number):
    """Say which of `number` files were skipped, the first ten by name; UserError for all."""
    if len(skipped) == number:
        raise UserError(f"none of the {number} files is readable, {skipped[0]} is one: give others")
    if skipped:
        names = ", ".join(skipped[:10])
        print(f"skipped {len(skipped)} unreadable: {names}{', ...' if len(skipped) > 10 else ''}")


# --------------------------------------------------------------------------------------------------
# Into a token folder


def square_side(size, crops):
    """The side of the square that crops of `size` pixels come from: for ten, a tenth larger."""
    return int(1.1 * size) if crops == 10 else size


def crops_of(images, size, crops):
    """The crops of images [b, 3, side, side], of square_side: a list of [b, 3, size, size].

    crops: 1, the image; 2, and its mirror image; 10, corners and centre, and their mirror images.
    """
    views = [images]
    if crops == 10:
        far = images.shape[-1] - size  # where the last crop of a row starts
        corners = (0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2)
        views = [images[:, :, top : top + size, left : left + size] for top, left in corners]
    return views if crops == 1 else views + [view.flip(3) for view in views]


def encode_images(images, labels, class_names, tokenizer, tokenizer_path, out, source="", size=None,
                  crops=2, batch_size=64, workers=None):
    """Turn images into the token folder `out`; interrupted and started again, it goes on.

    images: paths, or pixels uint8 [n, side, side, 3], side = square_side(size, crops); labels: int
    [n]; source: where they come from; size: of a crop, None: the tokenizer's; workers: to read.
    """
    f, device = tokenizer.config.downsampling, next(tokenizer.parameters()).device
    size = tokenizer.config.image_size if size is None else size
    if size < f or size % f:
        raise UserError(f"image size {size} is not a multiple of {f}, the tokenizer's pixels per "
                        f"token: try {max(size // f * f, f)}")

    def encode(pixels):  # uint8 [k, side, side, 3] -> [k, crops, N]
        views = crops_of(from_uint8(pixels).to(device), size, crops)  # [k, 3, size, size] each
        return torch.stack([tokenizer.encode(view) for view in views], dim=1).cpu().numpy()

    read = functools.partial(read_image, size=square_side(size, crops))
    if isinstance(images, np.ndarray):
        read = np.asarray  # they are in memory
    meta = {"grid": [size // f, size // f], "crops": crops, "classes": class_names}
    meta |= {"images": str(source)} | facts_of(tokenizer, tokenizer_path)
    write_tokens(out, images, read, encode, labels, meta, batch_size, workers)


def pack_tokens(folder, tokenizer, tokenizer_path, out, workers=None):
    """Turn the released tokens, CLASS/*.npy with CLASS a number, into a token folder likewise."""
    paths, labels, names = list_images(folder, (".npy",), "token files")
    strange = [name for name in names if not (name.isascii() and name.isdecimal())]
    if strange:
        raise UserError(f"{folder}/{strange[0]} is no class number: expected folders 0, 1, ...")

    # The first usable file decides the shape of all.
    read = functools.partial(read_tokens, codebook_size=tokenizer.config.codebook_size)
    usable = (tokens for tokens in map(read, paths[:1000]) if tokens is not None)
    first = next(usable, None)  # [crops, N]
    if first is None:
        raise UserError(f"{paths[0]} and those after it are no tokens: expected integers [crops, "
                        f"N], N a square, below the tokenizer's {tokenizer.config.codebook_size}")

    numbers = np.array(names, np.int64)  # of the classes, in the order of their folders
    side = math.isqrt(first.shape[1])
    class_names = [str(i) for i in range(numbers.max() + 1)]
    meta = {"grid": [side, side], "crops": len(first), "classes": class_names}
    meta |= {"images": str(pathlib.Path(folder).resolve())} | facts_of(tokenizer, tokenizer_path)
    read = functools.partial(read, shape=first.shape)
    write_tokens(out, paths, read, np.asarray, numbers[labels], meta, 256, workers)


def facts_of(tokenizer, path):
    """What meta.json says of a tokenizer; its weights' fingerprint tells it from any other."""
    digest = hashlib.sha256()
    for x in tokenizer.state_dict().values():
        digest.update(x.cpu().numpy().tobytes())  # the same on every machine
    return {"codes": tokenizer.config.codebook_size, "tokenizer": str(pathlib.Path(path).resolve()),
            "fingerprint": digest.hexdigest()[:12]}


def write_tokens(out, items, read, convert, labels, meta, batch_size, workers):
    """Write what is missing of `out`; convert: items read and stacked -> tokens [k, crops, N]."""
    out = pathlib.Path(out)
    if not begin(out, meta | {"files": len(items)}):
        return

    # At most 500 shards: each stays open in training, and 1,024 open files are the usual limit.
    size = max(SHARD, math.ceil(len(items) / 500))
    shards = [range(first, min(first + size, len(items))) for first in range(0, len(items), size)]
    paths = [out / f"tokens-{i:04}.npy" for i in range(len(shards))]
    # What exists is done.
    missing = [(path, shard) for path, shard in zip(paths, shards) if not path.is_file()]

    left, row = sum(len(shard) for _, shard in missing), (meta["crops"], math.prod(meta["grid"]))
    needed, free = 2e-9 * left * math.prod(row), 1e-9 * shutil.disk_usage(out).free  # GB
    if needed > free:
        raise UserError(f"{out} needs {needed:.1f} GB, {free:.1f} are free: give another --out")

    # No batch reaches into the next shard: made again, a shard is the same to the last bit.
    batches = (items[i : min(i + batch_size, shard.stop)]
               for _, shard in missing for i in shard[::batch_size])
    contents = read_ahead(read, batches, workers)
    with tqdm(total=len(items), initial=len(items) - left, desc="tokens", unit="image") as bar:
        for path, shard in missing:
            tokens = np.full((len(shard), *row), UNREADABLE, np.uint16)

            # Rows of unreadable files stay as they are.
            for first in range(0, len(shard), batch_size):
                batch = next(contents)
                good = [i for i, content in enumerate(batch) if content is not None]  # readable
                if good:
                    tokens[first + np.array(good)] = convert(np.stack([batch[i] for i in good]))
                bar.update(len(batch))
            save_array(tokens, path)

    finish(out, paths, items, labels)


def begin(out, meta):
    """Write meta.json; False if all is done. UserError if `out` was begun with other settings."""
    writable_folder(out)
    if not (out / "meta.json").is_file():
        text = json.dumps(meta, indent=1)
        write_safely(out / "meta.json", lambda partial: partial.write_text(text))
        return True

    # A tokenizer may have been moved meanwhile: its fingerprint counts, not its path.
    then = json.loads((out / "meta.json").read_text())
    changed = [key for key in meta if key != "tokenizer" and meta[key] != then.get(key)]
    if changed:
        raise UserError(f"{out} was begun with other settings (see {', '.join(changed)} in its "
                        "meta.json): give another --out, or delete it")
    if (out / "labels.npy").is_file():
        print(f"{out} is complete already")
    return not (out / "labels.npy").is_file()


def finish(out, paths, items, labels):
    """Write labels.npy, which makes the folder whole, and say which files were skipped."""
    first_tokens = [np.load(path, mmap_mode="r")[:, 0, 0] for path in paths]
    readable = np.concatenate(first_tokens) != UNREADABLE
    if not readable.any():  # the next attempt shall read them again
        for path in (*paths, out / "meta.json"):
            path.unlink()
    report_skipped([str(items[i]) for i in np.flatnonzero(~readable)], len(items))
    save_array(np.where(readable, labels, -1).astype(np.int64), out / "labels.npy")
    folder = TokenFolder(out)
    print(f"wrote {out}: {readable.sum():,} images of {len(folder.class_names):,} classes, "
          f"{folder.crops} crops each, {folder.grid[0]} x {folder.grid[1]} tokens")


def save_array(array, path):
    """np.save, safely."""

    def write(partial):
        with open(partial, "wb") as file:
            np.save(file, array)

    write_safely(path, write)


# --------------------------------------------------------------------------------------------------
# Out of a token folder


class TokenFolder:
    """A token folder, memory-mapped: only the rows of a batch are read. UserError if it is none.

    grid (h, w), codebook_size, class_names, tokenizer (a path), crops; shards: memory maps, uint16
    [k, crops, N]; labels: int64 [files]. Of the readable files 1%, at most 5,000, are held out,
    always the same: `batch` never gives them, len() does not count them.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        for name in ("meta.json", "labels.npy"):
            if not (folder / name).is_file():
                raise UserError(f"{folder} is no token folder, or not finished: {name} is missing, "
                                f"run python tokenizer.py encode --images DIR --out {folder}")
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.grid, self.codebook_size = tuple(meta["grid"]), meta["codes"]
            self.class_names, self.tokenizer = meta["classes"], meta["tokenizer"]
            self.labels = np.load(folder / "labels.npy")
            paths = sorted(folder.glob("tokens-*.npy"))
            paths = paths or [folder / "tokens.npy"]  # as the first version wrote them
            self.shards = [np.load(path, mmap_mode="r") for path in paths]
            self.crops = self.shards[0].shape[1]
        except (LookupError, TypeError, ValueError, EOFError, OSError) as error:
            raise UserError(f"{folder} is damaged ({error}): encode the images again") from None

        rows = np.flatnonzero(self.labels >= 0)
        row = (self.crops, math.prod(self.grid))
        whole = all(shard.shape[1:] == row for shard in self.shards) and len(rows) > 0
        whole = whole and sum(len(shard) for shard in self.shards) == len(self.labels)
        if not whole or self.labels.max() >= len(self.class_names):
            raise UserError(f"{folder} is damaged (parts contradict each other): encode again")

        # Held out are the first of a fixed permutation; one image at least remains to learn from.
        held_out = min(max(1, len(rows) // 100), 5000, len(rows) - 1)
        shuffled = np.random.default_rng(0).permutation(rows)  # int64 [n]
        self.held_out_rows, self.rows = np.sort(shuffled[:held_out]), np.sort(shuffled[held_out:])

    def __len__(self):
        return len(self.rows)

    def read(self, rows, crops):
        """(tokens [b, N], classes [b]), int64, of files and crops given by number, ints [b]."""
        tokens = np.empty((len(rows), math.prod(self.grid)), np.int64)  # [b, N]
        for place, (row, crop) in enumerate(zip(rows, crops)):
            shard, inside = divmod(row, len(self.shards[0]))  # only the last may be shorter
            tokens[place] = self.shards[shard][inside, crop]
        return torch.from_numpy(tokens), torch.from_numpy(self.labels[rows])

    def held_out(self, limit=5000):
        """At most `limit` held-out images, always the same: (tokens [m, N], classes [m]), int64."""
        rows = self.held_out_rows[:limit]  # the first crop of each
        return self.read(rows, np.zeros_like(rows))

    def batch(self, number, size, seed=0, part=slice(None)):
        """Batch `number` of an endless walk: tokens [size, N], classes [size], int64; of it `part`.

        Every image comes once an epoch, in a random order and crop. A batch depends on these
        arguments alone: a training that is resumed goes on as it would have, and processes with a
        part each see together what one would see. Any thread may ask.
        """
        places = np.arange(number * size, (number + 1) * size)[part]  # in the walk
        epochs = places // len(self)
        rows = np.empty(len(places), np.int64)  # of the files
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self.rows[epoch_order(len(self), seed, epoch)[places[here] % len(self)]]
        # One crop for each image of the whole batch, of which the part takes its own.
        crops = np.random.default_rng([seed, number, 1]).integers(self.crops, size=size)[part]
        return self.read(rows, crops)


@functools.lru_cache(maxsize=2)  # a batch may lie in two epochs; a million take a tenth of a second
def epoch_order(number, seed, epoch):
    """The order in which an epoch visits the images, int64 [number]; kept, not to be changed."""
    return np.random.default_rng([seed, epoch]).permutation(number)
