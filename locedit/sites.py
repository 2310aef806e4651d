"""The components of a model, unit by unit, with the slices of parameters that hold them.

A *neuron* is an entry of the input to the MLP's output projection (after the activation; act(gate) * up when gated), a
*head* is its share of the input to the attention's output projection. Every component has *write* slices, used to zero,
average and scale: a neuron's column of the output projection, a head's columns of o; only for them does zeroing weights
equal zeroing by hook. And it has *train* slices: a neuron's in, gate and out; a head's q, o, and the k, v of its group
only when every query head of the group is in the set.
"""

from collections.abc import Callable

from torch import nn

from locedit.anatomy import MATRICES, STORED, Anatomy, Matrix
from locedit.components import Site, Slice


def sites_of(anatomy: Anatomy, unit: str) -> dict[str, Site]:
    """All sites of a unit, in the order of the layers; parameters outside the blocks come last."""
    return {site.name: site for site in _SITES[unit](anatomy)}


def _neurons(anatomy: Anatomy) -> list[Site]:
    sites: list[Site] = []
    for layer in range(anatomy.table.n_layers):
        out = anatomy.matrix(layer, "mlp.out")
        slices = out.inputs(width=1)
        for role in anatomy.roles(layer, ("mlp.in", "mlp.gate")):
            slices += anatomy.matrix(layer, role).outputs(width=1)
        sites.append(Site(name=f"blocks.{layer}.mlp.neuron", count=out.n_in, slices=tuple(slices)))
    return sites


