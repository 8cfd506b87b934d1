"""The judge of the toy worlds: what Inception is to FID, a small network is to pictures of ours.

It answers two questions. *Accuracy*: does a classifier see the class that was asked for? *Frechet
distance*: do the pictures as a whole look like fresh ones? As in FID, mean and covariance of the
classifier's features describe both sets. A network that learns classes alone forgets the rest:
ours must also name the colour and the background, and notice what a generator does wrong: tokens
pasted in from another picture, and in the fine world, where pictures of two and three times the
size are judged against fresh ones *of that size*, pictures that are only blown up.

`python -m support.judge [--world fine]` trains it. Few pictures give a noisy covariance, which adds
to the distance: compare equal numbers only. Fresh pictures of the plain world, the best there is,
score 0.04 (10,000 of them), 0.26 (1,000) or 1.1 (200). For scale, with 2,000: fresh 0.14; one wrong
token of 64 in each 0.7, four 6.3, sixteen 34; only red 24; noise 114.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from support import border, toy
from support.border import UserError
from support.pictures import from_uint8
from support.speed import mixed_precision

JUDGE_SEED = 10**9  # it learns from (JUDGE_SEED, step) and is scaled on JUDGE_SEED + 1: use others
REFERENCE_SIZE = 10_000  # fresh pictures that stand for the world
LABELS = (len(toy.CLASSES), len(toy.COLOURS), len(toy.BACKGROUNDS))
DOUBTS = {"plain": 1, "fine": 2}  # how many more answers: are tokens pasted in, is it blown up?
SIDES = {"plain": (32,), "fine": (64, 128, 192)}  # pixels of the pictures that a judge has learned
TOKEN = 4  # pixels, the side of what is pasted in
CONVOLUTIONS = {  # input channels, output channels, stride
    "plain": ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 64, 1)),
    "fine": ((3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1),
             (128, 64, 1))}


class Judge(nn.Module):
    """A classifier of at most 359,000 parameters; with GroupNorm a score depends on one picture."""

    def __init__(self, world):
        super().__init__()
        layers = []
        for inputs, outputs, stride in CONVOLUTIONS[world]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
            layers += [convolution, nn.GroupNorm(8, outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, sum(LABELS) + DOUBTS[world])

    def forward(self, images):
        """[n, 3, S, S] -> features [n, 64], logits [n, 21 or 22] of all answers, classes first."""
        features = self.body(images).mean((2, 3))  # [n, 64, 8, 8], of larger ones more -> [n, 64]
        return features, self.head(features)


# --------------------------------------------------------------------------------------------------
# What it says


@functools.cache
def load_judge(device="cpu", side=toy.SIDE):
    """(Judge, mean [64] and covariance [64, 64] of its features of fresh pictures of this side)."""
    world = next(world for world in SIDES if side in SIDES[world])
    content = border.load(toy.folder(world) / "judge.pt", device)
    network = Judge(world).to(device).eval()
    network.load_state_dict(content["weights"])
    return network, content[side]["mean"], content[side]["covariance"]


@torch.no_grad()
def judge_features(images, network=None):
    """images float [n, 3, S, S] in [-1, 1] -> (features [n, 64], class logits [n, 10])."""
    side, known = images.shape[-1], sum(SIDES.values(), ())
    if images.shape[1:] != (3, side, side) or side not in known or not images.is_floating_point():
        raise UserError("the judge takes float images [n, 3, S, S] in [-1, 1], S one of "
                        f"{', '.join(map(str, known))}, not {images.dtype} {list(images.shape)}")

    network = network or load_judge(images.device, side)[0]
    results = [network(batch) for batch in images.float().split(500)]
    features, logits = (torch.cat(parts) for parts in zip(*results))  # [n, 64], [n, 21 or 22]
    return features, logits[:, : len(toy.CLASSES)]


@torch.no_grad()
def labels_seen(images):
    """What it sees in images float [n, 3, S, S]: class, colour, background, int64 [n, 3]."""
    network, _, _ = load_judge(images.device, images.shape[-1])
    _, logits = network(images)  # [n, 21 or 22]
    answers = logits[:, : sum(LABELS)].split(LABELS, dim=1)  # [n, 10], [n, 6], [n, 4]
    return torch.stack([answer.argmax(1) for answer in answers], dim=1)


def judge(images, classes):
    """What it says of images float [n, 3, S, S] in [-1, 1], n > 1, of the classes int [n].

    S: one of SIDES. Returns {"accuracy": share in which it sees the class, "frechet": distance to
    fresh pictures of this side}.
    """
    features, logits = judge_features(images)
    right = logits.argmax(1) == torch.as_tensor(classes, device=images.device)  # [n]
    _, mean, covariance = load_judge(images.device, images.shape[-1])
    return {"accuracy": right.float().mean().item(),
            "frechet": frechet_distance(features.mean(0), torch.cov(features.T), mean, covariance)}


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """FID's distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    Means [d] and covariances [d, d] of any float type, computed in float64. Returns a float.
    """
    a, b = covariance_a.double(), covariance_b.double()
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^1/2; rounding may make 0 < 0

    # A^1/2 B A^1/2 has the eigenvalues of AB, but is symmetric: never complex.
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    means = (mean_a.double() - mean_b.double()).square().sum()
    return (means + a.trace() + b.trace() - 2 * cross).item()


# --------------------------------------------------------------------------------------------------
# How it learns


def labelled_batch(n, seed, world, side):
    """Fresh pictures [n, 3, S, S] and what they show, int64 [n, 3]: class, colour, background."""
    images, labels = np.empty((n, side, side, 3), np.uint8), np.empty((n, 3), np.int64)
    for i in range(n):
        rng = np.random.default_rng([*seed, i])
        labels[i] = rng.integers(LABELS)
        class_index, colour, background = labels[i]
        images[i], _ = toy.draw(class_index, rng, world, side, colour=colour, background=background)
    return from_uint8(images), torch.from_numpy(labels)


def disturb(images, most):
    """Some blur, noise and brightness: what any tokenizer does should not change answers.

    most: of the first two; little where the judge is to see whether a picture is sharp.
    """
    blur, noise, light = torch.rand(3, len(images), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)  # 3 x 3
    noisy = torch.lerp(images, blurred, most * blur)
    noisy = noisy + 0.15 * most * noise * torch.randn_like(images)
    return noisy + 0.2 * (light - 0.5)


def paste_tokens(images):
    """Paste some tokens of its neighbour into every other picture: (images, pasted bool [n])."""
    share = 0.25 * torch.rand(len(images), 1, 1, 1)
    share[::2] = 0  # every other one stays whole
    tokens = images.shape[-1] // TOKEN  # along each axis
    tiles = torch.rand(len(images), 1, tokens, tokens) < share
    tiles = tiles.repeat_interleave(TOKEN, 2).repeat_interleave(TOKEN, 3)  # [n, 1, S, S]
    mixed = torch.where(tiles, images.roll(1, 0), images)
    return mixed, (mixed - images).abs().amax((1, 2, 3)) > 0.2  # sky on the same sky is no mistake


def blow_up(images):
    """Blow up every fourth picture from half its size: (images, blown up bool [n])."""
    small = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    chosen = torch.arange(len(images)) % 4 == 2  # nothing is pasted into these
    return torch.where(chosen[:, None, None, None], small, images), chosen


def train_judge(steps, path, world="plain"):
    """Train on up to 128 fresh pictures a step; write weights, and the features' statistics."""
    torch.manual_seed(0)
    network = Judge(world)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)

    for step in tqdm(range(steps), desc="judge"):
        side = SIDES[world][step % len(SIDES[world])]
        number = 128 * SIDES[world][0] // side  # of larger pictures fewer
        images, labels = labelled_batch(number, (JUDGE_SEED, step), world, side)
        images, pasted = paste_tokens(images)
        spoilt = [pasted]  # bool [b] for each doubt
        if world == "fine":
            images, blown_up = blow_up(images)
            spoilt.append(blown_up)
        with mixed_precision(images.device):
            _, logits = network(disturb(images, most=1 if world == "plain" else 0.3))
        # [b, 10], [b, 6], [b, 4], and [b, 1 or 2]
        *answers, doubts = logits.float().split((*LABELS, DOUBTS[world]), dim=1)

        # First of all it shall know the classes.
        losses = [F.cross_entropy(answer, label) for answer, label in zip(answers, labels.T)]
        losses += [F.binary_cross_entropy_with_logits(doubt, true.float())
                   for doubt, true in zip(doubts.T, spoilt)]
        loss = losses[0] + 0.3 * sum(losses[1:])

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    # Mean and covariance are those of the rounded weights, which is what users load.
    weights = {name: x.half() for name, x in network.state_dict().items()}
    network.load_state_dict(weights)
    content = {"weights": weights}
    for side in tqdm(SIDES[world], "statistics"):
        fresh, _, _ = toy.make(REFERENCE_SIZE, JUDGE_SEED + 1, world, side)
        features = torch.cat([judge_features(from_uint8(fresh[i : i + 500]), network)[0]
                              for i in range(0, len(fresh), 500)])
        content[side] = {"mean": features.mean(0), "covariance": torch.cov(features.T)}
    border.save(content, path)


def main():
    """The command: python -m support.judge."""
    parser = border.command_line(__doc__)
    parser.add_argument("--world", choices=toy.WORLDS, default="plain", help="(default: plain)")
    parser.add_argument("--steps", type=border.positive_int, default=1200)
    parser.add_argument("--out", default="judge.pt",
                        help="(default: judge.pt; the one in use is in checkpoints/)")
    args = parser.parse_args()
    with border.one_line_errors():
        border.output(args.out)
        train_judge(args.steps, args.out, args.world)


if __name__ == "__main__":
    main()
