"""What counts as linear, convolutional, and how wide a module's output is: by attributes, never by a model's name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from peftlib.methods.base import CHILD

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a linear-like leaf, or ``None``.

    Linear-like is ``nn.Linear``, a leaf with integer ``in_features`` and ``out_features`` (quantized layers and the
    like), or one with ``nx``/``nf`` and a weight of that shape (transformers' ``Conv1D``).
    """
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return None
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not _whole(sizes):
        weight = module._parameters.get("weight")
        sizes = getattr(module, "nx", None), getattr(module, "nf", None)
        if not _whole(sizes) and weight is not None and weight.dim() == 2:
            sizes = (weight.shape[0], sizes[1])
        if not _whole(sizes) or weight is None or tuple(weight.shape) != sizes:
            return None
    if isinstance(module, nn.Linear) or all(k == CHILD for k in module._modules):
        return sizes  # type: ignore[return-value]
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight lies as (in, out), as in transformers' ``Conv1D``."""
    return not _whole((getattr(module, "in_features", None),)) and _whole((getattr(module, "nf", None),))


def _whole(sizes: tuple[object, ...]) -> bool:
    return all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes)


def output_width(module: nn.Module) -> tuple[int, int] | None:
    """``(size, axis)`` of the feature axis of a module's output as far as attributes tell, else ``None``.

    A module of modules has the width of its last registered layer that has one: a guess that the delta checks
    against the first real output.
    """
    own = _own_width(module)
    if own is not None:
        return own[1], own[2]
    for child in reversed([m for k, m in module._modules.items() if m is not None and k != CHILD]):
        found = output_width(child)
        if found is not None:
            return found
    return None


def input_width(module: nn.Module) -> tuple[int, int] | None:
    """``(size, axis)`` of the feature axis of a module's input as far as attributes tell, else ``None``."""
    own = _own_width(module)
    if own is not None:
        return own[0], own[2]
    for key, child in module._modules.items():
        if child is not None and key != CHILD:
            found = input_width(child)
            if found is not None:
                return found
    return None


def _own_width(module: nn.Module) -> tuple[int, int, int] | None:
    """(in, out, axis) of a single layer."""
    shape = linear_shape(module)
    if shape is not None:
        return (*shape, -1)
    if isinstance(module, (*CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return module.in_channels, module.out_channels, 1
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features, module.num_features, 1
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, module.num_channels, 1
    normalized = getattr(module, "normalized_shape", None)
    if isinstance(normalized, (tuple, list)) and normalized:
        return int(normalized[-1]), int(normalized[-1]), -1
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.embedding_dim, -1
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim, -1
    if isinstance(module, nn.RNNBase):
        out = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
        return module.input_size, out, -1
    return None


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The layers inside a module, in registration order, without what peftlib added."""
    children = [m for k, m in module._modules.items() if m is not None and k != CHILD]
    if not children:
        yield module
    for child in children:
        yield from leaves(child)
