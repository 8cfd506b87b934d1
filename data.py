"""What training reads: folders of images, and the folders of tokens that they become.

Images lie in class folders, CLASS/picture.jpg, as ImageNet's do. Each is turned into tokens once, before
training, so that training never waits for a JPEG. A *token folder* holds

    tokens.npy   uint16 [n, crops, N], N tokens in raster order for each crop of each image
    labels.npy   int64 [n], the class of each image
    meta.json    {"grid": [h, w], "codes": V, "classes": [names], "tokenizer": path, "images": path}

    list_images, read_images, read_all   from files to pixels; damaged files are skipped and named
    encode_images                        from pixels to a token folder
    TokenFolder                          a token folder, opened for training
"""

import json
import math
import os
import pathlib

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import common

# ------------------------------------------------------------------------------------------------------------
# Folders of images

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
NOTHING_READABLE = "none of the images is readable: give a folder of PNG or JPEG photographs"


def list_images(folder):
    """The images in a folder of class folders: (paths, labels, class names), classes in alphabetical order.

    Raises FileNotFoundError for a missing folder, ValueError for one without class folders or images.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give one of class folders, {folder}/CLASS/picture.jpg")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not class_folders:
        raise ValueError(f"{folder} has no class folders: put the images of each class into a folder of its "
                         f"own, {folder}/CLASS/picture.jpg")
    paths, labels = [], []
    for label, class_folder in enumerate(class_folders):
        found = sorted(path for path in class_folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ValueError(f"{folder} has class folders but no images in them ({', '.join(IMAGE_ENDINGS)})")
    return paths, labels, [path.name for path in class_folders]


def read_image(path, size):
    """uint8 [size, size, 3]: the shorter edge resized to `size`, the centre cut out. Raises OSError."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's for damaged files
        raise OSError(f"unreadable image {path}: {error}") from None
    return np.asarray(ImageOps.fit(image, (size, size), Image.LANCZOS))


