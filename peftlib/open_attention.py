"""An open ``nn.MultiheadAttention``: the same arithmetic as the closed one, where a tuning can reach it.

``nn.MultiheadAttention`` hides its call: its forward hands everything to ``F.multi_head_attention_forward`` (or to a
fused kernel), and a torch function runs its body with the mode off. :func:`mha_forward` does the same arithmetic in
the open: three projections and the output projection as module calls, and one attention call that a scope sees.

Left out on purpose: jagged nested tensors, and masks beside strided ones, as in the original.

Shapes: B batch, T queries, S keys, H heads, E head width, M model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from peftlib.attention import attention_with_weights
from peftlib.errors import PeftlibError


class Projection(nn.Module):
    """One of the input projections of an open ``nn.MultiheadAttention``, as a linear without parameters of its own.

    ``y = x Wᵀ + b``, where W and b are rows of the host's ``in_proj_weight`` and ``in_proj_bias`` (or its
    ``q_proj_weight`` and so on). They are read at every call, so whatever stands in for the host's parameter is seen.

    Args:
        mha: the host.
        which: ``"q"``, ``"k"`` or ``"v"``.
    """

    def __init__(self, mha: nn.MultiheadAttention, which: str) -> None:
        super().__init__()
        # In a tuple, so that the host does not become its own grandchild.
        self._mha = (mha,)
        self.which = which
        self.training = mha.training
        self.in_features = {"q": mha.embed_dim, "k": mha.kdim, "v": mha.vdim}[which]
        self.out_features = mha.embed_dim

    def owner(self) -> tuple[nn.MultiheadAttention, str, slice | None]:
        """The host, the name of its parameter that holds the weight, and the rows of it (None: all)."""
        mha = self._mha[0]
        if mha._qkv_same_embed_dim:
            return mha, "in_proj_weight", self._rows()
        return mha, f"{self.which}_proj_weight", None

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), a view of the host's parameter."""
        mha, name, rows = self.owner()
        weight = getattr(mha, name)
        return weight if rows is None else weight[rows]

    @property
    def bias(self) -> Tensor | None:
        """(out_features,), a view of the host's parameter, or None."""
        bias: Tensor | None = self._mha[0].in_proj_bias
        return None if bias is None else bias[self._rows()]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.which}, in_features={self.in_features}, out_features={self.out_features}"

    def _rows(self) -> slice:
        start = "qkv".index(self.which) * self.out_features
        return slice(start, start + self.out_features)


def open_projections(mha: nn.MultiheadAttention) -> None:
    """Give the host the children ``q_proj``, ``k_proj`` and ``v_proj`` that :func:`mha_forward` calls."""
    for which in "qkv":
        if hasattr(mha, f"{which}_proj"):
            raise PeftlibError(
                f"{type(mha).__name__} has an attribute {which}_proj already, where peftlib puts a view of its input "
                "projection. Rename it, or close the attention that is open before opening it again."
            )
    for which in "qkv":
        mha.add_module(f"{which}_proj", Projection(mha, which))


def close_projections(mha: nn.MultiheadAttention) -> None:
    """Remove what :func:`open_projections` added."""
    for which in "qkv":
        assert isinstance(mha._modules[f"{which}_proj"], Projection)
        del mha._modules[f"{which}_proj"]


