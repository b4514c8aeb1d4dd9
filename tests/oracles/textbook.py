"""What does the method say, word for word?  This is the published recipe from its equations.

It runs whole forward passes, one vector at a time.

Shares no code with `melbo_lens`: TransformerLens' own hooks, its own objective, its own update.
"""

import torch


def target_activation(model, tokens, source_layer, target_layer, theta):
    """The stream entering the target layer of one prompt [1 pos], with theta added at the source's MLP output.

    The run goes on to the logits.
    """
    seen = {}
    name = (
        f"blocks.{target_layer}.hook_resid_pre"
        if target_layer < model.cfg.n_layers
        else f"blocks.{target_layer - 1}.hook_resid_post"
    )

    def add(mlp_out, hook):
        return mlp_out + theta

    def read(stream, hook):
        seen["z"] = stream

    model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{source_layer}.hook_mlp_out", add), (name, read)])
    return seen["z"][0]


def objective(changed, clean, positions, p, q):
    """( sum_t || z_t(theta) - z_t(0) ||^p )^(1/q) of one prompt."""
    total = 0.0
    for t in positions:
        total = total + torch.linalg.vector_norm(changed[t] - clean[t]) ** p
    return total ** (1 / q)


class Textbook:
    """The objective of a model, of prompts (each [1 pos]) and of their target positions, with gradients by autograd."""

    def __init__(self, model, prompts, source_layer, target_layer, positions, p=2, q=1):
        self.model, self.prompts, self.layers, self.positions, self.p, self.q = (
            model,
            prompts,
            (source_layer, target_layer),
            positions,
            p,
            q,
        )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        zero = torch.zeros(model.cfg.d_model)
        with torch.no_grad():
            self.clean = [target_activation(model, tokens, *self.layers, zero) for tokens in prompts]

    def value(self, theta):
        total = 0.0
        for tokens, clean, positions in zip(self.prompts, self.clean, self.positions, strict=True):
            changed = target_activation(self.model, tokens, *self.layers, theta)
            total = total + objective(changed, clean, positions, self.p, self.q)
        return total

    def learn(self, starts, radius, n_steps, lr, orthogonal=True, watch=None):
        """The published loop; `watch(k, step, value)` sees the objective before each step and of the last iterate."""
        found = []

        def off_the_found(x):
            for other in found if orthogonal else []:
                x = x - (x @ other) / (other @ other) * other
            return x

        for k, start in enumerate(starts):
            theta = off_the_found(start.clone())
            theta = torch.nn.Parameter(theta / theta.norm() * radius)
            optimizer = torch.optim.AdamW([theta], lr=lr, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
            for step in range(n_steps):
                optimizer.zero_grad()
                value = self.value(theta)
                (-value).backward()
                if watch:
                    watch(k, step, value.item())
                with torch.no_grad():
                    gradient = off_the_found(theta.grad)
                    theta.grad = gradient - (gradient @ theta) / (theta @ theta) * theta
                optimizer.step()
                with torch.no_grad():
                    moved = off_the_found(theta.detach())
                    theta.copy_(moved / moved.norm() * radius)
            if watch:
                with torch.no_grad():
                    watch(k, n_steps, self.value(theta).item())
            found.append(theta.detach())
        return torch.stack(found)
