"""Prefixes inside SDPA: what lets one attention site see trained keys and values before its own.

A prefix is P trained keys and values that every query sees besides the real ones. Nearly every model computes its
attention with ``F.scaled_dot_product_attention``, so :class:`PrefixScope` stands around one attention site's forward
and rewrites the calls made inside. Head layout, rotary positions, caches and grouped heads are settled by then, so
no model needs code of its own.

Left out on purpose: attention written by hand as ``softmax(q @ kᵀ)`` and flex attention, which no mode sees; nested
tensors under a prefix. A site that checkpoints *inside* its own forward recomputes outside the scope, which is
refused. Checkpoint the site itself, or anything around it, and the scope is entered again with it.

Shapes: ``...`` batch axes (any number), B batch, T queries, S keys, P prefix positions, H heads, E head width,
M model width. ``key_PHE`` has axes P, H and E; ``key_BPHE`` one prefix for each row of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function

from peftlib.errors import PeftlibError
from peftlib.kernels.causal_prefix import can_split, causal_prefix

# What nn.MultiheadAttention and nn.TransformerEncoderLayer hand everything to.
_CLOSED = (
    F.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
)


class PrefixScope(TorchFunctionMode):
    """Put a trained prefix in front of the keys and values of every SDPA call made inside the scope.

    ``out = softmax([q Kₚᵀ, q Kᵀ + mask] · scale) [Vₚ; V]``: the prefix is visible to every query, whatever the mask.
    It is shared by the whole batch, or each row has its own. Scopes nest: the outermost scope's prefix comes first.

    Args:
        key: (P, H, E), the prefix keys of H key heads; P may be 0. With B in front: a prefix for each row.
        value: (P, H, Eᵥ), the prefix values, or (B, P, H, Eᵥ).
        visible: (B, P), which positions of its prefix a row sees; ``None`` is all.

    The call's key is (..., H, S, E), or (B, S, E) of one head beside a three-dimensional query. It may have n·H heads
    (a model that repeats each key head n times in a row), and so gets each prefix head n times in a row; or H/n, and
    then its own heads are repeated. The prefix takes the call's dtype and device. Gradients reach it as usual.

    Raises:
        PeftlibError: inside the scope, when the call's heads or widths do not fit, when the site runs a closed
            ``nn.MultiheadAttention``, which the prefix could not reach, or when it turns gradients off.

    >>> query = key = value = torch.randn(2, 4, 5, 8)  # (B, H, S, E)
    >>> with PrefixScope(torch.randn(3, 4, 8), torch.randn(3, 4, 8)):
    ...     F.scaled_dot_product_attention(query, key, value, is_causal=True).shape
    torch.Size([2, 4, 5, 8])

    Paper: Li and Liang, Prefix-Tuning, https://arxiv.org/abs/2101.00190
    """

    def __init__(self, key: Tensor, value: Tensor, visible: Tensor | None = None) -> None:
        super().__init__()
        if not 3 <= key.dim() == value.dim() <= 4 or key.shape[:-1] != value.shape[:-1]:
            raise PeftlibError(
                f"A prefix of key {tuple(key.shape)} and value {tuple(value.shape)} was given; expected (P, H, E) "
                "and (P, H, Eᵥ) with the same P and H."
            )
        self.key = key
        self.value = value
        self.visible_BP = visible
        self.trains = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        self.met = False
        """Whether an attention call has been made inside."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # The mode is off in here, so whatever is called below reaches the next scope out, if any.
        if func is F.scaled_dot_product_attention:
            return self._attend(func, *args, **kwargs)
        if func is attention_with_weights:
            out, weights = self._attend(func, *args, **kwargs)
            return out, weights[..., self.key.shape[-3] :]
        if func in _CLOSED:
            raise PeftlibError(
                "A prefix was put around a module that runs a closed nn.MultiheadAttention, whose SDPA call cannot be "
                "seen. Target the nn.MultiheadAttention itself."
            )
        if func is Tensor.unflatten:
            # Called as a method: dynamo cannot inline the function (it calls super()).
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        func: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Any:
        if is_causal and attn_mask is not None:
            # Torch refuses this too, but on CPU only in some of its kernels.
            raise PeftlibError("SDPA got both attn_mask and is_causal=True. Put the causality into the mask.")
        if self.trains and not torch.is_grad_enabled():
            # Non-reentrant checkpoints notice by themselves that the recomputed keys are fewer; these would not.
            raise PeftlibError(
                "The attention runs without gradients inside its module, so its trained prefix would get none (or, in "
                "a reentrant checkpoint, be left out of the recomputation). Checkpoint the whole attention module "
                "instead, or call the model under torch.no_grad()."
            )
        self.met = True
        gqa = options.get("enable_gqa", False)
        n_real, n_prefix = key.shape[-2], self.key.shape[-3]
        own_key, key = _fitted("key", self.key, key, query, gqa)
        own_value, value = _fitted("value", self.value, value, query, gqa)
        if (
            func is F.scaled_dot_product_attention
            and (is_causal or (attn_mask is not None and _diagonal(attn_mask) == 0))
            and self.visible_BP is None
            and not dropout_p
            and can_split(query, key, value, (own_key, own_value))
            # A scope further out has to see a call.
            and not torch._C._is_torch_function_mode_enabled()
        ):
            return causal_prefix(query, key, value, (own_key, own_value), options.get("scale"))
        key, value = torch.cat([own_key, key], -2), torch.cat([own_value, value], -2)
        if self.visible_BP is None:
            attn_mask = _widen_mask(attn_mask, is_causal, query, key, value, n_real, n_prefix)
        else:
            attn_mask = _mask_rows(attn_mask, is_causal, self.visible_BP, query, n_real)
        return func(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **options)


