"""Draw pictures: python sample.py

A checkpoint goes in, a labelled grid of pictures comes out. With no argument: the ten classes of the toy
world. With released weights, python sample.py --ckpt randar_0.3b_llamagen_360k_bs_1024_lr_0.0004.safetensors
--tokenizer vq_ds16_c2i.pt --classes 207 "red fox": classes of ImageNet by number or name.

To measure quality, many pictures go into one file, here on eight GPUs, the same as on one:
torchrun --nproc-per-node 8 sample.py --number 50000 --npz samples.npz

    load_models                        a RandAR (or RAR) and the tokenizer that belongs to it
    sample_batches                     the pictures themselves, the work shared among processes
    names_of_classes, parse_classes    what the classes are called
    draw_grid, draw_gif, write_npz     what becomes of the pictures
"""

import difflib
import math
import pathlib
import shutil
import signal
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
import toy
from randar import ORDERS, generation_order, load_randar, step_sizes
from rar import ONE_BY_ONE, load_model
from vqgan import load_tokenizer

UNDECODED = 200  # the grey of places that are not decoded yet
SHOWN = 12  # pictures of each class in the grid
RELEASED = {16384: "LlamaGen's vq_ds16_c2i.pt", 1024: "MaskGIT's maskgit-vqgan-imagenet-f16-256.bin"}


def decoding_steps(grid):
    """The default number of decoding steps: the paper's 88 for 16 x 16 tokens, and in proportion."""
    return max(1, round(math.prod(grid) * 88 / 256))


def default_steps(model):
    """That for the model's grid; -1, one token a step, for the models of rar.py that can do no other."""
    return -1 if isinstance(model, ONE_BY_ONE) else decoding_steps(model.config.grid)


def decoding_precision(device):
    """bfloat16 on a GPU: half the bytes to read at each step. Elsewhere float32, the same on all machines."""
    return common.fast_precision(device) if device.type == "cuda" else torch.float32


def load_models(ckpt, tokenizer, device, load=load_randar):
    """(RandAR, Tokenizer) from files, in eval mode. tokenizer: a path, or None for tokenizer.pt beside ckpt.

    load: load_randar, or rar.load_model for any model that can be drawn from. Raises FileNotFoundError or
    ValueError where one is missing, or they do not belong together.
    """
    model = load(ckpt, device)
    codes, beside = model.config.vocab_size, pathlib.Path(ckpt).with_name("tokenizer.pt")
    if tokenizer is None and not beside.is_file():
        needed = RELEASED.get(codes, f"the one of {codes} codes that it was trained with")
        raise FileNotFoundError(f"{ckpt} needs its tokenizer, and there is no {beside}: give --tokenizer "
                                f"{needed}")
    tokenizer = load_tokenizer(tokenizer or beside, device)
    if tokenizer.config.codes != codes:
        raise ValueError(f"{ckpt} knows {codes} codes, the tokenizer has {tokenizer.config.codes}: give "
                         "--tokenizer the one that it was trained with")
    return model, tokenizer


def sample_batches(model, tokenizer, classes, seed, batch_size=64, rank=0, processes=1, *, order, **options):
    """Draw an image of each class. Yields batches (pixels uint8 [b, H, W, 3], turns int32 [b, h, w]), NumPy.

    turns: the decoding step in which each token was written. order: by name; options: steps, cfg, scg,
    temperature, top_k, top_p, as the model's decode takes them. The batches are dealt out to the processes;
    all of them must iterate, but only rank 0 gets to see the images. These are the same whatever the number
    of processes: chance in a batch follows from the seed and the batch's number alone.
    """
    device, f = next(model.parameters()).device, tokenizer.config.downsampling
    h, w = grid = model.config.grid
    size = min(batch_size, len(classes))
    batches = torch.as_tensor(classes).split(size)
    with tqdm(total=len(classes), desc="sampling", unit=" images", dynamic_ncols=True,
              disable=rank > 0) as bar:
        for first in range(0, len(batches), processes):  # in each round a batch for each process
            # In the last round some have less to do, or nothing; but all must send equally large tensors.
            pixels = torch.zeros(size, h * f, w * f, 3, dtype=torch.uint8, device=device)
            turns = torch.zeros(size, h * w, dtype=torch.int32, device=device)
            if first + rank < len(batches):
                part = batches[first + rank].to(device)
                generator = torch.Generator(device).manual_seed(seed + 1_000_003 * (first + rank))
                positions = generation_order(order, len(part), grid, generator, device)
                tokens = torch.zeros_like(positions)
                for i, step in enumerate(model.decode(part, positions, generator=generator, **options)):
                    tokens.scatter_(1, step.positions, step.tokens)
                    turns[: len(part)].scatter_(1, step.positions, i)
                images = common.to_uint8(tokenizer.decode(tokens, grid))
                pixels[: len(part)] = torch.from_numpy(images)
            gathered = zip(gather(pixels, rank, processes), gather(turns.view(-1, h, w), rank, processes))
            for part, (pixels, turns) in zip(batches[first : first + processes], gathered):
                bar.update(len(part))
                yield pixels[: len(part)].cpu().numpy(), turns[: len(part)].cpu().numpy()


