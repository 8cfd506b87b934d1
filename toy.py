"""A toy world: endless labelled 32 x 32 pictures, drawn here, so that all of it can be measured exactly.

Ten classes of storybook icons vary in six respects only: colour, background, x, y, size and left-right flip.
Because we draw them we know all there is to know: the class, and where the named parts are. And because fresh
ones cost nothing, a small network can learn to judge other pictures of this world, as Inception does for FID.

    COLOURS, BACKGROUNDS     the palette
    Pen                      unit coordinates in, pixels out: place, size and flip in one spot
    face ... rocket          ten objects, a few lines each: they draw themselves and name their keypoints
    draw, make               one picture of a given class; n pictures of a seed
    Judge, judge             a classifier, and what it says: accuracy and Frechet distance

    python toy.py            writes toy.png, a labelled sheet of examples
    python toy.py judge      trains the judge, checkpoints/judge.pt
"""

import functools
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import common

CLASSES = ["face", "fish", "flower", "house", "car", "tree", "boat", "butterfly", "mushroom", "rocket"]
SIDE = 32  # pixels, width and height of a picture
OVERSAMPLING = 4  # drawn at 128 x 128, then averaged over 4 x 4 blocks: Pillow has no smooth edges of its own


# ------------------------------------------------------------------------------------------------------------
# Colours and backgrounds
#
# Flat colours, few of them, and a horizon on a multiple of four pixels: a tokenizer that spends one token on
# 4 x 4 pixels can give most of its codes to edges and details. The object colours suit every background.

COLOURS = {
    "red": (222, 52, 56),
    "orange": (247, 138, 26),
    "yellow": (252, 208, 40),
    "green": (32, 148, 92),
    "blue": (38, 104, 222),
    "purple": (158, 66, 186),
}
BACKGROUNDS = {  # above and below the horizon
    "meadow": ((186, 226, 248), (142, 206, 118)),
    "sunset": ((255, 208, 196), (86, 150, 176)),
    "night": ((44, 44, 90), (222, 232, 246)),
    "room": ((238, 230, 242), (206, 166, 138)),
}
HORIZON = 24  # pixels from the top, in every picture
DARK, WHITE, CREAM, BROWN = (36, 30, 44), (255, 255, 255), (255, 230, 190), (112, 66, 44)
LEAF, GLASS, FLAME, GOLD = (26, 112, 62), (204, 238, 255), (255, 112, 28), (255, 214, 64)


# ------------------------------------------------------------------------------------------------------------
# The pen
#
# Objects are described once, in a square of -1..1 (x to the right, y down as in pictures). The pen alone
# knows where the object stands, how large it is and whether it is mirrored. Keypoints go through the same
# function as shapes, so the two cannot disagree.


