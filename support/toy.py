"""Two toy worlds: endless labelled pictures, drawn here, so that all can be measured exactly.

Ten classes of storybook icons vary in colour, background, x, y, size and flip. Because we draw them
we know all there is to know: the class, and where the named parts are. In the *plain* world, 32 x
32 pixels, objects are about equally large, near the middle: a small model learns it in minutes. In
the *fine* world, 64 x 64, they are near or far, anywhere, now and then cut by the border, and the
horizon is high or low: a part of an object has been seen small and large.
`python -m support.toy` writes toy.png, a labelled sheet of examples.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from support import border, pictures

CLASSES = "face fish flower house car tree boat butterfly mushroom rocket".split()
WORLDS = {"plain": 32, "fine": 64}  # and the width and height of their pictures, in pixels
SIDE = 32  # of a plain picture; the unit of all lengths is 1/32 of a picture's width, in any world
OVERSAMPLING = 4  # drawn four times as large, then averaged: Pillow has no smooth edges of its own

# Flat colours, few of them, and a horizon on a multiple of four pixels: a tokenizer that spends one
# token on 4 x 4 pixels can give most of its codes to edges and details.
COLOURS = {
    "red": (222, 52, 56), "orange": (247, 138, 26), "yellow": (252, 208, 40),
    "green": (32, 148, 92), "blue": (38, 104, 222), "purple": (158, 66, 186)}
BACKGROUNDS = {  # above and below the horizon
    "meadow": ((186, 226, 248), (142, 206, 118)), "sunset": ((255, 208, 196), (86, 150, 176)),
    "night": ((44, 44, 90), (222, 232, 246)), "room": ((238, 230, 242), (206, 166, 138))}
DARK, WHITE, CREAM, BROWN = (36, 30, 44), (255, 255, 255), (255, 230, 190), (112, 66, 44)
LEAF, GLASS, FLAME, GOLD = (26, 112, 62), (204, 238, 255), (255, 112, 28), (255, 214, 64)


class Pen:
    """Object coordinates in, pixels out: objects are described in a square of -1..1, y downwards.

    canvas: the picture, oversampled; zoom: its pixels for each of 32 units; colour: RGB; x, y: the
    centre; size: 1 is 11 units. The pen alone knows place, size and flip; keypoints pass through it
    too, and cannot disagree.
    """

    def __init__(self, canvas, zoom, colour, x, y, size, flip):
        self.draw, self.zoom, self.colour = ImageDraw.Draw(canvas), zoom, colour
        self.shade = tuple(int(0.7 * channel) for channel in colour)  # wings, roof, fins
        self.x, self.y, self.unit, self.mirror = x, y, 11.0 * size, -1 if flip else 1

    def place(self, x, y):
        """Where the object's coordinates (x, y) are, in units from the top-left corner."""
        return self.x + self.mirror * self.unit * x, self.y + self.unit * y

    def polygon(self, colour, *points):
        """A filled polygon through points (x, y)."""
        places = [self.place(x, y) for x, y in points]
        # Pillow's whole numbers are the centres of pixels, ours are their corners: hence the half.
        corners = [(self.zoom * x - 0.5, self.zoom * y - 0.5) for x, y in places]
        self.draw.polygon(corners, fill=colour)

    def box(self, colour, left, top, right, bottom):
        """A filled rectangle."""
        self.polygon(colour, (left, top), (right, top), (right, bottom), (left, bottom))

    def ellipse(self, colour, x, y, rx, ry, turn=0, start=0, end=360):
        """Centre, radii, clockwise turn; from start to end, clockwise from the right (degrees)."""
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        angles = [math.radians(start + (end - start) * k / 28) for k in range(29)]
        arc = [(rx * math.cos(a), ry * math.sin(a)) for a in angles]  # 28 sides look round
        self.polygon(colour, *[(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in arc])

    def line(self, colour, x0, y0, x1, y1):
        """A straight line of 1.2 pixels at least, even at the smallest size."""
        length = math.hypot(x1 - x0, y1 - y0)  # (u, v) is half the width, across the line
        u, v = 0.07 * (y1 - y0) / length, 0.07 * (x0 - x1) / length
        self.polygon(colour, (x0 + u, y0 + v), (x1 + u, y1 + v), (x1 - u, y1 - v), (x0 - u, y0 - v))


# --------------------------------------------------------------------------------------------------
# Ten objects. Each draws from back to front and returns its keypoints in unit coordinates. The main
# part has the picture's colour, a second one its shade. "left" and "right" are as seen.


def face(pen):  # ears behind the head, a cream muzzle, a laughing mouth
    for x in (-0.7, 0.7):
        pen.ellipse(pen.colour, x, -0.66, 0.34, 0.34)
        pen.ellipse(CREAM, x, -0.66, 0.17, 0.17)
    pen.ellipse(pen.colour, 0, 0.1, 0.95, 0.88)
    pen.ellipse(CREAM, 0, 0.46, 0.5, 0.38)
    pen.ellipse(DARK, -0.4, -0.12, 0.16, 0.19)
    pen.ellipse(DARK, 0.4, -0.12, 0.16, 0.19)
    pen.ellipse(DARK, 0, 0.4, 0.28, 0.28, end=180)
    return {"left eye": (-0.4, -0.12), "right eye": (0.4, -0.12), "mouth": (0, 0.5),
            "chin": (0, 0.95), "left ear": (-0.7, -0.66), "right ear": (0.7, -0.66)}


def fish(pen):  # it looks to the right
    pen.polygon(pen.shade, (-0.4, 0), (-1, -0.56), (-0.84, 0), (-1, 0.56))  # tail
    pen.polygon(pen.shade, (-0.3, -0.3), (-0.12, -0.82), (0.5, -0.4))  # back fin
    pen.polygon(pen.shade, (-0.1, 0.4), (-0.12, 0.78), (0.35, 0.42))  # belly fin
    pen.ellipse(pen.colour, 0.22, 0, 0.8, 0.54)
    pen.polygon(WHITE, (0.12, -0.54), (0.3, -0.54), (0.24, 0), (0.3, 0.54), (0.12, 0.54), (0.04, 0))
    pen.ellipse(WHITE, 0.62, -0.1, 0.24, 0.24)
    pen.ellipse(DARK, 0.66, -0.1, 0.15, 0.15)
    return {"mouth": (0.98, 0.08), "eye": (0.66, -0.1), "back fin": (-0.08, -0.6),
            "belly fin": (-0.05, 0.62), "tail": (-0.72, 0)}


def flower(pen):  # six petals round a disc
    pen.box(LEAF, -0.1, 0.1, 0.1, 1)  # stem
    pen.ellipse(LEAF, 0.42, 0.64, 0.4, 0.2, turn=-35)
    for k in range(6):
        angle = math.radians(60 * k + 30)
        pen.ellipse(pen.colour, 0.48 * math.cos(angle), -0.3 + 0.48 * math.sin(angle), 0.31, 0.31)
    pen.ellipse(WHITE, 0, -0.3, 0.29, 0.29)
    return {"disc": (0, -0.3), "top petal": (0, -0.86), "left petal": (-0.48, -0.3),
            "right petal": (0.48, -0.3), "leaf": (0.46, 0.6), "stem foot": (0, 0.94)}


def house(pen):  # a chimney behind the wall and the roof
    pen.box(BROWN, 0.4, -0.9, 0.66, -0.3)  # chimney
    pen.box(pen.colour, -0.78, -0.15, 0.78, 0.95)  # wall
    pen.polygon(pen.shade, (-1, -0.1), (0, -0.95), (1, -0.1))  # roof
    pen.box(BROWN, -0.5, 0.3, -0.1, 0.95)
    pen.box(CREAM, 0.2, 0.15, 0.6, 0.55)
    return {"roof top": (0, -0.88), "chimney": (0.53, -0.78), "door": (-0.3, 0.62),
            "window": (0.4, 0.35), "left eave": (-0.9, -0.14), "right eave": (0.9, -0.14)}


def car(pen):  # it drives to the right
    pen.polygon(pen.colour, (-0.84, 0.1), (-0.54, -0.6), (0.34, -0.6), (0.68, 0.1))
    pen.polygon(GLASS, (-0.62, 0.04), (-0.42, -0.42), (-0.16, -0.42), (-0.16, 0.04))
    pen.polygon(GLASS, (0.02, 0.04), (0.02, -0.42), (0.24, -0.42), (0.46, 0.04))
    pen.polygon(pen.colour, (-1, 0.64), (-1, 0.14), (-0.9, 0.02), (0.8, 0.02), (1, 0.2), (1, 0.64))
    pen.ellipse(GOLD, 0.88, 0.28, 0.13, 0.13)
    for x in (-0.54, 0.54):
        pen.ellipse(DARK, x, 0.62, 0.33, 0.33)
        pen.ellipse(WHITE, x, 0.62, 0.13, 0.13)
    return {"rear wheel": (-0.54, 0.62), "front wheel": (0.54, 0.62), "headlight": (0.88, 0.28),
            "roof": (-0.1, -0.52), "rear window": (-0.32, -0.16), "front window": (0.18, -0.16)}


def tree(pen):  # four round boughs on a trunk
    pen.polygon(BROWN, (-0.16, 0.2), (0.16, 0.2), (0.24, 1), (-0.24, 1))  # trunk
    for x, y, radius in ((-0.45, 0.02, 0.48), (0.45, 0.02, 0.48), (0, -0.42, 0.58), (0, 0.1, 0.4)):
        pen.ellipse(pen.colour, x, y, radius, radius)
    return {"top": (0, -0.92), "crown": (0, -0.2), "left bough": (-0.8, 0.02),
            "right bough": (0.8, 0.02), "trunk": (0, 0.68)}


def boat(pen):  # two sails, the larger one in front
    pen.box(BROWN, -0.16, -1, 0, 0.5)  # mast
    pen.polygon(pen.colour, (0, -0.92), (0.88, 0.36), (0, 0.36))
    pen.polygon(pen.shade, (-0.16, -0.7), (-0.16, 0.36), (-0.84, 0.36))
    pen.polygon(BROWN, (-1, 0.44), (1, 0.44), (0.66, 0.95), (-0.66, 0.95))
    return {"mast top": (-0.07, -0.94), "main sail": (0.28, -0.08), "fore sail": (-0.4, 0.06),
            "bow": (-0.9, 0.5), "stern": (0.9, 0.5), "keel": (0, 0.88)}


def butterfly(pen):  # wings turned outwards, in pairs
    for side in (-1, 1):
        pen.line(DARK, 0, -0.4, 0.3 * side, -0.88)
        pen.ellipse(pen.shade, 0.46 * side, 0.48, 0.42, 0.34, turn=45 * side)
        pen.ellipse(pen.colour, 0.54 * side, -0.26, 0.54, 0.4, turn=-35 * side)
        pen.ellipse(CREAM, 0.64 * side, -0.32, 0.18, 0.18)
    pen.ellipse(DARK, 0, 0.06, 0.13, 0.66)
    return {"head": (0, -0.5), "left wing": (-0.64, -0.32), "right wing": (0.64, -0.32),
            "left hind wing": (-0.46, 0.5), "right hind wing": (0.46, 0.5), "tail": (0, 0.64)}


def mushroom(pen):  # a half-round cap with three dots
    pen.polygon(CREAM, (-0.26, 0.1), (0.26, 0.1), (0.36, 0.95), (-0.36, 0.95))  # stem
    pen.ellipse(pen.colour, 0, 0.15, 1, 1.05, start=180)
    for x, y, radius in ((-0.55, -0.12, 0.17), (0.02, -0.52, 0.2), (0.5, -0.1, 0.2)):
        pen.ellipse(WHITE, x, y, radius, radius)
    return {"top": (0, -0.84), "middle dot": (0.02, -0.52), "left brim": (-0.9, 0.08),
            "right brim": (0.9, 0.08), "stem foot": (0, 0.88)}


def rocket(pen):  # a flame and two fins behind the body
    pen.polygon(FLAME, (-0.32, 0.5), (0.32, 0.5), (0, 1.08))  # behind all else
    for side in (-1, 1):
        root, tip = (0.3 * side, -0.05), (0.8 * side, 0.5)
        pen.polygon(pen.shade, root, tip, (0.8 * side, 0.76), (0.2 * side, 0.6))
    pen.ellipse(pen.colour, 0, -0.18, 0.46, 0.84)
    pen.ellipse(WHITE, 0, -0.28, 0.25, 0.25)
    return {"nose": (0, -0.92), "window": (0, -0.28), "left fin": (-0.64, 0.58),
            "right fin": (0.64, 0.58), "flame": (0, 0.8)}


OBJECTS = [face, fish, flower, house, car, tree, boat, butterfly, mushroom, rocket]  # as CLASSES


# --------------------------------------------------------------------------------------------------
# Pictures


def world_of(model, tokenizer):
    """The name of the world that a model has learnt, or None: its classes and picture size tell."""
    side = model.config.grid[0] * tokenizer.config.downsampling  # pixels
    known = {size: world for world, size in WORLDS.items()}
    return known.get(side) if model.class_names == CLASSES else None


def folder(world):
    """Where the networks that have learnt a world are: tokenizer.pt, judge.pt."""
    return border.CHECKPOINTS if world == "plain" else border.CHECKPOINTS / world


def draw(class_index, rng, world="plain", side=None, **fixed):
    """One picture of a class; what varies comes from rng, except what the caller fixes by name.

    class_index: 0..9; rng: numpy Generator; side: pixels (None: the world's), the same picture in
    any; fixed: any of colour (0..5), background (0..3), size, x and y (the centre), horizon (units
    from the top) and flip (bool).
    Returns (image uint8 [side, side, 3], keypoints {name: (x, y)} in pixels from the top left).
    """
    # All are drawn, in this order, whatever is fixed: the pictures of a seed must not change.
    side = side or WORLDS[world]
    look = {"colour": rng.integers(len(COLOURS)), "background": rng.integers(len(BACKGROUNDS))}
    if world == "plain":
        look |= {"x": rng.uniform(14, 18), "y": rng.uniform(14, 18), "size": rng.uniform(0.9, 1.1),
                 "horizon": 24}
    else:
        look |= {"size": 0.5 * 3 ** rng.random(), "horizon": rng.uniform(12, 28)}  # 0.5 .. 1.5
        reach = 16 - 0.7 * 11 * fixed.get("size", look["size"])  # at most 15% are cut off
        look |= {"x": rng.uniform(16 - reach, 16 + reach), "y": rng.uniform(16 - reach, 16 + reach)}
    look |= {"flip": bool(rng.integers(2))} | fixed
    look["colour"] = list(COLOURS.values())[look["colour"]]
    above, below = list(BACKGROUNDS.values())[look.pop("background")]

    zoom = side * OVERSAMPLING / SIDE  # pixels of the large picture for each unit
    canvas = Image.new("RGB", (side * OVERSAMPLING,) * 2, above)
    canvas.paste(below, (0, round(look.pop("horizon") * zoom), *canvas.size))
    pen = Pen(canvas, zoom, **look)
    parts = OBJECTS[class_index](pen)

    if look["flip"]:  # the left eye of a mirrored face is the one that is now on the left
        parts = {mirrored(name): part for name, part in parts.items()}
    places = {name: pen.place(x, y) for name, (x, y) in parts.items()}
    keypoints = {name: (x * side / SIDE, y * side / SIDE) for name, (x, y) in places.items()
                 if 0 <= min(x, y) and max(x, y) < SIDE}  # those in the picture
    return np.asarray(canvas.reduce(OVERSAMPLING)), keypoints  # means of 4 x 4 pixels


def mirrored(name):
    """'left eye' <-> 'right eye'; names without a side stay as they are."""
    return name.replace("left", "?").replace("right", "left").replace("?", "right")


def make(n, seed, world="plain", side=None):
    """n pictures of random classes. Picture i depends on (seed, i) only: more extend fewer.

    world, side: as for `draw`. Returns (images uint8 [n, side, side, 3], classes int64 [n], n dicts
    of keypoints {name: (x, y)}).
    """
    side = side or WORLDS[world]
    images, classes, keypoints = np.empty((n, side, side, 3), np.uint8), np.empty(n, np.int64), []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        classes[i] = rng.integers(len(CLASSES))  # of picture i's own randomness
        images[i], parts = draw(classes[i], rng, world, side)
        keypoints.append(parts)
    return images, classes, keypoints


def main():
    """The command: python -m support.toy."""
    parser = border.command_line(__doc__)
    parser.add_argument("--out", default="toy.png", help="the picture to write (default: toy.png)")
    args = parser.parse_args()
    rows = [(name, [draw(i, np.random.default_rng(10 * i + j))[0] for j in range(10)])
            for i, name in enumerate(CLASSES)]
    with border.one_line_errors():
        border.output(args.out)
        pictures.save_picture(pictures.picture_grid(rows), args.out)


if __name__ == "__main__":
    main()
