"""The field's accountings by formula, to check an estimate against, or to have a number without a model.

Sizes are in bytes. Where these and a measurement differ, docs/memory.md says why.
"""

from __future__ import annotations

from typing import Literal

from peftlib.errors import PeftlibError

ADAM_BYTES = {"weights": 2, "gradients": 2, "optimizer": 12}
"""Mixed-precision Adam, per parameter: 16-bit weights and gradients; 32-bit weights and two moments."""


def mixed_precision_adam_bytes(parameters: int, *, ranks: int = 1, stage: int = 0) -> float:
    """Weights, gradients and optimizer state of mixed-precision Adam: ``(2 + 2 + 12) N``.

    ZeRO's stages cut more and more of it into n parts: ``2 + 2 + 12/n`` (1), ``2 + 14/n`` (2), ``16/n`` (3).

    Args:
        parameters: N.
        ranks: n.
        stage: 0 to 3.

    Raises:
        PeftlibError: another stage.

    Example:
        >>> mixed_precision_adam_bytes(1_500_000_000) / 1e9  # GPT-2: "at least 24 GB"
        24.0
        >>> [round(mixed_precision_adam_bytes(7_500_000_000, ranks=64, stage=s) / 1e9, 1) for s in range(4)]
        [120.0, 31.4, 16.6, 1.9]

    Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3.1 and figure 1.
    """
    if stage not in range(4):
        raise PeftlibError(f"stage={stage!r}: ZeRO has the stages 1 to 3, and 0 stands for none")
    _positive(parameters=parameters, ranks=ranks)
    # a stage cuts the optimizer's state, then gradients, then weights
    return sum(
        parameters * size / (ranks if stage >= first else 1)
        for size, first in zip(ADAM_BYTES.values(), (3, 2, 1), strict=True)
    )


def transformer_activation_bytes(
    *,
    length: int,
    batch: int,
    width: int,
    heads: int,
    layers: int = 1,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    recompute: Literal["none", "selective", "full"] = "none",
) -> float:
    """Activations that a 16-bit transformer keeps for the backward: ``s b h (34 + 5 a s / h)`` per layer.

    The layer has attention with scores and dropout written down and a 4 h wide GELU feed-forward. With t-way tensor
    parallelism it is ``s b h (10 + 24/t + 5 a s / (h t))``, with sequence parallelism besides ``s b h (34/t + ...)``.
    Recomputing the attention's scores ("selective") takes the last term away, recomputing whole layers ("full")
    leaves ``2 s b h``.

    Args:
        length: s.
        batch: b, the micro-batch.
        width: h.
        heads: a.
        layers: L.
        tensor_parallel: t.
        sequence_parallel: whether what tensor parallelism leaves whole is cut along the sequence.
        recompute: "none", "selective" or "full".

    Raises:
        PeftlibError: a size below 1, or another kind of recomputation.

    Example:
        >>> transformer_activation_bytes(length=2048, batch=1, width=12288, heads=96) / (
        ...     2048 * 12288
        ... )  # 34 + 80
        114.0

    Source: Korthikanti et al. 2022, arXiv:2205.05198, equations 1 to 4 and section 5.
    """
    _positive(
        length=length, batch=batch, width=width, heads=heads, layers=layers, tensor_parallel=tensor_parallel
    )
    one = length * batch * width
    if recompute == "full":
        return 2.0 * one * layers
    if recompute not in ("none", "selective"):
        raise PeftlibError(f"recompute={recompute!r}: give 'none', 'selective' or 'full'")
    scores = 5 * heads * length / width / tensor_parallel if recompute == "none" else 0
    whole = 10 / (tensor_parallel if sequence_parallel else 1)
    return one * layers * (whole + 24 / tensor_parallel + scores)


def kv_cache_bytes(
    tokens: int, *, layers: int, kv_heads: int, head_width: int, bytes_per_value: float = 2
) -> float:
    """Keys and values kept while generating: ``2 T L H E`` values.

    Args:
        tokens: T, of all sequences together.
        layers: L.
        kv_heads: H, key/value heads (fewer than query heads with grouped queries).
        head_width: E.
        bytes_per_value: 2 for 16-bit types.

    Example:
        >>> kv_cache_bytes(1, layers=40, kv_heads=40, head_width=128) / 1024  # OPT-13B: "800 KB"
        800.0

    Source: Kwon et al. 2023, PagedAttention, arXiv:2309.06180, section 3.
    """
    _positive(tokens=tokens, layers=layers, kv_heads=kv_heads, head_width=head_width)
    return 2 * tokens * layers * kv_heads * head_width * bytes_per_value


def quantized_bytes(
    parameters: int, *, bits: int = 4, block: int = 64, double: bool = True, scale_bytes: int = 4
) -> float:
    """Frozen base weights in few bits: ``N (bits + 8 scale_bytes / block) / 8``.

    With double quantization the scales take 8 bits each and one 32-bit scale per 256 of them: 0.127 bits per weight in
    blocks of 64 where 0.5 were.

    Args:
        parameters: N.
        bits: 4 or 8, say.
        block: weights that share a scale; for 8-bit rows the row's length.
        double: whether the scales are quantized as well.
        scale_bytes: of a scale that is not.

    Raises:
        PeftlibError: a size below 1.

    Example:
        >>> more = quantized_bytes(65 * 10**9, double=False) - quantized_bytes(65 * 10**9)
        >>> round(8 * more / 65e9, 3), round(more / 1e9, 1)  # "0.373 bits per parameter (approximately 3 GB)"
        (0.373, 3.0)

    Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3; Dettmers et al. 2022, arXiv:2208.07339.
    """
    _positive(parameters=parameters, bits=bits, block=block)
    scale = 8 + 32 / 256 if double else 8 * scale_bytes
    return parameters * (bits + scale / block) / 8


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not size > 0:
            raise PeftlibError(f"{name}={size!r}: give a number above 0")