class Pen:
    def __init__(self, canvas, colour, x, y, size, flip):
        """canvas: the large picture; colour: RGB; x, y: centre in pixels; size 1: the unit is 11 pixels."""
        self.draw = ImageDraw.Draw(canvas)
        self.x, self.y, self.unit, self.mirror = x, y, 11.0 * size, -1 if flip else 1
        self.colour = colour
        self.shade = tuple(int(0.7 * channel) for channel in colour)  # for second parts: wings, roof, fins

    def pixel(self, x, y):
        """Where the unit coordinates (x, y) are in the picture, in pixels from its top-left corner."""
        return self.x + self.mirror * self.unit * x, self.y + self.unit * y

    def polygon(self, colour, *points):
        """A filled polygon through points (x, y)."""
        pixels = [self.pixel(x, y) for x, y in points]
        # Pillow's whole numbers are the centres of pixels, ours are their corners: hence the half.
        self.draw.polygon([(OVERSAMPLING * x - 0.5, OVERSAMPLING * y - 0.5) for x, y in pixels], fill=colour)

    def box(self, colour, left, top, right, bottom):
        self.polygon(colour, (left, top), (right, top), (right, bottom), (left, bottom))

    def ellipse(self, colour, x, y, rx, ry, turn=0, start=0, end=360):
        """Centre, radii, clockwise turn; start to end, clockwise from the right, is drawn (degrees)."""
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        angles = [math.radians(start + (end - start) * k / 28) for k in range(29)]  # 28 sides look round
        arc = [(rx * math.cos(a), ry * math.sin(a)) for a in angles]
        self.polygon(colour, *[(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in arc])

    def line(self, colour, x0, y0, x1, y1, width=0.14):
        """A straight line. Width 0.12 is 1.2 pixels at the smallest size: nothing here is thinner."""
        length = math.hypot(x1 - x0, y1 - y0)
        u, v = 0.5 * width * (y1 - y0) / length, 0.5 * width * (x0 - x1) / length
        self.polygon(colour, (x0 + u, y0 + v), (x1 + u, y1 + v), (x1 - u, y1 - v), (x0 - u, y0 - v))


# ------------------------------------------------------------------------------------------------------------
# Ten objects
#
# Each draws from back to front and returns its keypoints in unit coordinates. The main part has the picture's
# colour, a second part its shade, details are always the same. "left" and "right" are as seen in the picture.


def face(pen):
    for x in (-0.7, 0.7):  # ears behind the head
        pen.ellipse(pen.colour, x, -0.66, 0.34, 0.34)
        pen.ellipse(CREAM, x, -0.66, 0.17, 0.17)
    pen.ellipse(pen.colour, 0, 0.1, 0.95, 0.88)
    pen.ellipse(CREAM, 0, 0.46, 0.5, 0.38)
    pen.ellipse(DARK, -0.4, -0.12, 0.16, 0.19)
    pen.ellipse(DARK, 0.4, -0.12, 0.16, 0.19)
    pen.ellipse(DARK, 0, 0.4, 0.28, 0.28, end=180)  # a laughing mouth
    return {"left eye": (-0.4, -0.12), "right eye": (0.4, -0.12), "mouth": (0, 0.5),
            "chin": (0, 0.95), "left ear": (-0.7, -0.66), "right ear": (0.7, -0.66)}


def fish(pen):
    pen.polygon(pen.shade, (-0.4, 0), (-1, -0.56), (-0.84, 0), (-1, 0.56))  # tail
    pen.polygon(pen.shade, (-0.3, -0.3), (-0.12, -0.82), (0.5, -0.4))  # back fin
    pen.polygon(pen.shade, (-0.1, 0.4), (-0.12, 0.78), (0.35, 0.42))  # belly fin
    pen.ellipse(pen.colour, 0.22, 0, 0.8, 0.54)
    pen.polygon(WHITE, (0.12, -0.54), (0.3, -0.54), (0.24, 0), (0.3, 0.54), (0.12, 0.54), (0.04, 0))
    pen.ellipse(WHITE, 0.62, -0.1, 0.24, 0.24)
    pen.ellipse(DARK, 0.66, -0.1, 0.15, 0.15)
    return {"mouth": (0.98, 0.08), "eye": (0.66, -0.1), "back fin": (-0.08, -0.6),
            "belly fin": (-0.05, 0.62), "tail": (-0.72, 0)}


def flower(pen):
    pen.box(LEAF, -0.1, 0.1, 0.1, 1)
    pen.ellipse(LEAF, 0.42, 0.64, 0.4, 0.2, turn=-35)
    for k in range(6):
        angle = math.radians(60 * k + 30)
        pen.ellipse(pen.colour, 0.48 * math.cos(angle), -0.3 + 0.48 * math.sin(angle), 0.31, 0.31)
    pen.ellipse(WHITE, 0, -0.3, 0.29, 0.29)
    return {"disc": (0, -0.3), "top petal": (0, -0.86), "left petal": (-0.48, -0.3),
            "right petal": (0.48, -0.3), "leaf": (0.46, 0.6), "stem foot": (0, 0.94)}


def house(pen):
    pen.box(BROWN, 0.4, -0.9, 0.66, -0.3)  # chimney
    pen.box(pen.colour, -0.78, -0.15, 0.78, 0.95)
    pen.polygon(pen.shade, (-1, -0.1), (0, -0.95), (1, -0.1))
    pen.box(BROWN, -0.5, 0.3, -0.1, 0.95)
    pen.box(CREAM, 0.2, 0.15, 0.6, 0.55)
    return {"roof top": (0, -0.88), "chimney": (0.53, -0.78), "door": (-0.3, 0.62),
            "window": (0.4, 0.35), "left eave": (-0.9, -0.14), "right eave": (0.9, -0.14)}


def car(pen):
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


def tree(pen):
    pen.polygon(BROWN, (-0.16, 0.2), (0.16, 0.2), (0.24, 1), (-0.24, 1))
    for x, y, radius in ((-0.45, 0.02, 0.48), (0.45, 0.02, 0.48), (0, -0.42, 0.58), (0, 0.1, 0.4)):
        pen.ellipse(pen.colour, x, y, radius, radius)
    return {"top": (0, -0.92), "crown": (0, -0.2), "left bough": (-0.8, 0.02),
            "right bough": (0.8, 0.02), "trunk": (0, 0.68)}


def boat(pen):
    pen.box(BROWN, -0.16, -1, 0, 0.5)  # mast
    pen.polygon(pen.colour, (0, -0.92), (0.88, 0.36), (0, 0.36))
    pen.polygon(pen.shade, (-0.16, -0.7), (-0.16, 0.36), (-0.84, 0.36))
    pen.polygon(BROWN, (-1, 0.44), (1, 0.44), (0.66, 0.95), (-0.66, 0.95))
    return {"mast top": (-0.07, -0.94), "main sail": (0.28, -0.08), "fore sail": (-0.4, 0.06),
            "bow": (-0.9, 0.5), "stern": (0.9, 0.5), "keel": (0, 0.88)}


def butterfly(pen):
    for side in (-1, 1):
        pen.line(DARK, 0, -0.4, 0.3 * side, -0.88)
        pen.ellipse(pen.shade, 0.46 * side, 0.48, 0.42, 0.34, turn=45 * side)
        pen.ellipse(pen.colour, 0.54 * side, -0.26, 0.54, 0.4, turn=-35 * side)
        pen.ellipse(CREAM, 0.64 * side, -0.32, 0.18, 0.18)
    pen.ellipse(DARK, 0, 0.06, 0.13, 0.66)
    return {"head": (0, -0.5), "left wing": (-0.64, -0.32), "right wing": (0.64, -0.32),
            "left hind wing": (-0.46, 0.5), "right hind wing": (0.46, 0.5), "tail": (0, 0.64)}


def mushroom(pen):
    pen.polygon(CREAM, (-0.26, 0.1), (0.26, 0.1), (0.36, 0.95), (-0.36, 0.95))
    pen.ellipse(pen.colour, 0, 0.15, 1, 1.05, start=180)
    for x, y, radius in ((-0.55, -0.12, 0.17), (0.02, -0.52, 0.2), (0.5, -0.1, 0.2)):
        pen.ellipse(WHITE, x, y, radius, radius)
    return {"top": (0, -0.84), "middle dot": (0.02, -0.52), "left brim": (-0.9, 0.08),
            "right brim": (0.9, 0.08), "stem foot": (0, 0.88)}


def rocket(pen):
    pen.polygon(FLAME, (-0.32, 0.5), (0.32, 0.5), (0, 1.08))
    for side in (-1, 1):
        pen.polygon(pen.shade, (0.3 * side, -0.05), (0.8 * side, 0.5), (0.8 * side, 0.76), (0.2 * side, 0.6))
    pen.ellipse(pen.colour, 0, -0.18, 0.46, 0.84)
    pen.ellipse(WHITE, 0, -0.28, 0.25, 0.25)
    return {"nose": (0, -0.92), "window": (0, -0.28), "left fin": (-0.64, 0.58),
            "right fin": (0.64, 0.58), "flame": (0, 0.8)}


OBJECTS = [face, fish, flower, house, car, tree, boat, butterfly, mushroom, rocket]  # in the order of CLASSES


# ------------------------------------------------------------------------------------------------------------
# Pictures


def draw(class_index, rng, **fixed):
    """One picture of a class; what varies comes from rng, except what the caller fixes by name.

    class_index: 0..9; rng: numpy Generator; fixed: any of colour (0..5), background (0..3), x and y (centre,
    14..18 pixels), size (0.9..1.1) and flip (bool). Raises ValueError for other names.
    Returns (image uint8 [32, 32, 3], keypoints {name: (x, y)} in pixels from the top-left corner).
    """
    look = {"colour": rng.integers(len(COLOURS)), "background": rng.integers(len(BACKGROUNDS)),
            "x": rng.uniform(14, 18), "y": rng.uniform(14, 18), "size": rng.uniform(0.9, 1.1),
            "flip": bool(rng.integers(2))}
    if fixed.keys() - look.keys():
        raise ValueError(f"cannot fix {', '.join(fixed.keys() - look.keys())}, only {', '.join(look)}")
    look.update(fixed)
    look["colour"] = list(COLOURS.values())[look["colour"]]
    above, below = list(BACKGROUNDS.values())[look.pop("background")]
    large = SIDE * OVERSAMPLING
    canvas = Image.new("RGB", (large, large), above)
    canvas.paste(below, (0, HORIZON * OVERSAMPLING, large, large))
    pen = Pen(canvas, **look)
    places = OBJECTS[class_index](pen)
    if look["flip"]:  # the left eye of a mirrored face is the one that is now on the left
        places = {mirrored(name): place for name, place in places.items()}
    keypoints = {name: pen.pixel(x, y) for name, (x, y) in places.items()}
    return np.asarray(canvas.reduce(OVERSAMPLING)), keypoints


def mirrored(name):
    """'left eye' <-> 'right eye'; names without a side stay as they are."""
    other = {"left": "right", "right": "left"}
    return " ".join(other.get(word, word) for word in name.split())


def make(n, seed):
    """n pictures of random classes. Picture i depends on (seed, i) only: a longer run extends a shorter one.

    Returns (images uint8 [n, 32, 32, 3], classes int64 [n], keypoints: n dicts {name: (x, y)} in pixels).
    """
    images, classes, keypoints = np.empty((n, SIDE, SIDE, 3), np.uint8), np.empty(n, np.int64), []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        classes[i] = rng.integers(len(CLASSES))
        images[i], places = draw(classes[i], rng)
        keypoints.append(places)
    return images, classes, keypoints


def sheet(columns=8, zoom=4):
    """A labelled PIL picture: a row of examples per class, the last of them once more with its keypoints."""
    cells = []
    for row in range(len(CLASSES)):
        for column in range(columns):
            look = {"colour": (row + column) % len(COLOURS), "background": column % len(BACKGROUNDS)}
            image, keypoints = draw(row, np.random.default_rng([row, column]), **look)
            cells.append(image.repeat(zoom, 0).repeat(zoom, 1))
        marked = Image.fromarray(cells[-1])
        for x, y in keypoints.values():
            ImageDraw.Draw(marked).circle((zoom * x, zoom * y), 4, fill="white", outline="black", width=2)
        cells.append(np.asarray(marked))
    return common.picture_grid(np.stack(cells), CLASSES, "python toy.py: ten classes, and their keypoints")


# ------------------------------------------------------------------------------------------------------------
# The judge
#
# Two questions to a set of generated pictures. Accuracy: does a classifier see the class that was asked for?
# Frechet distance: do the pictures as a whole look like fresh ones? As in FID, both sets are described by
# mean and covariance of the classifier's features. A network that has learnt classes alone forgets everything
# else, so ours must also name the colour and the background, and notice when tokens of another picture have
# been pasted in: the ways in which a generator of tokens goes wrong. Those answers matter in training only.
#
# Few pictures give a noisy covariance, which adds to the distance: compare equal numbers only. Fresh
# pictures, the best there is, score 0.04 (10,000 of them), 0.26 (1,000) or 1.1 (200). For scale, with 2,000:
# fresh 0.14; one wrong token of 64 in each 0.7, four 6.3, sixteen 34; red objects only 24; uniform noise 114.

JUDGE_PATH = common.CHECKPOINTS / "judge.pt"
JUDGE_SEED = 10**9  # the judge learns from (JUDGE_SEED, step) and is scaled on JUDGE_SEED + 1: use others
REFERENCE_SIZE = 10_000  # fresh pictures that stand for the world
ANSWERS = (len(CLASSES), len(COLOURS), len(BACKGROUNDS), 1)  # the last: "something has been pasted in"


class Judge(nn.Module):
    """A classifier of 206,000 parameters. GroupNorm: a picture's score does not depend on the others."""

    def __init__(self):
        super().__init__()
        layers = []
        for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 64, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, sum(ANSWERS))

    def forward(self, images):
        """[n, 3, 32, 32] in [-1, 1] -> features [n, 64], logits [n, 21] of all answers, classes first."""
        features = self.body(images).mean((2, 3))  # [n, 64, 8, 8] -> [n, 64]
        return features, self.head(features)


