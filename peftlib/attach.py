"""match -> probe -> build -> open sites -> freeze -> Tuning; all or nothing.

Everything that can be wrong is found before the model is touched; what fails after that is undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from peftlib.errors import PeftlibError, ProbeError, StateError
from peftlib.freezing import hold_flags, restore_flags
from peftlib.methods.base import Method, Site
from peftlib.methods.full import FullFineTuning
from peftlib.methods.new_head import NewHead
from peftlib.open_attention import Projection
from peftlib.part import Part
from peftlib.registry import registry
from peftlib.selection import select
from peftlib.site import TUNINGS, can_open_attention, check_no_route, close_host, open_host, set_active
from peftlib.targets import Tree, describe
from peftlib.tuning import Tuning

if TYPE_CHECKING:
    from peftlib.probe import Probe

Plan = list[tuple[Method, list[Site]]]
"""What to build: each method with its sites, in the order in which their deltas shall run."""


def attach(
    model: nn.Module,
    method: Method | Mapping[Any, Method],
    *,
    targets: Any = None,
    name: str = "default",
    example: Any = None,
    freeze: bool = True,
) -> Tuning:
    """Attach a fine-tuning method to a module, in place and exactly removable.

    Args:
        model: any ``nn.Module``; it stays the same object, ``isinstance`` and state-dict keys of the base included.
        method: one method, or a mapping ``{target: method}``; ``""`` is the root. A module matched by two keys
            takes both deltas in order if they are of different methods.
        targets: where the method goes: a glob on the dotted name or any trailing part of it, a module type, a
            predicate ``(name, module) -> bool``, or a list of these; ``"!..."`` excludes. ``None``: the method's
            default. A glob may name a parameter for methods that can act on raw weights.
        name: the tuning's name on this model.
        example: the positional arguments (a tensor, a tuple) or the keyword arguments (a dict) of one forward.
            Used once, under fake tensors, to learn shapes, attention sites and what is really executed.
        freeze: stop training the base, and hold still the running statistics of its batch norms, so that the base is
            exactly what it was whatever was trained on top (a norm that the tuning itself trains moves its own). A
            second attach freezes nothing that is already being trained; all of it returns to what it was when the
            last tuning leaves.

    Returns:
        The enabled tuning.

    Raises:
        TargetError: a target matches nothing, cannot carry the method, or is never executed.
        ProbeError: the method needs ``example`` and has none, or the example could not be followed.
        StateError: the name is taken.
        PeftlibError: anything else that would make the tuning wrong or silently without effect.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> tuning = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["0"])
        >>> tuning.num_parameters  # 2 * (8 + 16)
        48
        >>> tuning.detach()
        >>> type(model[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    _check_arguments(model, method, targets, name)
    tree = Tree(model)
    probe = _probe(model, example) if example is not None else None
    plan: Plan = []
    skipped: dict[str, str] = {}
    for wanted, one in _requests(method, targets):
        if one.needs_probe and probe is None:
            example = _stand_in(model)
            if example is None:
                raise ProbeError(
                    f"{type(one).__name__} has to see one forward to know its sites: pass example= (a tensor, a tuple "
                    "of positional arguments, or a dict of keyword arguments). It is used once, under fake tensors."
                )
            probe = _probe(model, example)
        sites, left_out = select(one, wanted, tree, probe)
        skipped |= left_out
        plan.append((one, one.survey(sites, tree, probe)))
        for extra_wanted, extra in _head_requests(one, tree, probe):
            sites, left_out = select(extra, extra_wanted, tree, probe)
            plan.append((extra, extra.survey(sites, tree, probe)))
    return install(model, tree, build_parts(tree, plan, name), name=name, freeze=freeze, skipped=skipped)


def build_parts(tree: Tree, plan: Plan, name: str) -> list[Part]:
    """Build the deltas of a resolved plan, without touching the model."""
    parts: list[Part] = []
    taken: set[tuple[int, str]] = set()
    nesting: set[int] = set()
    for entry, (method, sites) in enumerate(plan):
        given = {site.name: site for site in sites}
        for site_name, delta in method.build(sites).items():
            site = given.get(site_name) or tree.site(site_name)
            delta.label = method.label
            key = f"{name}:{site.parameter or ''}{method.label}"
            if (id(site.module), key) in taken:
                raise PeftlibError(
                    f"{site.name or 'the root'!r} is matched twice by {type(method).__name__}; a place takes several "
                    "deltas only of different methods. Make the keys of the mapping disjoint."
                )
            taken.add((id(site.module), key))
            delta.train(site.module.training)
            opened = _enclosing(site, tree, nesting)
            parts.append(
                Part(
                    site.name,
                    site.module,
                    site.parameter,
                    delta,
                    method,
                    site.facts,
                    key,
                    opened,
                    site_name in given,
                    entry,
                )
            )
    return parts


def install(
    model: nn.Module,
    tree: Tree,
    parts: list[Part],
    *,
    name: str,
    freeze: bool,
    skipped: Mapping[str, str] | None = None,
    enabled: bool = True,
) -> Tuning:
    """Put built parts on the model, or leave it untouched (``attach`` and ``load`` share this)."""
    check_no_route(model)
    tuning = Tuning(name, model, parts, skipped or {})
    done: list[Part] = []
    first = not registry(model)
    held = False
    try:
        if first:
            hold_flags(model, list(tree.modules.values()), freeze)
            held = True
        for part in parts:
            _open(part, tree)
            done.append(part)
        model.__dict__.setdefault(TUNINGS, {})[name] = tuning
        if enabled:
            tuning.enable()
    except BaseException:
        for part in reversed(done):
            set_active(part.host, part.delta, part.parameter, False)
            tuning._remove(part)
        have = model.__dict__.get(TUNINGS, {})
        have.pop(name, None)
        if not have:
            model.__dict__.pop(TUNINGS, None)
        if held:
            restore_flags(model)
        raise
    return tuning


def _open(part: Part, tree: Tree) -> None:
    opened: list[nn.Module] = []
    try:
        for host in part.opened:
            open_host(host)
            opened.append(host)
            # An attention makes its projections when it opens; from then on they are the site.
        if isinstance(part.host, Projection):
            part.host = part.opened[0]._modules[f"{part.host.which}_proj"]  # type: ignore[assignment]
        hook = bool(tree.around(part.name, nn.TransformerEncoderLayer))
        open_host(part.host, shadow=part.parameter, hook=hook).add(part.key, part.delta)
    except BaseException:
        for host in opened:
            close_host(host)
        raise


def _enclosing(site: Site, tree: Tree, nesting: set[int]) -> list[nn.Module]:
    """Modules to open so that the site is called at all: the attention around its own projections.

    In eval an ``nn.TransformerEncoder`` nests a padded batch, which closed attentions take in their fused path alone,
    and what needs gradients cannot go there: then all its attentions are opened, by the first part inside.
    """
    parent = tree.parent(site.name) if site.parameter is None else None
    found: list[nn.Module] = [parent] if isinstance(parent, nn.MultiheadAttention) else []
    for around in tree.around(site.name, nn.TransformerEncoder):
        if around.use_nested_tensor and id(around) not in nesting:
            nesting.add(id(around))
            found += [m for m in around.modules() if can_open_attention(m)]
    return found


def _check_arguments(model: Any, method: Any, targets: Any, name: Any) -> None:
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"attach needs an nn.Module; got {type(model).__name__}.")
    if isinstance(method, type) and issubclass(method, Method):
        raise PeftlibError(f"attach needs a method's instance; got the class. Write {method.__name__}(...).")
    if isinstance(method, Mapping):
        if targets is not None:
            raise PeftlibError("A mapping {target: method} names its own targets; leave targets= out.")
        if not method:
            raise PeftlibError("The mapping {target: method} is empty; name at least one target.")
        for key, value in method.items():
            if not isinstance(value, Method):
                raise PeftlibError(f"The mapping's value at {describe(key)} must be a method; got {value!r}.")
    elif not isinstance(method, Method):
        raise PeftlibError(
            f"attach needs a method such as LoRA(rank=8), or a mapping of them; got {method!r}."
        )
    check_name(model, name)


def check_name(model: nn.Module, name: Any) -> None:
    """Refuse a name that is no name, or taken."""
    if not isinstance(name, str) or not name or "." in name or ":" in name:
        raise PeftlibError(f"A tuning's name is a non-empty string without '.' and ':'; got {name!r}.")
    have = registry(model)
    if name in have:
        raise StateError(
            f"The model has a tuning {name!r} already. Pass another name=..., or detach() that one first. "
            f"It has: {', '.join(map(repr, have))}."
        )


def _requests(method: Any, targets: Any) -> Iterator[tuple[Any, Method]]:
    if isinstance(method, Method):
        yield (targets if targets is not None else method.own_targets), method
        return
    for key, one in method.items():
        yield list(key) if isinstance(key, tuple) else [key], one


def _head_requests(method: Method, tree: Tree, probe: Probe | None) -> Iterator[tuple[Any, Method]]:
    """The parts that a method's ``head=`` stands for."""
    head = method.head
    if head is None:
        return
    if isinstance(head, NewHead):
        yield None, head
    elif isinstance(head, Mapping):
        yield from _requests(head, None)
    else:
        yield head if isinstance(head, (list, tuple)) else [head], FullFineTuning()


def _probe(model: nn.Module, example: Any) -> Probe:
    # Imported where it is needed: attaching to attributes alone, the common case, does without.
    from peftlib.probe import Probe

    return Probe(model, example)


def _stand_in(model: nn.Module) -> Any:
    """Models that carry an example of their own input (``dummy_inputs``) need none from the user."""
    example = getattr(model, "dummy_inputs", None)
    return example if isinstance(example, Mapping) and example else None
