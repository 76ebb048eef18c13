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
from peftlib.train.decoding import rounding, running
from peftlib.train.evaluation import mode
from peftlib.train.generate import Generated, checked_stops, generate
from peftlib.train.outputs import first_tensor
from peftlib.train.parallel import ALONE, Ranks
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
        raw_scores: (B,) rewards as they were given.
        scores: (B,) the same, less the penalty for not stopping.
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
    raw_scores: Tensor
    scores: Tensor
    stopped: Tensor

    def numbers(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """What every log of such a training has, over the completions of all processes."""
        kl, entropy, scores, raw, stopped, tokens, completions = ranks.total(
            (self.logps - self.reference_logps).sum(),
            self.entropy.sum(),
            self.scores.sum(),
            self.raw_scores.sum(),
            self.stopped.sum(),
            self.mask.sum(),
            len(self.ids),
        )
        return {
            "objective/kl": kl / completions,
            "objective/entropy": entropy / tokens,
            "objective/scores": scores / completions,
            "objective/raw_scores": raw / completions,
            "stopped": stopped / completions,
            "targets": tokens,
            "completions": completions,
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
        sampling: settings of :func:`peftlib.train.generate`; its temperature is the reference's too. Not ``top_k`` and
            ``top_p``: what they draw from is not the policy whose log-probabilities are compared.
        missing_stop_penalty: taken from the reward of a completion that no stop id ended, from 0.
        rows: completions whose logits exist at once, when they are read again; None is all.

    Raises:
        PeftlibError: as those raise; settings of sampling that change what is drawn from; a model that reads its
            completions otherwise than it drew them; a reward that is not one finite number per completion.

    Example:
        >>> import peftlib
        >>> model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))
        >>> policy = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["1"])
        >>> def reward(prompts, completions):
        ...     return [float(len(ids)) for ids in completions]
        >>> roll_out(model, [[1], [2, 3]], reward, sampling={"max_new_tokens": 4}).scores
        tensor([4., 4.])
    """
    _check(sampling, missing_stop_penalty, rows)
    temperature = sampling.get("temperature", 1.0)
    done = generate(model, prompts, **sampling)
    with mode(model, False):
        logps, entropy = in_parts(lambda part: completion_logps(model, part, temperature), done, rows)
    off = masked_mean((logps - done.logps).abs(), done.mask).item()
    if not off <= rounding(model):
        raise PeftlibError(
            "Read again in one forward, the completions' log-probabilities differ from those they were drawn with by "
            f"{off:.3g} per token. Either {type(model).__name__} is not causal (a position sees what comes after it), "
            "or its cache gives something else than its forward (try cache=False in sampling), or its "
            "forward is random."
        )
    with as_reference(model, reference) as other:
        (reference_logps,) = in_parts(lambda part: (token_logps(other, part, temperature),), done, rows)
    scores = checked_rewards(reward, [list(p) for p in prompts], done.lists()).to(logps)
    return Rollout(
        ids=done.ids,
        prompt_lengths=done.prompt_lengths,
        completions=done.completions,
        mask=done.mask,
        logps=logps,
        reference_logps=reference_logps,
        entropy=entropy,
        raw_scores=scores,
        scores=torch.where(done.stopped, scores, scores - missing_stop_penalty),
        stopped=done.stopped,
    )


def _check(sampling: Mapping[str, Any], missing_stop_penalty: float, rows: int | None) -> None:
    temperature = sampling.get("temperature", 1.0)
    if not isinstance(temperature, (int, float)) or not temperature > 0:
        raise PeftlibError(
            f"temperature={temperature}: a policy is explored by drawing; give a number above 0."
        )
    for name in ("top_k", "top_p"):
        if sampling.get(name) is not None:
            raise PeftlibError(
                f"{name}={sampling[name]} draws from another distribution than the policy, so that KL and ratios would "
                "be wrong. Leave it out, and lower the temperature instead."
            )
    if rows is not None and rows < 1:
        raise PeftlibError(f"rows={rows}: give a number of completions from 1, or None.")
    if not 0 <= missing_stop_penalty < float("inf"):
        raise PeftlibError(
            f"missing_stop_penalty={missing_stop_penalty} is taken from the reward: give a number from 0."
        )
    if missing_stop_penalty and not checked_stops(sampling.get("stop_ids", ())):
        raise PeftlibError(
            f"missing_stop_penalty={missing_stop_penalty} and no stop_ids= in sampling: every completion would pay it."
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
    logps_BT, logits_BTV, total_BT = _chosen(model, done, temperature)
    with torch.no_grad():
        shares = (logits_BTV - total_BT[..., None]).exp()
        entropy_BT = total_BT - (shares * torch.where(shares > 0, logits_BTV, 0)).sum(-1)
    return logps_BT, torch.where(done.mask, entropy_BT, 0)


def token_logps(model: nn.Module, done: Generated | Rollout, temperature: float = 1.0) -> Tensor:
    """:func:`completion_logps` without the entropy, which an update does not need."""
    return _chosen(model, done, temperature)[0]


def _chosen(model: nn.Module, done: Generated | Rollout, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of what was chosen, the logits at the temperature, and the logarithm of their sum of exps."""
    with running(model, done.ids):
        output = model(done.ids)
    logits_BTV = at_completions(first_tensor(output, model), done)
    logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)) / temperature
    total_BT = logits_BTV.logsumexp(-1)
    logps_BT = logits_BTV.gather(-1, done.completions[..., None])[..., 0] - total_BT
    return torch.where(done.mask, logps_BT, 0), logits_BTV, total_BT


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