def labelled_batch(n, seed):
    """Fresh pictures [n, 3, 32, 32] and what they show, int64 [n, 3]: class, colour, background."""
    images, labels = np.empty((n, SIDE, SIDE, 3), np.uint8), np.empty((n, 3), np.int64)
    for i in range(n):
        rng = np.random.default_rng([*seed, i])
        labels[i] = rng.integers(ANSWERS[:3])
        images[i], _ = draw(labels[i, 0], rng, colour=labels[i, 1], background=labels[i, 2])
    return common.from_uint8(images), torch.from_numpy(labels)


def disturb(images):
    """Some blur, noise and brightness: what a tokenizer does to all pictures should not change answers."""
    blur, noise, light = torch.rand(3, len(images), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.lerp(images, blurred, blur) + 0.15 * noise * torch.randn_like(images) + 0.2 * (light - 0.5)


def paste_tokens(images):
    """Paste up to 1/4 of its neighbour's 4 x 4 tiles into every other picture. -> images, pasted bool [n]."""
    share = 0.25 * torch.rand(len(images), 1, 1, 1)
    share[::2] = 0
    tiles = (torch.rand(len(images), 1, 8, 8) < share).repeat_interleave(4, 2).repeat_interleave(4, 3)
    mixed = torch.where(tiles, images.roll(1, 0), images)
    return mixed, (mixed - images).abs().amax((1, 2, 3)) > 0.2  # sky pasted on the same sky is no mistake


def train_judge(steps=1200, batch=128, path=JUDGE_PATH):
    """Train on steps x batch fresh pictures; write weights and the features' mean and covariance to path."""
    common.writable_folder(pathlib.Path(path).parent)
    torch.manual_seed(0)
    network = Judge()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    bar = tqdm(range(steps), desc="judge")
    for step in bar:
        images, labels = labelled_batch(batch, (JUDGE_SEED, step))
        images, pasted = paste_tokens(images)
        _, logits = network(disturb(images))
        *answers, suspicion = logits.split(ANSWERS, dim=1)  # [b, 10], [b, 6], [b, 4], [b, 1]
        named = [F.cross_entropy(answer, label) for answer, label in zip(answers, labels.T)]
        doubt = F.binary_cross_entropy_with_logits(suspicion[:, 0], pasted.float())
        loss = named[0] + 0.3 * (named[1] + named[2] + doubt)  # first of all it shall know the classes
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        accuracy = (answers[0].argmax(1) == labels[:, 0]).float().mean()
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy.item():.3f}")
    weights = common.half_precision(network.state_dict())
    network.load_state_dict(weights)  # statistics of the rounded weights: those are what users load
    features, _ = run_judge(network, common.from_uint8(make(REFERENCE_SIZE, JUDGE_SEED + 1)[0]))
    common.save({"weights": weights, "mean": features.mean(0), "covariance": torch.cov(features.T)}, path)


