"""Raises KeyboardInterrupt where Python would: in a function's beginning and after a call.

Python looks for signals there, and where a loop begins anew (tried before Python 3.12 only). Each
such place in this library's own code is a moment, and so is the beginning of each function of
others that it calls.
"""

import contextlib
import dis
import functools
import itertools
import pathlib
import sys

import jdropout

_LIBRARY = str(pathlib.Path(jdropout.__file__).parent)


def count(function):
    """The number of moments in a call of the function."""
    return _run(function, None)


def interrupt(function, moment):
    """Calls the function and interrupts it; returns whether it did come out of it."""
    try:
        _run(function, moment)
    except KeyboardInterrupt:
        return True
    return False


def _run(function, last):
    passed = 0

    def in_code(code):
        if _is_ours(code):
            pass_moment()

    def begins(frame):
        if _is_ours(frame.f_code) or (frame.f_back and _is_ours(frame.f_back.f_code)):
            pass_moment()

    def pass_moment():
        nonlocal passed
        passed += 1
        if passed - 1 == last:
            raise KeyboardInterrupt

    with _moments(in_code, begins):
        function()
    return passed


@functools.cache
def _is_ours(code):
    return code.co_filename.startswith(_LIBRARY)


@contextlib.contextmanager
def _monitored(in_code, begins):
    """Calls `begins` with each frame that begins, and `in_code` with the code of other moments."""
    monitoring, events = sys.monitoring, sys.monitoring.events
    tool = monitoring.DEBUGGER_ID

    def returned(code, offset, called, argument):
        # Nothing can be done between the acquisition of a lock by `with` and the block under it.
        if getattr(called, "__name__", "") != "__enter__":
            in_code(code)

    callbacks = {
        events.PY_START: lambda code, offset: begins(sys._getframe(1)),
        events.PY_RESUME: lambda code, offset: in_code(code),
        events.C_RETURN: returned,
    }
    monitoring.use_tool_id(tool, "interrupts")
    for event, callback in callbacks.items():
        monitoring.register_callback(tool, event, callback)
    # C_RETURN comes with CALL only.
    monitoring.set_events(tool, events.PY_START | events.PY_RESUME | events.CALL)
    try:
        yield
    finally:
        monitoring.set_events(tool, events.NO_EVENTS)
        for event in callbacks:
            monitoring.register_callback(tool, event, None)
        monitoring.free_tool_id(tool)


@contextlib.contextmanager
def _traced(in_code, begins):
    """The same before Python 3.12."""

    def called(frame, event, argument):
        begins(frame)
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step if _is_ours(frame.f_code) else None

    def step(frame, event, argument):
        if event == "opcode" and frame.f_lasti in _where_python_has_looked(frame.f_code):
            in_code(frame.f_code)
        return step

    before = sys.gettrace()
    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(before)


@functools.cache
def _where_python_has_looked(code):
    """The offsets of the instructions that follow a call, or a jump to the start of a loop."""
    instructions = [*dis.get_instructions(code)]
    after_calls = {
        after.offset
        for each, after in itertools.pairwise(instructions)
        if each.opname in ("CALL", "CALL_FUNCTION_EX")
    }
    return after_calls | {each.argval for each in instructions if each.opname == "JUMP_BACKWARD"}


_moments = _monitored if sys.version_info >= (3, 12) else _traced
