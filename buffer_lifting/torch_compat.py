"""The only file that touches private torch, with the public alternative that was missing beside each use."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import sympy  # type: ignore[import-untyped]
import torch
from torch._export.verifier import TrainingIRVerifier  # no public name for the training dialect's verifier
from torch._functorch._aot_autograd import descriptors as _d  # what aot_export_joint_with_descriptors annotates with
from torch._functorch._aot_autograd.schemas import InputAliasInfo, PlainTensorMeta  # what it knows of each input
from torch._higher_order_ops.flex_attention import flex_attention as FLEX_HOP  # torch.ops.higher_order has no type
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled  # operators, no alias
from torch._ops import HigherOrderOperator as HigherOrderOperator  # the class of an op, as the next
from torch._ops import OpOverload as OpOverload  # the class of an op; torch.ops has only its instances
from torch._subclasses.fake_tensor import FakeTensor  # no public name
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx._lazy_graph_module import _LazyGraphModule  # GraphModule writes and compiles its code at once
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo  # no public way to add an argument to a graph
from torch.utils import _pytree as pytree  # torch.utils.pytree has no TreeSpec for module_call_graph
from torch.utils._python_dispatch import _disable_current_modes  # the public modes have no way to be left for a while

from buffer_lifting.graph import sizes

Symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)
#: What torch.export calls a graph that can be trained.
TRAINING_DIALECT = TrainingIRVerifier.dialect
AUTOCAST_HOP = wrap_with_autocast
GRAD_MODE_HOP = wrap_with_set_grad_enabled
TreeSpec = pytree.TreeSpec
tree_flatten = pytree.tree_flatten
tree_unflatten = pytree.tree_unflatten
tree_map = pytree.tree_map

#: The operands of ``flex_attention``, a higher-order op without a schema, by position.
FLEX_ARGUMENTS = (
    "query",
    "key",
    "value",
    "score_mod",
    "block_mask",
    "scale",
    "kernel_options",
    "score_buffers",
    "mask_buffers",
)

#: What ``torch.nn.functional`` calls (its own are Python functions, which cost as much as a small op).
SILU, GELU = torch._C._nn.silu, torch._C._nn.gelu

_SIZES: dict[sympy.Expr, sizes.Size] = {}
_EXPRESSIONS: dict[sympy.Expr, str] = {}


def size_of(value: int | torch.SymInt, ranges: sizes.Ranges | None = None) -> sizes.Size:
    """A torch size as a :data:`sizes.Size`. Private: ``SymInt.node.expr`` (no public reader of the expression).

    ``Max`` and ``Min`` are resolved where the ranges of their symbols tell which side it is.
    """
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        return _convert(value.node.expr, ranges or {})
    return int(value)


def _convert(expr: sympy.Expr, ranges: sizes.Ranges) -> sizes.Size:
    known = _SIZES.get(expr)
    if known is not None:
        return known
    chooses = any(type(part).__name__ in ("Max", "Min") for part in sympy.preorder_traversal(expr))
    if type(expr).__name__ in ("Max", "Min") and len(expr.args) == 2:
        left, right = (_convert(cast(sympy.Expr, arg), ranges) for arg in expr.args)
        chosen = sizes.larger(left, right, ranges)
        if chosen is None:
            return sizes.symbol(str(expr))
        if type(expr).__name__ == "Min":
            chosen = right if chosen == left else left
        return chosen
    if type(expr).__name__ in sizes.QUOTIENTS and len(expr.args) == 2:
        exact = sizes.divide(*(_convert(cast(sympy.Expr, arg), ranges) for arg in expr.args))
        if exact is not None:
            return exact
    result: sizes.Size
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        result = sizes.symbol(str(expr))
    elif expr.is_Add:
        result = 0
        for term in expr.args:
            result = sizes.add(result, _convert(cast(sympy.Expr, term), ranges))
    elif expr.is_Mul:
        result = sizes.product(_convert(cast(sympy.Expr, factor), ranges) for factor in expr.args)
    elif expr.is_Pow and expr.args[1].is_Integer and int(expr.args[1]) > 0:
        result = sizes.product([_convert(cast(sympy.Expr, expr.args[0]), ranges)] * int(expr.args[1]))
    else:
        result = sizes.symbol(str(expr))
    if not chooses:
        _SIZES[expr] = result
    return result


def schema_args(node: Node) -> dict[str, Any]:
    """The arguments of a call by schema name, defaults included.

    Private: ``OpOverload._schema`` (``Node.normalized_arguments`` re-parses the schema on each call, which made
    it the largest cost of a scan).
    """
    schema = schema_of(node.target)
    if schema is None:
        names = FLEX_ARGUMENTS if node.target is FLEX_HOP else tuple(str(i) for i in range(len(node.args)))
        return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    given, named = node.args, node.kwargs
    result = {}
    for index, (name, keyword, has_default, default) in enumerate(_parameters(node.target)):
        if index < len(given) and not keyword:
            result[name] = given[index]
        elif name in named:
            result[name] = named[name]
        elif has_default:
            result[name] = default
    return result


def schema_of(target: Any) -> Any:
    """The schema of an op, ``None`` for what has none (higher-order ops, Python functions).

    Private: ``OpOverload._schema`` (``torch.ops`` has no public view of names, types and defaults).
    """
    return getattr(target, "_schema", None)


def argument_names(target: OpOverload) -> list[str]:
    """The argument names of an op, in the order of its schema. Private as :func:`schema_of`."""
    return [name for name, _, _, _ in _parameters(target)]


@functools.cache
def _parameters(target: Any) -> tuple[tuple[str, bool, bool, Any], ...]:
    """Name, whether it is a keyword only, whether it has a default, and the default, of each argument of an op."""
    return tuple(
        (argument.name, argument.kwarg_only, argument.has_default_value(), argument.default_value)
        for argument in target._schema.arguments
    )


def replace_operands(node: Node, replace: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's args and kwargs with operands replaced, by path (``"self"``, ``"indices.0"``).

    Private: ``OpOverload._schema``, as in :func:`schema_args`.
    """
    args, kwargs = list(node.args), dict(node.kwargs)
    schema = schema_of(node.target)
    names = [argument.name for argument in schema.arguments] if schema else [str(i) for i in range(len(args))]
    for path, value in replace.items():
        key, _, index = path.partition(".")
        place = names.index(key)
        current = kwargs[key] if key in kwargs else args[place]
        if index:
            items = list(cast(Sequence[Any], current))
            items[int(index)] = value
            value = items
        if key in kwargs:
            kwargs[key] = value
        else:
            args[place] = value
    return tuple(args), kwargs