@torch.no_grad()
def run_judge(network, images):
    """-> features [n, 64], class logits [n, 10]."""
    features, logits = map(torch.cat, zip(*[network(batch) for batch in images.float().split(500)]))
    return features, logits[:, : len(CLASSES)]


@functools.cache
def load_judge(device="cpu"):
    """-> Judge, its fresh features' mean [64], covariance [64, 64]. Raises FileNotFoundError, ValueError."""
    if not JUDGE_PATH.is_file():
        raise FileNotFoundError(f"no judge at {JUDGE_PATH}: train it with python toy.py judge")
    checkpoint = common.load(JUDGE_PATH, device)
    network = Judge().to(device).eval()
    try:
        network.load_state_dict(checkpoint["weights"])
        return network, checkpoint["mean"], checkpoint["covariance"]
    except (RuntimeError, KeyError, TypeError):
        raise ValueError(f"{JUDGE_PATH} does not hold a judge: train it with python toy.py judge") from None


def judge_features(images):
    """images float [n, 3, 32, 32] in [-1, 1] -> (features [n, 64], logits [n, 10]), on the images' device."""
    if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE) or not images.is_floating_point():
        raise ValueError(f"the judge takes float images [n, 3, {SIDE}, {SIDE}] in [-1, 1], "
                         f"not {images.dtype} {list(images.shape)}")
    return run_judge(load_judge(images.device)[0], images)


