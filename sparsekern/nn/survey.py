"""Which layers of a model can be converted, and why the others cannot.

A site is one weight with every nn.Linear or nn.Conv2d that uses it: one module under one or more names
(shared), or several Linears with one Parameter (tied). Everything else that looks like a layer gets a
reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from ..layout import FLOATS
from ..prune.mask import Mask, mask_of
from ..tensor import SparseTensor
from .base import SparseModule
from .dynamic import DynamicSparseLinear
from .report import SKIPPED, SPARSE, Row

Filter = Callable[[nn.Module, str], bool]
KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
# A subclass that defines one of these anew is not the layer that it looks like.
_BEHAVIOUR = ("forward", "__call__", "_conv_forward", "__getattr__", "weight", "bias",
              "_load_from_state_dict", "_save_to_state_dict")  # fmt: skip
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
                "_load_state_dict_post_hooks")  # fmt: skip
_PLAIN = set(nn.Module().__dict__)


@dataclass
class Site:
    """A weight that can be converted: `modules` use it, `names` are theirs, `dense` are plain twins of them.

    A twin is the module itself, or, where a mask sits on the weight, a plain layer with the masked weight.
    """

    names: list[str]
    modules: list[nn.Module]
    dense: list[nn.Module]
    type: str
    note: str = ""
    row: Row = field(init=False)

    def __post_init__(self) -> None:
        self.row = Row(self.names[0], self.type, tuple(self.weight.shape), also=tuple(self.names[1:]))
        self.row.bytes_before = self.row.bytes_after = self.weight.numel() * self.weight.element_size()

    @property
    def weight(self) -> Tensor:
        layer: Any = self.dense[0]
        return layer.weight.detach()

    @property
    def conv(self) -> bool:
        return isinstance(self.dense[0], nn.Conv2d)


def survey(model: nn.Module, filter_fn: Filter | None = None) -> tuple[list[Site | Row], list[str]]:
    """Every Linear and Conv2d of the model in order, as a Site or as a Row with its reason; and notes."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name or type(module).__name__)
        modules[id(module)] = module
    context = _Context(list(modules.values()), names)
    found: list[Site | Row] = []
    done: set[int] = set()
    for key, module in modules.items():
        if key in done:
            continue
        if isinstance(module, SparseModule):
            found.append(_sparse_row(module, names[key]))
        elif isinstance(module, nn.MultiheadAttention):
            found.extend(_attention_rows(module, names[key][0]))
        elif isinstance(module, KINDS):
            twins = context.twins(module)
            done.update(id(m) for m in twins)
            found.extend(_examine(twins, context, filter_fn))
    return found, context.notes()


