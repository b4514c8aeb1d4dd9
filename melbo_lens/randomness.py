"""Where does chance come from?  From generators of our own, each seeded by what it is for; the global one is neither read nor changed."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def generator(*key: object) -> torch.Generator:
    """A CPU generator whose stream depends on the key alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def gaussian_rows(n_rows: int, d_model: int, *key: object) -> Float[Tensor, "row d_model"]:
    """Standard Gaussian rows; row k depends on (key, k) alone, not on how many there are."""
    return torch.stack([torch.randn(d_model, generator=generator(*key, k)) for k in range(n_rows)])
