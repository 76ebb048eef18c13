"""Prompt tuning: trained vectors in front of a model's input.

Shape legend: P prompt length, D embedding width, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlib.methods.soft_prompt import SoftPrompt, start_rows
from peftlib.methods.virtual import Table


@dataclass(frozen=True, kw_only=True)
class PromptTuning(SoftPrompt):
    r"""Prompt tuning: P trained vectors before the embedded input, ``[p_1 ... p_P; e(x_1) ... e(x_T)]``.

    P D parameters. The model sees P placeholder positions more in every sequence-aligned input (ids, masks, positions,
    token types, labels with -100) and its outputs come back without them; key/value caches keep them. In an
    encoder-decoder the prompt goes before the encoder's input. Targeting a module of hidden states,
    ``{"encoder": PromptTuning(length=10)}``, prepends at its input and strips at its output.

    Args:
        length: P.
        init: ``"vocab"`` (rows of random vocabulary entries), ``"normal"`` (the vocabulary's spread, or 0.02), or
            P token ids. Modules of hidden states have no vocabulary and take ``"normal"``.
        sequence_args: kinds of arguments that names do not tell: ``{"my_mask": "mask"}``; one of ``"ids"``,
            ``"embeds"``, ``"mask"`` (marks what is seen, or adds to scores), ``"padding_mask"`` (marks what is
            ignored), ``"loss_mask"``, ``"positions"``, ``"lengths"``, ``"offset"`` (what the cache holds), ``"types"``
            (0 at the prompt), ``"labels"``, ``"cache"``, ``"skip"``. A cache is ``"skip"`` where the ids always come
            whole. The name of an output may be given as well, to keep it as a cache.

    Needs ``example=``.

    Raises:
        PeftlibError: a field out of range, token ids of another number, an unknown sequence-shaped argument, a model
            that does not take P more positions, or an embedding that runs outside the model's forward.

    Default sites: the root.

    Example:
        >>> import torch, peftlib
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), layer, torch.nn.Linear(8, 50))
        >>> ids = torch.randint(0, 50, (2, 5))
        >>> peftlib.attach(model, peftlib.PromptTuning(length=4), example=ids).num_parameters
        32
        >>> model(ids).shape
        torch.Size([2, 5, 50])

    Source: Lester et al. 2021, arXiv:2104.08691, section 2 (2.1 for the initializations).
    """

    init: Any = "vocab"

    def prompt(self, width: int, table: nn.Module | None, **where: Any) -> nn.Module:
        made = Table(self.length, width, **where)
        start_rows(made.rows, self.init, table)
        return made
