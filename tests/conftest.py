"""Makes the flat files importable, wherever pytest is started from; and what many tests start from."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402  (after the path)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from helpers import N, V, seeded, small_model  # noqa: E402

from randar import generation_order  # noqa: E402


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def batch():
    """tokens [3, N], classes [3], order [3, N]."""
    tokens = torch.randint(V, (3, N), generator=seeded(0))
    return tokens, torch.tensor([0, 3, 4]), generation_order("random", 3, (4, 4), seeded(1))


@pytest.fixture
def attention_calls(monkeypatch):
    """A list to which every call of attention adds (query, key, value, keyword arguments)."""
    calls, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        calls.append((q, k, v, options))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls
