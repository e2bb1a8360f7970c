"""The threads that PyTorch itself computes on, for our kernels too.

PyTorch's OpenMP threads spin for a while after each of its operators. Threads of our own have to share the cores with
them: on two cores a kernel that follows an operator then takes up to twice as long as with one thread. Run on the
spinning threads themselves it begins at once, a microsecond after the call; no thread takes Python's lock for it.
"""

# Typed by numba, when it is compiled:
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WORD, _INT, _BYTES = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
_forked = False


def team() -> int | None:
    """What ``parallel`` needs: the address of ``GOMP_parallel``. None where PyTorch runs on something else than GNU's
    OpenMP, and in a forked child, which has OpenMP's state but not its threads, and would wait for them for ever."""
    return None if _forked else _team()


@intrinsic
def parallel(typing, team, threads, tasks, pieces, kernel, arguments):
    """``kernel(first, last, *arguments)`` over ``tasks`` (first, last), in so many pieces, on so many threads of
    PyTorch's, the caller's among them; whoever is free takes the next piece. Returns when all are done. Only inside
    compiled functions, which pass ``kernel`` by its global name.

    Without a ``team`` (0) the caller does all by itself: by the same code, for a kernel is compiled once more in here,
    and may add in another order than the one outside.

    Raises MemoryError where a kernel could not have its buffers (they raise nothing else).
    """
    call = kernel.get_call_type(typing, (types.intp, types.intp, *arguments.types), {})

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
        compiled = kernel.dispatcher.get_compile_result(call)
        context.active_code_library.add_linking_library(compiled.library)
        _keep_copies(context.active_code_library)
        # What the threads share: the arguments, the next piece, tasks, pieces, whether any failed.
        team, threads, tasks, pieces, _, held = values
        shape = ir.LiteralStructType([held.type, _WORD, tasks.type, _WORD, _WORD])
        shared = cgutils.alloca_once(builder, shape)
        for place, value in enumerate((held, _WORD(0), tasks, pieces, _WORD(0))):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, place))
        body = _body(context, builder, shared.type, compiled.fndesc, call)
        kind = ir.FunctionType(ir.VoidType(), [body.type, _BYTES, _INT, _INT])
        data = builder.bitcast(shared, _BYTES)
        with builder.if_else(builder.icmp_signed("!=", team, _WORD(0))) as (together, alone):
            with together:
                start = builder.inttoptr(team, kind.as_pointer())
                builder.call(start, [body, data, builder.trunc(threads, _INT), _INT(0)])
            with alone:
                builder.call(body, [data])
        failed = builder.load(cgutils.gep_inbounds(builder, shared, 0, 4))
        with builder.if_then(builder.icmp_signed("!=", failed, _WORD(0)), likely=False):
            context.call_conv.return_user_exc(builder, MemoryError, ("a kernel could not have its buffers",))
        return context.get_dummy_value()

    return types.none(team, threads, tasks, pieces, kernel, arguments), generate


def _keep_copies(library: Any) -> None:
    """Bind what a function calls to the copies compiled with it. The process that compiles has those functions by
    themselves, too, optimised for themselves, and the linker would take them; a process that loads the function from
    numba's cache has its copies alone, and would give other last bits."""
    optimize = library._optimize_final_module

    def localise() -> None:
        for function in library._final_module.functions:
            if not function.is_declaration and function.linkage.name == "linkonce_odr":
                function.linkage = "internal"
        optimize()

    library._optimize_final_module = localise


def _body(context: Any, caller: Any, shared: Any, kernel: Any, call: Any) -> Any:
    """What every thread runs: piece after piece, as long as there are any."""
    name = f"{caller.function.name}.pieces"
    body = ir.Function(caller.module, ir.FunctionType(ir.VoidType(), [_BYTES]), name)
    body.linkage = "internal"
    builder = ir.IRBuilder(body.append_basic_block("entry"))
    data = builder.bitcast(body.args[0], shared)
    held, following, tasks, pieces, failed = (cgutils.gep_inbounds(builder, data, 0, place) for place in range(5))
    arguments, tasks, pieces = (builder.load(place) for place in (held, tasks, pieces))
    loop, work, done = (body.append_basic_block(name) for name in ("loop", "work", "done"))
    builder.branch(loop)
    builder.position_at_end(loop)
    piece = builder.atomic_rmw("add", following, _WORD(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", piece, pieces), work, done)
    builder.position_at_end(work)
    begin, end = cgutils.unpack_tuple(builder, tasks)
    count = builder.sub(end, begin)
    first, last = (
        builder.add(begin, builder.sdiv(builder.mul(count, at), pieces)) for at in (piece, builder.add(piece, _WORD(1)))
    )
    unpacked = [
        _unowned(context, builder, kind, value)
        for kind, value in zip(call.args[2:], cgutils.unpack_tuple(builder, arguments), strict=True)
    ]
    status, _ = context.call_internal_no_propagate(builder, kernel, call, [first, last, *unpacked])
    with builder.if_then(status.is_error, likely=False):
        builder.store(_WORD(1), failed)
    builder.branch(loop)
    builder.position_at_end(done)
    builder.ret_void()
    return body


def _unowned(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """An array without its owner, who outlives the call: threads that counted references to one would wait for each
    other at every slice. Anything else as it is."""
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    return array._getvalue()


@functools.cache
def _team() -> int | None:
    """The address of ``GOMP_parallel`` of the one GNU OpenMP in this process, if there is just one."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    found = {line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line}
    if len(found) != 1:
        return None
    return ctypes.cast(ctypes.CDLL(found.pop()).GOMP_parallel, ctypes.c_void_p).value


def _forget() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
