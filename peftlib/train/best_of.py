"""Best of n, and fine-tuning on it: rejection sampling, the plainest way to follow a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlib import PeftlibError
from peftlib.train.generate import generate
from peftlib.train.losses import IGNORE
from peftlib.train.packing import Encoded
from peftlib.train.rollouts import Reward, checked_rewards


@dataclass(frozen=True)
class Best:
    """The completion of a prompt that earned most.

    Attributes:
        example: prompt and completion, to be trained with :func:`peftlib.train.causal_lm`.
        completion: its ids.
        reward: what it earned.
        mean: what the prompt's completions earned on average; exactly ``reward`` where all earned the same, so that
            ``[best for best in found if best.reward > best.mean]`` leaves out where choosing told nothing.

    Example:
        >>> best = Best(Encoded([1, 5], [-100, 5]), completion=[5], reward=1.0, mean=0.25)
        >>> best.reward - best.mean  # what choosing gained
        0.75
    """

    example: Encoded
    completion: list[int]
    reward: float
    mean: float


def best_of(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    reward: Reward,
    n: int,
    *,
    rows: int | None = None,
    **settings: Any,
) -> list[Best]:
    """Draw n completions of each prompt and keep the one with the highest reward; of equal ones the first.

    Args:
        model: as it is now, see :func:`peftlib.train.generate`.
        prompts: rows of ids.
        reward: see :func:`peftlib.train.ppo`.
        n: completions of each prompt.
        rows: completions drawn at a time; None is all.
        **settings: of :func:`peftlib.train.generate`.

    Raises:
        PeftlibError: n or rows below 1, several completions at temperature 0, which would be one, or as
            ``generate`` and the reward raise.

    Example:
        >>> def reward(prompts, completions):
        ...     return [sum(ids) for ids in completions]
        >>> [best] = best_of(nn.Embedding(7, 7), [[1]], reward, 16, max_new_tokens=2)
        >>> best.reward == sum(best.completion) >= best.mean
        True

    Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.3 (rejection sampling fine-tuning).
    """
    if n < 1 or (rows is not None and rows < 1):
        raise PeftlibError(f"n={n}, rows={rows}: give numbers of completions from 1.")
    if n > 1 and settings.get("temperature") == 0:
        raise PeftlibError(
            f"n={n} completions at temperature=0 are one and the same. Give a temperature above 0."
        )
    repeated = [prompt for prompt in prompts for _ in range(n)]
    size = rows or len(repeated) or 1
    completions = [
        ids
        for start in range(0, len(repeated) or 1, size)
        for ids in generate(model, repeated[start : start + size], **settings).lists()
    ]
    rewards = checked_rewards(reward, [list(prompt) for prompt in repeated], completions).tolist()
    found = []
    for i, prompt in enumerate(prompts):
        group = range(i * n, (i + 1) * n)
        top = max(group, key=lambda j: rewards[j])
        labels = [IGNORE] * len(prompt) + completions[top]
        found.append(
            Best(
                Encoded([*prompt, *completions[top]], labels),
                completions[top],
                rewards[top],
                rewards[top] + sum(rewards[j] - rewards[top] for j in group) / n,
            )
        )
    return found
