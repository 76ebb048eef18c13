"""A reward model, and a value: a tuning with one number for an output, on the base that the policy has.

``attach(model, LoRA(rank=8, head={"lm_head": NewHead(1)}), name="reward")`` makes one; while it is enabled the model
gives (B, T, 1), and the score of a row is the number at its last token.

Letters: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import PeftlibError, Tuning, tunings, use
from peftlib.train.decoding import running
from peftlib.train.evaluation import mode
from peftlib.train.losses import IGNORE
from peftlib.train.outputs import forward, get
from peftlib.train.preference import reward_loss


def init_head(tuning: Tuning) -> Tuning:
    """Draw the new head's weight from N(0, 1 / (d + 1)), its bias 0: scores begin around 0 and small.

    Args:
        tuning: has one :class:`peftlib.NewHead` of one output, of d features.

    Raises:
        PeftlibError: it has none, or of more outputs.

    Example:
        >>> import peftlib
        >>> model = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 9))
        >>> tuning = init_head(peftlib.attach(model, {"1": peftlib.NewHead(1)}, name="reward"))
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 1])

    Source: Huang et al. 2024, arXiv:2403.17031, detail 11; Stiennon et al. 2020, arXiv:2009.01325, its code.
    """
    weight, bias = _head(tuning)
    with torch.no_grad():
        weight.normal_(0, (weight.shape[1] + 1) ** -0.5)
        if bias is not None:
            bias.zero_()
    return tuning


def score(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The number at each row's last token, (B,), in float32 or wider.

    Args:
        model: causal; gives (B, T, 1), or (B, T).
        batch: ``inputs``, and ``attention_mask`` (B, T), true where a token is, or ``labels``, whose last one that is
            not -100 is the last token.

    Raises:
        PeftlibError: an output of more numbers, or a row without a token.

    Example:
        >>> class Numbers(nn.Module):  # a token's number is its id
        ...     def forward(self, ids):
        ...         return ids.float()
        >>> score(
        ...     Numbers(), {"inputs": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        ... )
        tensor([6.])
    """
    output = forward(model, batch, causal=True)
    inside = batch["attention_mask"].bool() if "attention_mask" in batch else get(batch, "labels") != IGNORE
    values_BT = one_number(output, inside)
    if not inside.any(1).all():
        raise PeftlibError(f"Row {int((~inside.any(1)).nonzero()[0])} has no token, so it has no score.")
    places = torch.arange(inside.shape[1], device=inside.device)
    last_B = torch.where(inside, places, 0).amax(1)
    return values_BT.gather(1, last_B[:, None])[:, 0]


def reward_model(
    model: nn.Module, batch: Mapping[str, Any], *, centering: float = 0.0, under: Sequence[str] = ()
) -> tuple[Tensor, int]:
    """:func:`peftlib.train.reward_loss` of the pairs' scores; for :func:`peftlib.train.fit`.

    Args:
        model: with the reward's tuning enabled.
        batch: from :func:`peftlib.train.pad_pairs`, its margins included.
        centering: see :func:`peftlib.train.reward_loss`.
        under: names of the tunings that the reward's stands on, if any, as :class:`RewardModel` is told them too.

    Returns:
        The sum over pairs, and their number.

    Raises:
        PeftlibError: other tunings are enabled than these and one more: what is trained is not what would judge.

    Example:
        >>> import peftlib
        >>> from peftlib.train import Encoded, Pair, pad_pairs
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
        >>> tuning = init_head(peftlib.attach(model, {"1": peftlib.NewHead(1)}, name="reward"))
        >>> same = Encoded([1, 2], [-100, 2])
        >>> loss, pairs = reward_model(model, pad_pairs([Pair(same, same)], pad_id=0))
        >>> round(loss.item(), 4), pairs  # ln 2: it cannot tell them apart
        (0.6931, 1)
    """
    enabled = [name for name, tuning in tunings(model).items() if tuning.enabled]
    if enabled and (len(enabled) != len(under) + 1 or not set(under) < set(enabled)):
        raise PeftlibError(
            f"Enabled are {enabled}, and RewardModel judges with the reward's tuning on top of under={tuple(under)}. "
            "Call peftlib.use(model, ...) with the reward's alone, or name what it stands on, under=('sft',), here and "
            "to RewardModel."
        )
    chosen, rejected = score(model, batch).chunk(2)
    margin = batch.get("margin")
    return reward_loss(chosen, rejected, None if margin is None else margin.to(chosen), centering) * len(
        chosen
    ), len(chosen)