def set_operands(node: Node, args: Any, kwargs: Any) -> None:
    """Sets all arguments of a node at once.

    Private: ``_update_args_kwargs``, which is what ``Node.args = ...`` calls (and then the node is taken out of the
    graph's tables and put in again, though they do not depend on the arguments).
    """
    node._update_args_kwargs(args, kwargs)


def set_arguments(node: Node, values: Mapping[str, Any]) -> None:
    """Sets arguments of a call by schema name, whether they were given, by position or by keyword, or not.

    Private: ``OpOverload._schema``, as in :func:`schema_args`.
    """
    args, kwargs = list(node.args), dict(node.kwargs)
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name not in values:
            continue
        if index < len(args):
            args[index] = values[argument.name]
        else:
            kwargs[argument.name] = values[argument.name]
    node.args, node.kwargs = tuple(args), kwargs


def schema_names(node: Node) -> set[str]:
    """The argument names of a call's schema; none for what is no aten op. Private as in :func:`schema_args`."""
    return {argument.name for argument in getattr(schema_of(node.target), "arguments", ())}


def fake_mode_of(value: Any) -> Any:
    """The fake mode of a fake tensor. Private: FakeTensor and its ``fake_mode`` have no public name."""
    return value.fake_mode


def is_fake(value: torch.Tensor) -> bool:
    """Whether a tensor is a fake tensor. Private: FakeTensor has no public name."""
    return isinstance(value, FakeTensor)


