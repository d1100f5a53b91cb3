"""What a random module is made of: plain data, whose ``repr`` reproduces a failure."""

from __future__ import annotations

from dataclasses import dataclass, fields

HEADS = 2
VOCAB = 13
TABLE_LENGTH = 40  # of tables that are not read whole; a right-aligned read must find more rows than tokens
CONSTANT_OFFSET = 3

TABLES = ("buffer", "persistent", "attribute", "parameter", "computed")
SLICES = ("slice", "narrow", "select_slice", "full")
GATHERS = ("index", "index_select", "gather", "embedding")
INDEXES = ("arange", "arange_row", "cumsum_ones", "ids_buffer", "user", "padded")
OFFSETS = ("none", "constant", "length", "right")
LAYOUTS = ("rows", "lead", "seq_first", "heads_first", "seq_heads")
DTYPES = ("float32", "bfloat16", "int64", "complex64")
SITES = ("root", "shared", "own")
DATA_CONSUMERS = ("add", "mul", "gate", "where", "concat", "addcmul", "lerp")
HEAD_CONSUMERS = ("q_mul", "rope", "complex_rope")
MASKS = (
    "is_causal",
    "causal",
    "window",
    "chunked",
    "tril",
    "triu_inf",
    "alibi",
    "alibi_keys",
    "bucket",
    "square",
    "padding",
    "documents",
    "user_square",
    "ones",
    "none",
)
SQUARE_READS = ("slice", "narrow", "index", "grid", "right", "full")
ATTENTIONS = ("sdpa", "masked_fill", "where", "add")
CLASSES = 3  # of the head
IGNORED = -100
REGIONS = ("no_grad", "autocast", "autocast_off", "checkpoint")
LOSSES = ("mean", "sum", "shifted_mean", "shifted_sum")
FEATURES = ("sample_features", "global_features")
LENGTHS = ("divide", "sqrt", "log")
DISTRACTORS = (
    "zeros_like",
    "zeros",
    "token_types",
    "token_types_buffer",
    "arange_features",
    "feature_table",
    "batch_zeros",
    "full",
    "arange_heads",
)


class Short:
    """A ``repr`` of what differs from the defaults."""

    def __repr__(self) -> str:
        shown = [
            f"{item.name}={value!r}"
            for item in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, item.name)) != item.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Row(Short):
    """One read along one axis: rows of a table (or rows computed from an index) that meet the data.

    Attributes:
        table: what holds the rows; ``computed``: nothing, they are made from the index.
        read: how rows are taken, of ``SLICES`` or ``GATHERS`` (``""`` if computed).
        index: where the index of a gather comes from (``""`` for a slice).
        offset: by how much the rows are off: nothing, a constant, the length, or the rest of the table.
        layout: dims of the table, the features last.
        dtype: of the table.
        chain: ops between the rows and the data, in order.
        consumer: what reads the rows.
        site: read once at the root, in each layer from a shared table, or from a table of the layer's own.
        layers: the layers that consume it.
        region: of ``REGIONS``, or ``""``: what the read, its chain and its consumer stand in.
    """

    table: str = "buffer"
    read: str = "slice"
    index: str = ""
    offset: str = "none"
    layout: str = "rows"
    dtype: str = "float32"
    chain: tuple[str, ...] = ()
    consumer: str = "add"
    site: str = "shared"
    layers: tuple[int, ...] = (0, 1)
    region: str = ""


@dataclass(frozen=True, repr=False)
class Mask(Short):
    """What attention may see, and how it is written.

    Attributes:
        pattern: of ``MASKS``.
        index: where the indices of a computed mask come from (``arange``, ``cumsum_ones`` or ``ids_buffer``).
        table: what holds a ``square`` mask (of ``TABLES`` but ``computed``).
        read: how a square mask is taken from its ``[T, T]`` table.
        wide: whether the square table is ``[1, 1, T, T]``.
        expand: whether the mask is expanded to ``[batch, heads, S, S]``.
        attention: fused, or a softmax with the mask applied in one of three ways.
        site: made once at the root, or in each layer.
    """

    pattern: str = "none"
    index: str = "arange"
    table: str = "buffer"
    read: str = "slice"
    wide: bool = False
    expand: bool = False
    attention: str = "sdpa"
    site: str = "root"


@dataclass(frozen=True, repr=False)
class Spec(Short):
    """A module of two layers and how it is exported.

    Attributes:
        rows: reads along one axis.
        mask: ``None``: the layers have no attention, unless a row needs heads.
        length: how the length itself enters the data, of ``LENGTHS``, or ``""``.
        distractors: values that look positional and are not.
        batch, seq, width: sizes of the example; ``batch == seq`` is exported with ``axes=``.
        dynamic: batch and sequence as ``Dim.AUTO``, or all sizes fixed.
        loss: of ``LOSSES``, or ``""``: a second output, from labels with -100.
        features: inputs without a sequence, of ``FEATURES``.
    """

    rows: tuple[Row, ...] = ()
    mask: Mask | None = None
    length: str = ""
    distractors: tuple[str, ...] = ()
    batch: int = 2
    seq: int = 6
    width: int = 8
    dynamic: bool = True
    loss: str = ""
    features: tuple[str, ...] = ()

    @property
    def attends(self) -> bool:
        """Whether the layers have attention."""
        return self.mask is not None or any(row.consumer in HEAD_CONSUMERS for row in self.rows)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The user inputs besides the tokens."""
        names = ["position_ids"] if any(row.index == "user" for row in self.rows) else []
        pattern = self.mask.pattern if self.mask else ""
        own = {"padding": "attention_mask", "documents": "document_ids", "user_square": "square_mask"}
        names += [own[pattern]] if pattern in own else []
        return (*names, *(["labels"] if self.loss else []), *self.features)

    @property
    def positional(self) -> bool:
        """Whether it has a read of any kind: without one, nothing may be lifted, whatever the distractors are."""
        pattern = self.mask.pattern if self.mask else "none"
        reads = bool(self.rows) or pattern not in ("none", "ones", "user_square")
        return reads or bool(self.length) or self.loss.startswith("shifted") or "token_types_buffer" in self.distractors


def classes(spec: Spec) -> list[str]:
    """The pattern classes that a program belongs to, for counting."""
    found = {"dynamic" if spec.dynamic else "static"}
    for row in spec.rows:
        found |= {f"table {row.table}", f"consumer {row.consumer}", f"dtype {row.dtype}", f"offset {row.offset}"}
        found |= {f"layout {row.layout}", f"site {row.site}", *(f"chain {op}" for op in row.chain)}
        found |= {f"read {row.read}"} if row.read else set()
        found |= {f"index {row.index}"} if row.index else set()
        found |= {f"region {row.region}"} if row.region else set()
    if spec.mask:
        found |= {f"mask {spec.mask.pattern}", f"attention {spec.mask.attention}"}
        if spec.mask.pattern == "square":
            found |= {f"square {spec.mask.read}", f"square in {spec.mask.table}"}
    found |= {f"length {spec.length}"} if spec.length else set()
    found |= {f"loss {spec.loss}"} if spec.loss else set()
    found |= {f"input {name}" for name in spec.features}
    found |= {f"distractor {name}" for name in spec.distractors}
    found |= {"no position"} if not spec.positional else set()
    return sorted(found)


def tags(spec: Spec) -> str:
    """The classes on one line."""
    return ", ".join(classes(spec))
