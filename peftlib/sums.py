"""Ways of adding up updates element by element: the plain sum, TIES and DARE.

Each maps weighted differences of one tensor to what to add to it.
Sources: Yadav et al. 2023, arXiv:2306.01708, algorithm 1; Yu et al. 2024, arXiv:2311.03099, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftlib.errors import PeftlibError

Sum = Callable[[Sequence[tuple[float, Tensor]]], Tensor]

HOWS = ("linear", "concat", "svd", "ties", "dare")
DENSE = {"ties": 0.2, "dare": 0.5}
"""Those that weigh single elements, with the share that they keep if nothing else is said (0.2: the TIES paper's)."""


def chosen(how: str, density: float | None, generator: torch.Generator | None) -> Sum:
    """The sum that ``how`` names.

    Raises:
        PeftlibError: a setting that it does not have, or out of range.
    """
    if generator is not None and how != "dare":
        raise PeftlibError(f"combine(how={how!r}, generator=...): only 'dare' draws random numbers.")
    if how not in DENSE:
        if density is not None:
            raise PeftlibError(f"combine(how={how!r}, density=...): density is for 'ties' and 'dare' alone.")
        return linear
    share = DENSE[how] if density is None else _share(density)
    if how == "ties":
        return lambda terms: ties(terms, share)
    return lambda terms: dare(terms, share, generator)


def _share(density: float) -> float:
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise PeftlibError(f"combine(density={density!r}): density must be a number above 0 and up to 1.")
    return density


def linear(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """``sum_t w_t D_t``."""
    total = torch.zeros_like(terms[0][1])
    for weight, update in terms:
        total.add_(update, alpha=weight)
    return total


def ties(terms: Sequence[tuple[float, Tensor]], density: float) -> Tensor:
    """Trim each to its largest elements, elect a sign per element, and average those that have it."""
    trimmed = [weight * _largest(update, density) for weight, update in terms]
    elected = torch.stack(trimmed).sum(0).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for update in trimmed:
        agrees = (update.sign() == elected) & (elected != 0)
        total += torch.where(agrees, update, 0)
        count += agrees
    return total / count.clamp_min(1)


def _largest(update: Tensor, density: float) -> Tensor:
    """The share of elements of largest size, those of equal size with them; zeros elsewhere."""
    count = max(1, round(density * update.numel()))
    sizes = update.abs()
    smallest = sizes.flatten().kthvalue(update.numel() - count + 1).values
    return torch.where(sizes >= smallest, update, 0)


def dare(terms: Sequence[tuple[float, Tensor]], density: float, generator: torch.Generator | None) -> Tensor:
    """Drop elements at random, rescale the rest so that the expectation stays, and add up."""
    return linear([(weight / density, _dropped(update, density, generator)) for weight, update in terms])


def _dropped(update: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    # Drawn where the generator is, so that a seed means the same for a model on any device.
    device = "cpu" if generator is None else generator.device
    draws = torch.rand(update.shape, generator=generator, device=device, dtype=torch.float32)
    return torch.where(draws.to(update.device) < density, update, 0)