def symbolic_kernels() -> Any:
    """Lets ops on fakes find the Python kernels that take symbolic sizes, as tracing does. Private: the dispatcher's
    switch (FakeTensorMode does not turn it on by itself)."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def current_node(interpreter: Interpreter, node: Node) -> contextlib.AbstractContextManager[None]:
    """While it lasts, errors of an interpreter name this node. Private: it is part of ``Interpreter.run_node`` only."""
    return interpreter._set_current_node(node)


def aten_ops() -> dict[str, OpOverload]:
    """Every op of aten that can be called, by name with overload: ``"add.Tensor"``, ``"relu.default"``.

    Private: the dispatcher's list (``dir(torch.ops.aten)`` has only those that were asked for).
    """
    found = {}
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        op = (
            getattr(getattr(torch.ops.aten, packet, None), overload or "default", None) if namespace == "aten" else None
        )
        if op is not None:
            found[f"{packet}.{overload or 'default'}"] = op
    return dict(sorted(found.items()))


def returns_alias(node: Node) -> bool:
    """Whether a call returns a view of, or the same tensor as, one of its arguments (the schema's alias marks)."""
    schema = schema_of(node.target)
    if schema is None:
        return False
    return any(result.alias_info is not None for result in schema.returns)


def is_composite(target: OpOverload) -> bool:
    """Whether an op is made of other ops. Private: the dispatcher's table (``OpOverload.decompose`` only tries)."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"))


def is_mutable(target: OpOverload) -> bool:
    """Whether an op writes to an operand. Private: ``OpOverload._schema``."""
    return bool(target._schema.is_mutable)


def storage_id(tensor: torch.Tensor) -> int:
    """The same for tensors that lie in one storage, as long as one of them lives. Private: ``_cdata`` (on meta there is
    no ``data_ptr`` that tells)."""
    return int(tensor.untyped_storage()._cdata)


def replacements(value: torch.SymInt) -> int:
    """How many symbols the shape environment of a symbolic size has specialised or unified so far."""
    environment: Any = value.node.shape_env  # private: no public view of a ShapeEnv's replacements
    return len(environment.replacements)


def equal_sizes(graph: Graph) -> list[tuple[Any, dict[Any, Any]]]:
    """Each shape environment of a graph's inputs, with what it takes symbols for now: sizes read other than before once
    that changes. Private: as :func:`replacements`."""
    found: dict[int, Any] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                found[id(size.node.shape_env)] = size.node.shape_env
    return [(environment, dict(environment.replacements)) for environment in found.values()]


class _AtFirstUse:
    """The ``forward`` of a module whose code is not written yet: to ask for it writes the code."""

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        module.real_recompile()
        return type(module).forward.__get__(module)


class LazyGraphModule(_LazyGraphModule):
    """A GraphModule whose code is written when it is first called or shown: of 16 stages a rank runs one.

    Private: the base class. Its own first call goes through ``__call__`` again, so that hooks would run twice.
    """

    forward = _AtFirstUse()

    def real_recompile(self) -> None:
        """Writes the code, if that was put off."""
        super().real_recompile()
        _call_once(self)

    @classmethod
    def _needs_recompile(cls) -> bool:
        return isinstance(cls.forward, _AtFirstUse)

    @classmethod
    def recompile(cls) -> None:  # type: ignore[override]
        cls.forward = _AtFirstUse()


class StageModule(LazyGraphModule):
    """The module of a stage: its code calls ops as :func:`buffer_lifting.stage_code.spelled` says.

    Private: ``_graph``, which the code is written from, and ``_real_recompile``, which writes it.
    """

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As ``torch.nn.Module.compile``; Dynamo could not trace that the code is written."""
        self.real_recompile()
        super().compile(*args, **kwargs)

    def _real_recompile(self) -> Any:
        from buffer_lifting.stage_code import spelled

        graph = self._graph
        self._graph = spelled(graph)
        try:
            return super()._real_recompile()
        finally:
            self._graph = graph


def generate_code(module: GraphModule) -> None:
    """Writes the code of a module whose code was put off."""
    if isinstance(module, LazyGraphModule):
        module.real_recompile()


def rewrite_code(module: GraphModule) -> None:
    """Writes the code of a module whose graph was edited, be it wrapped or not."""
    module.recompile()
    generate_code(module)
    _call_once(module)


def _call_once(module: GraphModule) -> None:
    """Undoes what ``recompile`` does to the class that FSDP has put before the module's own: a ``__call__`` that calls
    the own one, which calls the first again. Private: ``_wrapped_call``."""
    cls: Any = type(module)
    if "_wrapped_call" in vars(cls) and any("_wrapped_call" in vars(base) for base in cls.__mro__[1:]):
        del cls._wrapped_call
        del cls.__call__


@contextlib.contextmanager
def _lazy_programs() -> Iterator[None]:
    """Lets ExportedProgram's constructor make a module whose code is written when it is needed.

    Private: the function that makes it. Without one of that name the constructor does as it always does.
    """
    from torch.export import exported_program

    name = "_create_graph_module_for_export"
    original = getattr(exported_program, name, None)
    if original is None:
        yield
        return
    setattr(exported_program, name, LazyGraphModule)
    try:
        yield
    finally:
        setattr(exported_program, name, original)


def rebuild_program(
    program: ExportedProgram,
    graph: Graph,
    signature: ExportGraphSignature,
    *,
    in_spec: TreeSpec,
    out_spec: TreeSpec,
    arg_names: list[str],
    state_dict: Mapping[str, Any],
    constants: Mapping[str, Any],
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None,
    submodules: Mapping[str, Any],
    keep_modules: bool = True,
    resized: Collection[str] = (),
) -> ExportedProgram:
    """An ExportedProgram around an edited graph: the public constructor, with the root call's spec replaced.

    ``resized`` are inputs whose sizes the program no longer states as the export did: the guards on them are dropped.
    Private: ``_guards_code`` (the constructor reads the guards off the shape environment, and nothing edits them).

    Raises:
        torch._export.verifier.SpecViolationError: the graph is not valid in the program's dialect.
    """
    import copy
    import dataclasses

    entries = list(program.module_call_graph) if keep_modules else program.module_call_graph[:1]
    root = entries[0]
    call = None
    if root.signature is not None:
        call = dataclasses.replace(root.signature, in_spec=in_spec, out_spec=out_spec, forward_arg_names=arg_names)
    entries = [dataclasses.replace(root, signature=call), *(copy.copy(entry) for entry in entries[1:])]
    with _lazy_programs():
        result = ExportedProgram(
            root=dict(submodules),
            graph=graph,
            graph_signature=signature,
            state_dict=dict(state_dict),
            range_constraints=dict(program.range_constraints),
            module_call_graph=entries,
            example_inputs=example_inputs,
            constants=dict(constants),
            verifiers=list(program.verifiers),
        )
    kept = _without_bases(result._guards_code)
    result._guards_code = [guard for guard in kept if not any(f"['{name}']" in guard for name in resized)]
    return result


def _without_bases(guards: Sequence[str]) -> list[str]:
    """Guards but those on the tensor that an example input was a view of (``L['tokens']._base.size()[1] != ...``).

    An export traced on ``text[:, :-1]`` has them. They say nothing of the program, and an input that is no view fails
    in them with an AttributeError.
    """
    return [guard for guard in guards if "]._base." not in guard]


def module_of(program: ExportedProgram) -> GraphModule:
    """``program.module()``, which also takes inputs that are no views where the example inputs were.

    Private: ``_guards_code`` (``module(check_guards=False)`` checks none of the others either).
    """
    import copy

    program = copy.copy(program)
    program._guards_code = _without_bases(program._guards_code)
    return program.module()


def writes(value: torch.Tensor) -> int:
    """How often a tensor or one of its views was written to; 0 if torch does not count. Private: ``_version``."""
    return 0 if value.is_inference() else value._version


def root_spec(program: ExportedProgram) -> tuple[TreeSpec, TreeSpec]:
    """The pytree specs of a program's inputs and outputs. Private: ``ExportedProgram.call_spec`` has both."""
    spec = program.call_spec
    return spec.in_spec, spec.out_spec


def with_keywords(spec: TreeSpec, names: tuple[str, ...]) -> TreeSpec:
    """The spec of a call with further keywords. Private: TreeSpec's constructor; unflattening the spec with stand-ins
    and flattening the result would run the constructors of the user's own containers (a BlockMask)."""
    args, kwargs = spec.children()
    leaves = [pytree.treespec_leaf() for _ in names]
    return TreeSpec(tuple, None, [args, TreeSpec(dict, [*kwargs.context, *names], [*kwargs.children(), *leaves])])


def flat_names(spec: TreeSpec, names: Sequence[str]) -> tuple[list[str], dict[str, str]] | None:
    """The leaves' names by positional argument and by keyword, or ``None`` if an argument is a container."""
    args, kwargs = spec.children()
    if not all(child.is_leaf() for child in (*args.children(), *kwargs.children())):
        return None
    count = args.num_children
    return list(names[:count]), dict(zip(kwargs.context, names[count:], strict=True))


def input_spec(args: tuple[Any, ...], kwargs: dict[str, Any]) -> TreeSpec:
    """The pytree spec of a call."""
    return tree_flatten((args, kwargs))[1]


def program_from_graph_module(
    submodules: Mapping[str, Any],
    graph: Graph,
    signature: ExportGraphSignature,
    state_dict: Mapping[str, Any],
    constants: Mapping[str, Any],
    in_spec: TreeSpec,
    out_spec: TreeSpec,
    arg_names: list[str],
    range_constraints: Mapping[Any, Any] | None = None,
    guards: Sequence[str] | None = None,
) -> ExportedProgram:
    """An ExportedProgram for a graph whose state was ``get_attr``.

    Private: ModuleCallEntry's module path; ``_guards_code`` as in :func:`rebuild_program`.
    """
    from torch.export import ModuleCallEntry, ModuleCallSignature

    entry = ModuleCallEntry(
        fqn="",
        signature=ModuleCallSignature(
            inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec, forward_arg_names=arg_names
        ),
    )
    result = ExportedProgram(
        root=dict(submodules),
        graph=graph,
        graph_signature=signature,
        state_dict=dict(state_dict),
        range_constraints=dict(range_constraints or {}),
        module_call_graph=[entry],
        constants=dict(constants),
        verifiers=[TrainingIRVerifier],
    )
    result._guards_code = _without_bases(result._guards_code if guards is None else guards)
    return result


def with_state_dict(program: ExportedProgram, state_dict: Mapping[str, Any]) -> ExportedProgram:
    """A program with other parameters and persistent buffers. Private: ``_state_dict`` (the constructor would check and
    compile the graph again)."""
    import copy

    result = copy.copy(program)
    result._state_dict = dict(state_dict)
    return result


def ranges_of(program: ExportedProgram, graph: Graph) -> dict[sympy.Symbol, Any]:
    """The range constraints of a program on the size symbols that a part of its graph has."""
    expressions = {size.node.expr for node in graph.nodes for size in _symbolic_sizes(node.meta.get("val"))}
    symbols = {symbol for expression in expressions for symbol in expression.free_symbols}
    return {symbol: limits for symbol, limits in program.range_constraints.items() if symbol in symbols}


def _symbolic_sizes(value: Any) -> list[Any]:
    if isinstance(value, Symbolic):
        return [value]
    if isinstance(value, torch.Tensor):
        return [size for size in (*value.shape, *value.stride()) if isinstance(size, torch.SymInt)]
    return [size for item in value for size in _symbolic_sizes(item)] if isinstance(value, tuple | list) else []


def guards_on(program: ExportedProgram, names: Collection[str]) -> list[str]:
    """The guards of a program that speak of the named inputs alone. Private: ``_guards_code``, as above."""
    return [
        guard for guard in program._guards_code if all(name in names for name in re.findall(r"L\['(\w+)'\]", guard))
    ]


def aoti_compile(program: ExportedProgram, path: str, settings: dict[str, Any]) -> str:
    """Compiles a program with AOTInductor. Private: the module of a documented function."""
    inductor: Any = importlib.import_module("torch._inductor")
    return str(inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=settings))


