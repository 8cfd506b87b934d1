"""What makes training and decoding faster or smaller, and what a step costs.

The MFU, at best 1, is training_flops of all images in a second as a share of matrix_rate.
"""

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

from support.border import fast_precision


def causal_attention(q, k, v, dropout=0.0):
    """The last n tokens of a sequence read all before them, and themselves: [b, heads, n, D].

    q: [b, heads, n, D], of these n; k, v: [b, heads, length, D], of all; dropout: of the weights.
    """
    n, length = q.shape[2], k.shape[2]
    if n == length and v.dtype is torch.bfloat16 and not v.is_cuda and n < 256:
        # On a CPU a compiled toy step (128 tokens) takes 1.9 times as long in bfloat16; one of the
        # fine model (512) is faster in it.
        with torch.autocast("cpu", enabled=False):
            return causal_attention(q.float(), k.float(), v.float(), dropout).bfloat16()
    if n == length:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)

    # Given a mask, a GPU takes a slower kernel, and some prepare it anew for every length, that is
    # for every step of decoding. The fast one needs none: it is causal from the *last* row and
    # column on. PyTorch names it under this operator only (see torch.nn.attention.bias).
    if q.is_cuda and q.dtype is torch.bfloat16 and q.shape[-1] % 8 == 0:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, True)[0]
    mask = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def mixed_precision(device):
    """For the forward pass: products of matrices in bfloat16 where there is hardware for it."""
    dtype = fast_precision(device)
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


def speed_up_cpu():
    """Sums in a fixed order from now on.

    Otherwise threads add up gradients as they come, and a resumed training is not the same to the
    last bit.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and only finds mistakes


def compile_layers(model):
    """Decode with compiled layers from now on: a GPU then starts 14 kernels a layer instead of 36.

    To compile takes half a minute or so. Call it before the largest batch: what is compiled for a
    batch of one first is compiled for one only, and once more for others.
    """
    torch._dynamo.config.recompile_limit = 64  # a step may be the first of its shape
    for layer in model.layers:
        layer.compile(dynamic=True)


def record(model, classes, generator, order=None, **options):
    """Record a decoding on a GPU, as a CUDA graph, which the host starts again as a whole.

    classes: int64 [b], for example; options: as model.decode takes them, but for drafts. Returns a
    function of other classes, [b], that makes the steps of model.decode with this generator, seeded
    anew, and these options: a list. They have no logits, and its next call overwrites them.
    """
    from randar import generation_order  # it imports this file, so not at the top

    def turns():
        return generation_order(order or model.order, len(classes), model.config.grid, generator,
                                classes.device)

    # The graph will read classes and positions from these, whatever they hold by then.
    classes, positions = classes.clone(), turns()
    begin = functools.partial(model.decode, classes, positions, generator=generator, **options)
    stream, mine = torch.cuda.Stream(classes.device), torch.cuda.current_stream(classes.device)
    stream.wait_stream(mine)
    with torch.cuda.stream(stream):  # once without: what libraries prepare cannot be recorded
        for _ in begin():
            pass
    mine.wait_stream(stream)

    decoding, graph = begin(), torch.cuda.CUDAGraph()  # it has checked all, and made no step yet
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=stream):
        steps = [step._replace(logits=None) for step in decoding]  # logits would fill the memory

    def decode(new_classes):
        classes.copy_(new_classes)
        positions.copy_(turns())
        graph.replay()
        return steps

    return decode


def checkpoint_activations(model):
    """Keep only the input of each layer, and compute the layer again when its gradient is due."""
    for layer in model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def training_flops(model):
    """Floating-point operations of one training image: forward, and backward twice as dear."""
    num_tokens = math.prod(model.config.grid)
    length = num_tokens * (model.predicting.step or 1)  # 2 N; N, where no token is inserted
    in_layers = sum(p.numel() for p in model.layers.parameters())  # each token meets all of them
    weights = length * in_layers + num_tokens * model.output.weight.numel()

    # Query by key, then weight by value: d multiplications each for every pair of tokens, half of
    # which a causal model needs.
    in_attention = model.config.n_layer * 2 * model.config.dim * length**2 / 2
    return 3 * 2 * (weights + in_attention)  # 2: a multiplication and an addition


def sustained(function):
    """Seconds of one call: the median while a device is busy for a second, and may slow down."""
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1).median


@functools.cache
def matrix_rate(device, dtype, side=8192):
    """Operations a second in large matrix products: what this device could do at best."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return 2 * side**3 / sustained(lambda: a @ b)


def throughput(model, images_per_second):
    """For the log: images and tokens a second, and of GPUs the MFU, the share of their rate."""
    device = next(model.parameters()).device
    tokens_per_second = images_per_second * math.prod(model.config.grid)
    line = {"images_per_second": round(images_per_second, 1),
            "tokens_per_second": round(tokens_per_second)}
    if device.type == "cuda":
        gpus = dist.get_world_size() if dist.is_initialized() else 1
        peak = gpus * matrix_rate(device, fast_precision(device))
        line["mfu"] = round(images_per_second * training_flops(model) / peak, 4)
    return line
