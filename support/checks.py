"""What a caller of the library may get wrong, said in one line; and networks in files.

No check of this kind stands between the steps of the method: `decode` asks once, before its first.
"""

import dataclasses
import math
import numbers

import torch

from support import border
from support.border import UserError


def check_shapes(dtype=torch.int64, **expected):
    """name=(tensor, shape as a list): raises UserError, with all names, if one does not fit."""
    for name, (x, _) in expected.items():
        if x.dtype != dtype:
            raise UserError(f"{name} must be {dtype}, not {x.dtype}")
    if any(list(x.shape) != shape for x, shape in expected.values()):
        wanted = ", ".join(f"{name} {shape}" for name, (_, shape) in expected.items())
        got = ", ".join(str(list(x.shape)) for x, _ in expected.values())
        raise UserError(f"expected {wanted}, got the shapes {got}")


def check_values(name, x, end):
    """Raises UserError where a number of the int64 tensor x is not from 0 to end - 1."""
    if ((x < 0) | (x >= end)).any():
        raise UserError(f"{name} must be from 0 to {end - 1}, not {x.min()} to {x.max()}")


def check_decoding(model, classes, order, steps, guidance, sampling, known, angles, queries,
                   drafts):
    """Raises UserError for arguments of RandAR.decode that do not fit the model or each other."""
    b, n, k = len(order), order.shape[-1], known[0].shape[-1]  # to decode: n, known: k
    check_shapes(classes=(classes, [b]), order=(order, [b, n]), known_positions=(known[0], [b, k]),
                 known_tokens=(known[1], [b, k]))

    # Positions and tokens: an index out of range would be a crash on a GPU, or a wrong picture.
    num_tokens = math.prod(model.config.grid) if angles is None else len(angles)  # or a larger one
    if angles is not None:
        check_shapes(angles.dtype, angles=(angles, [num_tokens, model.head_dim // 2]))
    positions = torch.cat([known[0], order], dim=1)  # [b, k + n]
    check_values("classes", classes, model.null_class + 1)
    check_values("positions", positions, num_tokens)
    check_values("known tokens", known[1], model.config.vocab_size)
    if (positions.sort(dim=1).values.diff(dim=1) == 0).any():
        raise UserError("a position is given twice, in the order or among the known: give it once")

    # How the tokens are drawn
    whole = {"steps": steps, "drafts": drafts, "top_k": sampling.top_k}
    if not all(x is None or isinstance(x, numbers.Integral) for x in whole.values()):
        raise UserError(f"expected whole numbers, not {whole}")
    if len(guidance.cfg) != 2 or not all(map(math.isfinite, (*guidance.cfg, guidance.scg))):
        raise UserError("cfg must be two numbers, at the start and at the end, and scg one, not "
                        f"{list(guidance.cfg)} and {guidance.scg}")
    if guidance.power is not None and not 0 <= guidance.power < math.inf:
        raise UserError(f"power must be 0 (constant guidance) or more, not {guidance.power}")
    if not 0 < sampling.temperature < math.inf:
        raise UserError(f"temperature must be above 0, and finite, not {sampling.temperature}")
    if sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise UserError("top_k must be 0 (all tokens) or more, top_p above 0 and at most 1, not "
                        f"{sampling.top_k} and {sampling.top_p}")

    if queries not in ("causal", "isolated"):
        raise UserError(f"queries must be 'causal' or 'isolated', not {queries!r}")
    if drafts is not None and (drafts < 1 or steps is not None):
        raise UserError(f"drafts must be 1 or more, and without steps, not {drafts} and {steps}")

    # What a model without position instruction tokens of their own cannot do
    more = drafts is not None or queries == "isolated" or guidance.scg != 1 or angles is not None
    if more and not model.inserts_instructions:
        raise UserError(f"a model of the kind {model.kind!r} decodes on its own grid, with causal "
                        "queries, without drafts and spatial contextual guidance (scg 1)")


def config_of(config_class, settings, path):
    """The dataclass with the settings that a file holds. UserError, with its path, for bad ones."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, x in settings.items():
        kind = type(defaults.get(name))
        if kind is float:  # dropouts
            good = type(x) in (int, float) and 0 <= x < 1
        elif kind is tuple:
            good = isinstance(x, (tuple, list)) and len(x) >= 2
            good = good and all(type(size) is int and size > 0 for size in x)
        else:
            good = type(x) is kind and (x > 0 or kind is bool)
        if name not in defaults or not good:
            raise UserError(f"{path} names a network with {name} = {x!r}, which there is not: it "
                            "is damaged, or of another version")
    config = config_class(**settings)
    if hasattr(config, "n_head") and config.dim % (4 * config.n_head):
        raise UserError(f"{path} names a network of width {config.dim} with {config.n_head} heads: "
                        "expected a multiple of 4 for each head")
    return config


def save_network(network, path, half=False, **more):
    """Write a network with a dataclass as `config`, and more; half: weights in float16."""
    state = network.state_dict()
    if half:  # load_state_dict makes it float32 again
        state = {name: x.half() for name, x in state.items()}
    border.save({"config": dataclasses.asdict(network.config), "model": state} | more, path)


def load_network(path, recognise, device="cpu"):
    """(network in eval mode, content of the file); recognise(content, path) -> (class, config).

    Raises UserError for a file that is missing, damaged or holds another network.
    """
    content, device = border.load(path), border.pick_device(device)
    network_class, config = recognise(content, path)
    with torch.device("meta"):  # shapes without numbers: all of these come from the file
        network = network_class(config)

    load_weights(network.to_empty(device=device), content.get("model", content), path)
    return network.eval(), content


def load_weights(network, state, path):
    """Put the weights of a file into a network. UserError where they do not fit, or are no good."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # one parameter too few or too many: it is another network
        reason = str(error).splitlines()[-1].strip()  # torch names every parameter, one will do
        raise UserError(f"{path} does not fit the model that it names ({reason})") from None
    if not all(p.isfinite().all() for p in network.parameters()):
        raise UserError(f"{path} holds weights that are not finite, its training has diverged: "
                        "give another file")
