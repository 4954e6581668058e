"""The cost of a program: collectives, FLOPs, live bytes.

Bytes of collectives are those that one rank sends over links in a ring, as in
``llamax.parallel.collectives``.  A matrix product over k elements counts 2 k FLOPs for each element
of its result, every other operation one FLOP for each element.

**Live bytes** are an estimate, because the compiler chooses the order and the fusions. Assumed:
operations run when a result needs them, those for the largest of its operands first, except that
one that frees more than it makes runs at once, as does all that is left to do with a result where
that makes no more; element-wise work is fused into its only user, but products are added up one by
one; an output reuses the memory of an input of the same shape (donation). An output that takes the
place of a tensor which the program does not read, as new weights do in the update, needs no memory
beside it: the old tensor is released first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from llamax.tools.audit.hlo import Instruction, Program, Shape

COLLECTIVES = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
}
NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "reshape", "broadcast", "iota"}
NO_WORK |= {"transpose", "slice", "convert", "bitcast", "copy", "opt-barrier", "concatenate"}
VIEWS = {"reshape", "get-tuple-element", "bitcast", "tuple", "opt-barrier"}
OWN_MEMORY = {"dot", "gather", "scatter", "reduce", "concatenate", "custom-call", "sort", "while"}
OWN_MEMORY |= {"dynamic-update-slice", "convolution", "conditional", "parameter"} | set(COLLECTIVES)

FEW = 64  # operations that run at once to free a result
SMALL_BYTES = 2**16  # results for which that is not tried
SPARE = 1.02  # what they may make, for each byte that they free

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind on one axis: their number, and the bytes that a rank sends."""

    kind: str
    axis: str
    count: int
    sent_bytes: int


def collectives(program: Program, axes: Mapping[str, Groups]) -> list[Traffic]:
    """The collectives of a program; ``axes``: axis name -> replica groups, first match."""
    count: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    for each in program.instructions:
        if each.opcode not in COLLECTIVES:
            continue
        groups = set(each.groups)
        ways = shifts if each.opcode == "collective-permute" else (lambda known: [set(known)])
        axis = next((name for name, known in axes.items() if groups in ways(known)), "other")
        key = (axis, each.opcode)
        count[key] += 1
        sent[key] += round(_sent(each, program))
    return [Traffic(kind, axis, count[axis, kind], sent[axis, kind]) for axis, kind in count]


def shifts(groups: Groups) -> list[set[tuple[int, ...]]]:
    """The (source, target) pairs of a shift around every group, by one rank either way."""
    return [
        {(group[i], group[(i + by) % len(group)]) for group in groups for i in range(len(group))}
        for by in (1, -1)
    ]


def communicators(program: Program) -> int:
    """The communicators of a program: one for each way in which its collectives group ranks."""
    return len({each.groups for each in program.instructions if each.opcode in COLLECTIVES})


def _sent(each: Instruction, program: Program) -> float:
    size = max(map(len, each.groups), default=1)
    if each.opcode == "collective-permute":
        return each.shape.nbytes
    whole = _payload(each) * (size if each.opcode == "reduce-scatter" else 1)
    return COLLECTIVES[each.opcode] * whole * (size - 1) / size


