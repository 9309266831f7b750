"""A tree of all suffixes of some texts, cut at a depth, with counts: what followed these ids, and how often?

Oliaro and others, SuffixDecoding (2024, arXiv 2411.04975). A path from the root spells ids that occur in a text; its
count says how often. A node stands for one id or more, where nothing branches off between them, so there are at most
two nodes for each id of a text and depth. Where two continuations are as frequent, the one is proposed that reached
that count in the order of this tree: as in arctic-inference 0.3, which the tests compare with.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

SINGLE = struct.Struct("f")
EPSILON = 1e-6  # so that 10 * 0.1 ids are one


class Node:
    """Ids ids[start : start + length] behind those of its parent, which occur count times.

    children: by their first id, linked in the order of first, next and previous: the most frequent first. ends: of each
    count that children have, the first and the last of them.
    """

    __slots__ = ("children", "count", "ends", "first", "ids", "last", "length", "next", "parent", "previous", "start")

    def __init__(self, parent: Node | None, ids: list[int], start: int, length: int, count: int) -> None:
        self.parent, self.ids, self.start, self.length, self.count = parent, ids, start, length, count
        self.children: dict[int, Node] = {}
        self.ends: dict[int, list[Node]] = {}
        self.first: Node | None = None
        self.last: Node | None = None
        self.next: Node | None = None
        self.previous: Node | None = None


@dataclass
class Text:
    """A text that may still grow. nodes: where its suffixes end, the longest one first."""

    ids: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Proposal:
    """ids: of the likely continuation. score: the sum of their probabilities by the tree's counts, in float32."""

    ids: list[int]
    score: float


NOTHING = Proposal([], 0.0)


class SuffixTree:
    """Of texts that are appended id by id, and removed in the order in which they were begun.

    A text must be complete before the next one is begun, if any is to be removed: then the ids of a node are those of
    the last text that passes through it.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.root = Node(None, [], 0, 0, 0)

    def append(self, text: Text, token: int) -> None:
        """Add an id to a text: each of its last `depth` suffixes grows by it."""
        ids, nodes = text.ids, text.nodes
        self.root.count += 1
        nodes.append(self.root)
        if len(nodes) > self.depth:
            del nodes[0]
        ids.append(token)
        end = len(ids)
        for index, node in enumerate(nodes):
            child = node.children.get(token)
            is_root = node.parent is None
            if child is None:
                if node.count == 1 and not is_root:  # a leaf of this suffix alone
                    node.length += 1
                else:
                    nodes[index] = child = Node(node, ids, end - 1, 1, 1)
                    node.children[token] = child
                    _insert(child, None)
            elif node.count == child.count + 1 and not is_root:  # every other suffix goes on to the child, now this too
                if child.length == 1:
                    child.count += 1
                    child.length = node.length + 1
                    child.ids, child.start = ids, end - child.length
                    _take_place(node, child)
                    nodes[index] = child
                else:
                    node.length += 1
                    node.ids, node.start = ids, end - node.length
                    del node.children[token]
                    child.start, child.length = child.start + 1, child.length - 1
                    node.children[child.ids[child.start]] = child
            else:
                if child.length > 1:  # this suffix ends within it
                    rest, child = child, Node(node, ids, end - 1, 1, child.count)
                    _take_place(rest, child)
                    rest.start, rest.length, rest.parent = rest.start + 1, rest.length - 1, child
                    child.children[rest.ids[rest.start]] = rest
                    _insert(rest, None)
                child.ids, child.start = ids, end - 1
                _count_up(child)
                nodes[index] = child

    def remove(self, ids: Sequence[int]) -> None:
        """Remove the text that was begun first."""
        for begin in range(len(ids)):
            node = self.root
            node.count -= 1
            at = begin
            while at < len(ids) and (child := node.children.get(ids[at])) is not None:
                if child.count == 1:
                    _detach(child)
                    del node.children[ids[at]]
                    break
                _count_down(child)
                at += child.length
                node = child
            if node.parent is not None and len(node.children) == 1:
                (child,) = node.children.values()
                if child.count == node.count:  # nothing ends or branches off between them
                    child.start, child.length = child.start - node.length, child.length + node.length
                    _take_place(node, child)

    def propose_for(self, text: Text, max_ids: int, factor: float, min_probability: float) -> Proposal:
        """What follows the last ids of a text of this tree, as `propose` does."""
        best = NOTHING
        for match in range(min(self.depth, len(text.ids)) - 1, 0, -1):
            limit = min(max_ids, int(match * factor + EPSILON))
            if best.score >= limit:  # a shorter match cannot reach more
                break
            node = text.nodes[-match]
            if node.first is not None:
                best = _better(best, _walk(node, node.length, limit, min_probability))
        return best

    def propose(self, context: Sequence[int], max_ids: int, factor: float, min_probability: float) -> Proposal:
        """The best continuation of the context's last ids, of any number below `depth` that occurs.

        From each match on, ids are taken as long as the tree gives their path min_probability, and at most max_ids and
        factor times the length of the match. The highest score wins, of equal ones the longest match.
        """
        best = NOTHING
        longest, too_long = 0, min(self.depth, len(context))
        while longest + 1 < too_long:  # what occurs, occurs without its first id too
            middle = (longest + too_long) // 2
            longest, too_long = (middle, too_long) if self._find(context, middle) else (longest, middle)
        for match in range(longest, 0, -1):
            limit = min(max_ids, int(match * factor + EPSILON))
            if best.score >= limit:
                break
            found = self._find(context, match)
            assert found is not None
            best = _better(best, _walk(*found, limit, min_probability))
        return best

    def _find(self, context: Sequence[int], match: int) -> tuple[Node, int] | None:
        """The node in which the last `match` ids of the context end, and after how many of its ids; None: nowhere."""
        node, at = self.root, 0
        for token in context[len(context) - match :]:
            if at == node.length:
                child = node.children.get(token)
                if child is None:
                    return None
                node, at = child, 1
            elif node.ids[node.start + at] == token:
                at += 1
            else:
                return None
        return node, at


def _better(best: Proposal, other: Proposal) -> Proposal:
    """The other one, of a shorter match, where its score is higher."""
    return other if other.score > best.score else best


def _walk(node: Node, at: int, max_ids: int, min_probability: float) -> Proposal:
    """Go on from a place in a node along the most frequent children."""
    ids: list[int] = []
    probability, score, least = 1.0, 0.0, _single(min_probability)
    while len(ids) < max_ids and probability >= least:
        if at == node.length:
            child = node.first
            if child is None:
                break
            probability = _single(probability * _single(child.count / node.count))
            node, at = child, 0
        else:
            ids.append(node.ids[node.start + at])
            score = _single(score + probability)
            at += 1
    return Proposal(ids, score)


def _single(value: float) -> float:
    """Rounded to float32, as the reference computes."""
    rounded: float = SINGLE.unpack(SINGLE.pack(value))[0]
    return rounded


def _insert(node: Node, before: Node | None) -> None:
    """Link a node into its parent's order before a sibling, or behind the last one."""
    parent = node.parent
    assert parent is not None
    node.next, node.previous = before, parent.last if before is None else before.previous
    _link(node)
    ends = parent.ends.get(node.count)
    if ends is None:
        parent.ends[node.count] = [node, node]
    elif ends[0] is node.next:
        ends[0] = node
    else:
        ends[1] = node


