"""The sites a method gets: what its targets, or its defaults, mean in a model, without those where it would do nothing.

What a default leaves out is listed with the reason; what was asked for by name and cannot be is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftlib.errors import TargetError
from peftlib.methods.base import Method, Site, plain_class
from peftlib.targets import Tree, as_list, describe, matches

if TYPE_CHECKING:
    from peftlib.probe import Probe


def select(
    method: Method, targets: Any, tree: Tree, probe: Probe | None
) -> tuple[list[Site], dict[str, str]]:
    """Resolve targets to sites that the method can act on.

    Returns:
        The sites in tree order without repeats, and the sites a default left out with the reason.

    Raises:
        TargetError: a target that matches nothing, or only places that the method refuses.
    """
    wanted = as_list(targets)
    if targets is not None and not wanted:
        raise TargetError(
            "targets=[] names no place. Leave targets out for the method's default, or name one."
        )
    for target in wanted:
        if isinstance(target, str) and not target.strip("!"):
            if target != "":
                raise TargetError(f"The target {target!r} excludes nothing; write '!' and a glob.")
    excluded: set[str] = set()
    for target in wanted:
        if isinstance(target, str) and target.startswith("!"):
            gone = matches(target[1:], tree)
            if not gone:
                raise TargetError(tree.near_miss(target[1:]).replace("The target", "The exclusion", 1))
            excluded |= {s.name for s in gone}
    included = [t for t in wanted if not (isinstance(t, str) and t.startswith("!"))]
    left_out: dict[str, str] = {}
    if not included:
        sites = []
        left_out |= method.default_skips(tree, probe)
        for site in method.default_sites(tree, probe):
            if _covered(site.name, excluded):
                continue
            why = method.fits(site) or method.wasteful(site)
            if why is not None:
                left_out[site.name] = why
            elif probe is not None and not probe.executed(site):
                left_out[site.name] = "not executed by the example"
            elif (why := _half_reached(method, site, probe)) is not None:
                left_out[site.name] = why
            else:
                sites.append(site)
        if not sites:
            reasons = "".join(f" {n or 'the root'!r}: {why}." for n, why in list(left_out.items())[:4])
            raise TargetError(
                f"{type(method).__name__} finds no place in {type(tree.model).__name__} by default.{reasons} "
                "Name one with targets=[...]; peftlib.inspect(model) lists what can be targeted."
            )
        return sites, left_out
    found: dict[str, Site] = {}
    for target in included:
        hits = matches(target, tree)
        if not hits:
            raise TargetError(
                tree.near_miss(target)
                if isinstance(target, str)
                else f"The target {describe(target)} matches no module of {type(tree.model).__name__}."
            )
        good: list[Site] = []
        for hit in hits:
            good += method.resolve(hit, tree, probe)
        good = [s for s in good if not _covered(s.name, excluded)]
        if not good:
            kept = [h for h in hits if not _covered(h.name, excluded)]
            if not kept:
                raise TargetError(f"The target {describe(target)} is wholly excluded by the '!...' targets.")
            why = method.why_unresolved(kept[0], probe)
            below = tree.inside(kept[0].name) if kept[0].parameter is None else ()
            inner = [s.name for s in below if s.name != kept[0].name and not method.refuses(s)]
            hint = f" Inside it, these can be targeted: {', '.join(map(repr, inner[:4]))}." if inner else ""
            raise TargetError(
                f"The target {describe(target)} matches {len(kept)} place(s), none of which can carry "
                f"{type(method).__name__}: {kept[0].name or 'the root'!r} ({_kind(kept[0])}): {why}.{hint}"
            )
        for site in good:
            found.setdefault(site.name, site)
    sites = sorted(found.values(), key=tree.place)
    for site in sites:
        why = method.fits(site) or method.wasteful(site)
        if why is not None:
            raise TargetError(f"{site.name or 'the root'!r} cannot carry {method}: {why}.")
    if probe is not None:
        idle = [s.name for s in sites if not probe.executed(s)]
        if idle:
            raise TargetError(
                f"The example never executes {', '.join(map(repr, idle[:5]))}{' ...' if len(idle) > 5 else ''}: "
                "a delta "
                "there would silently do nothing. The model reads the weight directly or skips the module. Target "
                f"the parameter instead (for instance '{idle[0]}.weight' with LoRA), or another module."
            )
    for site in sites:
        why = _half_reached(method, site, probe)
        if why is not None:
            raise TargetError(f"{site.name!r} cannot carry {method}: {why}.")
    return sites, left_out


def _half_reached(method: Method, site: Site, probe: Probe | None) -> str | None:
    """Why a method that acts where a module is called would leave a part of the model with the weight as it was."""
    if probe is None or not method.follows_calls or site.parameter is not None:
        return None
    read = probe.read_elsewhere(site)
    if read is None:
        return None
    parameter, reader = read
    where = repr(reader) if reader else "the root"
    return (
        f"{where} reads {parameter!r} itself, outside any call of {site.name!r}: there the weight stays as it was, "
        f"and merging would change it there too. Target the parameter, {parameter!r} with LoRA, to act at every read"
    )


def _covered(name: str, excluded: set[str]) -> bool:
    """An exclusion of a module excludes what is inside it."""
    if not excluded:
        return False
    while name:
        if name in excluded:
            return True
        name = name.rpartition(".")[0]
    return False


def _kind(site: Site) -> str:
    return (
        f"parameter of {plain_class(site.module).__name__}"
        if site.parameter
        else plain_class(site.module).__name__
    )
