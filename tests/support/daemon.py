"""qemu-storage-daemon as a peer: started, asked over QMP, stopped. Also used by the benchmarks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["CommandFailed", "Daemon"]


class CommandFailed(Exception):
    """QMP answered with an error."""


class Daemon:
    """A running daemon. A context manager.

    :param folder: where its socket goes
    :ivar events: those that came, oldest first
    """

    def __init__(self, program: str, folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        path = folder / "qmp.sock"
        path.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [program, "--chardev", f"socket,id=qmp,path={path},server=on,wait=off", "--monitor", "chardev=qmp"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._connect(path)
        self._lines = self._socket.makefile("rb")
        self._read()  # the greeting
        self("qmp_capabilities")

    def _connect(self, path: Path) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self._socket.connect(str(path))
                return
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.01)

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            line = b""
        if not line:
            raise CommandFailed("the daemon has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __call__(self, command: str, **arguments: object) -> Any:
        """Run a command; underscores in names become dashes."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": given}).encode() + b"\n")
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise CommandFailed(answer["error"]["desc"])
            else:
                return answer["return"]

    def wait(self, event: str, condition: Callable[[dict[str, Any]], bool] = lambda data: True) -> dict[str, Any]:
        """The data of the first ``event`` that fits; earlier events are forgotten."""
        while True:
            while self.events:
                found = self.events.pop(0)
                if found["event"] == event and condition(found.get("data", {})):
                    data: dict[str, Any] = found.get("data", {})
                    return data
            answer = self._read()
            if "event" in answer:
                self.events.append(answer)

    def open(self, name: str, path: object, driver: str = "qcow2", **options: object) -> None:
        """``blockdev-add``."""
        file = {"driver": "file", "filename": str(path), "discard": "unmap"}
        self("blockdev-add", driver=driver, node_name=name, file=file, discard="unmap", **options)

    def concluded(self, job: str) -> None:
        """Wait until the job is over.

        :raises CommandFailed: with its error
        """
        self.wait("JOB_STATUS_CHANGE", lambda data: data["id"] == job and data["status"] == "concluded")
        (found,) = (each for each in self("query-jobs") if each["id"] == job)
        self("job-dismiss", id=job)
        if "error" in found:
            raise CommandFailed(found["error"])

    def processor(self) -> float:
        """Seconds of processor time that it has used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        try:
            self("quit")
        except (OSError, CommandFailed):
            self._process.terminate()
        self._lines.close()
        self._socket.close()
        self._process.wait(20)
        if self._process.stderr is not None:
            self._process.stderr.close()