class ImageFiles(torch.utils.data.Dataset):
    """Image files for a DataLoader: item i is (i, uint8 [size, size, 3]), or (i, None) if unreadable."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return i, read_image(self.paths[i], self.size)
        except OSError:
            return i, None


def read_images(paths, size, batch_size=64, skipped=None):
    """Yields (indices of the files, uint8 [n, size, size, 3]) in order, read by up to two worker processes.

    Unreadable files are left out, and their paths are appended to the list `skipped`.
    """
    workers = min(2, torch.get_num_threads()) if len(paths) > batch_size else 0
    files = ImageFiles(paths, size)
    for batch in torch.utils.data.DataLoader(files, batch_size, num_workers=workers, collate_fn=list):
        good = [(i, image) for i, image in batch if image is not None]
        if skipped is not None:
            skipped += [paths[i] for i, image in batch if image is None]
        if good:
            yield [i for i, _ in good], np.stack([image for _, image in good])


def read_all(paths, size):
    """All images in memory, uint8 [n, size, size, 3]; unreadable ones are left out and named."""
    skipped = []
    batches = read_images(paths, size, skipped=skipped)
    pixels = [batch for _, batch in tqdm(batches, "reading", unit="batch", dynamic_ncols=True)]
    report_skipped(skipped)
    if not pixels:
        raise ValueError(NOTHING_READABLE)
    return np.concatenate(pixels)


def report_skipped(skipped):
    """Say which files were unreadable: the first ten by name, the others by their number."""
    if skipped:
        names = ", ".join(str(path) for path in skipped[:10]) + (", ..." if len(skipped) > 10 else "")
        print(f"skipped {len(skipped)} unreadable image{'s' * (len(skipped) > 1)}: {names}")


# ------------------------------------------------------------------------------------------------------------
# From images to tokens


def encode_images(batches, labels, class_names, source, tokenizer, tokenizer_path, out, size, crops=2):
    """Turn images into a token folder.

    batches: yields (indices, uint8 [n, size, size, 3]), as read_images does; images that never come are left
    out. labels: the class of each image; source: where they come from, a path; crops: 1, the image as it is,
    or 2, and its mirror image. The files get their names when all is done, meta.json last: a token folder is
    never half-written.
    """
    f, number = tokenizer.config.downsampling, len(labels)
    if size < f or size % f:
        raise ValueError(f"image size {size} is not a multiple of {f}, the tokenizer's pixels per token: "
                         f"try {max(size // f * f, f)}")
    out = common.writable_folder(out)
    device = next(tokenizer.parameters()).device
    grid = [size // f, size // f]
    partial = out / "tokens.npy.partial"
    try:
        tokens = np.lib.format.open_memmap(partial, "w+", np.uint16, (number, crops, math.prod(grid)))
        found = np.zeros(number, bool)
        with tqdm(total=number, desc="encoding", unit="image", dynamic_ncols=True) as bar:
            for indices, pixels in batches:
                images = common.from_uint8(pixels).to(device)
                for crop in range(crops):
                    view = images.flip(3) if crop else images
                    tokens[indices, crop] = tokenizer.encode(view).cpu().numpy()
                found[indices] = True
                bar.update(len(indices))
        if not found.any():
            raise ValueError(NOTHING_READABLE)
        (out / "meta.json").unlink(missing_ok=True)  # of what is replaced now
        if found.all():
            tokens.flush()
            os.replace(partial, out / "tokens.npy")
        else:
            write_array(out / "tokens.npy", tokens[found])
        write_array(out / "labels.npy", np.asarray(labels, np.int64)[found])
    finally:
        partial.unlink(missing_ok=True)
    meta = {"grid": grid, "codes": tokenizer.config.codes, "classes": class_names,
            "tokenizer": str(pathlib.Path(tokenizer_path).resolve()), "images": str(source)}
    common.write_safely(out / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=1)))


def write_array(path, array):
    def write(partial):
        with open(partial, "wb") as file:
            np.save(file, array)
    common.write_safely(path, write)


# ------------------------------------------------------------------------------------------------------------
# Reading tokens


class TokenFolder:
    """A token folder, memory-mapped: only the rows of a batch are read.

    Attributes: tokens uint16 [n, crops, N], labels int64 [n], grid (h, w), codes, class_names, tokenizer and
    source (paths). Raises FileNotFoundError or ValueError where the folder is none, or its parts contradict
    each other.
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
            self.source = meta.get("images")
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
            self.labels = np.load(folder / "labels.npy")
            damaged = self.labels.min() < 0 or self.labels.max() >= len(self.class_names)
        except (KeyError, TypeError, AttributeError, ValueError, EOFError) as error:
            raise ValueError(f"{folder} is damaged ({error}): encode the images again") from None
        shape = self.tokens.shape
        if len(shape) != 3 or shape[0] != len(self.labels) or shape[2] != math.prod(self.grid) or damaged:
            raise ValueError(f"{folder} contradicts itself: tokens {list(shape)}, {len(self.labels)} labels "
                             f"of {len(self.class_names)} classes, grid {list(self.grid)}: encode the images "
                             "again")

    def __len__(self):
        return len(self.tokens)

    def batch(self, number, size, seed=0):
        """Batch `number` of an endless walk: (tokens [size, N], classes [size]), int64.

        Every image comes once in each epoch, in an order of its own, in a random crop. The batch depends on
        the arguments alone, so a training that is resumed sees the very images it would have seen.
        """
        places = np.arange(number * size, (number + 1) * size)
        epochs = places // len(self)
        rows = np.empty(size, np.int64)
        for epoch in np.unique(epochs):
            shuffled = np.random.default_rng([seed, epoch]).permutation(len(self))
            rows[epochs == epoch] = shuffled[places[epochs == epoch] % len(self)]
        crops = np.random.default_rng([seed, number, 1]).integers(self.tokens.shape[1], size=size)
        tokens = self.tokens[rows, crops].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(self.labels[rows])
