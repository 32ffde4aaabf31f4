"""Commands in processes of their own, forked from a server that has imported once what all of them need."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.server"])


def _print_to(descriptor):
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)


def _run(arguments, output, terminal, ignored, environment, begun):
    """Body of a process that is the installed command with these arguments; the server of forks ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN if signal.SIGINT in ignored else signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if terminal is not None:
        os.setsid()
        descriptor = os.open(terminal, os.O_RDWR)  # the controlling terminal of the new session
    else:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _print_to(descriptor)
    os.environ.update(environment)
    from pgdpo_fast.cli import script

    sys.argv = ["pgdpo-fast", *map(str, arguments)]
    begun.set()
    code = script()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Command:
    """The installed command in a process of its own; `wrote` is what it printed.

    Args:
        folder: where `printed.txt` takes what it prints, unless `terminal` names a terminal that does.
        ignored: signals it is started to ignore, as nohup does. environment: variables laid over this process's.
    """

    def __init__(self, folder, *arguments, terminal=None, ignored=(), environment=None, output="printed.txt"):
        self.output = folder / output
        self.output.touch()
        self.begun = FORK.Event()
        given = (arguments, str(self.output), terminal, ignored, environment or {}, self.begun)
        self.process = FORK.Process(target=_run, args=given)
        self.process.start()

    def wait_for(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.is_alive() and time.monotonic() < deadline, self.wrote
            time.sleep(0.01)

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self, seconds=120):
        """Exit code, and the seconds until the process was gone."""
        began = time.monotonic()
        self.process.join(seconds)
        assert not self.process.is_alive(), self.wrote
        return self.process.exitcode, time.monotonic() - began

    @property
    def wrote(self):
        return self.output.read_text()


def _run_script(script, arguments, output):
    """Body of a process that is `python SCRIPT ARGUMENTS...`."""
    _print_to(os.open(output, os.O_WRONLY | os.O_CREAT))
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


def run_scripts(folder, *calls):
    """What `python SCRIPT ARGUMENTS...` prints for every call, all of them run at once; each has to succeed."""
    outputs = [folder / f"script-{number}.txt" for number in range(len(calls))]
    processes = []
    for (script, *arguments), output in zip(calls, outputs, strict=True):
        given = (str(script), [str(argument) for argument in arguments], str(output))
        processes.append(FORK.Process(target=_run_script, args=given))
        processes[-1].start()
    for process in processes:
        process.join(300)
    printed = [output.read_text() if output.exists() else "" for output in outputs]
    assert [process.exitcode for process in processes] == [0] * len(calls), "\n".join(printed)
    return printed


def lines_of(path):
    return path.read_text().count("\n") if path.exists() else 0
