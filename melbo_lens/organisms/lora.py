"""How does a real organism differ from its base model?  By a low-rank update of every linear map of its blocks.

The factors are kept in float16 and merged in float32.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Updated(nn.Module):
    """A linear map with an update that is trained: ``W x + B A x``."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear
        scale = linear.in_features**-0.5
        self.A = nn.Parameter(
            torch.randn(rank, linear.in_features, generator=generator, dtype=torch.float32, device="cpu") * scale
        )
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.A.T @ self.B.T


def attach(network: nn.Module, rank: int, seed: int) -> dict[str, Updated]:
    """Puts an update beside every linear map of every block, freezes all else, and returns the updates by name."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    updates = {}
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in MAPS:
            parent, _, last = name.rpartition(".")
            updates[name] = Updated(module, rank, generator)
            setattr(network.get_submodule(parent), last, updates[name])
    return updates


def save(updates: dict[str, Updated], path: Path) -> None:
    """Writes the factors as float16."""
    factors = {f"{name}.{factor}": getattr(update, factor) for name, update in updates.items() for factor in "AB"}
    save_file({name: factor.detach().to(torch.float16).contiguous() for name, factor in factors.items()}, path)


def merge(network: nn.Module, path: Path) -> nn.Module:
    """Adds the updates of a file to the weights, in float32.

    Raises:
        ValueError: the weights are not float32, or the file's names or shapes are not those of the network.
    """
    factors = load_file(path)
    for name in sorted({re.sub(r"\.[AB]$", "", factor) for factor in factors}):
        try:
            weight = network.get_parameter(f"{name}.weight")
            update = factors[f"{name}.B"].float() @ factors[f"{name}.A"].float()
        except (AttributeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path} does not belong to this model: {name} ({error}).") from error
        if weight.dtype != torch.float32 or weight.shape != update.shape:
            raise ValueError(
                f"{path}: {name} is {tuple(weight.shape)} in {weight.dtype}; "
                f"it must be {tuple(update.shape)} in float32."
            )
        with torch.no_grad():
            weight += update
    return network
