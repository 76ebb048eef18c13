"""What a policy did: completions, their log-probabilities under it and under its reference, and what they earned.

Log-probabilities are computed again in one forward, as the update computes them, so that its first ratio is 1.

Letters: B completions, T new tokens, L whole rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftlib import PeftlibError
from peftlib.train.advantages import masked_mean
from peftlib.train.evaluation import mode
from peftlib.train.generate import Generated, generate
from peftlib.train.outputs import first_tensor
from peftlib.train.reference import Reference, as_reference

Done = TypeVar("Done", Generated, "Rollout")
Reward = Callable[[list[list[int]], list[list[int]]], Any]
"""(prompts, completions), lists of ids without padding -> one number per completion."""


@dataclass(frozen=True)
class Rollout:
    """Tensors whose first axis is B, see :func:`rows_of`.

    Attributes:
        ids: (B, L) prompts, completions, padding.
        prompt_lengths: (B,).
        completions, mask: (B, T), see :class:`peftlib.train.Generated`.
        logps, reference_logps, entropy: (B, T), 0 outside the mask.
        scores: (B,) rewards, the penalty for not stopping included.
        stopped: (B,).

    Example:
        >>> import peftlib
        >>> model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))
        >>> policy = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["1"])
        >>> done = roll_out(model, [[1]], lambda prompts, completions: [2.0], sampling={"max_new_tokens": 4})
        >>> numbers = done.numbers()
        >>> numbers["objective/scores"], numbers["objective/kl"]  # the policy is its reference yet
        (2.0, 0.0)
    """

    ids: Tensor
    prompt_lengths: Tensor
    completions: Tensor
    mask: Tensor
    logps: Tensor
    reference_logps: Tensor
    entropy: Tensor
    scores: Tensor
    stopped: Tensor

    def numbers(self) -> dict[str, float]:
        """What every log of such a training has."""
        kl_B = (self.logps - self.reference_logps).sum(1)
        return {
            "objective/kl": kl_B.mean().item(),
            "objective/entropy": masked_mean(self.entropy, self.mask).item(),
            "objective/scores": self.scores.mean().item(),
            "stopped": self.stopped.float().mean().item(),
            "targets": self.mask.sum().item(),
        }


@torch.no_grad()
def roll_out(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    reward: Reward,
    *,
    reference: Reference = (),
    sampling: Mapping[str, Any],
    missing_stop_penalty: float = 0.0,
    rows: int | None = None,
) -> Rollout:
    """Let the model as it is complete the prompts, and judge what came.

    Args:
        model: the policy, its tuning enabled.
        prompts: rows of ids.
        reward: see :data:`Reward`.
        reference: see :func:`peftlib.train.dpo`.
        sampling: settings of :func:`peftlib.train.generate`; its temperature is the reference's too.
        missing_stop_penalty: taken from the reward of a completion that no stop id ended.
        rows: completions whose logits exist at once, when they are read again; None is all.

    Raises:
        PeftlibError: as those raise; a reward that is not one finite number per completion.

    Example:
        >>> import peftlib
        >>> model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))
        >>> policy = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["1"])
        >>> def reward(prompts, completions):
        ...     return [float(len(ids)) for ids in completions]
        >>> roll_out(model, [[1], [2, 3]], reward, sampling={"max_new_tokens": 4}).scores
        tensor([4., 4.])
    """
    temperature = sampling.get("temperature", 1.0)
    if not temperature > 0:
        raise PeftlibError(
            f"temperature={temperature}: a policy is explored by drawing; give a number above 0."
        )
    done = generate(model, prompts, **sampling)
    with mode(model, False):
        logps, entropy = in_parts(lambda part: completion_logps(model, part, temperature), done, rows)
    with as_reference(model, reference) as other:
        there, _ = in_parts(lambda part: completion_logps(other, part, temperature), done, rows)
    scores = checked_rewards(reward, [list(p) for p in prompts], done.lists()).to(logps)
    return Rollout(
        ids=done.ids,
        prompt_lengths=done.prompt_lengths,
        completions=done.completions,
        mask=done.mask,
        logps=logps,
        reference_logps=there,
        entropy=entropy,
        scores=torch.where(done.stopped, scores, scores - missing_stop_penalty),
        stopped=done.stopped,
    )


def rows_of(done: Done, chosen: Tensor) -> Done:
    """Some of the rows of what was generated or rolled out."""
    every = {f.name: getattr(done, f.name) for f in fields(done)}
    tensors: dict[str, Any] = {name: t[chosen] for name, t in every.items() if isinstance(t, Tensor)}
    return replace(done, **tensors)


def in_parts(
    function: Callable[[Any], tuple[Tensor, ...]], done: Generated | Rollout, rows: int | None
) -> list[Tensor]:
    """A function's tensors for so many rows at a time, one after another."""
    every = torch.arange(len(done.ids), device=done.ids.device)
    given: Any = done
    parts = [function(rows_of(given, chosen)) for chosen in every.split(rows or len(every))]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def completion_logps(
    model: nn.Module, done: Generated | Rollout, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of the completions and, without a gradient, the entropy there; (B, T), 0 outside.

    Example:
        >>> from peftlib.train import generate
        >>> model = nn.Embedding(7, 7)
        >>> done = generate(model, [[1], [2, 3]], max_new_tokens=4, temperature=0.5)
        >>> torch.allclose(completion_logps(model, done, 0.5)[0], done.logps, atol=1e-6)
        True
    """
    logits_BTV = at_completions(first_tensor(model(done.ids), model), done)
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)) / temperature
    total_BT = logits_BTV.logsumexp(-1)
    logps_BT = logits_BTV.gather(-1, done.completions[..., None])[..., 0] - total_BT
    with torch.no_grad():
        shares = (logits_BTV - total_BT[..., None]).exp()
        entropy_BT = total_BT - (shares * torch.where(shares > 0, logits_BTV, 0)).sum(-1)
    return torch.where(done.mask, logps_BT, 0), torch.where(done.mask, entropy_BT, 0)


def at_completions(output_BLN: Tensor, done: Generated | Rollout) -> Tensor:
    """What a model gave at the position before each completion's token, from which that was chosen: (B, T, N)."""
    if output_BLN.dim() != 3 or output_BLN.shape[:2] != done.ids.shape:
        raise PeftlibError(
            f"The model gave {tuple(output_BLN.shape)} for ids of {tuple(done.ids.shape)}; here it needs (rows, "
            "positions, numbers)."
        )
    steps = torch.arange(done.completions.shape[1], device=done.ids.device)
    places_BT = (done.prompt_lengths[:, None] - 1 + steps).clamp(max=done.ids.shape[1] - 1)
    return output_BLN[torch.arange(len(done.ids), device=done.ids.device)[:, None], places_BT]


def checked_rewards(reward: Reward, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """The rewards as a (B,) tensor.

    Raises:
        PeftlibError: no numbers, another number of them, or one that is not finite; with the row.
    """
    given = reward(prompts, completions)
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        found = torch.as_tensor(given, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PeftlibError(
            f"The reward {name} gave {type(given).__name__}, which is no list of numbers: {error}. Return one number "
            "per completion."
        ) from error
    if found.shape != (len(completions),):
        raise PeftlibError(
            f"The reward {name} gave numbers of shape {tuple(found.shape)} for {len(completions)} completions. Return "
            f"({len(completions)},), one per completion."
        )
    if not found.isfinite().all():
        row = int((~found.isfinite()).nonzero()[0])
        raise PeftlibError(
            f"The reward {name} gave {found[row].item()} for completion {row}, {completions[row][:20]} after the "
            f"prompt {prompts[row][-20:]}. Give a finite number, a low one for what cannot be judged."
        )
    return found
