"""Folders of images, and the folders of tokens that they become: what training reads.

Images lie in class folders, CLASS/picture.jpg, as ImageNet's do. Each becomes tokens once, so that
training never waits for a JPEG. A *token folder* holds

    meta.json        {"grid": [h, w], "codes": V, "classes": [names], "tokenizer": path, ...}: first
    tokens-0007.npy  uint16 [k, crops, N], a *shard*: N tokens in raster order, crops of k files
    labels.npy       int64 [n], the class of each file, -1 for an unreadable one: last
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from support.border import UserError, alone, writable_folder, write_safely
from support.pictures import from_uint8, open_picture

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHARD = 250  # files, the least in a shard but the last
UNREADABLE = 65535  # fills the rows of a file that cannot be read: no token is as large


# --------------------------------------------------------------------------------------------------
# Files


def list_images(folder, endings=IMAGE_ENDINGS):
    """The images in a folder of class folders: (paths, labels int64 [n], class names), sorted."""
    folder = pathlib.Path(folder)
    names = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    paths, labels = [], []  # n each
    for name in names:
        if (folder / name).resolve() in (folder.resolve(), *folder.resolve().parents):
            raise UserError(f"{folder / name} is a link to a folder that it lies in: remove it")
    for label, name in enumerate(names):
        files = sorted(map(str, (folder / name).rglob("*")))
        found = [file for file in files if file.lower().endswith(endings)]
        paths += found
        labels += [label] * len(found)

    if not paths:
        raise UserError(f"no files {', '.join(endings)} in {folder}/CLASS: give a folder with a "
                        "folder for each class")
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
    if not os.path.isfile(path):  # a named pipe, say
        return None
    try:
        tokens = np.load(path)  # never a pickle
        good = tokens.ndim == 2 and tokens.dtype.kind in "iu" and shape in (None, tokens.shape)
        good = good and 0 <= tokens.min() <= tokens.max() < codebook_size
    except Exception:  # numpy's for damaged files are as many as Pillow's
        return None
    return tokens.astype(np.uint16) if good else None


def read_all(paths, size):
    """All images in memory, uint8 [n, size, size, 3]; unreadable ones are left out and named."""
    with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock: threads suffice
        images = list(tqdm(pool.map(lambda path: read_image(path, size), paths), total=len(paths)))
    report_skipped([path for path, image in zip(paths, images) if image is None])
    return np.array([image for image in images if image is not None])


def report_skipped(paths):
    """Say which files were skipped, the first ten by name."""
    if paths:
        print(f"skipped {len(paths)} unreadable: {', '.join(paths[:10])}")


# --------------------------------------------------------------------------------------------------
# Into a token folder


def crops_of(images, size, crops):
    """Of images [b, 3, side, side]: a list of [b, 3, size, size].

    crops: 1, the centre; 2, and its mirror image; 10, corners and centre, and their mirror images.
    """
    far = images.shape[-1] - size  # where the last crop of a row starts
    places = (0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2)
    if crops < 10:
        places = places[4:]
    views = [images[:, :, top : top + size, left : left + size] for top, left in places]
    return views if crops == 1 else views + [view.flip(3) for view in views]


def encode_images(images, labels, class_names, tokenizer, tokenizer_path, out, source="", size=None,
                  crops=2, batch_size=64):
    """Turn images into the token folder `out`; interrupted and started again, it goes on.

    images: paths, or pixels uint8 [n, size, size, 3]; labels: int [n]; source: where they come
    from; size: of a crop, None: the tokenizer's.
    """
    f, device = tokenizer.config.downsampling, next(tokenizer.parameters()).device
    size = size or tokenizer.config.image_size
    if size % f:
        raise UserError(f"image size {size} is no multiple of {f}, the tokenizer's pixels a token")
    side = int(1.1 * size) if crops == 10 else size  # ten crops are cut from a larger square

    def read(image):  # a path or pixels -> uint8 [side, side, 3]
        return image if isinstance(image, np.ndarray) else read_image(image, side)

    def encode(pixels):  # uint8 [k, side, side, 3] -> [k, crops, N]
        views = crops_of(from_uint8(pixels).to(device), size, crops)  # [k, 3, size, size] each
        return torch.stack([tokenizer.encode(view) for view in views], dim=1).cpu().numpy()

    meta = {"grid": [size // f, size // f], "crops": crops, "classes": class_names,
            "images": str(source)} | facts_of(tokenizer, tokenizer_path)
    with alone(out):
        write_tokens(out, images, labels, read, encode, meta, batch_size)


def pack_tokens(folder, tokenizer, tokenizer_path, out):
    """Turn the released tokens, CLASS/*.npy with CLASS a number, into a token folder likewise."""
    paths, labels, names = list_images(folder, (".npy",))
    if not all(name.isdecimal() and len(name) <= 5 for name in names):  # 20240131 is none either
        raise UserError(f"{folder} has folders that are no class numbers: expected 0, 1, ...")
    numbers = np.array(names, np.int64)  # of the classes, in the order of their folders

    # The first file decides the shape of all.
    codes = tokenizer.config.codebook_size
    first = read_tokens(paths[0], codes)  # [crops, N]
    if first is None or math.isqrt(first.shape[1]) ** 2 != first.shape[1]:
        raise UserError(f"{paths[0]} holds no tokens of square images: expected integers "
                        f"[crops, N], below {codes}")
    side = math.isqrt(first.shape[1])

    class_names = [str(i) for i in range(numbers.max() + 1)]
    meta = {"grid": [side, side], "crops": len(first), "classes": class_names,
            "images": str(pathlib.Path(folder).resolve())} | facts_of(tokenizer, tokenizer_path)
    read = functools.partial(read_tokens, codebook_size=codes, shape=first.shape)
    with alone(out):
        write_tokens(out, paths, numbers[labels], read, np.asarray, meta, batch_size=256)


def facts_of(tokenizer, path):
    """What meta.json says of a tokenizer; its weights' fingerprint tells it from any other."""
    weights = b"".join(x.cpu().numpy().tobytes() for x in tokenizer.state_dict().values())
    return {"codes": tokenizer.config.codebook_size, "tokenizer": str(pathlib.Path(path).resolve()),
            "fingerprint": hashlib.sha256(weights).hexdigest()[:12]}


def fingerprint_of_files(paths):
    """It changes if one is added, removed, renamed, or replaced by one of another size."""
    lines = [f"{path.split(os.sep)[-2:]} {os.lstat(path).st_size}" for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def write_tokens(out, items, labels, read, convert, meta, batch_size):
    """Write what is missing of `out`; convert: items read and stacked -> tokens [k, crops, N]."""
    out, older = writable_folder(out), meta | {"files": len(items)}  # older: of earlier versions
    listing = {"listing": fingerprint_of_files(items)} if isinstance(items[0], str) else {}
    meta, path, begun = older | listing, out / "meta.json", {}
    if path.is_file():
        with contextlib.suppress(ValueError):  # damaged
            begun = json.loads(path.read_text())
    if begun not in (meta, older) and any(x.suffix in (".json", ".npy") for x in out.iterdir()):
        raise UserError(f"{out} was begun with other settings or files, see its meta.json, or by "
                        "others: give another --out, or delete it")
    if (out / "labels.npy").is_file():
        print(f"{out} is complete already")
        return
    write_safely(path, lambda partial: partial.write_text(json.dumps(meta, indent=1)))

    # At most 500 shards: each stays open in training, and 1,024 open files are the usual limit.
    size = max(SHARD, math.ceil(len(items) / 500))
    shards = [items[first : first + size] for first in range(0, len(items), size)]
    paths = [out / f"tokens-{i:04}.npy" for i in range(len(shards))]

    # A shard that exists is done: an interrupted command goes on with the next.
    with ThreadPoolExecutor() as pool, tqdm(total=len(items), unit="image") as bar:
        for shard, path in zip(shards, paths):
            if path.is_file():
                bar.update(len(shard))
                continue

            # Threads read the next images while the tokenizer is at work on a batch.
            shape = len(shard), meta["crops"], math.prod(meta["grid"])
            tokens = np.full(shape, UNREADABLE, np.uint16)
            contents = pool.map(read, shard)
            for first in range(0, len(shard), batch_size):
                batch = list(itertools.islice(contents, batch_size))
                good = [i for i, content in enumerate(batch) if content is not None]
                if good:  # the other rows stay as they are
                    tokens[first + np.array(good)] = convert(np.stack([batch[i] for i in good]))
                bar.update(len(batch))
            save_array(tokens, path)

    # The labels make the folder whole.
    try:
        first_tokens = [np.load(path, mmap_mode="r")[:, 0, 0] for path in paths]
    except (ValueError, EOFError):  # a shard of an earlier start, damaged since
        raise UserError(f"{out} is damaged: delete it and encode again") from None
    readable = np.concatenate(first_tokens) != UNREADABLE
    report_skipped([str(items[i]) for i in np.flatnonzero(~readable)])
    if not readable.any():
        raise UserError(f"none of the {len(items)} files is readable: delete {out} and give others")
    save_array(np.where(readable, labels, -1).astype(np.int64), out / "labels.npy")
    print(f"wrote {out}: {readable.sum():,} images, {len(meta['classes']):,} classes")


def save_array(array, path):
    """np.save, safely."""
    file = io.BytesIO()
    np.save(file, array)
    write_safely(path, lambda partial: partial.write_bytes(file.getvalue()))


# --------------------------------------------------------------------------------------------------
# Out of a token folder


class TokenFolder:
    """A token folder, memory-mapped: only the rows of a batch are read. UserError if it is none.

    shards: memory maps, uint16 [k, crops, N]; labels: int64 [files]. Of the readable files 1%, at
    most 5,000, are held out, always the same: `batch` never gives them, len() does not count them.
    """

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        if not (folder / "labels.npy").is_file():
            begun = (folder / "meta.json").is_file()
            what = "was begun, but is not finished" if begun else "is no token folder"
            raise UserError(f"{folder} {what}: run python tokenizer.py encode --images DIR --out "
                            f"{folder}{' again, with the flags that it had' * begun}")
        try:
            meta = json.loads((folder / "meta.json").read_text())
            self.grid, self.codebook_size = tuple(meta["grid"]), meta["codes"]
            self.class_names, self.tokenizer = meta["classes"], meta["tokenizer"]
            self.fingerprint = meta.get("fingerprint")  # None: a first one
            paths = sorted(folder.glob("tokens-*.npy"))
            paths = paths or [folder / "tokens.npy"]  # as the first version wrote them
            self.shards = [np.load(path, mmap_mode="r") for path in paths]
            self.labels, self.crops = np.load(folder / "labels.npy"), self.shards[0].shape[1]
            self.source = meta.get("images", "")  # where its images come from
            whole = sum(map(len, self.shards)) == len(self.labels)
            whole &= self.shards[0].shape[2] == math.prod(self.grid)
            whole &= all(isinstance(name, str) for name in (self.tokenizer, *self.class_names))

            # Each is read once before a training of days: no token may be beyond the codes.
            ends = np.cumsum([len(shard) for shard in self.shards])
            for shard, labels in zip(self.shards, np.split(self.labels, ends[:-1])):
                tokens = shard[labels >= 0]  # [k, crops, N]
                whole &= tokens.dtype == np.uint16 and tokens.max(initial=0) < self.codebook_size
            whole &= self.labels.dtype == np.int64 and self.labels.shape == (len(self.labels),)
            whole &= 0 <= self.labels.max() < len(self.class_names)
        except Exception:  # of numpy, json, ...
            whole = False
        if not whole:
            raise UserError(f"{folder} is damaged: delete it and encode again")

        # Held out are the first of a fixed permutation; one image at least remains to learn from.
        rows = np.flatnonzero(self.labels >= 0)
        held_out = min(max(1, len(rows) // 100), 5000, len(rows) - 1)
        shuffled = np.random.default_rng(0).permutation(rows)  # int64 [n]
        self.held_out_rows, self.rows = np.sort(shuffled[:held_out]), np.sort(shuffled[held_out:])

    def __len__(self):
        return len(self.rows)

    def read(self, rows, crops):
        """(tokens [b, N], classes [b]), int64, of files and crops given by number, ints [b]."""
        size = len(self.shards[0])  # only the last may be shorter
        tokens = [self.shards[row // size][row % size, crop] for row, crop in zip(rows, crops)]
        tokens = np.array(tokens, np.int64).reshape(-1, math.prod(self.grid))  # [b, N]
        return torch.from_numpy(tokens), torch.from_numpy(self.labels[rows])

    def held_out(self, limit=5000):
        """At most `limit` held-out images, always the same: (tokens [m, N], classes [m]), int64."""
        rows = self.held_out_rows[:limit]  # the first crop of each
        return self.read(rows, np.zeros_like(rows))

    def batch(self, number, size, seed=0, part=slice(None)):
        """Batch `number` of an endless walk: tokens [size, N], classes [size], int64; of it `part`.

        Every image comes once an epoch, in a random order and crop. A batch depends on these
        arguments alone: so a training can be resumed, or shared by processes with a part each.
        """
        places = range(number * size, (number + 1) * size)[part]  # in the walk
        epochs = [divmod(place, len(self)) for place in places]
        rows = [self.rows[epoch_order(len(self), seed, epoch)[i]] for epoch, i in epochs]
        crops = np.random.default_rng([seed, number, 1]).integers(self.crops, size=size)[part]
        return self.read(rows, crops)


@functools.lru_cache(maxsize=2)  # a batch may lie in two epochs; a million take a tenth of a second
def epoch_order(number, seed, epoch):
    """The order in which an epoch visits the images, int64 [number]; kept, not to be changed."""
    return np.random.default_rng([seed, epoch]).permutation(number)