def _link(node: Node) -> None:
    """Let the neighbours of a node, or its parent, point to it."""
    parent = node.parent
    assert parent is not None
    if node.previous is None:
        parent.first = node
    else:
        node.previous.next = node
    if node.next is None:
        parent.last = node
    else:
        node.next.previous = node


def _leave_ends(node: Node) -> None:
    """Take a node out of the ends of its count."""
    assert node.parent is not None
    ends = node.parent.ends
    first, last = ends[node.count]
    if first is last:
        del ends[node.count]
    elif first is node:
        assert node.next is not None
        ends[node.count][0] = node.next
    elif last is node:
        assert node.previous is not None
        ends[node.count][1] = node.previous


def _detach(node: Node) -> None:
    """Take a node out of its parent's order."""
    parent = node.parent
    assert parent is not None
    _leave_ends(node)
    if node.previous is None:
        parent.first = node.next
    else:
        node.previous.next = node.next
    if node.next is None:
        parent.last = node.previous
    else:
        node.next.previous = node.previous


def _take_place(node: Node, other: Node) -> None:
    """Put a node of the same count in another's place below its parent."""
    parent = node.parent
    assert parent is not None
    other.parent, other.next, other.previous = parent, node.next, node.previous
    _link(other)
    parent.children[other.ids[other.start]] = other
    ends = parent.ends[node.count]
    ends[:] = [other if end is node else end for end in ends]


def _count_up(node: Node) -> None:
    """Add 1 to a node's count, and move it past the siblings that it overtakes."""
    previous, parent = node.previous, node.parent
    assert parent is not None
    if previous is None or previous.count > node.count + 1:
        _leave_ends(node)
        node.count += 1
        parent.ends[node.count] = [node, node]
    else:
        before = parent.ends[previous.count][0]
        _detach(node)
        node.count += 1
        _insert(node, before)


def _count_down(node: Node) -> None:
    """Take 1 from a node's count, and move it behind the siblings that overtake it."""
    following, parent = node.next, node.parent
    assert parent is not None
    if following is not None and following.count == node.count:
        last = parent.ends[node.count][1]
        _detach(node)
        node.count -= 1
        _insert(node, last.next)
        return
    _leave_ends(node)
    node.count -= 1
    ends = parent.ends.get(node.count)
    if ends is None:
        parent.ends[node.count] = [node, node]
    else:
        ends[0] = node
