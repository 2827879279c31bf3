"""Optimizers, the learning rate's schedule and the moving average of the weights."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def learning_rate_factor(step: int, total_steps: int, warmup: int) -> float:
    """Return the factor of the peak learning rate: linear warm-up, times a line from 1 to 0.

    Defazio et al. 2023 prove that a line over the whole run is best in the worst case.
    """
    warmup = max(1, min(warmup, total_steps // 5))
    return min(1.0, (step + 1) / warmup) * (1 - min(1.0, step / total_steps))


def ema_decay(step: int, decay: float) -> float:
    """Return the decay of this step. Early on, the average spans about a tenth of the steps."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, weight: Tensor) -> None:
    """Set the parameters of `ema` to (1 - weight) ema + weight model; the weight is ()."""
    averages = list(ema.parameters())
    changes = torch._foreach_sub(list(model.parameters()), averages)
    torch._foreach_mul_(changes, weight)
    torch._foreach_add_(averages, changes)


def make_optimizers(model: nn.Module, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Return AdamW and, if muon_lr > 0, Muon, which share the parameters of a UNet.

    Muon updates the hidden weight matrices: convolutions and attention. AdamW updates the rest:
    stem, head, embeddings of time and label, the layers that scale and shift by the time, norms and
    biases. Each parameter group keeps its peak learning rate as "peak_lr". Its learning rate "lr"
    is a tensor () on the device, so that a CUDA graph reads the value of each step.
    """
    device = next(model.parameters()).device
    hidden, rest = [], []
    for name, p in model.named_parameters():
        embeds = "embed" in name or "scale_shift" in name
        outer = embeds or name.startswith(("stem", "head"))
        (hidden if p.ndim >= 2 and not outer and muon_lr else rest).append(p)
    adamw = torch.optim.AdamW(
        rest,
        torch.tensor(lr, device=device),
        betas=(0.9, 0.99),
        weight_decay=0.0,
        fused=True,
        capturable=device.type == "cuda",
    )
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if hidden:
        optimizers.append(Muon(hidden, torch.tensor(muon_lr, device=device)))
    for optimizer, peak_lr in zip(optimizers, (lr, muon_lr), strict=False):
        for group in optimizer.param_groups:
            group["peak_lr"] = peak_lr
    return optimizers


def orthogonalize(matrices: list[Tensor], steps: int = 5) -> list[Tensor]:
    """Return about U V^T of each matrix G = U S V^T, by Newton-Schulz (Jordan et al. 2024).

    Their iteration is X <- (a I + b A + c A^2) X with A = X X^T. Every iterate is P X_0, where P is
    a polynomial in A_0. So this code iterates P and A = P A_0 P instead: they are m x m, m being
    the shorter side of the matrix. Matrices with equal m are iterated together. TF32 must stay off:
    its rounding makes small eigenvalues of A negative, and those grow.
    """
    wide = [G if len(G) <= len(G.mT) else G.mT for G in matrices]
    same_m = defaultdict(list)
    for i, X in enumerate(wide):
        same_m[len(X)].append(i)

    def polynomial(A: Tensor) -> Tensor:
        identity = torch.eye(A.shape[-1], device=A.device)
        return torch.baddbmm(3.4445 * identity - 4.7750 * A, A, A, alpha=2.0315)

    for members in same_m.values():
        A = torch.stack([wide[i] @ wide[i].mT for i in members])
        squared_norm = A.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-14)[:, None, None]
        A = A / squared_norm
        P = Q = polynomial(A)
        for _ in range(steps - 1):
            A = Q @ A @ Q
            Q = polynomial(A)
            P = Q @ P
        for i, P_i in zip(members, P * squared_norm.rsqrt(), strict=True):
            wide[i] = P_i @ wide[i]
    return [X if X.shape == G.shape else X.mT for X, G in zip(wide, matrices, strict=True)]


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and orthogonalised updates (Jordan et al. 2024).

    It takes weights of two or more dimensions. A convolution's weight is treated as the matrix
    (out, in * k * k). (torch.optim.Muon takes 2-D parameters only, one at a time.)
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float | Tensor, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
            directions = orthogonalize([update.flatten(1) for update in updates])
            for p, direction in zip(params, directions, strict=True):
                rows, columns = direction.shape
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                p.sub_(direction.view(p.shape) * scale)