def _fitted(what: str, prefix: Tensor, real: Tensor, query: Tensor, gqa: bool) -> tuple[Tensor, Tensor]:
    """A prefix, (P, H, E) or (B, P, H, E), and ``real``, (..., H, S, E), laid out alike but for P and S; no copies of
    the batch.
    """
    if real.is_nested:
        raise PeftlibError(
            f"SDPA got a nested {what}; a prefix needs a padded one with a mask. Pad before attention."
        )
    n_own = prefix.shape[-2]
    has_heads = query.dim() > 3 and real.dim() > 2
    n_real = real.shape[-3] if has_heads else 1
    n_query = query.shape[-3] if query.dim() > 3 else 1
    fits = n_own > 0 and prefix.shape[-1] == real.shape[-1]
    if fits and n_real % n_own == 0:
        prefix = prefix.repeat_interleave(n_real // n_own, dim=-2)
    elif fits and has_heads and n_own % n_real == 0 and (n_query % n_own == 0 if gqa else n_query == n_own):
        real = real.repeat_interleave(n_own // n_real, dim=-3)
    else:
        raise PeftlibError(
            f"SDPA got a {what} of shape {tuple(real.shape)} ({n_real} heads of width {real.shape[-1]}) for a query of "
            f"shape {tuple(query.shape)}; expected {n_own} heads, a multiple or a divisor of them, of width "
            f"{prefix.shape[-1]}, as the prefix has. Build the prefix from an example of this very call."
        )
    if prefix.dim() == 4:
        real = _of_rows(what, len(prefix), real, query)
    prefix = rearrange(prefix, "... p h e -> ... h p e") if has_heads else prefix[..., 0, :]
    return prefix.to(real).expand(*real.shape[:-2], -1, -1), real


def _of_rows(what: str, n_rows: int, real: Tensor, query: Tensor) -> Tensor:
    """A key or value with the batch's rows on its first axis, where each row has a prefix of its own."""
    expected = 4 if query.dim() > 3 else 3
    if (
        query.dim() > 4
        or real.dim() != expected
        or query.shape[0] != n_rows
        or real.shape[0] not in (1, n_rows)
    ):
        raise PeftlibError(
            f"SDPA got a query of shape {tuple(query.shape)} and a {what} of shape {tuple(real.shape)}, and each of "
            f"{n_rows} rows of the batch has a prefix of its own; expected the rows on the first axis of both: "
            "(B, H, T, E)."
        )
    return real.expand(n_rows, *real.shape[1:])


def _mask_rows(
    mask: Tensor | None, is_causal: bool, visible_BP: Tensor, query: Tensor, n_real: int
) -> Tensor:
    """The mask over the real keys, with columns on its left that each row sees or not."""
    n_query = query.shape[-2]
    diagonal = 0 if is_causal else None if mask is None else _diagonal(mask)
    if diagonal is not None:
        mask = torch.ones(n_query, n_real, dtype=torch.bool, device=query.device).tril(diagonal)
    elif mask is None:
        mask = torch.ones(1, n_real, dtype=torch.bool, device=query.device)
    left = visible_BP.view(len(visible_BP), *[1] * (query.dim() - 2), visible_BP.shape[1])
    if mask.dtype != torch.bool:
        left = torch.zeros_like(left, dtype=mask.dtype).masked_fill(~left, -math.inf)
    lead = torch.broadcast_shapes(mask.shape[:-1], left.shape[:-1])
    return torch.cat([left.expand(*lead, -1), mask.expand(*lead, n_real)], dim=-1)


def _widen_mask(
    mask: Tensor | None,
    is_causal: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_real: int,
    n_prefix: int,
) -> Tensor | None:
    """The mask over the real keys, with ``n_prefix`` visible columns on its left."""
    if mask is None and not is_causal:
        return None
    # A causal mask lets query t see the keys up to t + diagonal.
    diagonal = 0 if mask is None else _diagonal(mask)
    if diagonal is not None:
        n_query = query.shape[-2]
        if diagonal == n_real - n_query and diagonal >= 0 and _on_real_cuda(query, key, value):
            # The last query still sees the last key, so flash kernels have the mask built in. Imported here because
            # the module imports all of dynamo, and because fake tensors cannot hold its tensors.
            from torch.nn.attention.bias import causal_lower_right

            return causal_lower_right(n_query, n_prefix + n_real)
        mask = torch.ones(n_query, n_real, dtype=torch.bool, device=query.device).tril(diagonal)
    assert mask is not None
    # A last axis of 1 stands for all the real keys; it must not cover the prefix.
    mask = mask.expand(*mask.shape[:-1], n_real)
    return F.pad(mask, (n_prefix, 0), value=1.0 if mask.dtype == torch.bool else 0.0)


def _diagonal(mask: Tensor) -> int | None:
    """The diagonal of a ``CausalBias``, which has no entries to pad; None for a plain mask."""
    if type(mask) in (Tensor, nn.Parameter):
        return None
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(mask, CausalBias):
        return None
    return 0 if mask.variant == CausalVariant.UPPER_LEFT else mask.seq_len_kv - mask.seq_len_q


def _on_real_cuda(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a ``CausalBias`` can be used: it chooses its kernel eagerly, from real tensors of one dtype."""
    if torch.compiler.is_compiling() or not query.is_cuda:
        return False
    if not (type(query) is type(key) is type(value) is Tensor and query.dtype == key.dtype == value.dtype):
        return False
    # It also skips autocast, so what autocast would still cast takes the mask.
    return not torch.is_autocast_enabled("cuda") or query.dtype == torch.get_autocast_dtype("cuda")


def attention_with_weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """SDPA that also returns its weights (..., H, T, S), after dropout; a :class:`PrefixScope` sees it as it sees SDPA.

    The weights are those of the real keys; under a prefix they sum to less than one. Written out, because reading them
    through SDPA needs an identity of S×S as value, which makes S/E times as much work.
    """
    # Not has_torch_function(): dynamo answers it without looking at the modes, and the prefix would silently be lost.
    if torch._C._is_torch_function_mode_enabled():
        tensors = (query, key, value)
        return handle_torch_function(
            attention_with_weights, tensors, *tensors, attn_mask=attn_mask, dropout_p=dropout_p
        )
    scores = (query * math.sqrt(1.0 / query.shape[-1])) @ key.mT
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    weights = scores.softmax(-1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    return weights @ value, weights