def judge(images, classes):
    """images float [n, 3, 32, 32] in [-1, 1], n > 1; classes int [n], those asked for.

    -> {"accuracy": share of the images in which the judge sees the class, "frechet": distance to fresh ones}
    Raises ValueError for wrong shapes, FileNotFoundError where there is no trained judge.
    """
    classes = torch.as_tensor(classes, device=images.device)
    if classes.shape != images.shape[:1] or len(images) < 2:
        raise ValueError(f"expected two or more images and a class for each, got {len(images)} images "
                         f"and classes {list(classes.shape)}")
    features, logits = judge_features(images)
    _, mean, covariance = load_judge(images.device)
    return {"accuracy": (logits.argmax(1) == classes).float().mean().item(),
            "frechet": frechet_distance(features.mean(0), torch.cov(features.T), mean, covariance)}


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """FID's distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Means [d] and covariances [d, d] of any float type, computed in float64. Returns a float.
    """
    a, b = covariance_a.double(), covariance_b.double()
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^1/2; clamp: rounding turns 0 into -1e-17
    # A^1/2 B A^1/2 has the eigenvalues of AB, but is symmetric: eigvalsh is exact and never complex.
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a.double() - mean_b.double()).square().sum() + a.trace() + b.trace() - 2 * cross).item()


def main():
    parser = common.command_line(__doc__)
    parser.add_argument("what", nargs="?", default="sheet", choices=("sheet", "judge"),
                        help="sheet: draw examples; judge: train the judge (default: sheet)")
    parser.add_argument("--out", help="the file to write (default: toy.png, checkpoints/judge.pt)")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of the judge (default: 1200)")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, not {args.steps}")
    with common.one_line_errors():
        if args.what == "sheet":
            common.save_picture(sheet(), args.out or "toy.png")
        else:
            train_judge(args.steps, path=args.out or JUDGE_PATH)


if __name__ == "__main__":
    main()