def aoti_load(path: str) -> Any:
    """Loads what :func:`aoti_compile` wrote. Private: the module of a documented function."""
    inductor: Any = importlib.import_module("torch._inductor")
    return inductor.aoti_load_package(path)


def example_size(value: int | torch.SymInt) -> int:
    """A size at the example inputs of its program. Private: ``SymInt.node.hint`` (no public reader)."""
    return value if isinstance(value, int) else int(value.node.hint)


def finite_range(limits: Any) -> tuple[int, int]:
    """The limits of a dynamic size, an int64. Private: the class of the values of ``range_constraints``."""
    most = 2**63 - 1
    low, high = (
        int(limit) if limit.is_Integer and abs(limit) < most else most for limit in (limits.lower, limits.upper)
    )
    return low, high


def max_operator_version() -> int:
    """The version of aten's operators, which every archive states. Private: torch has no public name for it."""
    return int(torch._C._get_max_operator_version())


def raw_expression(value: Any) -> sympy.Expr:
    """The expression of a symbolic size as it was made, to look it up. Private: ``SymNode._expr`` (``expr`` asks the
    shape environment each time)."""
    return value.node._expr


def symbolic_expression(value: Any) -> tuple[str, Any] | None:
    """The expression of a symbolic size, as torch.export writes it, and its hint; ``None`` for a plain number.

    Private: ``SymInt.node`` (no public reader of the expression or the hint).
    """
    if not isinstance(value, Symbolic) or not value.node.expr.free_symbols:
        return None
    expression = value.node.expr
    if expression not in _EXPRESSIONS:
        _EXPRESSIONS[expression] = sympy.printing.repr.srepr(expression)
    return _EXPRESSIONS[expression], value.node.hint


