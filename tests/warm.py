"""Python processes that begin with torch and MONAI imported: forked from a server that has done so, once for many.

Importing takes some eight seconds, most of what a tiny run takes. `Warm.python` is a program that is used like
`python`: the process that it starts has its own folder, environment, arguments, streams, exit code and memory. Where a
test is about the start itself (a bare environment, a process that is killed), `sys.executable` starts it as usual.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMPORTS = ("monai.bundle", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.utils.tensorboard", "fire")


class Warm:
    """A server that runs `interpreter` in `environment`; it ends with this process, or by `close`.

    `python` and `torchrun` in `programs` take the place of the programs of these names; elsewhere than on Linux they
    are the usual ones.
    """

    def __init__(self, interpreter: str = sys.executable, environment: dict[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory()  # the path of a socket has to be short
        self.programs, address = Path(self._folder.name, "programs"), Path(self._folder.name, "socket")
        self.python, listening = str(self.programs / "python"), hasattr(os, "pidfd_open")
        self.programs.mkdir()
        client = f"'{interpreter}' -I -S '{__file__}' '{address}'" if listening else f"'{interpreter}'"
        for name, line in (("python", f'{client} "$@"'), ("torchrun", f'{self.python} -m torch.distributed.run "$@"')):
            (self.programs / name).write_text(f"#!/bin/sh\nexec {line}\n")
            (self.programs / name).chmod(0o755)
        command = [interpreter, "-W", "ignore", __file__, str(address), "serve"]
        self._server = None
        if listening:
            pipe, usual = subprocess.PIPE, {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            self._server = subprocess.Popen(command, env=environment or usual, stdin=pipe, stdout=pipe)
            assert self._server.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """End the server."""
        if self._server:
            self._server.communicate(timeout=60)
        self._folder.cleanup()


def serve(address: str) -> list[str]:
    """Fork a process for each request until the standard input is closed; returns, in that process, its arguments."""
    for name in IMPORTS:
        __import__(name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        gc.collect()
        gc.freeze()  # the forked processes share what is imported, unless a collection writes to it
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                sys.exit()
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
    length = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
    message, streams, _, _ = socket.recv_fds(connection, length, 3)
    while len(message) < length:
        message += connection.recv(length - len(message))
    request = json.loads(message)
    if process := os.fork():
        _watch(process, connection)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    return request["arguments"]


def _watch(process: int, connection: socket.socket) -> None:
    """Pass signals on to a process and its exit status back; one whose caller is gone is killed."""
    ended = os.pidfd_open(process)
    while True:
        ready, _, _ = select.select([ended, connection], [], [])
        if ended in ready:
            break
        number = connection.recv(1)
        os.kill(process, number[0] if number else signal.SIGKILL)
        if not number:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall((status if status >= 0 else 128 - status).to_bytes(1, "big"))
    os._exit(0)


def run(arguments: list[str], libraries: list[str]) -> None:
    """What `python` does with its arguments: a module, a command, the standard input or a file."""
    import runpy

    while arguments[0] in ("-u", "-W"):
        del arguments[: 2 if arguments[0] == "-W" else 1]
    kind, *rest = arguments
    named = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = os.getcwd() if kind == "-m" else "" if kind in ("-c", "-") else os.path.dirname(os.path.abspath(kind))
    sys.path[:] = [first, *named, *(path for path in libraries if path not in named)]
    sys.path_importer_cache.clear()
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = ["-c", *rest[1:]] if kind == "-c" else [kind, *rest]
    if kind in ("-c", "-"):
        exec(compile(rest[0] if kind == "-c" else sys.stdin.read(), "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


def end(function: Callable, *arguments: Any) -> None:
    """Call a function and end this process as an interpreter ends, but for taking down what it shares with others."""
    status = 0
    try:
        function(*arguments)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        if status == 1 and not isinstance(left.code, int):
            print(left.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ask(address: str, arguments: list[str]) -> int:
    """Have the server run `arguments` with the folder, environment and streams of this process; its exit status."""
    message = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        connection.sendall(len(message).to_bytes(8, "big"))
        sent = socket.send_fds(connection, [message], [0, 1, 2])
        connection.sendall(message[sent:])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        return int.from_bytes(connection.recv(1), "big")


if __name__ == "__main__":
    if sys.argv[2:] == ["serve"]:
        end(run, serve(sys.argv[1]), sys.path[1:])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
