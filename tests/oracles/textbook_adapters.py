"""What does the recipe for adapters say, word for word?  Whole forward passes, one adapter at a time, W_out edited.

It shares no code with `melbo_lens`: the MLP's output weights of a bare Hugging Face network get the low-rank update in
place, and autograd does the rest.
"""

import torch
from torch.func import functional_call


def normalized(matrix, how):
    """Every column of unit norm, unit Frobenius norm, or largest singular value 1."""
    if how == "column":
        return torch.stack([column / column.norm() for column in matrix.T], dim=1)
    return matrix / (matrix.norm() if how == "frobenius" else torch.linalg.svdvals(matrix)[0])


class TextbookAdapters:
    """The objective of low-rank updates of one weight of a Hugging Face model.

    It is taken over prompts (each [1 pos]) and their target positions.
    """

    def __init__(self, network, weight_names, prompts, target_layer, positions, p=2, q=2, transposed=False):
        """`transposed`: the weights are [d_mlp d_model], as GPT-2 keeps them."""
        self.network, self.names, self.prompts, self.transposed = network, weight_names, prompts, transposed
        self.target, self.positions, self.p, self.q = target_layer, positions, p, q
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        self.weights = dict(network.named_parameters())
        with torch.no_grad():
            self.clean = [self.read({}, tokens) for tokens in prompts]

    def read(self, changed, tokens):
        """The stream that enters the target layer."""
        return functional_call(self.network, changed, (tokens,), {"output_hidden_states": True}).hidden_states[
            self.target
        ][0]

    def value(self, factors, scale):
        """Sum over prompts of ( sum_t ||change_t||^p )^(1/q); `factors` is a pair (A, B) per weight [d_model d_mlp]."""
        updates = [scale * (a.T @ b.T if self.transposed else b @ a) for a, b in factors]
        changed = {name: self.weights[name] + update for name, update in zip(self.names, updates, strict=True)}
        total = 0.0
        for tokens, clean, positions in zip(self.prompts, self.clean, self.positions, strict=True):
            change = self.read(changed, tokens) - clean
            total = total + sum(change[t].norm() ** self.p for t in positions) ** (1 / self.q)
        return total

    def learn(self, starts, scale, how, n_steps, lr):
        """The published loop: AdamW on both factors, each normalised after every step.

        Returns the factors and the objective before each step.
        """
        found, histories = [], []
        for pairs in starts:
            leaves = [torch.nn.Parameter(normalized(factor, how)) for pair in pairs for factor in pair]
            optimizer = torch.optim.AdamW(leaves, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
            history = []
            for _ in range(n_steps):
                optimizer.zero_grad()
                value = self.value(list(zip(leaves[::2], leaves[1::2], strict=True)), scale)
                (-value).backward()
                history.append(float(value))
                optimizer.step()
                with torch.no_grad():
                    for leaf in leaves:
                        leaf.copy_(normalized(leaf, how))
            pairs = [(a.detach(), b.detach()) for a, b in zip(leaves[::2], leaves[1::2], strict=True)]
            with torch.no_grad():
                history.append(float(self.value(pairs, scale)))
            found.append(pairs)
            histories.append(history)
        return found, torch.tensor(histories).T