def spec_text(spec: TreeSpec) -> str:
    """A pytree spec as text. Private: there is no public name of ``treespec_dumps``."""
    return pytree.treespec_dumps(spec, 1)


def operator_name(target: Any) -> str:
    """What torch.export writes for the op of a node: ``"torch.ops.aten.add.Tensor"``, ``"_operator.mul"``."""
    return f"{target.__module__.replace('torch._ops', 'torch.ops')}.{target.__name__}"


def call_operator(name: str) -> Callable[..., Any]:
    """The op for ``"aten.view.default"``; only the ``aten`` namespace is looked into."""
    namespace, packet, overload = name.split(".")
    if namespace != "aten":
        raise KeyError(name)
    return cast(Callable[..., Any], getattr(getattr(torch.ops.aten, packet), overload))


def registered_operator(name: str) -> Callable[..., Any] | None:
    """The op for ``"library.name.overload"``, if a library has registered it."""
    namespace, packet, overload = name.split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    return found if isinstance(found, OpOverload) else None


def _functional_collectives() -> tuple[Any, Any, Any]:
    import torch.distributed._functional_collectives  # registers the autograd formula of wait_tensor

    ops = torch.ops
    autograd = ops._c10d_functional_autograd
    return (
        autograd.all_gather_into_tensor.default,
        autograd.all_to_all_single.default,
        ops._c10d_functional.wait_tensor.default,
    )


#: torch's functional collectives with autograd, as ops that a graph can hold (the public wrappers of
#: ``torch.distributed._functional_collectives`` resolve a process group at once).
ALL_GATHER, ALL_TO_ALL, WAIT = _functional_collectives()


def is_load_balancer(value: Any) -> bool:
    """Whether a value is one of torch's context-parallel load balancers (their base class is private)."""
    return callable(getattr(value, "_generate_indices", None))


def balancer_indices(balancer: Any) -> torch.Tensor | None:
    """The order a load balancer rearranges the sequence to: ``[1 or batch, seq]``. Private: the only reader of it."""
    return cast("torch.Tensor | None", balancer._generate_indices(restore=False))


