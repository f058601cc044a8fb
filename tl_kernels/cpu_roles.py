"""Roles of warps on the CPU target (tl_kernels/cpu.py): branches on the thread index become one statement after another.

They run in an order that their named barriers allow, and barriers then do nothing. Where each role has a loop of its own and all end at the
same iteration, they take turns iteration by iteration.
"""

import functools
import itertools

from tilelang import tvm
from tvm import tirx

COMPARE = (tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE)


def op_of(node):
    """Name of the intrinsic a node calls, or an empty string."""
    return getattr(getattr(node, "op", None), "name", "") if isinstance(node, tirx.Call) else ""


def find(node, wanted):
    """All nodes below one for which ``wanted`` holds."""
    found = []
    tirx.stmt_functor.post_order_visit(node, lambda part: found.append(part) if wanted(part) else None)
    return found


def _barriers(stmt):
    """Named barriers a role waits at, and those it only arrives at."""
    waits, arrives = set(), set()
    for call in find(stmt, op_of):
        if op_of(call) == "tirx.tvm_storage_sync":
            waits.add(str(call.args[1]) if len(call.args) > 1 else "0")
        elif op_of(call) == "tl.named_barrier_arrive":
            arrives.add(str(call.args[0]))
    return waits, arrives


def _arrange(roles, order):
    """Roles one after another: those that only arrive at a barrier before those that wait there, else as written.

    Every legal order must give the same results. ``order`` picks another of them, so that a test can look for races. Only barriers between
    branches of one ``if`` count.
    """
    waits, arrives = zip(*(_barriers(role) for role in roles), strict=True)
    for i, j in itertools.combinations(range(len(roles)), 2):
        if waits[i] & waits[j]:
            raise ValueError(f"two roles wait for each other at barrier {', '.join(sorted(waits[i] & waits[j]))}: not for the CPU target")

    def legal(chosen):
        return not any(waits[first] & arrives[then] for first, then in itertools.combinations(chosen, 2))

    orders = [chosen for chosen in itertools.permutations(range(len(roles))) if legal(chosen)]
    if not orders:
        raise ValueError("each of the roles waits at a barrier for another: not for the CPU target, which runs them one after another")
    return [roles[i] for i in orders[order % len(orders)]]


def _steps(stmt):
    """The statements of a sequence, of one in it too."""
    return [step for part in stmt.seq for step in _steps(part)] if isinstance(stmt, tirx.SeqStmt) else [stmt]


def _only_loop(role):
    """The one loop in order that a role is, beside what comes before and after; None where there is none, or several."""
    found = [step for step in _steps(role) if isinstance(step, tirx.For) and step.kind == tirx.ForKind.SERIAL]
    return found[0] if len(found) == 1 and isinstance(found[0].min, tirx.IntImm) else None


def _end(loop):
    """Where a loop ends; loops that end together may take turns, whichever begins later."""
    return str(tvm.arith.Analyzer().simplify(loop.min + loop.extent))


def _beginning(steps):
    """Index and name of the barrier that an iteration begins at, nothing but waiting before it; (None, None) where there is none."""
    for i, step in enumerate(steps):
        waits, arrives = _barriers(step)
        if waits and isinstance(step, tirx.Evaluate):
            return i, waits
        if waits or arrives or find(step, lambda node: isinstance(node, (tirx.BufferStore, tirx.For, tirx.While))):
            break
    return None, None


def _fuse(roles, loops, order):
    """What the roles do before their loops, one loop in which they take turns, and what they do after. Where all begin an iteration at one
    barrier, all of them have ended the one before, as in one loop. A loop that begins later is left out of the iterations before.
    """
    before, after, bodies = [], [], []
    first = min(loops, key=lambda loop: int(loop.min))
    for role, loop in zip(roles, loops, strict=True):
        steps = _steps(role)
        at = next(i for i, step in enumerate(steps) if step.same_as(loop))
        before += steps[:at]
        after += steps[at + 1 :]
        bodies.append(_steps(tirx.stmt_functor.substitute(loop.body, {loop.loop_var: first.loop_var})))
    begin = [_beginning(steps) for steps in bodies]
    if all(name is not None and name == begin[0][1] for _, name in begin):
        bodies = [[*steps[:at], *steps[at + 1 :]] for steps, (at, _) in zip(bodies, begin, strict=True)]
    bodies = [tirx.SeqStmt(steps) if len(steps) > 1 else steps[0] for steps in bodies]
    bodies = [
        body if int(loop.min) == int(first.min) else tirx.IfThenElse(first.loop_var >= loop.min, body, None)
        for body, loop in zip(bodies, loops, strict=True)
    ]
    body = tirx.SeqStmt(_arrange(bodies, order))
    return [*before, tirx.For(first.loop_var, first.min, first.extent, tirx.ForKind.SERIAL, body), *after]


def lower_roles(body, order):
    """One thread plays every role: branches on the thread index all run. It has no other use on this target.

    ``order``: see :func:`_arrange`.
    """
    threads = {
        bind.var for bind in find(body, lambda node: isinstance(node, tirx.stmt.Bind) and op_of(node.value) == "tl.launch_thread_idx")
    }

    def uses_thread(node):
        return bool(find(node, lambda part: isinstance(part, tirx.Var) and part in threads))

    def conjuncts(node):
        return [*conjuncts(node.a), *conjuncts(node.b)] if isinstance(node, tirx.And) else [node]

    def is_role(condition):
        """A thread index compared with a number."""
        if not isinstance(condition, COMPARE):
            return False
        kinds = {"thread" if side in threads else "number" if isinstance(side, tirx.IntImm) else "" for side in (condition.a, condition.b)}
        return kinds == {"thread", "number"}

    def branches(stmt):
        """Branches of an if that chooses among roles, of all its elifs too."""
        if not (isinstance(stmt, tirx.IfThenElse) and uses_thread(stmt.condition)):
            return [stmt]
        parts = conjuncts(stmt.condition)
        others = [part for part in parts if not uses_thread(part)]
        if any(uses_thread(part) and not is_role(part) for part in parts) or (others and stmt.else_case):
            raise ValueError(f"a role is chosen by comparing the thread index with a number, got: {stmt.condition}")
        role = stmt.then_case if not others else tirx.IfThenElse(functools.reduce(tirx.And, others), stmt.then_case, None)
        return [role, *(branches(stmt.else_case) if stmt.else_case else [])]

    def lower(stmt):
        if not uses_thread(stmt.condition):
            return None
        roles = branches(stmt)
        loops = [_only_loop(role) for role in roles]
        if len(roles) > 1 and None not in loops and len(set(map(_end, loops))) == 1:
            roles = _fuse(roles, loops, order)
        else:
            roles = _arrange(roles, order)
        roles = [transform(role) for role in roles]
        return tirx.SeqStmt(roles) if len(roles) > 1 else roles[0]

    def transform(stmt):
        return tirx.stmt_functor.ir_transform(stmt, lower, None, ["tirx.IfThenElse"])

    body = transform(body) if threads else body
    if threads and uses_thread(body):
        raise ValueError("the thread index may only choose roles on the CPU target: `if tx < 128`")
    return body