class _Context:
    """What a layer's fate depends on beside itself: its parents, who else holds its weight, and where."""

    def __init__(self, modules: list[nn.Module], names: dict[int, list[str]]) -> None:
        self.modules, self.names = modules, names
        self.parents: dict[int, list[nn.Module]] = {}
        self.owners: dict[int, list[tuple[nn.Module, str]]] = {}
        self.listed: dict[int, str] = {}
        self.adapters: dict[int, str] = {}
        holder: dict[int, nn.Module] = {}
        for m in modules:
            lists: Any = m.parametrizations if parametrize.is_parametrized(m) else {}
            holder.update((id(steps), m) for steps in lists.values())
        self.extents: list[tuple[int, int, int, str]] = []
        for m in modules:
            for child in m._modules.values():
                if child is not None:
                    self.parents.setdefault(id(child), []).append(m)
            owner = holder.get(id(m), m)
            for name, parameter in m._parameters.items():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append((owner, name))
                    self._add_extent(parameter, f"{self.names.get(id(owner), ['?'])[0]}.{name}")
            self._note_lists(m)
            self._note_adapters(m)

    def _add_extent(self, p: Tensor, name: str) -> None:
        plain = type(p) in (nn.Parameter, Tensor) and p.layout == torch.strided and not p.is_meta and p.numel()
        if plain:
            reach = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)) + 1
            self.extents.append((id(p), p.data_ptr(), p.data_ptr() + reach * p.element_size(), name))

    def _note_lists(self, m: nn.Module) -> None:
        for name, value in m.__dict__.items():
            if name in _PLAIN or not isinstance(value, (list, tuple, set, dict)):
                continue
            for item in value.values() if isinstance(value, dict) else value:
                if isinstance(item, nn.Module):
                    self.listed[id(item)] = f"{self.names[id(m)][0]}.{name}"

    def _note_adapters(self, m: nn.Module) -> None:
        if isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            return
        lora = [n for n in (*m._modules, *m._parameters) if n.lower().startswith("lora_")]
        inner: list[nn.Module | None] = []
        if "base_layer" in m._modules:
            inner = list(m._modules.values())
        elif lora:
            inner = [c for n, c in m._modules.items() if n in lora or isinstance(c, KINDS)]
            inner += [m] if isinstance(m, KINDS) else []
        for child in inner:
            if child is not None:
                for part in child.modules():
                    self.adapters[id(part)] = type(m).__name__

    def twins(self, module: nn.Module) -> list[nn.Module]:
        """All Linear and Conv2d modules that hold the module's weight parameter, itself first."""
        weight = _parameter(module)
        if weight is None:
            return [module]
        owners = [m for m, _ in self.owners.get(id(weight), [])]
        return [module, *(m for m in owners if m is not module and isinstance(m, KINDS))]

    def why_not(self, module: nn.Module) -> str | None:
        """Why this module cannot be replaced, whatever its weight; None where it can."""
        for parent in self.parents.get(id(module), []):
            if isinstance(parent, nn.MultiheadAttention):
                return "nn.MultiheadAttention reads its weight directly"
        if id(module) in self.adapters:
            return (
                f"part of the adapter {self.adapters[id(module)]}, which reads and merges the dense weight; "
                "merge and remove the adapter first"
            )
        if id(module) in self.listed:
            return f"also held by the plain container {self.listed[id(module)]}, where it cannot be replaced"
        return (
            _why_not_class(module) or _why_not_weight(module) or _why_not_extras(module) or self._why_not_shared(module)
        )

    def _why_not_shared(self, module: nn.Module) -> str | None:
        weight = _parameter(module)
        for owner, name in self.owners.get(id(weight), []):
            linears = (
                isinstance(owner, nn.Linear)
                and isinstance(module, nn.Linear)
                and name in ("weight", "original0", "original")
            )
            if owner is not module and not linears:
                return f"its weight is tied to {self.names[id(owner)][0]}.{name} ({type(owner).__name__})"
        mine = next((e for e in self.extents if e[0] == id(weight)), None)
        if mine is not None:
            for other, begin, end, name in self.extents:
                if other != mine[0] and begin < mine[2] and mine[1] < end:
                    return f"its weight shares memory with {name}"
        return None

    def notes(self) -> list[str]:
        """What the model has beside Linear and Conv2d, and what its blocks lose."""
        other = Counter(
            type(m).__name__
            for m in self.modules
            if not isinstance(m, (*KINDS, SparseModule, nn.MultiheadAttention, Mask, parametrize.ParametrizationList))
            and any(p is not None and p.dim() > 1 for p in m._parameters.values())
        )
        if not other:
            return []
        return [f"Not considered: {', '.join(f'{n} {name}' for name, n in sorted(other.items()))}."]


def _examine(twins: list[nn.Module], context: _Context, filter_fn: Filter | None) -> Iterator[Site | Row]:
    """One site for all users of a weight, or a row for each of them."""
    reasons: list[str | None] = []
    for module in twins:
        names = context.names[id(module)]
        wanted = filter_fn is None or all(filter_fn(module, name) for name in names)
        reasons.append(context.why_not(module) if wanted else "left out by filter_fn")
    several = len(twins) > 1
    if several and not all(type(m) is type(twins[0]) and mask_of(m) is None for m in twins):
        reasons = [r or "its weight is tied to a layer of another kind or with a mask" for r in reasons]
    bad = next((i for i, r in enumerate(reasons) if r is not None), None)
    if bad is not None:
        culprit = context.names[id(twins[bad])][0]
        for module, reason in zip(twins, reasons, strict=True):
            names = context.names[id(module)]
            yield _skipped(module, names, reason or f"its weight is tied to {culprit}: {reasons[bad]}")
        return
    dense, note = zip(*(_plain(m) for m in twins), strict=True)
    names = [name for m in twins for name in context.names[id(m)]]
    yield Site(names, twins, list(dense), _class_name(twins[0]), note[0])


def _class_name(module: nn.Module) -> str:
    return parametrize.type_before_parametrizations(module).__name__


def _why_not_class(module: nn.Module) -> str | None:
    cls = parametrize.type_before_parametrizations(module)
    base = next(kind for kind in KINDS if isinstance(module, kind))
    if cls is DynamicSparseLinear:
        base = cls
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy and not initialised yet: run the model once"
    for name in _BEHAVIOUR:
        if getattr(cls, name, None) is not getattr(base, name, None):
            return f"{cls.__name__} is a {base.__name__} that defines {name} itself"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None


def _why_not_extras(module: nn.Module) -> str | None:
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        return "it has state_dict hooks, which expect a dense weight"
    own = [*module._parameters, *module._buffers, *module._modules]
    expected = {"weight", "bias", "weight_orig", "weight_mask", "parametrizations"}
    extra = [name for name in own if name not in expected]
    return f"it has tensors or modules of its own: {', '.join(extra)}" if extra else None