def gather(x, rank, processes):
    """The tensors x of all processes, equal in shape and dtype: a list of them on rank 0, [] elsewhere."""
    if processes == 1:
        return [x]
    parts = [torch.empty_like(x) for _ in range(processes)] if rank == 0 else None
    dist.gather(x, parts)
    return parts or []


# ------------------------------------------------------------------------------------------------------------
# What the classes are called


def names_of_classes(class_names, number):
    """All names of each class, the most readable one first: a list of `number` tuples of str.

    class_names: list of str, those of a checkpoint or a token folder, or None. Where they are WordNet ids,
    as folders of ImageNet are called, or numbers of ImageNet's 1,000 classes, English names are added.
    """
    file = pathlib.Path(__file__).resolve().with_name("imagenet_classes.txt")
    imagenet = [line.split(" ", 1) for line in file.read_text().splitlines()]  # [WordNet id, name] each
    known = {wordnet: (name, wordnet) for wordnet, name in imagenet}
    if number == len(imagenet):
        known |= {str(i): (name, wordnet, str(i)) for i, (wordnet, name) in enumerate(imagenet)}
        class_names = class_names or [wordnet for wordnet, _ in imagenet]
    if class_names is None:
        return [(f"class {i}",) for i in range(number)]
    return [known.get(name, (name,)) for name in class_names]


def plain(name):
    """Golden_Retriever, golden-retriever -> golden retriever."""
    return name.lower().replace("_", " ").replace("-", " ")


def parse_classes(words, names):
    """Class numbers from numbers or names; names: as names_of_classes gives them.

    Raises ValueError for a class that the model does not have, and for a name that several of them have.
    """
    classes = []
    for word in words:
        found = ([i for i, known in enumerate(names) if word in known]
                 or [i for i, known in enumerate(names) if plain(word) in map(plain, known)])
        if not found and word.isdecimal() and int(word) < len(names):
            found = [int(word)]
        if not found:
            readable = {plain(known[0]): known[0] for known in names}
            close = ([name for name in readable if plain(word) in name]
                     or difflib.get_close_matches(plain(word), readable, n=5))
            close = close if close and len(names) > 12 else list(readable)
            listed = ", ".join(readable[name] for name in close[:10]) + ", ..." * (len(close) > 10)
            raise ValueError(f"no class {word!r}: give a number from 0 to {len(names) - 1} or a name "
                             f"({listed})")
        if len(found) > 1:
            raise ValueError(f"{word!r} is the name of the classes {' and '.join(map(str, found))}: give the "
                             "number of the one you mean")
        classes += found
    return classes


