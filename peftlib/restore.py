"""Putting a saved tuning on a model: the plan is built without values, checked, and given those that were read.

``checkpoint`` and ``hf`` read different files and share this. Nothing is allocated for what a file merely claims, no
random number is drawn, and values that already are where the host is become the parameters themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peftlib.attach import Plan, build_parts, install
from peftlib.errors import CheckpointError, ProbeError
from peftlib.methods.base import Site, placement, without_values
from peftlib.part import Part, check_state
from peftlib.targets import Tree
from peftlib.tuning import Tuning


def restore(
    tree: Tree,
    plan: Plan,
    state: Mapping[str, Tensor],
    *,
    name: str,
    trainable: bool,
    source: str,
    what: str,
    enabled: bool = True,
) -> Tuning:
    """Attach a resolved plan with given values.

    Args:
        tree: of the model.
        plan: methods with their sites, in the order in which they shall run.
        state: every tensor of the tuning by its name in :meth:`peftlib.Tuning.state_dict`, on the CPU.
        name: the tuning's name on the model.
        trainable: whether its parameters require gradients.
        source: where the plan was read, for messages.
        what: what the state has to fit, for messages.
        enabled: whether it acts at once.

    Raises:
        CheckpointError: the tensors do not fit the plan on this model, which is then unchanged.
    """
    with explained(source), without_values():
        parts = build_parts(tree, plan, name)
    own = [(part, dict(part.delta.tensors())) for part in parts]
    check_state({f"{part.prefix}.{k}": t for part, mine in own for k, t in mine.items()}, state, what)
    with explained(source), torch.no_grad():
        given = [_give_values(part, mine, tree.model, state) for part, mine in own]
    tuning = install(tree.model, tree, parts, name=name, freeze=True, enabled=enabled)
    with torch.no_grad():
        for (part, mine), keys in zip(own, given, strict=True):
            # The rest are the base's own tensors, and those of a method that builds its own with values.
            if len(keys) < len(mine):
                for key, tensor in part.delta.tensors():
                    if key not in keys:
                        tensor.copy_(state[f"{part.prefix}.{key}"])
    if not trainable:
        for parameter in tuning.parameters():
            parameter.requires_grad_(False)
    return tuning


@contextlib.contextmanager
def explained(source: str) -> Iterator[None]:
    """Errors about what was read name the file they came from."""
    try:
        yield
    except (CheckpointError, ProbeError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{source} does not fit this model: {error}") from error


def _give_values(
    part: Part, own: Mapping[str, Tensor], model: nn.Module, state: Mapping[str, Tensor]
) -> list[str]:
    """Turn the empty tensors of a delta into those given, where the host is; no copy if they are there already."""
    empty = [key for key, t in own.items() if t.is_meta]
    if not empty:
        return empty
    where = placement(Site(part.name, part.host, part.parameter, model))["device"]
    # A base on meta has no values yet; a tuning's are kept on the CPU until it does.
    where = torch.device("cpu") if where.type == "meta" else where
    for key in empty:
        path, _, name = key.rpartition(".")
        owner = part.delta.get_submodule(path) if path else part.delta
        value = _alone(state[f"{part.prefix}.{key}"].to(where, own[key].dtype))
        if owner._parameters.get(name) is own[key]:
            # By assignment, which modules with lists of their own weights (nn.LSTM) notice.
            setattr(owner, name, nn.Parameter(value, own[key].requires_grad))
        elif owner._buffers.get(name) is own[key]:
            setattr(owner, name, value)
        else:
            raise CheckpointError(
                f"{part.name or 'the root'!r} trains the base's own {key}, which is on the meta device: there are no "
                "values to exchange. Give the model its values first, then load."
            )
    part.delta.derive()
    return empty


def _alone(tensor: Tensor) -> Tensor:
    """In memory of its own: a part of a larger tensor would keep all of that alive."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