def head_tail_indices(length: int, ranks: int) -> torch.Tensor:
    """The order of torch's load balancer of causal attention, ``[1, length]``: every rank gets a chunk of the head
    and the one that mirrors it from the tail. Private: its load balancers have no public names.

    Raises:
        ValueError: ``length`` does not divide into two chunks a rank.
    """
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer

    if length % (2 * ranks):
        raise ValueError(f"a sequence of {length} does not divide into {2 * ranks} chunks")
    return cast(torch.Tensor, balancer_indices(_HeadTailLoadBalancer(length, ranks, "cpu"))).long()


def as_mesh(value: Any) -> Any:
    """A DeviceMesh, ``None`` for anything else (which does not import torch.distributed)."""
    if isinstance(value, tuple):
        return None
    from torch.distributed.device_mesh import DeviceMesh

    return value if isinstance(value, DeviceMesh) else None


def _replicate() -> type:
    from torch.distributed.pipelining.microbatch import (
        _Replicate,
    )  # a keyword that is not chunked has no public spec

    return _Replicate


def REPLICATE() -> Any:
    """The chunk spec of a keyword that every microbatch gets whole."""
    return _replicate()()


def without_first_step(schedule: Any, stages: Sequence[Any], voted: bool) -> None:
    """Leaves out what a schedule of ``PipelineStage``s that were given their shapes need not do on its first step.

    Private: ``_post_metadata_inference_cleanup`` (drops the gradients of an FSDP module, those that earlier steps
    accumulated included, although there was no dry run whose gradients it would have to drop) and, where earlier
    stages of the same ranks have ``voted`` that all shapes are given, that vote: up to torch 2.14
    ``_warmup_forward_vote`` and ``_warmup_backward_result`` of a stage (one message each between neighbouring stages),
    then ``_initialize_pipeline_distributed_state`` of a schedule (all-reduces, and a message to connect neighbours that
    are connected by now). There is no public way to say that nothing is left to infer.
    """
    from torch.distributed.pipelining._utils import InferenceMode

    def known(stages: Sequence[Any], has_backward: bool, initialize_p2p: bool) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    for stage in stages:
        stage._post_metadata_inference_cleanup = lambda: None
        if voted and hasattr(stage, "_warmup_forward_vote"):
            stage._warmup_forward_vote = lambda has_backward, received_acc=None: torch.ones(1, dtype=torch.int32)
            stage._warmup_backward_result = lambda received_result=None: torch.ones(1, dtype=torch.int32)
    own_edges = any(getattr(stage, "p2p_per_edge", False) for stage in stages)  # process groups of this schedule's own
    if voted and not own_edges and hasattr(schedule, "_initialize_pipeline_distributed_state"):
        schedule._initialize_pipeline_distributed_state = known


_RENAMED = {
    "zero_": "zeros_like",
    "fill_": "fill",
    "__iand__": "bitwise_and",
    "__ior__": "bitwise_or",
    "__ixor__": "bitwise_xor",
}


def functional_form(target: Any) -> Any:
    """The op that returns what an in-place op of the same overload would write; ``None`` if there is none.

    Private: ``OpOverload._schema`` (no public map from in-place to functional ops).
    """
    schema = target._schema
    _, _, name = schema.name.partition("::")
    name = _RENAMED.get(name, name[:-1] if name.endswith("_") and not name.endswith("__") else "")
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    packet = getattr(torch.ops.aten, name, None) if name else None
    if packet is None or written != [schema.arguments[0].name] or len(schema.returns) != 1:
        return None
    overload = "default" if name == "zeros_like" else schema.overload_name or "default"
    form = getattr(packet, overload, None)
    if form is None or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    return form


def schedule_class(schedule: Any) -> Any:
    """The class of a schedule of ``torch.distributed.pipelining``, given by name or itself.

    Raises:
        ValueError, TypeError: there is no such schedule.
    """
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle, get_schedule_class

    found = get_schedule_class(schedule.removeprefix("Schedule")) if isinstance(schedule, str) else schedule
    if not issubclass(found, PipelineScheduleMulti | PipelineScheduleSingle) or found.__name__.startswith("Pipeline"):
        raise TypeError(f"{schedule!r} is no schedule")
    return found


def is_single(schedule: Any) -> bool:
    """Whether a schedule has one stage on each rank."""
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle

    return issubclass(schedule, PipelineScheduleSingle)


def stage_to_rank(pp: int, num_stages: int, style: str) -> dict[int, int]:
    """torch's own map, ``style`` being ``"loop"`` or ``"v"``. Private: the module that it is in."""
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    return dict(generate_stage_to_rank_mapping(pp, num_stages, style))


