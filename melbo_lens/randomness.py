"""Where does chance come from?  From generators of our own, each seeded by what it is for; the global one is neither read nor changed.

Dtype and device are named, so that torch's defaults, which a user may have set, change nothing.
"""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def generator(*key: object) -> torch.Generator:
    """A CPU generator whose stream depends on the key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def gaussian(shape: Sequence[int], *key: object) -> Float[Tensor, "..."]:
    """Standard Gaussian numbers that depend on the key alone, float32 on the CPU."""
    return torch.randn(*shape, generator=generator(*key), dtype=torch.float32, device="cpu")


def uniform(n: int, *key: object) -> Float[Tensor, " draw"]:
    """Uniform numbers from [0, 1) that depend on the key alone, float32 on the CPU."""
    return torch.rand(n, generator=generator(*key), dtype=torch.float32, device="cpu")


def gaussian_rows(n_rows: int, d_model: int, *key: object) -> Float[Tensor, "row d_model"]:
    """Standard Gaussian rows; row k depends on (key, k) alone, not on how many there are."""
    return torch.stack([gaussian((d_model,), *key, k) for k in range(n_rows)])
