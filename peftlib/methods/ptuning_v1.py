"""P-Tuning v1: trained virtual tokens anywhere in a template, made by a small recurrent or feed-forward encoder."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError
from peftlib.methods.base import Method, check_positive_int, check_probability
from peftlib.methods.rows import FrozenCache
from peftlib.methods.soft_prompt import SoftPrompt, start_rows
from peftlib.methods.virtual import Table


class BiLSTM(nn.RNNBase):
    """``nn.LSTM`` of two layers and both directions over one (P, D) sequence; in contrast to it, it can be compiled."""

    def __init__(self, width: int, hidden: int, dropout: float, **where: Any):
        super().__init__(
            "LSTM",
            width,
            hidden,
            num_layers=2,
            bidirectional=True,
            batch_first=True,
            dropout=dropout,
            **where,
        )

    def forward(self, x_PD: Tensor) -> Tensor:
        start = x_PD.new_zeros(4, 1, self.hidden_size)
        weights: Any = self._flat_weights
        x = x_PD.unsqueeze(0)
        return torch.lstm(x, (start, start), weights, True, 2, self.dropout, self.training, True, True)[0][0]


class PromptEncoder(nn.Module):
    """(P, D) rows from a trained table through a bi-LSTM and an MLP, or an MLP alone."""

    def __init__(self, method: PTuningV1, width: int, **where: Any):
        super().__init__()
        self.table = nn.Parameter(torch.empty(method.length, width, **where))
        self.lstm: BiLSTM | None = None
        if method.encoder == "lstm":
            hidden = method.hidden if method.hidden is not None else max(1, width // 2)
            self.lstm = BiLSTM(width, hidden, method.dropout, **where)
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            hidden = method.hidden if method.hidden is not None else width
            sizes = [width, hidden, hidden, width]
        layers: list[nn.Module] = []
        for into, out in itertools.pairwise(sizes):
            layers += [nn.Linear(into, out, **where), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self._cache = FrozenCache()

    def forward(self) -> Tensor:
        if self.training and self.lstm is not None and self.lstm.dropout:
            return self._compute()
        return self._cache(tuple(self.parameters()), self._compute)

    def _compute(self) -> Tensor:
        return self.mlp(self.table if self.lstm is None else self.lstm(self.table))


@dataclass(frozen=True, kw_only=True)
class PTuningV1(SoftPrompt):
    r"""P-Tuning: P virtual tokens ``h_i = MLP([LSTM(e_0..i); LSTM(e_i..P)])`` in the input, e a trained (P, D) table.

    With ``placeholder_id`` the k-th occurrence of that id in a sequence becomes h_k, anywhere in the user's template;
    without, the P tokens come in front as in :class:`PromptTuning` (masks, positions, labels and outputs included).
    While gradients are off the rows are computed once, not once per call. ``tuning.fold()`` drops the encoder.

    Parameters, encoder ``"lstm"`` (two layers, both directions, hidden h, then Linear(2h, 2h), ReLU, Linear(2h, D)):
    P D + 8h(D + h + 2) + 8h(3h + 2) + (2h + 1) 2h + (2h + 1) D. Encoder ``"mlp"`` (three linears with ReLU between):
    P D + (D + 1) h + (h + 1) h + (h + 1) D.

    Args:
        length: P.
        encoder: ``"lstm"`` (the paper's) or ``"mlp"``.
        hidden: h; ``None`` takes D / 2 for the LSTM, so that both directions together have the width D, and D for the
            MLP.
        dropout: between the LSTM's layers, in training.
        placeholder_id: the id that marks the prompt's places; it may lie outside the vocabulary. ``None``: prepend.
        init: start of the table: ``"normal"``, ``"vocab"`` or P token ids, as in :class:`PromptTuning`.
        sequence_args: kinds of arguments that names do not tell, as in :class:`PromptTuning`.

    Needs ``example=`` without ``placeholder_id``.

    Raises:
        PeftlibError: a field out of range, or a sequence with another number of placeholders than P.

    Default sites: the root; with ``placeholder_id`` the token embedding.

    Example:
        >>> import torch, peftlib
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), layer, torch.nn.Linear(8, 50))
        >>> method = peftlib.PTuningV1(length=2, encoder="mlp", placeholder_id=50)
        >>> tuning = peftlib.attach(model, method)
        >>> model(torch.tensor([[50, 7, 50, 9]])).shape  # [p1] 7 [p2] 9
        torch.Size([1, 4, 50])

    Source: Liu et al. 2021, arXiv:2103.10385, section 3.2.
    """

    encoder: str = "lstm"
    hidden: int | None = None
    dropout: float = 0.0
    placeholder_id: int | None = None
    init: Any = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ("lstm", "mlp", "none"):
            raise PeftlibError(f"PTuningV1(encoder={self.encoder!r}): encoder must be 'lstm' or 'mlp'.")
        if self.hidden is not None:
            check_positive_int("PTuningV1", hidden=self.hidden)
        check_probability("PTuningV1", dropout=self.dropout)
        if self.placeholder_id is not None and (
            type(self.placeholder_id) is not int or self.placeholder_id < 0
        ):
            raise PeftlibError(
                f"PTuningV1(placeholder_id={self.placeholder_id!r}): it must be a token id (an integer >= 0)."
            )

    @property
    def needs_probe(self) -> bool:
        return self.placeholder_id is None

    @property
    def placeholder(self) -> int | None:
        return self.placeholder_id

    def prompt(self, width: int, table: nn.Module | None, **where: Any) -> nn.Module:
        if self.encoder == "none":
            return Table(self.length, width, **where)
        made = PromptEncoder(self, width, **where)
        start_rows(made.table, self.init, table)
        return made

    def folded(self) -> Method:
        # "none" is the encoder of a folded prompt: its rows are trained themselves.
        return replace(self, encoder="none")