def schedule_order(kind: Any, ranks: Sequence[int], n_microbatches: int) -> dict[int, list[tuple[int, str]]]:
    """What each rank computes in a step: stage and ``"F"``, ``"B"``, ``"I"`` or ``"W"``, in order.

    Private: schedules read nothing but numbers off their stages until a step runs, so stand-ins will do (there is no
    public way to a schedule's order without processes); ``_prepare_schedule_with_comms`` is left out, which adds
    messages.

    Raises:
        ValueError: the schedule does not take that many microbatches or stages.
    """
    from types import SimpleNamespace

    own = type(kind.__name__, (kind,), {"_prepare_schedule_with_comms": lambda self, *args, **kwargs: None})
    pp, count = max(ranks) + 1, len(ranks)
    stages = [
        SimpleNamespace(num_stages=count, group_size=pp, group_rank=0, stage_index=stage, submod=None, is_last=False)
        for stage, rank in enumerate(ranks)
        if rank == 0
    ]
    made = own(stages[0] if is_single(kind) else stages, n_microbatches=n_microbatches)
    found: dict[int, list[tuple[int, str]]] = {}
    for rank, actions in made.pipeline_order.items():
        parts = (part for action in actions if action is not None for part in action.sub_actions or (action,))
        found[rank] = [(part.stage_index, part.computation_type.value) for part in parts]
    return found


def process_group(name: str) -> Any:
    """The process group that torch registered under a name. Private: a public name can be had of a group, and not the
    other way round."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(cast(Any, name))


def ring_attention_forward(
    kernel: Callable[..., Any], group: Any, balanced: bool | None, *operands: torch.Tensor
) -> Any:
    """torch's ring attention on a rank's ``query, key, value``, each ``[batch, heads, rows, head dim]``.

    Private: ``_templated_ring_attention`` (``torch.distributed.tensor.experimental.context_parallel`` replaces
    ``torch.nn.functional.scaled_dot_product_attention`` in the whole process, and knows kernels for CUDA alone).

    Args:
        kernel: ``(query, key, value, is_causal) -> (out, logsumexp, *rest)``.
        group: the process group of the ranks.
        balanced: causal attention, the rows being in head-tail (``True``) or contiguous order; ``None``: full.
        operands: query, key and value.

    Returns:
        ``(out, logsumexp, *rest)``; ``rest`` is of the last call of the kernel.
    """
    with _ring(balanced, operands[0].dtype) as torch_ring:
        return torch_ring._templated_ring_attention(group, 2, kernel, *operands, is_causal=balanced is not None)


def ring_attention_backward(
    kernel: Callable[..., Any], group: Any, balanced: bool | None, grad_out: torch.Tensor, *saved: torch.Tensor
) -> Any:
    """The gradients of a rank's query, key and value. Private: as :func:`ring_attention_forward`.

    Args:
        kernel: ``(query, key, value, out, logsumexp, is_causal, grad_out) -> (grad_query, grad_key, grad_value)``, by
            keyword.
        group, balanced: as there.
        grad_out: the gradient of the result.
        saved: query, key, value, result and logsumexp of the forward.
    """
    with _ring(balanced, saved[0].dtype) as torch_ring:
        return torch_ring._templated_ring_attention_backward(
            group, 2, kernel, grad_out, "grad_out", *saved, is_causal=balanced is not None
        )[:3]


@contextlib.contextmanager
def _ring(balanced: bool | None, dtype: torch.dtype) -> Iterator[Any]:
    """The module of torch's ring attention, with the switches of the process that it reads set for one call."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    options = _attention._cp_options
    before = options.enable_load_balance, options.convert_to_f32
    options.enable_load_balance, options.convert_to_f32 = bool(balanced), dtype != torch.float64
    try:
        yield _attention
    finally:
        options.enable_load_balance, options.convert_to_f32 = before


def same_transient(source: torch.nn.Module, module: torch.nn.Module) -> None:
    """Makes the same buffers non-persistent. Private: ``_non_persistent_buffers_set`` (``register_buffer`` alone sets
    it, and the buffers are there)."""
    module._non_persistent_buffers_set = set(source._non_persistent_buffers_set)


# -- joint graphs of forward and backward -------------------------------------------------------------------------


def outside_of_modes() -> Any:
    """Leaves the fake mode that capturing a joint graph keeps open until it is compiled."""
    return _disable_current_modes()


def described(descriptor: Any) -> tuple[str, str]:
    """Kind (``"parameter"``, ``"buffer"``, ``"tangent"``, ``"input"``, else ``""``) and FQN of an input."""
    if isinstance(descriptor, _d.ParamAOTInput):
        return "parameter", descriptor.target
    if isinstance(descriptor, _d.BufferAOTInput):
        return "buffer", descriptor.target
    if isinstance(descriptor, _d.TangentAOTInput):
        return "tangent", ""
    return ("input" if isinstance(descriptor, _d.PlainAOTInput) else ""), ""


def same_result(tangent: Any, output: Any) -> bool:
    """Whether an input's descriptor says that it is the gradient of the result with another descriptor."""
    return isinstance(tangent, _d.TangentAOTInput) and bool(tangent.output == output)


