"""Pictures: tensors to pixels and back, files, labelled grids, animations.

Images are float tensors [n, 3, h, w] in [-1, 1] where networks see them, *pixels* are numpy arrays
uint8 [n, h, w, 3] everywhere else.
"""

import io
import math
import os
import pathlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from support.border import MARK, UserError, write_safely

UNDECODED = 200  # the grey of positions that are not decoded yet
# What is read. Pillow goes by content, not by name, and hands PostScript to another program.
FORMATS = "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"


def to_uint8(images):
    """[n, 3, h, w] float in [-1, 1] -> numpy uint8 [n, h, w, 3]."""
    pixels = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(pixels):
    """numpy uint8 [n, h, w, 3] -> [n, 3, h, w] float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(images, painted):
    """Peak signal-to-noise ratio of each image in dB, [b]; both [b, 3, H, W] in [-1, 1]."""
    error = ((images - painted) / 2).square().mean((1, 2, 3))  # of pixels in [0, 1]
    return -10 * error.clamp_min(1e-10).log10()


def open_picture(path, background="white"):
    """The picture in a file as PIL's Image, RGB and upright; a transparent one on a background.

    UserError if it is missing or unreadable.
    """
    try:
        if not os.path.isfile(path):  # from a named pipe one would read for ever
            raise OSError("no such file")
        with Image.open(path, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # of which `convert` would cut off all above 255
                return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise OSError("32 bits a pixel, and nobody knows which number is white")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
            return image.convert("RGB")
    except Exception as error:  # a damaged file may raise anything in Pillow
        raise UserError(f"unreadable image {os.fsdecode(path)} ({error}): give another") from None


def read_picture(path, background="white"):
    """The picture in a file, as large as it is: [3, H, W] in [-1, 1]. UserError."""
    return from_uint8(np.array(open_picture(path, background))[None])[0]


def with_dots(pixels, points, zoom=4):
    """Pixels uint8 [H, W, 3] -> [1, 3, 4 H, 4 W], each point (x, y) a dot of its own colour."""
    image = Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1))
    colours = "red", "lime", "blue", "yellow", "magenta", "cyan"  # toy objects have six points
    for (x, y), colour in zip(points.tolist(), colours):
        ImageDraw.Draw(image).circle((zoom * x, zoom * y), 5, fill=colour, outline="black", width=2)
    return from_uint8(np.array(image)[None])


# --------------------------------------------------------------------------------------------------
# Labelled grids and animations


def picture_grid(rows, title=""):
    """A labelled PIL picture; rows: (label, pixels uint8 [n, h, w, 3]) of each.

    Shorter rows end in white. title: one line on top. Small images are enlarged with hard pixel
    edges: what the model drew.
    """
    columns, gap, white = max(len(row) for _, row in rows), 6, np.full_like(rows[0][1][0], 255)
    cells = [image for _, row in rows for image in [*row, *[white] * (columns - len(row))]]
    scale = max(1, 96 // max(white.shape[:2]))
    cells = np.stack(cells).repeat(scale, 1).repeat(scale, 2)
    cells = np.pad(cells, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)  # [n, H, W, 3]
    lines = [np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    grid, height = Image.fromarray(np.vstack(lines)), cells.shape[1]

    # Labels to the left, the title above
    font = ImageFont.load_default(size=15)
    margin = gap + int(max(font.getlength(label) for label, _ in rows)) + gap
    top = gap + (22 if title else 0)
    width = max(margin + grid.width, int(font.getlength(title)) + 2 * gap)
    sheet = Image.new("RGB", (width, top + grid.height), "white")
    sheet.paste(grid, (margin, top))
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap - 2), title, fill="black", font=font)
    for row, (label, _) in enumerate(rows):
        middle = top + row * height + (height - gap) // 2
        draw.text((margin - gap, middle), label, fill="black", font=font, anchor="rm")
    return sheet


def draw_gif(pixels, steps, f, path):
    """Write an animation: grey pictures fill up in the order of decoding, in four seconds.

    pixels: uint8 [n, H, W, 3], the finished pictures; steps: int [n, h, w], the step that decoded
    each token; f: pixels a token. A token's pixels appear, as they are in the end, in its step.
    """
    number, columns = int(steps.max()) + 1, math.ceil(math.sqrt(len(pixels) * 2))
    step_of_pixel = steps.repeat(f, axis=1).repeat(f, axis=2)[..., None]  # [n, H, W, 1]

    frames = []
    for step in range(number + 1):
        cells = np.where(step_of_pixel < step, pixels, np.uint8(UNDECODED))
        rows = [("", cells[i : i + columns]) for i in range(0, len(cells), columns)]
        frames.append(picture_grid(rows, f"step {step} of {number}"))

    durations = [4000 // number] * number + [2000]  # milliseconds; the last one stays
    save_picture(frames[0], path, save_all=True, append_images=frames[1:], duration=durations,
                 loop=0)


def picture_format(path):
    """The format that a picture's name asks for. UserError for one that we do not write."""
    kinds = {".png": "png", ".gif": "gif", ".jpg": "jpeg", ".jpeg": "jpeg"}
    kind = kinds.get(pathlib.Path(path).suffix.lower())
    if kind is None:
        raise UserError(f"cannot write a picture as {path}: give a name that ends in .png, .jpg or "
                        ".gif")
    return kind


def save_picture(picture, path, **options):
    """Write a PIL image as a PNG (or GIF, with its options), safely; it says that we drew it."""
    kind, info = picture_format(path), PngInfo()
    info.add_text("Software", MARK.decode())
    options |= {"pnginfo": info} if kind == "png" else {"comment": MARK}
    write_safely(path, lambda partial: picture.save(partial, format=kind, **options))


def save_figure(figure, path):
    """Write a figure of matplotlib likewise."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    save_picture(Image.open(file).convert("RGB"), path)