def spread_classes(classes, rows=10, columns=8):
    """int64 [n]: `columns` of each class, of at most `rows` classes spread evenly over those given."""
    chosen = [classes[i * len(classes) // min(rows, len(classes))] for i in range(min(rows, len(classes)))]
    return torch.tensor(chosen).repeat_interleave(columns)


# ------------------------------------------------------------------------------------------------------------
# What becomes of the pictures


def draw_grid(pixels, classes, class_names, title):
    """A labelled picture with a row for each class; where a class has fewer images, the rest stays white.

    pixels: uint8 [n, H, W, 3]; classes: list of n ints; class_names: list of str, one for each class of the
    model. Returns a PIL image.
    """
    rows = {label: [] for label in classes}
    for image, label in zip(pixels, classes):
        rows[label].append(image)
    columns = max(map(len, rows.values()))
    white = np.full_like(pixels[0], 255)
    cells = np.stack([image for row in rows.values() for image in row + [white] * (columns - len(row))])
    return common.picture_grid(cells, [class_names[label] for label in rows], title)


def draw_gif(pixels, turns, f, path, seconds=4.0):
    """An animation: grey pictures fill up in the order of decoding, then stay for a while.

    pixels: uint8 [n, H, W, 3], the finished pictures; turns: int [n, h, w], the step in which each token was
    decoded; f: pixels a token. A token's pixels appear, as they are in the end, in the step that decoded it.
    """
    steps, tokens = int(turns.max()) + 1, turns[0].size
    shown = np.stack([np.kron(turns, np.ones((1, f, f), turns.dtype)) < step for step in range(steps + 1)])
    columns = math.ceil(math.sqrt(len(pixels) * 2))
    frames = []
    for step, mask in enumerate(shown):
        cells = np.where(mask[..., None], pixels, np.uint8(UNDECODED))
        cells = np.concatenate([cells, np.full((-len(cells) % columns, *cells.shape[1:]), 255, np.uint8)])
        title = f"step {step} of {steps}: {(turns[0] < step).sum()} of {tokens} tokens"
        frames.append(common.picture_grid(cells, [""] * (len(cells) // columns), title))
    durations = [int(1000 * seconds / steps)] * steps + [2000]
    common.save_picture(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def write_npz(path, batches, classes, height, width):
    """Write pictures as ADM's evaluation reads them: arr_0 uint8 [n, height, width, 3], arr_1 labels int64.

    batches: an iterator of uint8 [b, height, width, 3], n in all; each is written before the next is drawn,
    so that the memory does not grow with n. classes: list of n ints.
    """
    def write(partial):
        with zipfile.ZipFile(partial, "w") as archive:  # which is what an .npz is: .npy files, not compressed
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {
                    "descr": "|u1", "fortran_order": False, "shape": (len(classes), height, width, 3)})
                for pixels in batches:
                    file.write(pixels.tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(classes, np.int64))
    common.write_safely(path, write)


# ------------------------------------------------------------------------------------------------------------
# The command


def draw(args, rank, processes, device):
    """What the command line says; `rank` of several `processes` that share the work."""
    # All that can be wrong is found before anything is drawn or written: each of these raises ValueError or
    # OSError.
    if common.picture_format(args.out) == "gif" and args.gif:
        raise ValueError(f"--gif would overwrite {args.out}: end the name of --out in .png")
    if args.npz and (pathlib.Path(args.npz).suffix != ".npz" or pathlib.Path(args.npz).is_dir()):
        raise ValueError(f"cannot write pictures as {args.npz}: give a name that ends in .npz")
    model, tokenizer = load_models(args.ckpt, args.tokenizer, device, load_model)
    model.to(decoding_precision(device))
    names = names_of_classes(model.class_names, model.config.num_classes)
    if args.classes:
        chosen = parse_classes(args.classes, names)
    elif args.npz:
        chosen = list(range(model.config.num_classes))
    else:
        chosen = spread_classes(range(model.config.num_classes), columns=1).tolist()
    number = 8 * len(chosen) if args.number is None else args.number
    for option, value in (("--number", number), ("--batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, not {value}")
    order = model.order if args.order is None else args.order
    options = dict(steps=default_steps(model) if args.steps is None else args.steps, cfg=args.cfg,
                   scg=args.scg, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if args.power is not None:
        if not isinstance(model, ONE_BY_ONE):
            raise ValueError("--power is for RAR: the guidance of this model rises in a straight line")
        options["power"] = args.power
    step_number = len(step_sizes(math.prod(model.config.grid), options["steps"]))
    one_order = generation_order(order, 1, model.config.grid, device=device)
    model.decode(torch.zeros(1, dtype=torch.int64, device=device), one_order, **options)  # no step of it yet
    height, width = (side * tokenizer.config.downsampling for side in model.config.grid)
    common.writable_folder(pathlib.Path(args.out).parent)
    if args.npz:
        folder = common.writable_folder(pathlib.Path(args.npz).parent, "--npz")
        needed, free = number * height * width * 3, shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(f"{number} pictures need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
                             f"free in {folder}: give another place, --npz")

    classes = [chosen[i % len(chosen)] for i in range(number)]
    if not args.npz:  # measures of quality are computed over parts of the file: there they stay mixed
        classes.sort(key=chosen.index)
    rows = list(dict.fromkeys(classes))
    rows = spread_classes(rows, columns=1).tolist() if args.npz else rows
    shown = np.concatenate([np.flatnonzero(np.equal(classes, label))[:SHOWN] for label in rows])
    shown.sort()
    toy_world = model.class_names == toy.CLASSES
    shown_pixels, shown_turns, judged = [], [], []

    def batches():
        """The pixels of each batch; what the picture and the judge are to see is kept on the way."""
        first = 0
        for pixels, turns in sample_batches(model, tokenizer, classes, args.seed, args.batch_size, rank,
                                            processes, order=order, **options):
            here = shown[(first <= shown) & (shown < first + len(pixels))] - first
            shown_pixels.append(pixels[here])
            shown_turns.append(turns[here])
            if toy_world:
                judged.append(pixels)
            first += len(pixels)
            yield pixels

    if rank > 0:
        for _ in batches():
            pass
        return
    if args.npz:
        write_npz(args.npz, batches(), classes, height, width)
        print(f"wrote {args.npz}: {number} pictures and their classes")
    else:
        for _ in batches():
            pass
    pixels, turns = np.concatenate(shown_pixels), np.concatenate(shown_turns)
    labels = [classes[i] for i in shown]
    power = "" if args.power is None else f" by power {args.power:g}"
    title = (f"{step_number} steps, order {order}, cfg {args.cfg[0]:g} to {args.cfg[1]:g}{power}, "
             f"scg {args.scg:g}, seed {args.seed}")
    common.save_picture(draw_grid(pixels, labels, [known[0] for known in names], title), args.out)
    print(f"drew {number} pictures, wrote up to {SHOWN} of each class to {args.out}; {title}")
    if args.gif:
        path = pathlib.Path(args.out).with_suffix(".gif")
        first = [labels.index(label) for label in dict.fromkeys(labels)]  # one picture of each class
        draw_gif(pixels[first], turns[first], tokenizer.config.downsampling, path)
        print(f"wrote {path}")
    if toy_world and number > 1:
        verdict = toy.judge(common.from_uint8(np.concatenate(judged)), torch.tensor(classes))
        print(f"the judge sees the class asked for in {verdict['accuracy']:.1%} of them")
        if number >= 500 and len(chosen) == len(names):  # fewer, or of some classes only, do not compare
            print(f"Frechet distance to fresh pictures {verdict['frechet']:.2f} (1,000 fresh ones: 0.26)")


def add_decoding_flags(add, usual_steps, out, steps=None, cfg=(1.0, 4.0), scg=1.0):
    """The flags that this command shares with those of apps.py; add: a parser's add_argument."""
    add("--ckpt", default=common.CHECKPOINTS / "randar_toy.pt",
        help="weights of train.py or released ones (default: the toy model that ships)")
    add("--tokenizer", help="ours or a released one (default: tokenizer.pt beside --ckpt)")
    add("--steps", type=int, default=steps, help=f"of decoding, -1: one a token (default: {usual_steps})")
    add("--order", help=f"one of {', '.join(ORDERS)} (default: that of the model's training)")
    add("--cfg", nargs=2, type=float, default=cfg, metavar=("START", "END"),
        help=f"classifier-free guidance, from START to END (default: {cfg[0]:g} {cfg[1]:g})")
    add("--scg", type=float, default=scg, help=f"spatial contextual guidance (default: {scg:g})")
    add("--temperature", type=float, default=1.0)
    add("--top-k", type=int, default=0, help="the k most likely tokens only (default: all)")
    add("--top-p", type=float, default=1.0, help="the likeliest tokens of this probability")
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda, ... (default: a GPU where there is one)")
    add("--out", default=out, help=f"the picture to write (default: {out})")


def main():
    parser = common.command_line(__doc__)
    parser.add_argument("--classes", nargs="+", metavar="CLASS",
                        help="numbers or names (default: ten, with --npz all in turn)")
    parser.add_argument("--number", type=int, help="pictures in all (default: 8 of each class)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default: 64)")
    add_decoding_flags(parser.add_argument, "88 per 256 tokens", out="samples.png")
    parser.add_argument("--power", type=float, metavar="P",
                        help="RAR: guidance rises as (1 - cos(pi share^P)) / 2 (default: in a straight line)")
    parser.add_argument("--gif", action="store_true", help="also an animation of the decoding, beside --out")
    parser.add_argument("--npz", metavar="FILE", help="also all pictures, for evaluate.py, in ADM's format")
    args = parser.parse_args()
    with common.one_line_errors():
        # Ended by a cluster, or by torchrun as another process failed: as by Ctrl-C, no half a file stays.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        draw(args, *common.join_processes(args.device))


if __name__ == "__main__":
    main()