def _heads(anatomy: Anatomy) -> list[Site]:
    sites: list[Site] = []
    width = anatomy.table.d_head
    for layer in range(anatomy.table.n_layers):
        out, query = (anatomy.matrix(layer, role) for role in ("attn.o", "attn.q"))
        count = out.n_in // width
        slices = out.inputs(width=width) + query.outputs(width=width)
        for role in ("attn.k", "attn.v"):
            shared = anatomy.matrix(layer, role)
            slices += shared.outputs(width=width, group=count * width // shared.n_out)
        sites.append(Site(name=f"blocks.{layer}.attn.head", count=count, slices=tuple(slices)))
    return sites


def _mlps(anatomy: Anatomy) -> list[Site]:
    return [_module_site(anatomy, layer, "mlp") for layer in range(anatomy.table.n_layers)]


def _attentions(anatomy: Anatomy) -> list[Site]:
    return [_module_site(anatomy, layer, "attn") for layer in range(anatomy.table.n_layers)]


def _module_site(anatomy: Anatomy, layer: int, kind: str) -> Site:
    """All matrices of an MLP or attention with their biases; written to at the output projection."""
    output = {"mlp": "mlp.out", "attn": "attn.o"}[kind]
    slices = anatomy.matrix(layer, output).whole(write=True)
    for role in anatomy.roles(layer, STORED):
        if role.startswith(f"{kind}.") and role != output and role not in anatomy.table.rows:
            slices += anatomy.matrix(layer, role).whole()
    for norm in ("attn.q_norm", "attn.k_norm"):
        if kind == "attn" and anatomy.has(f"blocks.{layer}.{norm}"):
            slices += _all_of(anatomy, anatomy.module(f"blocks.{layer}.{norm}"), written=frozenset())
    return Site(name=f"blocks.{layer}.{kind}", count=1, slices=tuple(slices))


def _layers(anatomy: Anatomy) -> list[Site]:
    sites: list[Site] = []
    for layer, block in enumerate(anatomy.blocks):
        outputs = [anatomy.matrix(layer, role) for role in anatomy.roles(layer, ("attn.o", "mlp.out"))]
        written = frozenset(name for out in outputs for name in (out.weight, out.bias) if name)
        slices = _all_of(anatomy, block, written=written)
        sites.append(Site(name=f"blocks.{layer}.layer", count=1, slices=tuple(slices)))
    return sites


def _all_of(anatomy: Anatomy, module: nn.Module, *, written: frozenset[str]) -> list[Slice]:
    own = {id(parameter) for parameter in module.parameters()}
    return [
        Slice(param=name, shape=tuple(parameter.shape), axis=None, write=name in written)
        for name, parameter in anatomy.parameters.items()
        if id(parameter) in own
    ]


def _matrices(anatomy: Anatomy) -> list[Site]:
    sites: list[Site] = []
    for layer in range(anatomy.table.n_layers):
        for role in anatomy.roles(layer, MATRICES):
            slices = anatomy.matrix(layer, role).whole(write=True)
            sites.append(Site(name=f"blocks.{layer}.{role}.matrix", count=1, slices=tuple(slices)))
    return sites + _remaining(anatomy, sites, "matrix")


def _rows(anatomy: Anatomy) -> list[Site]:
    return _lines(anatomy, "row")


def _columns(anatomy: Anatomy) -> list[Site]:
    return _lines(anatomy, "column")


def _lines(anatomy: Anatomy, unit: str) -> list[Site]:
    """Rows (weights into an output) or columns (weights leaving an input) of the stored matrices, then of the rest."""
    sites: list[Site] = []
    for layer, matrix in _stored(anatomy):
        axis = matrix.out_axis if unit == "row" else matrix.in_axis
        one = Slice(param=matrix.weight, shape=matrix.shape, axis=axis, write=True)
        sites.append(Site(name=f"blocks.{layer}.{matrix.role}.{unit}", count=matrix.shape[axis], slices=(one,)))
    return sites + _remaining(anatomy, sites, unit)


def _weights(anatomy: Anatomy) -> list[Site]:
    sites: list[Site] = []
    for layer, matrix in _stored(anatomy):
        one = Slice(param=matrix.weight, shape=matrix.shape, axis=None, write=True)
        name = f"blocks.{layer}.{matrix.role}.weight"
        sites.append(Site(name=name, count=matrix.shape[0] * matrix.shape[1], slices=(one,)))
    return sites + _remaining(anatomy, sites, "weight")


def _stored(anatomy: Anatomy) -> list[tuple[int, Matrix]]:
    """The matrices as they are stored: a fused one counts once, under 'attn.qkv' or 'mlp.gate_up'."""
    return [
        (layer, anatomy.matrix(layer, role))
        for layer in range(anatomy.table.n_layers)
        for role in anatomy.roles(layer, STORED)
        if role not in anatomy.table.rows
    ]


def _remaining(anatomy: Anatomy, sites: list[Site], unit: str) -> list[Site]:
    """Parameters that no site holds yet, under their Hugging Face names.

    A matrix has its rows along axis 0 (a token's vector, in an embedding) and its columns along axis 1; a vector is one
    row and one column (Yu et al. 2023, PCGU); a stack of matrices, such as experts', has one `matrix` per entry of its
    axis 0 and no rows and columns.
    """
    held = {s.param for site in sites for s in site.slices}
    found: list[Site] = []
    for name, parameter in anatomy.parameters.items():
        shape = tuple(parameter.shape)
        if name in held or (len(shape) > 2 and unit in ("row", "column")):
            continue
        axis = {"row": 0, "column": 1}.get(unit) if len(shape) == 2 else None
        axis = 0 if len(shape) > 2 and unit == "matrix" else axis
        count = parameter.numel() if unit == "weight" else 1 if axis is None else shape[axis]
        one = Slice(param=name, shape=shape, axis=axis, write=True)
        found.append(Site(name=f"{name}:{unit}", count=count, slices=(one,)))
    return found


_SITES: dict[str, Callable[[Anatomy], list[Site]]] = {
    "neuron": _neurons,
    "head": _heads,
    "mlp": _mlps,
    "attn": _attentions,
    "layer": _layers,
    "matrix": _matrices,
    "row": _rows,
    "column": _columns,
    "weight": _weights,
}
