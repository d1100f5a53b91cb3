"""Labels from symbolic sizes, where a rule did not find them: a dynamic program states its axes in its shapes."""

from __future__ import annotations

from buffer_lifting.axes import InputLabels
from buffer_lifting.graph.record import Node, TensorMeta
from buffer_lifting.graph.sizes import Expr, Size, atoms, divide
from buffer_lifting.labels import BATCH, COL, ROW, Factor, Labels, feature, has_seq, is_labelled


class Completion:
    """Completes labels for one program; a static program has no symbols, and nothing is added."""

    def __init__(self, inputs: InputLabels) -> None:
        self.inputs = inputs
        self.seq_atoms = frozenset(a for size in inputs.lengths.values() for a in atoms(size))

    def complete(self, node: Node, outputs: tuple[Labels, ...] | None) -> tuple[Labels, ...] | None:
        """Fills in, from symbolic sizes, labels that a rule did not find."""
        metas = node.meta if isinstance(node.meta, tuple) else (node.meta,)
        tensors = [meta for meta in metas if isinstance(meta, TensorMeta)]
        if outputs is None:
            found = tuple(self.by_symbol(meta.shape) for meta in tensors)
            return found if any(is_labelled(dim) for labels in found for dim in labels) else None
        if not self.seq_atoms:
            return outputs
        fixed = []
        for labels, meta in zip(outputs, tensors, strict=False):
            by_symbol = None
            merged = []
            for index, (dim, size) in enumerate(zip(labels, meta.shape, strict=False)):
                if type(size) is Expr and not has_seq(dim) and not self.seq_atoms.isdisjoint(atoms(size)):
                    by_symbol = by_symbol or self.by_symbol(meta.shape)
                    dim = by_symbol[index]
                merged.append(dim)
            fixed.append(tuple(merged))
        return tuple(fixed)

    def by_symbol(self, shape: tuple[Size, ...]) -> Labels:
        """Labels of dims whose size is an axis's symbol; a second dim of a sequence is the key side."""
        result = []
        seen = False
        for size in shape:
            dim = feature(size)
            if isinstance(size, Expr):
                axes = [axis for axis, length in self.inputs.lengths.items() if size == length]
                if len(axes) == 1:  # two axes of one symbol cannot be told apart here
                    dim = (Factor(axes[0], COL if seen else ROW, size),)
                    seen = True
                batch = self.inputs.batch
                if isinstance(batch, Expr) and size == batch:
                    dim = (Factor(BATCH, "", batch),)
                elif isinstance(batch, Expr):
                    rest = divide(size, batch)
                    folded = [axis for axis, length in self.inputs.lengths.items() if rest == length]
                    if len(folded) == 1 and isinstance(rest, Expr):
                        dim = (Factor(BATCH, "", batch), Factor(folded[0], ROW, rest))
            result.append(dim)
        return tuple(result)