@torch.no_grad()
def reward_accuracy(model: nn.Module, batches: Any) -> dict[str, float]:
    """How often the better one has the higher score, and by how much on average: ``accuracy`` and ``margin``.

    For ``evaluate=functools.partial(reward_accuracy, batches=...)`` of :func:`peftlib.train.fit`.

    Raises:
        PeftlibError: no batches, or as :func:`score`.

    Example:
        >>> from peftlib.train import Encoded, Pair, pad_pairs
        >>> model = nn.Embedding.from_pretrained(torch.arange(9.0)[:, None])  # a token's number is its id
        >>> pairs = [Pair(Encoded([1, 7], [-100, 7]), Encoded([1, 4], [-100, 4]))]
        >>> reward_accuracy(model, [pad_pairs(pairs, pad_id=0)])
        {'accuracy': 1.0, 'margin': 3.0}
    """
    device = next(model.parameters()).device
    gaps = []
    with mode(model, False):
        for batch in batches:
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            chosen, rejected = score(model, moved).chunk(2)
            gaps.append(chosen - rejected)
    if not gaps:
        raise PeftlibError("reward_accuracy has no batches to judge by.")
    gap = torch.cat(gaps)
    return {"accuracy": (gap > 0).float().mean().item(), "margin": gap.mean().item()}


class RewardModel:
    """A reward tuning as a callable (prompts, completions) -> (B,) scores, for PPO, GRPO and best-of-n.

    Args:
        tuning: on the policy's own model, or on another.
        pad_id: fills rows; never the last token of one.
        rows: scored at a time.
        under: names of the tunings that were enabled with it when it was trained; none is the base alone.

    Raises:
        PeftlibError: a tuning without a head of one number; prompts and completions that do not go together.

    Example:
        >>> import peftlib
        >>> model = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 9))
        >>> tuning = init_head(peftlib.attach(model, {"1": peftlib.NewHead(1)}, name="reward"))
        >>> tuning.disable().model(torch.tensor([[1]])).shape, RewardModel(tuning)([[1]], [[2, 3]]).shape
        (torch.Size([1, 1, 9]), torch.Size([1]))
    """

    def __init__(self, tuning: Tuning, *, pad_id: int = 0, rows: int = 64, under: Sequence[str] = ()):
        _head(tuning)
        if rows < 1:
            raise PeftlibError(f"rows={rows}: give a number of completions at a time, from 1.")
        self.tuning, self.pad_id, self.rows, self.under = tuning, pad_id, rows, tuple(under)
        self.shift = 0.0

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
        """Score each completion after its prompt."""
        model = self.tuning.model
        device = next(model.parameters()).device
        if len(prompts) != len(completions) or not len(prompts):
            raise PeftlibError(
                f"RewardModel takes a completion for each prompt; got {len(prompts)} and {len(completions)}."
            )
        whole = [torch.tensor([*p, *c], device=device) for p, c in zip(prompts, completions, strict=True)]
        if not all(len(row) for row in whole):
            empty = next(i for i, row in enumerate(whole) if not len(row))
            raise PeftlibError(f"Prompt and completion {empty} have no id together, so they have no score.")
        found = []
        with use(model, *self.under, self.tuning.name), mode(model, False):
            for start in range(0, len(whole), self.rows):
                some = whole[start : start + self.rows]
                ids = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=self.pad_id)
                lengths = torch.tensor([len(row) for row in some], device=device)
                there = torch.arange(ids.shape[1], device=device) < lengths[:, None]
                with running(model, ids):
                    found.append(score(model, {"inputs": ids, "attention_mask": there}))
        return torch.cat(found) - self.shift

    def centre(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> RewardModel:
        """Shift the head's bias so that these have a mean score of 0, as answers of the SFT model should.

        What the bias's dtype leaves of the mean, bfloat16's three digits, is taken off here.

        Raises:
            PeftlibError: the head has no bias.
        """
        _, bias = _head(self.tuning)
        if bias is None:
            raise PeftlibError("The reward's head has no bias to shift. Make it with NewHead(1, bias=True).")
        with torch.no_grad():
            bias.sub_(self(prompts, completions).mean().to(bias))
            self.shift += self(prompts, completions).mean().item()
        return self


def one_number(output: Tensor, like: Tensor) -> Tensor:
    """A model's (B, T, 1) or (B, T) as (B, T), in float32 or wider."""
    values = output.squeeze(-1) if output.dim() == 3 and output.shape[-1] == 1 else output
    if values.shape != like.shape:
        raise PeftlibError(
            f"The model gave {tuple(output.shape)}, and a score is one number per token, {(*like.shape, 1)}. Give its "
            "tuning an output of its own, NewHead(1), and enable that tuning alone."
        )
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _head(tuning: Tuning) -> tuple[nn.Parameter, nn.Parameter | None]:
    own = {
        name.rpartition(".")[2]: parameter
        for name, parameter in tuning.named_parameters()
        if name.split(".")[-2] == "newhead"
    }
    if "weight" not in own:
        raise PeftlibError(
            f"The tuning {tuning.name!r} has no new head; a reward or a value has one, "
            "LoRA(rank=8, head={'lm_head': NewHead(1)})."
        )
    if own["weight"].shape[0] != 1:
        raise PeftlibError(
            f"The head of the tuning {tuning.name!r} has {own['weight'].shape[0]} outputs; a reward or a value is one: "
            "NewHead(1)."
        )
    return own["weight"], own.get("bias")
