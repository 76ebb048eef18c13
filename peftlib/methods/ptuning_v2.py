"""P-Tuning v2: deep prompts, trained keys and values in every attention, directly by default."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftlib.methods.base import Method, check_positive_int
from peftlib.methods.prefix import DeepPrefix


@dataclass(frozen=True, kw_only=True)
class PTuningV2(DeepPrefix):
    r"""Deep prompt tuning: P trained key and value vectors before those of every attention.

    ``attention(q, [k_P; k], [v_P; v])`` with k_P (P, H, E) and v_P (P, H, V) trained themselves: 2 P L kv parameters
    for L layers of key/value width kv. Usually with a task head (``head=``), as in the paper.

    Args:
        length: P.
        reparametrize: put the MLP of prefix tuning before them (the paper finds it helps some tasks).
        hidden: width of that MLP.
        dropout: on the prompts' keys and values, in training.
        init: start at real keys and values, as in :class:`PrefixTuning`.
        head: a task head to train along, such as ``"classifier"`` or ``NewHead(2)``.

    Needs ``example=``.

    Raises:
        PeftlibError: a field out of range; ``TargetError`` where no module calls ``F.scaled_dot_product_attention``.

    Default sites: every attention: the innermost modules that call SDPA.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(1, 3, 8)
        >>> peftlib.attach(model, peftlib.PTuningV2(length=4), example=(x, x, x)).num_parameters  # 2 * 4 * 8
        64

    Source: Liu et al. 2022, arXiv:2110.07602, section 3.2.
    """

    reparametrize: bool = False
    hidden: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("PTuningV2", hidden=self.hidden)

    @property
    def middle(self) -> int | None:
        return self.hidden if self.reparametrize else None

    def folded(self) -> Method:
        return replace(self, reparametrize=False)
