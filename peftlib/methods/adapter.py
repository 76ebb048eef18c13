"""Bottleneck adapters: a small MLP after a module, or beside it.

Shape legend: W feature width of the output, I of the input, M bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from peftlib.errors import PeftlibError, ProbeError, TargetError
from peftlib.methods.base import CHILD, Delta, Method, Site, check_positive_int, placement, plain_class
from peftlib.methods.bottleneck import ACTIVATIONS, Bottleneck
from peftlib.methods.linear import CONVOLUTIONS, input_width, leaves, linear_shape, output_width
from peftlib.methods.lora import linear_sites

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree


@dataclass(frozen=True, kw_only=True)
class Adapter(Method):
    r"""A bottleneck after a module, ``out = f + s (U act(D f + d) + u)``, or beside it, with ``D x`` for ``D f``.

    f = f(x) is the module's output, or its first output; D (M, W), d (M), U (W, M), u (W): 2 M W + M + W parameters.
    U and u start at 0, so attaching changes nothing; D starts kaiming-uniform(sqrt 5). On channel-first modules
    (convolutions, batch norms) the two matrices act as 1x1 convolutions.

    Args:
        dim: bottleneck M. Give this or ``reduction``.
        reduction: M = W / reduction (at least 1).
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"identity"``.
        placement: ``"sequential"`` (after) or ``"parallel"`` (beside).
        scale: s; 4 is He et al.'s choice for parallel adapters.
        layer_norm: normalize the bottleneck's input with a trained LayerNorm (2 W more parameters).
        axis: feature axis of the module's output; ``None`` takes the example's or the module's own.
        where: which places the default takes: ``"blocks"``, or the published ``"houlsby"``, ``"pfeiffer"`` and
            ``"parallel"``, which need ``example=`` to see the order in which a block works.

    Raises:
        PeftlibError: neither or both of dim and reduction, an unknown activation or placement, a width that cannot be
            told from attributes (pass ``example=``), or an output of another width than expected.

    Default sites: after each repeated block of the model (the elements of its module lists); where there are none,
    every linear-like module but the output head. With a preset, the published places in each block.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> peftlib.attach(model, peftlib.Adapter(dim=4), targets=["0"]).num_parameters  # 2*4*32 + 4 + 32
        292

    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; Pfeiffer et al. 2021, arXiv:2005.00247;
    He et al. 2022, arXiv:2110.04366, section 3.
    """

    dim: int | None = None
    reduction: float | None = None
    activation: str = "relu"
    placement: str = "sequential"
    scale: float = 1.0
    layer_norm: bool = False
    axis: int | None = None
    where: str = "blocks"

    def __post_init__(self) -> None:
        if (self.dim is None) == (self.reduction is None):
            raise PeftlibError(
                f"Adapter(dim={self.dim!r}, reduction={self.reduction!r}): give exactly one of dim= (the bottleneck) "
                "and reduction= (width divided by it)."
            )
        if self.dim is not None:
            check_positive_int("Adapter", dim=self.dim)
        elif not isinstance(self.reduction, (int, float)) or not self.reduction > 0:
            raise PeftlibError(f"Adapter(reduction={self.reduction!r}): reduction must be a positive number.")
        for name, value, allowed in (
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("placement", self.placement, ("sequential", "parallel")),
            ("where", self.where, ("blocks", "houlsby", "pfeiffer", "parallel")),
        ):
            if value not in allowed:
                raise PeftlibError(
                    f"Adapter({name}={value!r}): {name} must be one of {', '.join(map(repr, allowed))}."
                )
        if not isinstance(self.scale, (int, float)) or not math.isfinite(self.scale) or not self.scale:
            raise PeftlibError(f"Adapter(scale={self.scale!r}): scale must be a finite number other than 0.")
        if self.axis is not None and (isinstance(self.axis, bool) or not isinstance(self.axis, int)):
            raise PeftlibError(f"Adapter(axis={self.axis!r}): axis must be an integer, or None.")

    @classmethod
    def houlsby(cls, **fields: Any) -> Adapter:
        """Two per block: after the attention's and after the feed-forward's last projection (Houlsby et al. 2019).

        ``dim`` is 64 unless ``dim`` or ``reduction`` is given.
        """
        return cls._preset(fields, {"dim": 64}, activation="gelu", where="houlsby")

    @classmethod
    def pfeiffer(cls, **fields: Any) -> Adapter:
        """One per block: after the feed-forward's last projection (Pfeiffer et al. 2021).

        ``reduction`` is 16 unless ``dim`` or ``reduction`` is given.
        """
        return cls._preset(fields, {"reduction": 16}, where="pfeiffer")

    @classmethod
    def parallel(cls, **fields: Any) -> Adapter:
        """One per block, beside the feed-forward, scaled by 4 (He et al. 2022).

        ``dim`` is 512 unless ``dim`` or ``reduction`` is given.
        """
        return cls._preset(fields, {"dim": 512}, placement="parallel", scale=4.0, where="parallel")

    @classmethod
    def _preset(cls, fields: dict[str, Any], size: dict[str, Any], **published: Any) -> Adapter:
        given = fields.get("dim") is not None or fields.get("reduction") is not None
        return cls(**{**({} if given else size), **published, **fields})

    def refuses(self, site: Site) -> str | None:
        if site.parameter is not None:
            return "an adapter acts on a module's output, not on a parameter"
        if type(site.module).forward is nn.Module.forward:
            return "it has no forward (a container), so there is no output to adapt"
        if self.placement == "parallel" and isinstance(site.module, nn.Embedding):
            return "a parallel adapter works on the module's input, and these are integer ids"
        if self.placement == "parallel" and isinstance(site.module, CONVOLUTIONS):
            if any(s != 1 for s in site.module.stride) or site.module.padding == "valid":
                return "a parallel adapter keeps the spatial size, which this convolution changes"
        return None

    def fits(self, site: Site) -> str | None:
        sizes = [site.facts.get(k) for k in ("in", "out", "axis")] if site.facts else []
        if any(type(n) is not int for n in sizes) or any(n < 1 for n in sizes[:2]):  # type: ignore[operator]
            return f"its sizes are no integers: {dict(site.facts)}"
        return None

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        if self.where == "blocks":
            return [tree.site(n) for n in repeated_blocks(tree)] or list(linear_sites(tree, probe))
        if probe is None:
            raise ProbeError(
                f"Adapter's {self.where!r} places are found by watching a block work: pass example=, or name the "
                "places with targets=[...]."
            )
        # A model of one block is a model of blocks, too: a one-element list counts here.
        names = repeated_blocks(tree) or repeated_blocks(tree, least=1)
        found = [site for name in names for site in self._published(tree.site(name), tree, probe)]
        if not found:
            places = {
                "houlsby": "linears, the first of them after an attention that calls SDPA",
                "pfeiffer": "linears",
                "parallel": "a feed-forward that is a module of its own",
            }
            raise TargetError(
                f"{type(tree.model).__name__} shows no block with the {self.where!r} places "
                f"({places[self.where]}). Name "
                "them with targets=[...]."
            )
        return found

    def _published(self, block: Site, tree: Tree, probe: Probe) -> list[Site]:
        """The last projection of the block, and the first linear after its attention."""
        own = (f"{block.name}.", f"{block.name}!")
        order = [n for n in probe.record.order if n.startswith(own)]
        linear = [n for n in order if n in tree.modules and linear_shape(tree.modules[n]) is not None]
        if not linear:
            return []
        last = linear[-1]
        if self.where == "parallel":
            return self._feed_forward(last, tree, probe, block.name)
        if self.where == "pfeiffer":
            return [tree.site(last)]
        calls = [i for i, n in enumerate(order) if n.endswith("!")]
        after = next((n for n in order[calls[0] :] if n in linear), None) if calls else None
        return [] if after is None else [tree.site(n) for n in dict.fromkeys((after, last))]

    @staticmethod
    def _feed_forward(last: str, tree: Tree, probe: Probe, block: str) -> list[Site]:
        """The smallest module around the last projection that maps the width back to itself."""
        for name, _ in tree.ancestors(last):
            trace = probe.record.traces.get(name)
            if len(name) <= len(block):
                break
            if trace is not None and trace.input and trace.output and trace.input[-1] == trace.output[-1]:
                return [tree.site(name)]
        return []

    def survey(self, sites: Sequence[Site], tree: Tree, probe: Probe | None) -> list[Site]:
        return [replace(site, facts=self._sizes(site, probe)) for site in sites]

    def _sizes(self, site: Site, probe: Probe | None) -> dict[str, int]:
        guess, inside = output_width(site.module), input_width(site.module)
        trace = probe.trace(site) if probe is not None else None
        if trace is not None and trace.output is not None:
            axis = self.axis if self.axis is not None else _feature_axis(trace.output, guess)
            if not -len(trace.output) <= axis < len(trace.output):
                raise TargetError(
                    f"Adapter(axis={axis}): the output of {site.name or 'the root'!r} has shape {trace.output}."
                )
            width = trace.output[axis]
            into = None
            if trace.input and trace.is_floating and len(trace.input) == len(trace.output):
                into = trace.input[axis]
            if self.placement == "parallel" and (
                into is None or _without(trace.input, axis) != _without(trace.output, axis)
            ):
                raise TargetError(
                    f"A parallel adapter needs input and output that differ in the feature axis alone; {site.name!r} "
                    f"maps {trace.input} to {trace.output}. Use placement='sequential', or another module."
                )
        elif trace is not None:
            raise TargetError(
                f"{site.name or 'the root'!r} ({type(site.module).__name__}) returns no tensor in the example, "
                "so an adapter "
                "has nothing to add to. Target a module whose output (or first output) is a tensor."
            )
        elif guess is None:
            raise ProbeError(
                f"The width of the output of {site.name or 'the root'!r} ({type(site.module).__name__}) cannot be told "
                "from its attributes. Pass example=."
            )
        else:
            width, axis = guess[0], guess[1] if self.axis is None else self.axis
            into = inside[0] if inside is not None else None
        if self.placement == "sequential":
            into = width
        if into is None:
            raise ProbeError(
                f"The width of the input of {site.name!r} cannot be told from its attributes. Pass example=."
            )
        return {"in": into, "out": width, "axis": axis}

    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        found: dict[str, Delta] = {}
        for site in sites:
            into, out, axis = (site.facts[k] for k in ("in", "out", "axis"))
            dim = self.dim if self.dim is not None else max(1, int(out / self.reduction))
            found[site.name] = Bottleneck(self, (into, dim, out), axis, **placement(site, self.dtype))
        return found


def repeated_blocks(tree: Tree, least: int = 2) -> list[str]:
    """The outermost module lists' elements: the blocks a deep model repeats.

    A list counts if it holds at least so many modules, all of one class and with linears or convolutions inside.
    """
    found: list[str] = []
    for name, module in tree.modules.items():
        if any(name.startswith(f"{block}.") for block in found):
            continue
        children = [(k, m) for k, m in module._modules.items() if m is not None and k != CHILD]
        kinds = [plain_class(m) for _, m in children]
        if (
            isinstance(module, (nn.ModuleList, nn.Sequential))
            and len(children) >= least
            and len(set(kinds)) == 1
        ):
            first = children[0][1]
            if type(first).forward is nn.Module.forward or not any(k != CHILD for k in first._modules):
                continue
            if any(output_width(leaf) is not None for leaf in leaves(children[0][1])):
                found += [f"{name}.{k}" if name else k for k, _ in children]
    return list(dict.fromkeys(tree.aliases[n] for n in found))


def _without(shape: tuple[int, ...] | None, axis: int) -> list[int]:
    """A shape without one of its axes."""
    sizes = list(shape or ())
    del sizes[axis]
    return sizes


def _feature_axis(shape: tuple[int, ...], guess: tuple[int, int] | None) -> int:
    """The last, unless the module's layers say that axis 1 is the feature axis and the last is not."""
    if guess is None:
        return -1
    size, axis = guess
    if axis == 1 and len(shape) > 2 and shape[1] == size:
        return 1
    if shape[-1] == size or len(shape) < 3:
        return -1
    return 1 if shape[1] == size else -1
