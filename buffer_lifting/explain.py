"""Explains one item of a scan: the chain from the source to the consumer, what lifting does at each step, and where
it stops. Works on a graph record and its plan; computed when asked, linear in the values that the read is made of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection

from buffer_lifting.explanation import STAYS, Explanation, FedBy, Mark, Step, role_text, shape_text
from buffer_lifting.graph.record import GraphRecord, Node, NodeKind, TensorMeta
from buffer_lifting.graph.sizes import Size
from buffer_lifting.labels import COL, ROW, Labels, is_labelled
from buffer_lifting.ops import content_operands
from buffer_lifting.patterns import at_frontier, at_mixing, at_node
from buffer_lifting.plan import Call, Context, CutKey, Lifted, LiftPlan, Reapply, Refuse
from buffer_lifting.program import PositionRead, SequenceMixing


def explain(record: GraphRecord, plan: LiftPlan, item: PositionRead | SequenceMixing) -> Explanation:
    """The explanation of one item of ``plan.report``. For many, keep an :class:`Explainer`."""
    return Explainer(record, plan).explain(item)


class Explainer:
    """Explains items of one plan; what they share is looked up once."""

    def __init__(self, record: GraphRecord, plan: LiftPlan) -> None:
        self.record, self.plan = record, plan
        self._made: dict[int, tuple[str, Labels]] = {}  # id of a plan -> the (deepest) node that it rebuilds
        self._failed: dict[int, list[tuple[str, Labels, Context]]] = defaultdict(list)
        self._labels: dict[str, list[tuple[Labels, object]]] = defaultdict(list)
        for key, known in plan.trace.rebuilt.items():
            result = known if isinstance(known, Refuse) else known[0].plan
            self._labels[key[0]].append((key[1], result))
            if isinstance(result, Refuse):
                self._failed[id(result)].append(key)
            else:
                self._made.setdefault(id(result), key[:2])
        self._tried: dict[tuple[str, Labels], dict[str, Refuse]] = defaultdict(dict)
        for (name, labels, _, attempt), refusal in plan.trace.tried.items():
            self._tried[name, labels][attempt] = refusal
        self._replaced = {(r.consumer, r.path): r for r in plan.replacements}
        self._edges = {(edge.consumer, edge.path): edge for edge in plan.frontier}
        self._lengths = {
            meta.shape[dim]: axis
            for axes in plan.input_axes.values()
            for dim, axis, _ in axes.seq_dims
            if (meta := self._input(axes.name)) is not None
        }

    def _input(self, fqn: str) -> TensorMeta | None:
        return next((node.tensor for node in self.record.inputs() if node.fqn == fqn), None)

    def explain(self, item: PositionRead | SequenceMixing) -> Explanation:
        """The explanation of an item of the plan's report."""
        if isinstance(item, SequenceMixing):
            return self._mixing(item)
        if item.value == item.node:  # a flag or a body of the op: nothing stands above it
            mark: Mark = "refused" if item.refusal else "consumer"
            detail = "its own mask, made from the natural order" if item.source_kind == "is_causal" else item.operand
            steps = (self._step(item.node, mark, detail),)
            return Explanation(item, steps, stopped=item.node if item.refusal else "", reason=item.refusal or "")
        if item.refusal:
            return self._refused(item)
        return self._lifted(item)

    # -- reads that are lifted ------------------------------------------------------------------------------

    def _lifted(self, read: PositionRead) -> Explanation:
        replaced, edge = self._replaced.get((read.node, read.operand)), self._edges.get((read.node, read.operand))
        if replaced is None or edge is None:
            return Explanation(read, self._plain(self._chains(read, [])[0], {}, {}, read))
        sites, rebuilt, chosen, plans = self._walk(read.value, replaced.plan)
        chosen.setdefault(read.value, edge.labels)
        marks: dict[str, tuple[Mark, str]] = {name: ("rebuilt", "") for name in rebuilt}
        fed_by: list[FedBy] = []
        for name, key in sites:
            lifted = self.plan.outputs[key].input
            text = lifted.name
            if name in marks and marks[name][0] in ("cut", "gathered"):
                text = f"{marks[name][1]}, {lifted.name}"
            marks[name] = ("cut" if _is_input(plans.get(name)) else "gathered", text)
            if all(fed.input is not lifted for fed in fed_by):
                fed_by.append(FedBy(lifted, name))
        names = list(dict.fromkeys(name for name, _ in sites))
        cuts = {name for name, (mark, _) in marks.items() if mark == "cut"}
        chains = self._chains(read, names, cuts)
        settled: dict[str, Mark] = {}
        shown = [
            self._marked(chain, marks, chosen, settled, None if number else read.operand)
            for number, chain in enumerate(chains)
        ]
        return Explanation(read, shown[0], tuple(shown[1:]), tuple(fed_by))

    def _walk(
        self, value: str, plan: object
    ) -> tuple[list[tuple[str, CutKey]], set[str], dict[str, Labels], dict[str, object]]:
        """Where lifted inputs enter a plan, the nodes that it rebuilds, and their labels and plans."""
        plans: dict[str, object] = {}
        sites: list[tuple[str, CutKey]] = []
        rebuilt: set[str] = set()
        labels: dict[str, Labels] = {}
        seen: set[tuple[int, str]] = set()
        stack: list[tuple[object, str]] = [(plan, value)]
        while stack:
            part, current = stack.pop()
            if isinstance(part, tuple | list):
                stack.extend((item, current) for item in reversed(part))
                continue
            made = self._made.get(id(part))
            if made is not None:
                current = made[0]
                labels.setdefault(*made)
                plans.setdefault(current, part)
            if (id(part), current) in seen:
                continue
            seen.add((id(part), current))
            if isinstance(part, Lifted):
                if (current, part.key) not in sites:
                    sites.append((current, part.key))
            elif isinstance(part, Call):
                rebuilt.add(part.anchor)
                stack.extend((item, current) for item in reversed(part.args))
            elif isinstance(part, Reapply):
                rebuilt.add(part.anchor)
                stack.extend((item, current) for _, item in reversed(part.replace))
        return sites, rebuilt, labels, plans

    def _marked(
        self,
        names: list[str],
        marks: dict[str, tuple[Mark, str]],
        labels: dict[str, Labels],
        settled: dict[str, Mark],
        operand: str | None,
    ) -> tuple[Step, ...]:
        """Steps of a chain: above a cut the feed computes, above a gather the table stays in the stage.

        ``settled`` has the marks of the chains before, of which a branch takes those that it meets.
        """
        last = len(names) - 1
        sites = [i for i in range(last + 1) if marks.get(names[i], ("", ""))[0] in ("cut", "gathered")]
        site = sites[-1] if sites else -1
        joint = settled.get(names[last], "kept")
        if site >= 0:
            above: Mark = "feed" if marks[names[site]][0] == "cut" else "kept"
        else:
            above = "feed" if joint in ("feed", "cut") else "kept"
        steps: list[Step] = []
        roles = frozenset[str]()
        for index in range(last, -1, -1):
            name = names[index]
            mark, detail = marks.get(name, ("rebuilt" if 0 <= site < index else above, ""))
            if operand is not None and index == last:
                mark, detail = "consumer", f"operand {operand!r}"
            elif 0 <= index < site and mark not in ("cut", "gathered"):
                mark, detail = above, ""
            met = name in settled
            mark = mark if name in marks else settled.get(name, mark)
            settled.setdefault(name, mark)
            if index == 0 and mark in ("feed", "kept") and not met:
                mark, detail = "source", "in the feed" if mark == "feed" else STAYS
            step = self._step(name, mark, detail, labels.get(name), roles)
            roles = frozenset(role for text in step.roles for role in text.split("*") if ":" in role) or roles
            steps.append(step)
        return tuple(reversed(steps))

    # -- reads that are refused -----------------------------------------------------------------------------

    def _refused(self, read: PositionRead) -> Explanation:
        unknown = ((), Refuse(read.refusal or "", read.node))
        labels, refusal = self.plan.trace.refused.get((read.node, read.operand), unknown)
        keys = self._failed.get(id(refusal), [])
        through = [refusal.node] if refusal.node in self._ancestors(read.value) else []
        main, *branches = self._chains(read, through)
        chosen = {read.value: labels} if labels else {}
        chosen.update({name: known for name, known, _ in keys})
        marks: dict[str, tuple[Mark, str]] = {refusal.node: ("refused", "")}
        steps = self._plain(main, marks, chosen, read)
        more = tuple(self._plain(branch, marks, chosen, None) for branch in branches)
        if keys:  # the planner was asked: the first to fail is the deepest
            name, known, _ = next((key for key in keys if key[0] == refusal.node), keys[0])
            tried = self._tried.get((name, known), {})
            nearest = at_node(self.record, self.record.nodes[name], known, refusal, tried, self._ancestors(name))
        else:
            data = shape_text(self._step(read.node, ""))
            nearest = at_frontier(self.record, self.record.nodes[read.node], read, str(refusal), data)
        return Explanation(read, steps, more, (), refusal.node, str(refusal), nearest)

    def _plain(
        self,
        names: list[str],
        marks: dict[str, tuple[Mark, str]],
        labels: dict[str, Labels],
        read: PositionRead | None,
    ) -> tuple[Step, ...]:
        steps = []
        for index, name in enumerate(names):
            mark, detail = marks.get(name, ("source" if index == 0 else "", ""))
            if read is not None and index == len(names) - 1:
                detail = f"operand {read.operand!r}"
                mark = mark or "consumer"
            steps.append(self._step(name, mark, detail, labels.get(name)))
        return tuple(steps)

    # -- ops that mix the sequence --------------------------------------------------------------------------

    def _mixing(self, mix: SequenceMixing) -> Explanation:
        node = self.record.nodes[mix.node]
        steps = [
            self._step(name, "operand", f"operand {path!r}")
            for path, name in node.named_refs()
            if isinstance(self.record.nodes[name].meta, TensorMeta | tuple)
        ]
        steps.append(self._step(mix.node, "mixes", mix.reason))
        if mix.handled:
            return Explanation(mix, tuple(steps))
        features = [dim for dim, role in enumerate(steps[0].roles) if not role]
        nearest = at_mixing(self.record, node, mix.reason, features)
        return Explanation(mix, tuple(steps), (), (), mix.node, mix.reason, nearest)

    # -- chains ---------------------------------------------------------------------------------------------

    def _ancestors(self, name: str) -> set[str]:
        seen: set[str] = set()
        stack = [name]
        while stack:
            current = stack.pop()
            if current not in seen:
                seen.add(current)
                stack.extend(content_operands(self.record.nodes[current]))
        return seen

    def _up(self, start: str, wanted: Callable[[Node], bool], closed: Collection[str] = ()) -> list[str]:
        """The shortest chain from a wanted node down to ``start``, both included; empty if there is none.

        ``closed`` nodes are not looked into.
        """
        below: dict[str, str] = {start: ""}
        queue = [start]
        for name in queue:
            if wanted(self.record.nodes[name]):
                chain = [name]
                while below[chain[-1]]:
                    chain.append(below[chain[-1]])
                return chain
            if name in closed:
                continue
            for operand in content_operands(self.record.nodes[name]):
                if operand not in below:
                    below[operand] = name
                    queue.append(operand)
        return []

    def _down(self, name: str, value: str, closed: Collection[str]) -> list[str]:
        """The shortest chain from a node down to a value, if it can be not through ``closed`` nodes."""
        return self._up(value, lambda node: node.name == name, closed) or self._up(value, lambda n: n.name == name)

    def _chains(self, read: PositionRead, through: list[str], closed: Collection[str] = ()) -> list[list[str]]:
        """The chain from the read's source to its consumer, through one of the nodes if it can be, and branches."""
        main = self._main(read, through, closed) or [read.value]
        chains = [[*main, read.node]]
        covered = set(chains[0])
        if not any(self._is_index(self.record.nodes[name]) for name in covered.union(through)):
            through = [*through, *self._up(read.value, self._is_index)[:1]]
            closed = ()
        for name in through:
            down = self._down(name, read.value, closed)
            met = name in covered  # above another cut: only its way down is new
            joint = next((index for index, below in enumerate(down) if index >= met and below in covered), 0)
            if joint > met:
                top = [name] if met else self._up(name, self._is_index) or self._up(name, self._is_leaf)
                start = max((i for i, above in enumerate(top[:-1]) if above in covered), default=0)
                chains.append(top[start:] + down[1 : joint + 1])
                covered.update(chains[-1])
        return chains

    def _main(self, read: PositionRead, through: list[str], closed: Collection[str]) -> list[str]:
        for is_source in self._source_tests(read):
            for name in through:
                head = self._up(name, is_source)
                if head:
                    return head + self._down(name, read.value, closed)[1:]
            found = self._up(read.value, is_source)
            if found:
                return found
        return []

    def _is_leaf(self, node: Node) -> bool:
        return not content_operands(node)

    def _is_index(self, node: Node) -> bool:
        """Whether a node counts along a sequence, as far as its length says."""
        return node.base_op == "aten.arange" and node.tensor is not None and node.tensor.shape[0] in self._lengths

    def _source_tests(self, read: PositionRead) -> list[Callable[[Node], bool]]:
        """What the source of a read is; the first test that a node passes counts."""
        names = {read.source, *read.aliases}
        if read.source_kind == "iota":
            return [self._is_index, lambda node: node.base_op == "aten.arange"]
        if read.source_kind == "length":
            return [self._is_leaf]
        kind = NodeKind.INPUT if read.source_kind == "input" else NodeKind.STATE
        return [lambda node: node.kind is kind and node.fqn in names]

    # -- steps ----------------------------------------------------------------------------------------------

    def _step(
        self,
        name: str,
        mark: Mark,
        detail: str = "",
        labels: Labels | None = None,
        roles: Collection[str] = (),
    ) -> Step:
        node = self.record.nodes[name]
        meta = next(iter(node.meta), None) if isinstance(node.meta, tuple) else node.meta
        tensor = meta if isinstance(meta, TensorMeta) else None
        op = node.op or (node.state_kind.value if node.state_kind else node.kind.value)
        shape = tensor.shape if tensor else None
        names = self._roles(node, shape, labels, roles) if shape is not None else ()
        return Step(name, op, node.fqn, shape, tensor.dtype if tensor else "", names, node.location, mark, detail)

    def _roles(
        self, node: Node, shape: tuple[Size, ...], labels: Labels | None, below: Collection[str]
    ) -> tuple[str, ...]:
        """What the dims run along: from the plan, else from the data, else by the length of an axis."""
        if labels is None or len(labels) != len(shape):
            known = self.plan.data_labels.get(node.name)
            labels = known[0] if known else None
        if labels is None and self._labels.get(node.name):
            labels = self._labels[node.name][0][0]
        if labels is not None and len(labels) == len(shape) and any(is_labelled(dim) for dim in labels):
            return tuple(role_text(dim) for dim in labels)
        found: list[str] = []
        for size in shape:
            axis = self._lengths.get(size)
            if axis is None or (node.kind is NodeKind.STATE and isinstance(size, int)):
                found.append("")
                continue
            own = [text for text in below if text.startswith(f"{axis}:")]
            second = any(text.startswith(f"{axis}:") for text in found)
            found.append(own[0] if len(own) == 1 else f"{axis}:{COL if second else ROW}")
        return tuple(found)


def _is_input(plan: object) -> bool:
    """Whether a plan is a lifted input with its dims moved, and nothing else."""
    while isinstance(plan, Call) and plan.op in ("aten.permute.default", "aten.unsqueeze.default"):
        plan = plan.args[0]
    return isinstance(plan, Lifted)