def _payload(each: Instruction) -> int:
    """Bytes of the result, without the token that torch-xla adds in a tuple."""
    shapes = each.shapes if len(each.shapes) == 1 else each.shapes[:-1]
    return sum(shape.nbytes for shape in shapes)


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products, and of everything else."""

    matmul_flops: int
    other_flops: int

    @property
    def matmul_share(self) -> float:
        total = self.matmul_flops + self.other_flops
        return self.matmul_flops / total if total else 0.0


def work(program: Program) -> Work:
    """The FLOPs of a program."""
    matmul = other = 0
    for each in program.instructions:
        if each.opcode == "dot":
            left = program.by_name[each.operands[0]].shape
            contracted = prod(left.dims[dim] for dim in each.ints("lhs_contracting_dims"))
            matmul += 2 * contracted * each.shape.elements
        elif each.opcode == "reduce":
            other += program.by_name[each.operands[0]].shape.elements
        elif each.opcode not in NO_WORK and each.opcode not in COLLECTIVES:
            other += sum(shape.elements for shape in each.shapes)
    return Work(matmul, other)


@dataclass(frozen=True)
class Live:
    """Bytes of inputs, of outputs with new memory, and the peak of intermediate results.

    ``replaced_bytes``: tensors that outputs replace, which are released before the program runs.
    """

    input_bytes: int
    output_bytes: int
    between_bytes: int
    replaced_bytes: int = 0

    @property
    def added_bytes(self) -> int:
        """The bytes that a run of the program adds to what is held between programs."""
        return max(self.output_bytes + self.between_bytes - self.replaced_bytes, 0)


def live(program: Program, replaceable: Iterable[Shape] = ()) -> Live:
    """The memory of one run of the program, by the assumptions above.

    ``replaceable``: the tensors that are held between programs and that outputs may replace.
    """
    by_name, needed = program.by_name, _needed(program)
    users: dict[str, list[str]] = {each.name: [] for each in needed}
    for each in needed:
        for operand in dict.fromkeys(each.operands):
            users[operand].append(each.name)
    outputs = {_whole(name, by_name): by_name[name].shape for name in program.outputs}
    own = {*outputs, *_sums(program, users)}
    size = {each.name: _allocated(each, users, own) for each in needed}
    needs = {each.name: _roots(each, by_name, size) for each in needed}
    waiting = Counter[str]()
    for name, roots in needs.items():
        if size[name] is not None:
            waiting.update(roots)
    for name in outputs:
        waiting.update([name] if size[name] is not None else needs[name])

    makers = _depth_first(needed, size, needs, outputs)
    available = Counter(str(each.shape) for each in program.parameters)
    wanted = Counter(map(str, outputs.values()))
    donated = {shape: min(available[shape], wanted[shape]) for shape in wanted}
    for (
        name,
        shape,
    ) in outputs.items():  # constants, such as cleared gradients, are written in place
        if size[name] is None and donated[str(shape)]:
            donated[str(shape)] -= 1

    consumers: dict[str, list[str]] = {}
    for name in makers:
        for root in needs[name]:
            consumers.setdefault(root, []).append(name)
    missing = {
        name: sum(by_name[root].opcode != "parameter" for root in needs[name]) for name in makers
    }
    old = Counter(map(str, replaceable))
    now = peak = output = replaced = 0
    left = dict(waiting)
    done: set[str] = set()

    def bytes_of(name: str) -> int:
        allocated = size[name]
        is_input = by_name[name].opcode == "parameter"
        return 0 if allocated is None or is_input else allocated

    def frees(name: str) -> int:
        return sum(bytes_of(root) for root in needs[name] if left[root] == 1)

    def finish(result: str) -> list[str]:
        """What is left to run before a result is freed; empty where it would make more."""
        if bytes_of(result) < SMALL_BYTES:
            return []
        found, seen, made = list[str](), set[str](), 0
        stack = [(user, False) for user in consumers.get(result, ()) if user not in done]
        if left[result] != len(stack):  # it is an output
            return []
        while stack:
            name, complete = stack.pop()
            if complete:
                found.append(name)
            elif name not in seen:
                seen.add(name)
                made += bytes_of(name)
                if made > SPARE * bytes_of(result) or len(seen) > FEW:
                    return []
                stack.append((name, True))
                unmade = (root for root in needs[name] if root in missing and root not in done)
                stack += [(root, False) for root in unmade if root not in seen]
        return found

    def run(name: str) -> None:
        nonlocal now, peak, output, replaced
        shape = str(outputs.get(name))
        if name in outputs and donated.get(shape, 0) > 0:
            donated[shape] -= 1
        else:
            now += bytes_of(name)
            if name in outputs:
                output += bytes_of(name)
                replaced += bytes_of(name) if old[shape] > 0 else 0
                old[shape] -= 1
        peak = max(peak, now)
        done.add(name)
        for root in needs[name]:
            left[root] -= 1
            if not left[root]:
                now -= bytes_of(root)

    for first in makers:
        stack = [first]
        while stack:
            name = stack.pop()
            if name in done or missing[name]:
                continue
            run(name)
            for user in consumers.get(name, ()):
                missing[user] -= 1
            last = [user for root in needs[name] if left[root] == 1 for user in consumers[root]]
            stack += [
                user
                for user in (*last, *consumers.get(name, ()))
                if user not in done and not missing[user]
                if user in own or frees(user) >= bytes_of(user)
            ]
            stack += next(filter(None, map(finish, (name, *needs[name]))), [])[::-1]
    inputs = sum(each.nbytes for each in program.parameters)
    return Live(inputs, output, peak - output, replaced)


def _needed(program: Program) -> list[Instruction]:
    """The instructions that a result needs; a compiler leaves out the others.

    Such is the last number by which torch-xla makes one collective follow another: it needs all of
    them, and would be ready before any product.
    """
    found, stack = set[str](), [*program.outputs]
    while stack:
        name = stack.pop()
        if name not in found:
            found.add(name)
            stack += program.by_name[name].operands
    return [each for each in program.instructions if each.name in found]


def _depth_first(
    needed: Sequence[Instruction],
    size: Mapping[str, int | None],
    needs: Mapping[str, Sequence[str]],
    outputs: Container[str],
) -> list[str]:
    """What has memory of its own, each after what it needs, and of that the largest first."""
    names = [each.name for each in needed if each.opcode != "parameter"]
    makers = [name for name in names if size[name] is not None]
    weights: dict[str, int] = {}  # bytes on the path to a result that makes most
    for name in makers:
        before = (weights[root] for root in needs[name] if root in weights)
        weights[name] = (size[name] or 0) + max(before, default=0)
    read = {root for name in makers for root in needs[name]}
    order: dict[str, None] = {}
    stack = [(name, False) for name in reversed(makers) if name in outputs or name not in read]
    seen = set[str]()
    while stack:
        name, complete = stack.pop()
        if complete:
            order[name] = None
        elif name not in seen:
            seen.add(name)
            stack.append((name, True))
            unmade = [root for root in needs[name] if root in weights and root not in seen]
            stack += [(root, False) for root in sorted(unmade, key=weights.__getitem__)]
    return [*order]


def _whole(name: str, by_name: Mapping[str, Instruction]) -> str:
    """The instruction that a result is another shape of."""
    while by_name[name].opcode in ("reshape", "bitcast"):
        (name,) = by_name[name].operands
    return name


def _allocated(
    each: Instruction, users: Mapping[str, list[str]], own: Container[str]
) -> int | None:
    """Bytes allocated for a result; None where it is fused away or a view."""
    if each.opcode in VIEWS or each.opcode in ("constant", "iota", "broadcast"):
        return None
    if each.opcode in OWN_MEMORY or each.name in own or len(users[each.name]) > 1:
        return each.nbytes
    return None


def _sums(program: Program, users: Mapping[str, list[str]]) -> set[str]:
    """The sums over several matrix products, which take them one by one: 0 + a, then + b, ..."""
    found, by_name = set[str](), program.by_name

    def is_product(name: str) -> bool:
        while by_name[name].opcode in ("convert", "multiply") and len(users[name]) == 1:
            name = by_name[name].operands[0]
        return by_name[name].opcode == "dot" and len(users[name]) == 1

    for each in program.instructions:
        if each.opcode == "add":
            a, b = each.operands
            other = b if is_product(a) else a if is_product(b) else ""
            if other in found or (other and by_name[other].opcode == "broadcast"):
                found.add(each.name)
    return found


def _roots(
    each: Instruction, by_name: Mapping[str, Instruction], size: Mapping[str, int | None]
) -> tuple[str, ...]:
    """The allocated results that an instruction reads, through the operations fused into it."""
    found: dict[str, None] = {}
    stack, seen = list(each.operands), set(each.operands)
    while stack:
        name = stack.pop()
        if size[name] is not None:
            found[name] = None
            continue
        fresh = [operand for operand in by_name[name].operands if operand not in seen]
        seen.update(fresh)
        stack += fresh
    return tuple(found)
