"""Which slices of which parameters stand or fall together: the channels of a traced model, the heads of attentions.

A unit (a channel, a head) is a set of slices: the rows that produce it, the batch-norm entries that scale it,
the columns that read it, through residual additions, concatenations and flattening. All of them masked is the
same function as all of them cut out; a `Group` holds the units that go through the same layers. Dependencies
are those of DepGraph (Fang et al. 2023, arXiv 2301.12900), found here by running the model once on labels: every
activation carries, beside its value, the number of the channel that each entry belongs to, and where two
channels meet (an addition, a residual) their numbers become one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What maps each entry by itself and 0 to 0, as module, function or method (in-place forms included).
_STILL = [
    "relu",
    "relu6",
    "gelu",
    "silu",
    "tanh",
    "leaky_relu",
    "leakyrelu",
    "elu",
    "selu",
    "celu",
    "hardswish",
    "hardtanh",
    "mish",
    "softsign",
    "softshrink",
    "hardshrink",
    "neg",
    "abs",
    "square",
    "sqrt",
    "sin",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "alphadropout",
    "identity",
    "contiguous",
    "clone",
    "detach",
    "float",
    "half",
    "bfloat16",
    "double",
    "to",
    "type_as",
    "prelu",
]
_SHIFTING = [
    "sigmoid",
    "exp",
    "softplus",
    "cos",
    "hardsigmoid",
    "logsigmoid",
    "clamp",
    "log",
    "rsqrt",
    "reciprocal",
    "pow",
]
_ADDING = ["add", "iadd", "sub", "isub", "rsub"]
_SCALING = ["mul", "imul", "truediv", "itruediv", "div", "multiply"]
_MOVING = [
    "permute",
    "transpose",
    "flatten",
    "unsqueeze",
    "squeeze",
    "cat",
    "concat",
    "t",
    "movedim",
    "swapaxes",
    "view",
    "reshape",
    "expand",
    "getitem",
]
_REDUCING = ["mean", "sum", "amax", "amin"]
_POOLS = [
    "avg_pool",
    "avgpool",
    "max_pool",
    "maxpool",
    "adaptive_avg_pool",
    "adaptiveavgpool",
    "adaptive_max_pool",
    "adaptivemaxpool",
    "interpolate",
    "upsample",
]


@dataclass(frozen=True)
class Slice:
    """index[u]: the entries along `dim` of a parameter or buffer that belong to unit u.

    `role` "out" makes the unit, "in" reads it, "through" scales or shifts it (norms, depthwise
    convolutions), "buffer" is a statistic that is cut but not masked.
    """

    layer: str
    module: nn.Module
    parameter: str
    dim: int
    index: Tensor
    role: str

    @property
    def key(self) -> str:
        return f"{self.layer}.{self.parameter}" if self.layer else self.parameter


@dataclass
class Group:
    """Units that go through the same layers. `kind` is "channels" or "heads"."""

    kind: str
    name: str
    slices: list[Slice]
    after: Callable[[Tensor], None] | None = None  # called with the kept units once they are cut

    @property
    def units(self) -> int:
        return self.slices[0].index.shape[0]

    def role(self, *roles: str) -> list[Slice]:
        return [s for s in self.slices if s.role in roles]

    @property
    def producers(self) -> list[str]:
        return list(dict.fromkeys(s.layer for s in self.role("out")))


@dataclass
class Record:
    """One parameter and the labels along one of its dimensions."""

    layer: str
    module: nn.Module
    parameter: str
    dim: int
    labels: Tensor
    role: str
    positions: Tensor  # of the labels, along `dim`


@dataclass
class Traced:
    """The groups of a model, and every record of a labelled dimension in whole (`permute.py` reads them)."""

    groups: list[Group]
    records: list[Record]
    pinned: dict[str, str] = field(default_factory=dict)  # layer -> why its channels must stay


def channel_groups(
    model: nn.Module, sample: Any, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> list[Group]:
    """The groups of channels that can be removed from a model, traced by torch.fx on a sample.

    sample: a tensor, tuple or dict of inputs. filter_fn(module, name): only groups all of whose producers
    pass. Raises ValueError where torch.fx cannot trace the model.
    """
    found = trace(model, sample).groups
    if filter_fn is None:
        return found
    modules = dict(model.named_modules())
    return [g for g in found if all(filter_fn(modules[name], name) for name in g.producers)]


def trace(model: nn.Module, sample: Any) -> Traced:
    """Runs the model once on `sample`, in evaluation mode, following every channel."""
    training = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        try:
            graph = _Tracer().trace(model)
        except Exception as error:
            raise ValueError(
                f"torch.fx cannot trace {type(model).__name__}, so its channels cannot be followed: {error}"
            ) from error
        walk = _Walk(fx.GraphModule(model, graph), model)
        with torch.no_grad():
            walk.run(*_arguments(graph, sample))
    finally:
        for m, mode in training:
            m.training = mode
    return walk.result()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Sequential, nn.ModuleList)):
            return False
        kind = parametrize.type_before_parametrizations(m)
        return kind.__module__.startswith("torch.nn") or isinstance(m, (nn.Linear, nn.LayerNorm, *CONVS, *BATCH_NORMS))


def _arguments(graph: fx.Graph, sample: Any) -> list[Any]:
    if isinstance(sample, Tensor):
        return [sample]
    if isinstance(sample, (tuple, list)):
        return list(sample)
    if not isinstance(sample, Mapping):
        raise TypeError(f"sample must be a tensor, tuple or dict of inputs, got {type(sample).__name__}")
    names = [(str(n.target), n.args) for n in graph.nodes if n.op == "placeholder"]
    unknown = set(sample) - {name for name, _ in names}
    if unknown:
        raise ValueError(f"the model takes no input named {', '.join(sorted(unknown))}")
    return [sample[name] if name in sample else default[0] if default else None for name, default in names]


class _Walk(fx.Interpreter):
    """Runs a graph on values and, beside them, on labels: int64 of each value's shape, 0 for "must stay"."""

    def __init__(self, graph: fx.GraphModule, model: nn.Module) -> None:
        super().__init__(graph)
        self.model = model
        self.names = {id(m): n for n, m in reversed(list(model.named_modules()))}
        self.labels: dict[fx.Node, Any] = {}
        self.parent = [0]
        self.shifted: set[int] = set()
        self.records: dict[tuple[int, str, str], Record] = {}
        self.reasons: dict[int, str] = {}
        self.layer_norms: list[Tensor] = []

    # Labels that become one ---------------------------------------------------------------------------------

    def fresh(self, count: int) -> Tensor:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def roots(self, labels: Tensor) -> Tensor:
        unique, inverse = labels.unique(return_inverse=True)
        return torch.tensor([self.root(i) for i in unique.tolist()], dtype=torch.int64)[inverse]

    def unite(self, a: Tensor, b: Tensor) -> None:
        pairs = torch.stack((a.reshape(-1), b.reshape(-1)), 1).unique(dim=0)
        for x, y in pairs.tolist():
            x, y = sorted((self.root(x), self.root(y)))
            self.parent[y] = x  # the smaller one wins: 0 pins

    def pin(self, labels: Any, why: str) -> None:
        for t in pytree.tree_leaves(labels):
            if isinstance(t, Tensor):
                for label in t.unique().tolist():
                    self.reasons.setdefault(self.root(label), why)
                self.unite(t, torch.zeros_like(t))

    # One node -----------------------------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) or n.op == "output" or any(map(self._labelled, n.all_input_nodes)):
            found = self._label(n, value)
            if isinstance(found, Tensor) and found.shape != value.shape:
                found = found.expand(value.shape)
            self.labels[n] = found
        return value

    def _labelled(self, n: fx.Node) -> bool:
        return any(isinstance(t, Tensor) for t in pytree.tree_leaves(self.labels.get(n)))

    def _label(self, n: fx.Node, value: Any) -> Any:
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: self.labels.get(a))
        first = next((t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
        if n.op == "placeholder":
            return torch.zeros(value.shape, dtype=torch.int64) if isinstance(value, Tensor) else None
        if n.op == "get_attr":
            return self._attribute(str(n.target), value)
        if n.op == "output":
            self.pin((args, kwargs), "its channels are an output of the model")
            return None
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            name = parametrize.type_before_parametrizations(module).__name__.lower()
            handler = self._layer(module)
            if handler is not None:
                return handler(module, self.names.get(id(module), str(n.target)), first, value)
        else:
            name = (n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")).lower()
            name = name.strip("_")
            if name == "getattr" or (first is None and not isinstance(value, Tensor)):
                return None  # x.shape and the like
        return self._function(name, n, args, kwargs, first, value)

    def _function(self, name: str, n: fx.Node, args: Any, kwargs: Any, first: Tensor | None, value: Any) -> Any:
        if not isinstance(value, Tensor):
            if name in ("size", "dim", "ndimension", "numel", "len"):
                return None
        elif first is None:
            return torch.zeros(value.shape, dtype=torch.int64)
        elif name in _STILL and first.shape == value.shape:
            return first
        elif name in _SHIFTING and first.shape == value.shape:
            self.shifted.update(first.unique().tolist())
            return first
        elif name in _ADDING or name in _SCALING:
            return self._binary(args, value, adding=name in _ADDING)
        elif name in _REDUCING:
            return self._reduce(args, kwargs, value)
        elif name.startswith(tuple(_POOLS)) and first.dim() > 2:
            return self._pool(first, value)
        elif name in _MOVING:
            return self._move(name, n, args, kwargs, first, value)
        self.pin((args, kwargs), f"they go into {name or n.target}, through which channels are not followed")
        return pytree.tree_map(
            lambda v: torch.zeros(v.shape, dtype=torch.int64) if isinstance(v, Tensor) else None, value
        )

    def _binary(self, args: Any, value: Tensor, adding: bool) -> Tensor:
        operands = [a for a in args[:2] if isinstance(a, Tensor)]
        if len(operands) == 1:
            if adding:
                self.shifted.update(operands[0].unique().tolist())
            return operands[0]
        for a, b in (operands, operands[::-1]):
            if not b.any() and _broadcast_along(b, _varying(a), a.dim()):
                if adding:  # something without channels is added to every channel
                    self.shifted.update(a.unique().tolist())
                return a.expand(value.shape)
        a, b = torch.broadcast_tensors(*operands)
        self.unite(a, b)
        return a

    def _reduce(self, args: Any, kwargs: Any, value: Tensor) -> Tensor:
        options = {k: v for k, v in kwargs.items() if k in ("dim", "keepdim")}
        labels, rest = self.roots(args[0]), args[1:3]
        least, most = torch.amin(labels, *rest, **options), torch.amax(labels, *rest, **options)
        if bool((least != most).any()):
            self.pin(args[0], "they are summed up over channels")
            return torch.zeros(value.shape, dtype=torch.int64)
        return least.reshape(value.shape)

    def _pool(self, labels: Tensor, value: Tensor) -> Tensor:
        one = labels.flatten(2)[..., 0]
        if labels.shape[:2] != value.shape[:2] or bool((labels.flatten(2) != one[..., None]).any()):
            self.pin(labels, "they are pooled over channels")
            return torch.zeros(value.shape, dtype=torch.int64)
        return one.reshape(*one.shape, *[1] * (value.dim() - 2)).expand(value.shape)

    def _move(self, name: str, n: fx.Node, args: Any, kwargs: Any, first: Tensor, value: Tensor) -> Tensor:
        """The very same movement of the labels, unless the code states a size that removal would change."""
        real = fx.node.map_arg((n.args, n.kwargs), lambda a: self.labels[a] if self._labelled(a) else self.env[a])
        if n.op == "call_method":
            moved = getattr(real[0][0], str(n.target))(*real[0][1:], **real[1])
        elif n.op == "call_module":  # nn.Flatten
            moved = self.fetch_attr(str(n.target))(real[0][0])
        else:
            moved = n.target(*real[0], **real[1])  # type: ignore[operator]
        varying = _varying(moved)
        if name in ("view", "reshape", "expand"):
            sizes = n.args[1] if len(n.args) == 2 and isinstance(n.args[1], (tuple, list)) else n.args[1:]
            sizes = n.kwargs.get("shape", n.kwargs.get("size", sizes))  # type: ignore[assignment]
            stated = {d for d, s in enumerate(sizes) if isinstance(s, int) and s != -1}
            if stated & set(varying):
                self.pin(first, f"{name} states their number in the code")
                return torch.zeros_like(moved)
        if name == "getitem" and any(first.shape[d] not in moved.shape for d in _varying(first)):
            self.pin(first, "they are sliced by number")
            return torch.zeros_like(moved)
        return moved

    # Layers -------------------------------------------------------------------------------------------------

    def _layer(self, module: nn.Module) -> Callable[..., Tensor] | None:
        if isinstance(module, nn.Linear):
            return self._linear
        if isinstance(module, CONVS):
            return self._conv
        if isinstance(module, BATCH_NORMS):
            return self._batch_norm
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            return self._layer_norm
        if isinstance(module, nn.Embedding):
            return self._embedding
        return self._feed_forward if isinstance(module, nn.TransformerEncoderLayer) else None

    def _attribute(self, target: str, value: Any) -> Any:
        """A parameter of the model's own (a layer scale, a position embedding) has channels as well."""
        if not isinstance(value, Tensor):
            return None
        owner, _, name = target.rpartition(".")
        wide = [d for d, size in enumerate(value.shape) if size > 1]
        if not isinstance(value, nn.Parameter) or not wide:
            return torch.zeros(value.shape, dtype=torch.int64)
        dim = wide[0] if len(wide) == 1 else value.dim() - 1
        module = self.model.get_submodule(owner)  # self.module holds copies of what is not a leaf
        labels = self._record(self.names.get(id(module), owner), module, name, dim, value.shape[dim], "through")
        return labels.reshape([-1 if d == dim else 1 for d in range(value.dim())]).expand(value.shape)

    def _record(
        self,
        layer: str,
        module: nn.Module,
        parameter: str,
        dim: int,
        labels: Tensor | int,
        role: str,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Notes the labels along a dimension; of a layer that is called again, they become one with the first."""
        key = (id(module), parameter, role)
        if isinstance(labels, int):
            labels = self.records[key].labels if key in self.records else self.fresh(labels)
        elif key in self.records:
            self.unite(self.records[key].labels, labels)
        where = torch.arange(len(labels)) if positions is None else positions
        self.records.setdefault(key, Record(layer, module, parameter, dim, labels, role, where))
        return labels

    def _vector(self, labels: Tensor, dim: int, layer: str) -> Tensor:
        """The labels along one dimension, which must not depend on the others."""
        rows = labels.movedim(dim, -1).reshape(-1, labels.shape[dim])
        if len(rows) and bool((rows != rows[:1]).any()):
            self.pin(labels, f"{layer} reads them in different orders")
            return torch.zeros(labels.shape[dim], dtype=torch.int64)
        return rows[0]

    def _outputs(self, layer: str, module: nn.Module, count: int) -> Tensor:
        labels = self._record(layer, module, "weight", 0, count, "out")
        if getattr(module, "bias", None) is not None:
            self._record(layer, module, "bias", 0, labels, "out")
        return labels

    def _linear(self, module: Any, layer: str, x: Tensor, value: Tensor) -> Tensor:
        self._record(layer, module, "weight", 1, self._vector(x, -1, layer), "in")
        return self._outputs(layer, module, module.out_features).expand(value.shape)

    def _conv(self, module: Any, layer: str, x: Tensor, value: Tensor) -> Tensor:
        dim, groups = -module.weight.dim() + 1, module.groups
        given = self._vector(x, dim, layer)
        if groups == module.in_channels and groups > 1:  # depthwise: each channel by itself
            made = given.repeat_interleave(module.out_channels // groups)
            for name in ("weight", "bias") if module.bias is not None else ("weight",):
                self._record(layer, module, name, 0, made, "through")
        else:
            inside = module.in_channels // groups
            within = torch.arange(module.in_channels) % inside
            self.unite(given, given[within])  # every group gives up the same places
            self._record(layer, module, "weight", 1, given, "in", within)
            made = self._outputs(layer, module, module.out_channels)
            self.unite(made, made[torch.arange(len(made)) % (len(made) // groups)])
        return made.reshape(-1, *[1] * (-dim - 1)).expand(value.shape)

    def _batch_norm(self, module: Any, layer: str, x: Tensor, value: Tensor) -> Tensor:
        labels = self._vector(x, 1, layer)
        if module.weight is None:  # nothing can be masked: a removed channel would not be zero, and is not read
            self.shifted.update(labels.tolist())
        for name in ("weight", "bias"):
            if getattr(module, name) is not None:
                self._record(layer, module, name, 0, labels, "through")
        for name in ("running_mean", "running_var"):
            if getattr(module, name) is not None:
                self._record(layer, module, name, 0, labels, "buffer")
        return x

    def _layer_norm(self, module: Any, layer: str, x: Tensor, value: Tensor) -> Tensor:
        labels = self._vector(x, -1, layer)
        self.layer_norms.append(labels)
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None:
                self._record(layer, module, name, 0, labels, "through")
        if module.weight is None:
            self.pin(labels, f"{layer} has no scale that could be masked")
        return x

    def _embedding(self, module: Any, layer: str, x: Tensor, value: Tensor) -> Tensor:
        return self._record(layer, module, "weight", 1, module.embedding_dim, "out").expand(value.shape)

    def _feed_forward(self, module: Any, layer: str, x: Tensor, value: Tensor) -> Tensor:
        """torch's encoder layer cannot be traced; its two Linears are coupled as written there."""
        self.pin(x, f"{layer} is a TransformerEncoderLayer, whose width is fixed")
        one, two = module.linear1, module.linear2
        labels = self._outputs(f"{layer}.linear1", one, one.out_features)
        self._record(f"{layer}.linear2", two, "weight", 1, labels, "in")
        return torch.zeros(value.shape, dtype=torch.int64)

    # The result ---------------------------------------------------------------------------------------------

    def result(self) -> Traced:
        records = list(self.records.values())
        users: dict[int, set[int]] = {}
        for r in records:
            users.setdefault(id(_original(r.module, r.parameter)), set()).add(id(r.module))
        for r in records:
            if len(users[id(_original(r.module, r.parameter))]) > 1:
                self.pin(r.labels, "their weight is tied to another layer's")
        shifted = {self.root(i) for i in self.shifted}
        for labels in self.layer_norms:
            bad = [i for i in labels.tolist() if self.root(i) in shifted]
            if bad:
                self.pin(torch.tensor(bad), "a layer norm sees them after a function that does not map 0 to 0")
        for r in records:
            r.labels = self.roots(r.labels)
        pinned = {r.layer: self.reasons.get(0, "") for r in records if r.role == "out" and not r.labels.all()}
        return Traced(_groups(records), records, pinned)


def _original(module: nn.Module, parameter: str) -> Any:
    if parametrize.is_parametrized(module, parameter):
        return module.parametrizations[parameter].original  # type: ignore[index, union-attr]
    return getattr(module, parameter)


def _varying(labels: Tensor) -> list[int]:
    """The dimensions along which labels differ."""
    return [d for d in range(labels.dim()) if labels.numel() and bool((labels != labels.narrow(d, 0, 1)).any())]


def _broadcast_along(b: Tensor, dims: Iterable[int], of: int) -> bool:
    """Whether b has size 1, or no such dimension, along all of these dimensions of a tensor with `of`."""
    return all(d - of + b.dim() < 0 or b.shape[d - of + b.dim()] == 1 for d in dims)


def _groups(records: Sequence[Record]) -> list[Group]:
    """Units (the labels that need not stay) by the records and multiplicities that they have in common."""
    places: dict[int, dict[int, list[int]]] = {}
    for i, r in enumerate(records):
        for label, position in zip(r.labels.tolist(), r.positions.tolist(), strict=True):
            if label:
                places.setdefault(label, {}).setdefault(i, []).append(position)
    together: dict[Any, list[dict[int, list[int]]]] = {}
    for found in places.values():
        found = {i: sorted(set(where)) for i, where in found.items()}
        if {"out", "in"} <= {records[i].role for i in found}:
            together.setdefault(tuple((i, len(where)) for i, where in sorted(found.items())), []).append(found)
    groups = []
    for key, units in together.items():
        first = next(i for i, _ in key if records[i].role == "out")
        units.sort(key=lambda u: u[first])
        slices = [
            Slice(r.layer, r.module, r.parameter, r.dim, torch.tensor([u[i] for u in units]), r.role)
            for i, r in ((i, records[i]) for i, _ in key)
        ]
        producers = dict.fromkeys(s.layer for s in slices if s.role == "out")
        groups.append(Group("channels", "+".join(producers), slices))
    return groups