def mha_forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward`` in the open, for a subclass whose projections are modules.

    Arguments, results and errors are the original's. Without ``need_weights`` a query that may see no key at all gets
    zeros, as in training there (the original's fused inference kernel gives NaN); with it NaN, as there.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        if query is not key or key is not value or key_padding_mask is not None or attn_mask is not None:
            raise PeftlibError(
                "nn.MultiheadAttention takes nested tensors only as self-attention without masks. Pad query, key and "
                "value, and give a key_padding_mask."
            )
        return _nested_self_attention(self, query, need_weights, average_attn_weights)
    batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batch_axis = 0 if self.batch_first else 1
    if not batched:
        query, key, value = (x.unsqueeze(batch_axis) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if not query.shape[batch_axis] == key.shape[batch_axis] or not key.shape[:2] == value.shape[:2]:
        # SDPA would broadcast a batch of one, which the original refuses.
        raise RuntimeError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must have one batch "
            "size, and key and value one length."
        )

    axes = "b t (h e)" if self.batch_first else "t b (h e)"
    q_BHTE, k_BHSE, v_BHSE = (
        rearrange(x, f"{axes} -> b h t e", h=self.num_heads)
        for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))  # type: ignore[operator]
    )
    # The original takes the hint at its word here, and only here; elsewhere it applies the mask.
    is_causal = is_causal and key_padding_mask is None and not need_weights
    mask = _merge_masks(None if is_causal else attn_mask, key_padding_mask, q_BHTE, k_BHSE)
    k_BHSE = _append_extra_keys(k_BHSE, self.bias_k, self.add_zero_attn)
    v_BHSE = _append_extra_keys(v_BHSE, self.bias_v, self.add_zero_attn)
    if mask is not None:
        mask = F.pad(mask, (0, k_BHSE.shape[-2] - mask.shape[-1]))

    dropout_p = self.dropout if self.training else 0.0
    weights: Tensor | None = None
    if need_weights:
        out_BHTE, weights = attention_with_weights(q_BHTE, k_BHSE, v_BHSE, mask, dropout_p)
        weights = weights.mean(dim=1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        out_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, mask, dropout_p, is_causal)
    out = self.out_proj(rearrange(out_BHTE, f"b h t e -> {axes}"))
    return (out if batched else out.squeeze(batch_axis)), weights


def _merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q_BHTE: Tensor, k_BHSE: Tensor
) -> Tensor | None:
    """Both masks as one that is added to the scores, broadcast against (B, H, T, S)."""
    B, H, T, _ = q_BHTE.shape
    S = k_BHSE.shape[-2]
    for name, mask, expected in (
        ("attn_mask", attn_mask, (T, S) if attn_mask is not None and attn_mask.dim() == 2 else (B * H, T, S)),
        ("key_padding_mask", key_padding_mask, (B, S)),
    ):
        if mask is not None and tuple(mask.shape) != expected:
            raise RuntimeError(f"The shape of {name} is {tuple(mask.shape)}, but should be {expected}.")
    key_padding_mask = F._canonical_mask(
        key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", q_BHTE.dtype
    )
    attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", q_BHTE.dtype, check_other=False)
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(B, H, T, S)
    if key_padding_mask is None:
        return attn_mask
    key_padding_mask = key_padding_mask[:, None, None, :]
    return key_padding_mask if attn_mask is None else attn_mask + key_padding_mask


def _append_extra_keys(x_BHSE: Tensor, bias: Tensor | None, add_zero: bool) -> Tensor:
    """Append the trained key (or value) of ``add_bias_kv``, then the zeros of ``add_zero_attn``."""
    B, H, _, _ = x_BHSE.shape
    if bias is not None:
        bias_1H1E = rearrange(bias, "1 1 (h e) -> 1 h 1 e", h=H)
        x_BHSE = torch.cat([x_BHSE, bias_1H1E.to(x_BHSE).expand(B, -1, -1, -1)], dim=-2)
    return F.pad(x_BHSE, (0, 0, 0, 1)) if add_zero else x_BHSE


def _nested_self_attention(
    mha: nn.MultiheadAttention, nested: Tensor, need_weights: bool, average_attn_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Self-attention over what ``nn.TransformerEncoder`` makes of a padded batch in eval: pad, attend, nest again."""
    if nested.layout is not torch.strided or not mha.batch_first:
        raise PeftlibError(
            f"nn.MultiheadAttention got a nested tensor of layout {nested.layout} with batch_first={mha.batch_first}; "
            "expected torch.strided and True. Pad it, and give a key_padding_mask."
        )
    x_BTM = nested.to_padded_tensor(0.0)
    lengths = torch.tensor([len(x) for x in nested.unbind()], device=x_BTM.device)
    real_BT = torch.arange(x_BTM.shape[1], device=x_BTM.device) < lengths[:, None]
    out_BTM, weights = mha_forward(
        mha, x_BTM, x_BTM, x_BTM, ~real_BT, need_weights, None, average_attn_weights
    )
    if weights is not None:
        # Rows of the padding are zero in the original's kernel.
        visible = real_BT[:, :, None] if average_attn_weights else real_BT[:, None, :, None]
        weights = weights.masked_fill(~visible, 0.0)
    return torch._nested_tensor_from_mask(out_BTM, real_BT, mask_check=False), weights
