"""Raises KeyboardInterrupt where Python would: in a function's beginning, after a call, in a loop.

Python looks for signals at these instructions only. Every one of them in this library's own code
is a moment, and so is the beginning of each function of others that it calls.
"""

import dis
import functools
import pathlib
import sys

import jdropout

_LIBRARY = str(pathlib.Path(jdropout.__file__).parent)


def count(function):
    """The number of moments in a call of the function."""
    return _Tracer(None).run(function)


def interrupt(function, moment):
    """Calls the function and interrupts it; returns whether it did come out of it."""
    try:
        _Tracer(moment).run(function)
    except KeyboardInterrupt:
        return True
    return False


class _Tracer:
    def __init__(self, moment):
        self.moment = moment
        self.passed = 0

    def run(self, function):
        before = sys.gettrace()
        sys.settrace(self.called)
        try:
            function()
        finally:
            sys.settrace(before)
        return self.passed

    def called(self, frame, event, argument):
        ours = _is_ours(frame.f_code.co_filename)
        if ours or (frame.f_back and _is_ours(frame.f_back.f_code.co_filename)):
            self.pass_moment()
        if not ours:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        looks = _where_python_looks(frame.f_code)
        previous = None

        def step(frame, event, argument):
            nonlocal previous
            if event == "opcode":
                if previous in looks:
                    self.pass_moment()
                previous = frame.f_lasti
            return step

        return step

    def pass_moment(self):
        if self.passed == self.moment:
            self.moment = None
            sys.settrace(None)
            raise KeyboardInterrupt
        self.passed += 1


@functools.cache
def _is_ours(file):
    return file.startswith(_LIBRARY)


@functools.cache
def _where_python_looks(code):
    names = ("CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD")
    return {each.offset for each in dis.get_instructions(code) if each.opname in names}