def gradient_of(descriptor: Any) -> str | None:
    """Whose gradient a result is: an FQN, or how torch writes the input; ``None`` for a result that is no gradient."""
    if not isinstance(descriptor, _d.GradAOTOutput):
        return None
    return described(descriptor.grad_of)[1] or descriptor.grad_of.expr()


def input_descriptors(existing: Sequence[Any], count: int) -> list[Any]:
    """Descriptors of further plain inputs, numbered behind those that there are."""
    first = 1 + max((d.idx for d in existing if isinstance(d, _d.PlainAOTInput)), default=-1)
    return [_d.PlainAOTInput(idx=first + index) for index in range(count)]


def gradient_descriptor(descriptor: Any) -> Any:
    """The descriptor of the gradient of an input."""
    return _d.GradAOTOutput(grad_of=descriptor)


def codegen_with(graph: Graph, names: Sequence[str], tangents: int, gradients: int) -> CodeGen | None:
    """How a graph is called that has further inputs ``names``, in front of its last ``tangents``.

    A flat graph stays flat. Of ``f(primals, tangents)`` they are further primals, and ``gradients`` further results
    stand with the gradients. Of a call of ``torch.export``, ``f(*args, **kwargs)``, they are keywords.

    Returns:
        ``None`` for a call of another kind.
    """
    own = graph._codegen
    if not isinstance(own, _PyTreeCodeGen):
        return CodeGen()
    info = own.pytree_info
    spec, out = info.in_spec, info.out_spec
    sides = spec.children()
    if not tangents and spec.type is tuple and [side.type for side in sides] == [tuple, dict]:
        return _PyTreeCodeGen(_PyTreeInfo([*info.orig_args, *names], with_keywords(spec, tuple(names)), out))
    if spec.type not in (tuple, list) or spec.num_children != 2 or sides[1].num_leaves != tangents:
        return None
    if sides[0].type is not list or not all(child.is_leaf() for child in sides[0].children()):
        return None
    if gradients:
        if out is None or out.num_children != 2 or out.children()[1].type not in (tuple, list):
            return None
        out = _longer(out, 1, gradients)
    return _PyTreeCodeGen(_PyTreeInfo(list(info.orig_args), _longer(spec, 0, len(names)), out))


def _longer(spec: TreeSpec, side: int, count: int) -> TreeSpec:
    """The spec of a pair of sequences, with further leaves in one of the two."""
    pair = list(tree_unflatten(list(range(spec.num_leaves)), spec))
    pair[side] = type(pair[side])([*pair[side], *range(count)])
    return tree_flatten(tuple(pair) if spec.type is tuple else pair)[1]


def captured_inputs(capture: Any) -> int:
    """How many inputs the forward of a ``JointWithDescriptors`` has; -1 where they are not, one by one, the call's.

    Private: as in :func:`extend_capture`.
    """
    state, traced = capture._aot_state, capture._aot_graph_capture
    if traced.maybe_subclass_meta is not None or not isinstance(traced.updated_flat_args, tuple):
        return -1
    plain = all(isinstance(meta, PlainTensorMeta) for meta in state.fw_metadata.subclass_inp_meta)
    same = len(state.flat_args) == len(traced.updated_flat_args[0]) == len(state.fw_metadata.input_info)
    return len(state.flat_args) if plain and same else -1


def extend_capture(capture: Any, module: GraphModule, place: int, values: Sequence[Any], names: Sequence[Any]) -> None:
    """Makes a lifted graph that of a ``JointWithDescriptors``, so that it is compiled with its further inputs.

    ``values`` and ``names``: fake tensors and descriptors of the further inputs, which stand at ``place`` among the
    primals. Private: all that torch keeps beside the graph (``jd.graph_module`` has a setter, but it does not change
    the number of inputs).
    """
    state, traced = capture._aot_state, capture._aot_graph_capture
    info = InputAliasInfo(
        is_leaf=True,
        mutates_data=False,
        mutates_metadata=False,
        mutations_hidden_from_autograd=True,
        mutations_under_no_grad_or_inference_mode=False,
        mutation_inductor_storage_resize=False,
        mutates_storage_metadata=False,
        requires_grad=False,
        keep_input_mutations=False,
    )
    at = slice(place, place)
    plain = [PlainTensorMeta(unwrapped_idx=place + index) for index in range(len(values))]
    for held, further in (
        (state.flat_args, values),
        (state.flat_args_descs, names),
        (state.fw_metadata.input_info, [info] * len(values)),
        (state.fw_metadata.subclass_inp_meta, plain),
        (traced.updated_flat_args[0], values),
        (traced.updated_flat_args_descs[0], names),
    ):
        if len(held) == place + len(values) and held[place:] == list(further):
            continue  # one list under two names
        held[at] = list(further)
    capture.graph_module = module
