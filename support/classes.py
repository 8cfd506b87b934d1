"""What the classes are called: numbers and names to class indices, ImageNet's included."""

import difflib
import pathlib

import torch

from support.border import UserError


def names_of_classes(class_names, number):
    """All names of each class, the most readable one first: a list of `number` tuples of str.

    class_names: list of str, those of a checkpoint or a token folder, or None. To WordNet ids, as
    folders of ImageNet are called, and to numbers of its 1,000 classes, English names are added.
    """
    file = pathlib.Path(__file__).with_name("imagenet_classes.txt")
    imagenet = [line.split(" ", 1) for line in file.read_text().splitlines()]  # [WordNet id, name]
    known = {wordnet: (name, wordnet) for wordnet, name in imagenet}

    if number == len(imagenet):
        known |= {str(i): (name, wordnet, str(i)) for i, (wordnet, name) in enumerate(imagenet)}
        class_names = class_names or [wordnet for wordnet, _ in imagenet]  # a released checkpoint
    class_names = class_names or [f"class {i}" for i in range(number)]
    return [known.get(name, (name,)) for name in class_names]


def plain(name):
    """Golden_Retriever, golden-retriever -> golden retriever."""
    return name.lower().replace("_", " ").replace("-", " ")


def parse_classes(words, names):
    """Class indices from numbers or names. UserError for an unknown one, or one that several have.

    names: as names_of_classes gives them.
    """
    classes = []
    for word in words:
        # As it is written first: folders may be called 0, 1, 10, ..., which are not their indices.
        found = [i for i, known in enumerate(names) if word in known]
        if not found:
            found = [i for i, known in enumerate(names) if plain(word) in map(plain, known)]
        if not found and word.isdecimal() and int(word) < len(names):
            found = [int(word)]  # a number that is nobody's name

        if not found:
            readable = [known[0] for known in names]
            close = difflib.get_close_matches(plain(word), readable, n=10) or readable[:10]
            raise UserError(f"no class {word!r}: give a number from 0 to {len(names) - 1} or a "
                            f"name ({', '.join(close)})")
        if len(found) > 1:
            raise UserError(f"{word!r} is the name of the classes {' and '.join(map(str, found))}: "
                            "give the number of the one you mean")
        classes += found
    return classes


def spread_classes(classes, columns=8):
    """int64 [n]: `columns` of each of at most ten classes, spread evenly over those given."""
    rows = min(10, len(classes))
    chosen = [classes[i * len(classes) // rows] for i in range(rows)]  # ImageNet: 0, 100, 200, ...
    return torch.tensor(chosen).repeat_interleave(columns)
