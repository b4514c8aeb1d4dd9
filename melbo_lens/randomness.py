"""Where do random numbers come from?  From private generators, each seeded by a key that says what it is for.

The global generator is neither read nor changed. Dtype and device are always named, so torch's defaults, which a user
may have set, change nothing.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Item = TypeVar("Item")


def generator(*key: object) -> torch.Generator:
    """Makes a CPU generator whose stream depends only on the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def gaussian(shape: Sequence[int], *key: object) -> Float[Tensor, "..."]:
    """Draws standard Gaussian numbers, float32 on the CPU, that depend only on the key."""
    return torch.randn(*shape, generator=generator(*key), dtype=torch.float32, device="cpu")


def uniform(n: int, *key: object) -> Float[Tensor, " draw"]:
    """Draws uniform numbers from [0, 1), float32 on the CPU, that depend only on the key."""
    return torch.rand(n, generator=generator(*key), dtype=torch.float32, device="cpu")


def gaussian_rows(n_rows: int, d_model: int, *key: object) -> Float[Tensor, "row d_model"]:
    """Draws standard Gaussian rows; row k depends only on (key, k), not on the number of rows."""
    return torch.stack([gaussian((d_model,), *key, k) for k in range(n_rows)])


def draw(items: Sequence[Item], n: int, *key: object) -> list[Item]:
    """Draws n of the items, or all if they are fewer, without replacement; the places depend only on the key.

    So the same key draws the same places of another list of that length.
    """
    order = torch.randperm(len(items), generator=generator(*key), dtype=torch.int64, device="cpu")
    return [items[place] for place in order[:n].tolist()]
