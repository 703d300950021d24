"""Pattern rewriting in near-linear time: rules indexed by op, a worklist, and names that survive.

A `Rule` says at which ops it can start; `apply_rules` offers each node only to the rules that start at its
op, offers what a rewrite touched again at once, and sweeps until nothing matches any more. So the time grows
with the number of nodes and of rewrites, not with nodes × rules × pattern size.

Rules build what they put in with a `Replacement`: it names the new nodes and values after what they replace,
carries their metadata (the module a node came from), refuses ops that the model's opset does not have, and
takes the dead remains out.

Subgraphs of If, Loop and Scan are rewritten like the main graph, each on its own. Bodies of model-local
functions are left alone: in planish a function body is the definition of an op, and canonicalize inlines
the functions of others.

Statistics in the manner of tinygrad's ``PRINT_MATCH_STATS``: everything inside ``with match_statistics()``
is counted per rule, together with the reasons that rules gave for near misses.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
from onnxscript.rewriter import RewriteRule

from ...ir.errors import PassError
from ...ir.walk import graphs
from .rewrite_limit import RewriteLimit, current_limit

ANY_OP = "*"
"""As a root: the rule is offered every node."""

_REWRITES_PER_NODE = 20
"""More rewrites than this per node of the graph at the start means that rules undo each other's work."""

_REASONS_KEPT = 1000
"""How many near misses one `RuleStatistics` keeps in full."""


class Rule(abc.ABC):
    """One rewrite. Subclasses set ``name`` and ``roots`` and implement `apply`.

    Attributes:
        name: what statistics and errors call the rule.
        roots: ops that the rule can start from: ``"Mul"``, ``"com.microsoft::Gelu"`` or `ANY_OP`.
    """

    name: str
    roots: tuple[str, ...]

    @abc.abstractmethod
    def apply(self, node: ir.Node) -> bool:
        """Rewrite in place around ``node``; True if anything changed.

        A rule checks everything before it changes anything, and ends in ``return missed(node, "why")`` where
        the structure matched but a precondition did not hold.
        """


@dataclasses.dataclass
class RuleStatistics:
    """How often a rule was tried, how often it hit, how long it took, and why it nearly hit."""

    tries: int = 0
    hits: int = 0
    seconds: float = 0.0
    misses: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why each node that nearly matched did not, by node name, the first thousand."""


MatchStatistics = dict[str, RuleStatistics]
"""Statistics by rule name."""

_statistics: ContextVar[MatchStatistics | None] = ContextVar("match_statistics", default=None)


@contextlib.contextmanager
def match_statistics() -> Iterator[MatchStatistics]:
    """Collect the statistics of every `apply_rules` inside the block."""
    collected: MatchStatistics = collections.defaultdict(RuleStatistics)
    token = _statistics.set(collected)
    try:
        yield collected
    finally:
        _statistics.reset(token)


class _Run:
    """What one rewriting session knows: the model, its names, and the rule at work."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.value_names: set[str] = set()
        self.node_names: set[str] = set()
        self.new_nodes: list[ir.Node] = []
        self.dead: dict[ir.Node, ir.Graph] = {}
        self.rule_name = ""
        for graph in graphs(model):
            self.value_names.update(graph.initializers)
            self.value_names.update(value.name or "" for value in graph.inputs)
            for node in graph:
                self.node_names.add(node.name or "")
                self.value_names.update(value.name or "" for value in node.outputs)

    def bury(self) -> None:
        """Take the dead nodes out of their graphs, all at once: each removal looks at every graph output."""
        for graph in dict.fromkeys(self.dead.values()):
            graph.remove([node for node in self.dead if node.graph is graph], safe=True)
        self.dead.clear()


_GRAPH_ATTRIBUTES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


_run: ContextVar[_Run | None] = ContextVar("rewriting", default=None)


@contextlib.contextmanager
def rewriting(model: ir.Model) -> Iterator[None]:
    """Allow `Replacement` inside the block, for passes that rewrite ``model`` by a visitor instead of rules.

    Costs one look at every name of the model. Blocks nest; the inner one reuses the outer one's names.
    """
    current = _run.get()
    if current is not None and current.model is model:
        yield
        return
    run = _Run(model)
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)
        run.bury()


def _current_run() -> _Run:
    run = _run.get()
    if run is None:
        raise PassError(
            "a graph rewrite was started outside apply_rules", hint="wrap it in `with rewriting(model):`"
        )
    return run


def missed(node: ir.Node, reason: str) -> bool:
    """Note why a rule that nearly matched at ``node`` did not; always False, so rules can return it."""
    statistics, run = _statistics.get(), _run.get()
    if statistics is not None and run is not None:
        misses = statistics[run.rule_name].misses
        if len(misses) < _REASONS_KEPT:
            misses[node.name or ""] = reason
    return False