def _why_not_weight(module: Any) -> str | None:
    if parametrize.is_parametrized(module):
        if list(module.parametrizations) != ["weight"]:
            return f"{', '.join(module.parametrizations)} have parametrizations"
        steps = module.parametrizations["weight"]
        if len(steps) != 1 or not isinstance(steps[0], Mask):
            kinds = ", ".join(type(step).__name__ for step in steps)
            return f"its weight has the parametrization {kinds}; remove it first (remove_parametrizations)"
    elif "weight_orig" in module._parameters:
        if "weight_mask" not in module._buffers or _foreign_pre_hook(module):
            return "its weight is recomputed by a hook (spectral norm?); remove that first"
    elif "weight" not in module._parameters:
        return "its weight is no parameter; a hook recomputes it (weight norm?)"
    weight = _parameter(module)
    if weight is None:
        return "its weight is no single parameter"
    if isinstance(weight, SparseTensor):
        return f"its weight is a SparseTensor already ({weight.format})"
    if type(weight.data) is not Tensor or type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight.data).__name__}"
    if weight.is_meta:
        return "its weight is on the meta device: it has no values yet"
    if weight.layout != torch.strided or weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}, {weight.layout}; supported: {', '.join(map(str, FLOATS))}"
    return "its weight is empty" if weight.numel() == 0 else None


def _foreign_pre_hook(module: nn.Module) -> bool:
    """True where something beside torch.nn.utils.prune computes the weight before a forward."""
    return (
        not any(_is_pruning(hook) for hook in module._forward_pre_hooks.values()) or "bias_orig" in module._parameters
    )


def _is_pruning(hook: object) -> bool:
    return isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight"


def _parameter(module: Any) -> nn.Parameter | None:
    """The parameter behind `module.weight`, whatever sits on it."""
    if parametrize.is_parametrized(module, "weight"):
        original = getattr(module.parametrizations["weight"], "original", None)
        return original if isinstance(original, nn.Parameter) else None
    return module._parameters.get("weight_orig", module._parameters.get("weight"))


def _plain(module: Any) -> tuple[nn.Module, str]:
    """The module, or a plain layer with its masked weight; and what was done to get it."""
    if isinstance(module, DynamicSparseLinear):
        return plain_twin(module, module.packed().to_dense()), f"{module.mask} mask frozen"
    if mask_of(module) is not None:
        return plain_twin(module, module.weight.detach()), "mask made permanent"
    if "weight_orig" in module._parameters:
        weight = module.weight_orig.detach() * module.weight_mask
        return plain_twin(module, weight), "torch.nn.utils.prune mask made permanent"
    return module, ""


@torch.no_grad()
def plain_twin(module: nn.Module, weight: Tensor) -> nn.Module:
    """A plain nn.Linear or nn.Conv2d of the same settings and bias parameter with another weight."""
    twin: nn.Module
    if isinstance(module, nn.Linear):
        twin = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    elif isinstance(module, nn.Conv2d):
        twin = nn.Conv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,  # type: ignore[arg-type]
            module.dilation, module.groups, module.bias is not None, module.padding_mode, device="meta",  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        raise TypeError(f"expected an nn.Linear or nn.Conv2d, got {type(module).__name__}")
    parameter = _parameter(module)
    twin.weight = nn.Parameter(weight, requires_grad=parameter is not None and parameter.requires_grad)
    twin.bias = module.bias
    return twin.train(module.training)


def _skipped(module: nn.Module, names: list[str], reason: str) -> Row:
    weight = _parameter(module)
    row = Row(names[0], _class_name(module), status=SKIPPED, reason=reason, also=tuple(names[1:]))
    if isinstance(weight, SparseTensor):
        row.status, row.format, row.density = SPARSE, weight.format, weight.density
        row.shape, row.bytes_before = tuple(weight.shape), weight.nbytes
    elif weight is not None and not isinstance(weight, nn.parameter.UninitializedParameter):
        row.shape, row.bytes_before = tuple(weight.shape), weight.numel() * weight.element_size()
    row.bytes_after = row.bytes_before
    return row


def _attention_rows(module: nn.MultiheadAttention, name: str) -> Iterator[Row]:
    """The input projections, which are no modules; out_proj is met by itself."""
    for part in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight = getattr(module, part, None)
        if isinstance(weight, nn.Parameter):
            size = weight.numel() * weight.element_size()
            reason = "nn.MultiheadAttention uses it as a plain tensor; there is no layer to replace"
            yield Row(
                f"{name}.{part}", type(module).__name__, tuple(weight.shape), reason=reason,
                bytes_before=size, bytes_after=size,
            )  # fmt: skip


def _sparse_row(module: SparseModule, names: list[str]) -> Row:
    return Row(
        names[0], type(module).__name__, tuple(module.dense_shape), SPARSE, density=module.density,
        format=module.format, bytes_before=module.nbytes, bytes_after=module.nbytes, reason="sparse already",
        also=tuple(names[1:]),
    )  # fmt: skip