class Replacement:
    """Builds the nodes that take the place of ``root``.

    New nodes go in front of ``root`` (or right behind the producer of ``after``), inherit its metadata, and
    take their names from it: the node and value that stand in for the root keep its names, those between
    are called ``<root>.<op>``.

    >>> replacement = Replacement(node)                                     # doctest: +SKIP
    >>> y = replacement.op("Gelu", x, like=node.outputs[0], approximate="tanh")
    >>> replacement.finish(y)
    True
    """

    def __init__(self, root: ir.Node, *, after: ir.Value | None = None) -> None:
        if root.graph is None:
            raise PassError(f"{root.name}: the node to replace is in no graph")
        self._run = _current_run()
        self._root = root
        self._graph = root.graph
        self._anchor = root
        self._follow = False
        if after is not None:
            producer = after.producer()
            self._follow = producer is not None and producer.graph is self._graph
            self._anchor = producer if producer is not None and self._follow else self._graph[0]
        self._old_nodes: list[ir.Node] = [root]
        self._new_nodes: list[ir.Node] = []

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        metadata: ir.Node | None = None,
    ) -> ir.Node:
        """Add a node; its metadata comes from ``metadata``, else from the root."""
        check_op_exists(self._graph, self._run.model, op_type, domain)
        new = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs)
        self.adopt(new, metadata=metadata)
        return new

    def adopt(self, new: ir.Node, *, metadata: ir.Node | None = None) -> None:
        """Name a node that was made elsewhere, give it the root's metadata and put it in."""
        run = self._run
        source = metadata or self._root
        new.name = unique_name(f"{self._root.name}.{new.op_type}", run.node_names)
        for output in new.outputs:
            output.name = unique_name(f"{self._root.outputs[0].name}.{new.op_type}", run.value_names)
        for key, text in source.metadata_props.items():
            new.metadata_props.setdefault(key, text)
        if self._follow:
            self._graph.insert_after(self._anchor, new)
            self._anchor = new
        else:
            self._graph.insert_before(self._anchor, new)
        self._new_nodes.append(new)
        run.new_nodes.append(new)

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        like: ir.Value | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output and return the output, with the type and shape of ``like``."""
        output = self.node(op_type, inputs, attributes, domain=domain).outputs[0]
        if like is not None:
            output.type = like.type
            output.shape = like.shape
        return output

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a constant to the main graph under ``name``, or a name like it that is still free."""
        graph = self._run.model.graph
        value = ir.Value(
            name=unique_name(name, self._run.value_names),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    def shape(self, *dims: int) -> ir.Value:
        """The constant that Reshape takes; equal shapes are one initializer."""
        graph = self._run.model.graph
        name = "planish.shape." + "x".join(str(dim) for dim in dims)
        existing = graph.initializers.get(name)
        if existing is not None and existing.const_value is not None:
            known = existing.const_value
            if known.dtype == ir.DataType.INT64 and known.numpy().tolist() == list(dims):
                return existing
        return self.initializer(name, ir.tensor(np.array(dims, np.int64)))

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let all that reads ``old`` read ``new``; a graph output keeps its name."""
        producer = old.producer()
        if producer is not None and producer not in self._old_nodes:
            self._old_nodes.append(producer)
        new.type = new.type or old.type
        new.shape = new.shape or old.shape
        if not old.is_graph_output():
            if new.producer() in self._new_nodes:
                self._take_name(old, new)
            old.replace_all_uses_with(new)
            return
        source = new.producer()
        if source is None or source.graph is not self._graph or new.is_graph_output():
            # A graph output must be made by a node of the graph, and by one that makes no other output.
            new = self.op("Identity", new, like=old)
        self._take_name(old, new)
        old.replace_all_uses_with(new, replace_graph_outputs=True)

    def retire(self, node: ir.Node) -> None:
        """Take ``node`` out at the end as well, with what only it reads, if nothing reads it by then."""
        self._old_nodes.append(node)

    def _take_name(self, old: ir.Value, new: ir.Value) -> None:
        old_name, old_producer, new_producer = old.name, old.producer(), new.producer()
        old.name = unique_name(f"{old_name}.replaced", self._run.value_names)
        new.name = old_name
        if old_producer is self._root and new_producer is not None and new_producer in self._new_nodes:
            new_producer.name, old_producer.name = old_producer.name, new_producer.name

    def finish(self, *values: ir.Value) -> bool:
        """Let ``values`` stand in for the root's (first) outputs, take out what is dead; always True."""
        for old, new in zip(self._root.outputs, values, strict=False):
            self.replace(old, new)
        remove_dead(self._old_nodes)
        return True


def unique_name(name: str, taken: set[str]) -> str:
    """``name``, or ``name_2``, ``name_3``, … if it is taken; the answer is taken afterwards."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


@functools.cache
def _op_exists(op_type: str, version: int, domain: str) -> bool:
    if domain not in {"", "ai.onnx.ml"}:
        return True  # Only the standard domains have their schemas registered.
    return bool(onnx.defs.has(op_type, max_inclusive_version=version, domain=domain)) and not bool(
        onnx.defs.get_schema(op_type, max_inclusive_version=version, domain=domain).deprecated
    )


def check_op_exists(graph: ir.Graph, model: ir.Model, op_type: str, domain: str) -> None:
    """Refuse an op that the model's opset does not have; import a further domain at its version 1.

    Raises:
        PassError: the standard domain has no such op at the model's opset.
    """
    imports = model.graph.opset_imports
    if domain:
        imports.setdefault(domain, 1)
        graph.opset_imports.setdefault(domain, 1)
    version = imports.get(domain, 1)
    if not _op_exists(op_type, version, domain):
        raise PassError(
            f"a rewrite emitted {op_type}, which opset {version} of domain '{domain}' does not have",
            hint="load the model through planish.load, which raises the opset to 23",
        )


def detach(node: ir.Node) -> None:
    """Take a node off its inputs' lists of users."""
    for position, value in enumerate(node.inputs):
        if value is not None:
            node.replace_input_with(position, None)


def remove_dead(nodes: Iterable[ir.Node]) -> None:
    """Remove those of ``nodes`` that nothing reads, then what only they read, unused initializers included.

    They stop reading their inputs at once and leave the graph with the rest of the sweep's dead. Nodes that
    hold subgraphs stay: their inner uses of outer values are for a dead-code pass to take apart.
    """
    dead = _current_run().dead
    pending = list(nodes)
    while pending:
        node = pending.pop()
        graph = node.graph
        if graph is None or node in dead:
            continue
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        if any(attribute.type in _GRAPH_ATTRIBUTES for attribute in node.attributes.values()):
            continue
        inputs = [value for value in node.inputs if value is not None]
        detach(node)
        dead[node] = graph
        for value in inputs:
            producer = value.producer()
            if producer is not None:
                pending.append(producer)
            else:
                _remove_unused_initializer(value)


def _remove_unused_initializer(value: ir.Value) -> None:
    if value.uses() or not value.is_initializer() or value.is_graph_input() or value.is_graph_output():
        return
    graph, name = value.graph, value.name
    if graph is not None and name is not None and graph.initializers.get(name) is value:
        del graph.initializers[name]
        run = _run.get()
        if run is not None:
            run.value_names.discard(name)


def apply_rules(model: ir.Model, rules: Sequence[Rule]) -> dict[str, int]:
    """Rewrite ``model`` in place until no rule matches; earlier rules go first at a node.

    Returns:
        How often each rule hit, by name, zeros included.

    Raises:
        PassError: two rules undo each other without end, or a rule emits an op that does not exist.
    """
    index: dict[str, list[Rule]] = collections.defaultdict(list)
    for rule in rules:
        for root in rule.roots:
            index[root].append(rule)
    # A wildcard rule is one of the candidates of every op, in the order in which the rules were given.
    if anywhere := index.pop(ANY_OP, []):
        position = {id(rule): number for number, rule in enumerate(rules)}
        for root, candidates in index.items():
            index[root] = sorted([*candidates, *anywhere], key=lambda rule: position[id(rule)])
    hits = dict.fromkeys((rule.name for rule in rules), 0)
    with rewriting(model):
        for graph in graphs(model):
            _Driver(graph, index, anywhere, hits, _current_run()).run()
    return hits


class _Driver:
    """Sweeps one graph until nothing matches."""

    def __init__(
        self,
        graph: ir.Graph,
        index: dict[str, list[Rule]],
        anywhere: list[Rule],
        hits: dict[str, int],
        run: _Run,
    ) -> None:
        self.graph = graph
        self.index = dict(index)
        self.anywhere = anywhere
        self.hits = hits
        self.session = run
        self.statistics = _statistics.get()
        self.limit = current_limit()
        self.budget = _REWRITES_PER_NODE * (len(graph) + 50)

    def run(self) -> None:
        """Sweep until a whole sweep changes nothing."""
        while self._sweep():
            pass

    def _sweep(self) -> bool:
        changed = False
        for node in self.graph:
            pending = [node]
            while pending:
                current = pending.pop()
                if current.graph is not self.graph or current in self.session.dead:
                    continue
                if touched := self._rewrite(current):
                    changed = True
                    pending.extend(touched)
        self.session.bury()
        return changed

    def _rewrite(self, node: ir.Node) -> list[ir.Node]:
        """Try the rules of one node; the nodes to look at again, none if no rule hit."""
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        candidates = self.index.get(op, self.anywhere)
        if not candidates:
            return []
        neighbours = node.predecessors()
        for rule in candidates:
            if not self._try(rule, node):
                continue
            self._charge(rule, node)
            remove_dead([*neighbours, node])
            touched = [*self.session.new_nodes, *neighbours, node]
            self.session.new_nodes.clear()
            return touched
        return []

    def _try(self, rule: Rule, node: ir.Node) -> bool:
        if self.limit is not None:
            return self._try_within(self.limit, rule, node)
        self.session.rule_name = rule.name
        if self.statistics is None:
            return rule.apply(node)
        start = time.perf_counter()
        hit = rule.apply(node)
        row = self.statistics[rule.name]
        row.seconds += time.perf_counter() - start
        row.tries += 1
        row.hits += hit
        return hit

    def _try_within(self, limit: RewriteLimit, rule: Rule, node: ir.Node) -> bool:
        """Try a rule while bisection still allows rewrites, and tell it of a hit."""
        name = node.name or ""  # before the rewrite gives it to another node
        self.session.rule_name = rule.name
        if limit.is_reached or not rule.apply(node):
            return False
        limit.record(rule.name, name)
        return True

    def _charge(self, rule: Rule, node: ir.Node) -> None:
        self.hits[rule.name] += 1
        self.budget -= 1
        if self.budget < 0:
            worst = max(self.hits, key=lambda name: self.hits[name])
            raise PassError(
                f"rewriting does not end: rule {rule.name} at {node.name}, most hits by {worst}",
                hint="two rules undo each other; run them in separate apply_rules calls",
            )


class PatternRule(Rule):
    """An onnxscript `RewriteRule` as a `Rule`.

    Only patterns with one root node are taken: others make onnxscript search the whole graph at every node.
    Guards against what onnxscript's own driver lets through: initializers of equal names from two rewrites,
    ops that the opset does not have, matches that reach into an outer graph, and clashing value names.
    With ``types`` it matches only where the first result has one of them: the types that the new op runs in.

    Raises:
        PassError: the pattern has more than one root, or replaces values inside the pattern.
    """

    def __init__(
        self, rule: RewriteRule, name: str | None = None, *, types: Collection[ir.DataType] | None = None
    ) -> None:
        # The pattern is private in onnxscript; this is the one place that looks at it.
        pattern = rule._target_pattern
        self.name = name or rule.name or "anonymous"
        if not pattern.has_single_output_node:
            raise PassError(f"rule {self.name}: its pattern has several roots", hint="write a planish Rule")
        root = pattern.output_node
        if any(value.producer() is not root for value in pattern.outputs):
            raise PassError(
                f"rule {self.name}: it replaces values inside its pattern", hint="write a planish Rule"
            )
        identifier = root.op_identifier()
        if identifier is None:
            self.roots = (ANY_OP,)
        else:
            domain, op_type, _ = identifier
            self.roots = (f"{domain}::{op_type}" if domain else op_type,)
        self._rule = rule
        self._types = types

    def apply(self, node: ir.Node) -> bool:
        """Match at ``node`` and put the replacement in."""
        run, graph = _current_run(), node.graph
        if graph is None or (self._types is not None and node.outputs[0].dtype not in self._types):
            return False
        # onnxscript adds the opset imports of a replacement before anybody can refuse it.
        imports = dict(graph.opset_imports)
        delta = self._rule.try_rewrite(run.model, graph, node)
        if delta is None:
            return False
        reason = self._objection(graph, run.model, delta)
        if reason:
            for new in delta.new_nodes:
                detach(new)
            graph.opset_imports.clear()
            graph.opset_imports.update(imports)
            return missed(node, reason)
        for value in delta.new_initializers:
            value.name = unique_name(str(value.name), run.value_names)
            run.model.graph.register_initializer(value)
        onnxscript.optimizer.basic_constant_propagation(delta.new_nodes)
        replacement = Replacement(node)
        for new in delta.new_nodes:
            replacement.adopt(new)
        replacement.finish(*delta.new_outputs)
        remove_dead(delta.match.nodes)
        return True

    def _objection(self, graph: ir.Graph, model: ir.Model, delta: Any) -> str | None:
        if any(matched.graph is not graph for matched in delta.match.nodes):
            return "the pattern reaches into another graph"
        for new in delta.new_nodes:
            version = model.graph.opset_imports.get(new.domain, 1)
            if not _op_exists(new.op_type, version, new.domain):
                return f"the replacement needs {new.op_type}, which opset {version} does not have"
        return None
