"""Processes that train together notice when one of them is gone, and end with one line instead of waiting for ever.

Every process beats through the key-value store of jax's coordination service, which process 0 holds. Process 0 judges
who is silent; a process that leaves by itself says why. jax has a heartbeat too, but it aborts with a stack trace of
C++: it is set so long that ours comes first. Only where process 0 is the one that is gone does the abort stand, and it
is told in one line as well.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the store that jax and orbax agree through has no public name

from uae_jax.errors import UserError

JAX_FACTOR = 3  # jax's heartbeat in ours: it beats at half of it, and must not come first even so
_LOOKS = 50  # into the store in a heartbeat
_BEATS, _ENDED = "uae_jax/beats/", "uae_jax/ended/"
_AGAIN = "the same command, on all hosts, continues from the last checkpoint"


class Silence:
    """Since when each process has been silent."""

    def __init__(self, processes: int, now: float):
        self._heard: dict[int, tuple[str, float]] = dict.fromkeys(range(processes), ("", now))

    def longer(self, beats: Mapping[int, str], now: float, seconds: float) -> list[int]:
        """The processes whose beat has been the same for more than `seconds`.

        Args:
          beats: what each wrote last, a different text each time.
          now: seconds on the clock of this process; others' clocks do not matter.
          seconds: of silence.
        """
        for process, beat in beats.items():
            if beat != self._heard[process][0]:
                self._heard[process] = beat, now
        return [process for process, (_, at) in self._heard.items() if now - at > seconds]


class Watch:
    """Watches over the processes that train together, from `jax.distributed.initialize` on, in two threads."""

    def __init__(self, heartbeat: float):
        """Begins; `heartbeat` is how many seconds of silence mean death."""
        state = distributed.global_state
        self._client: Any = state.client
        self._process, self._count = state.process_id, state.num_processes
        self._coordinator = str(state.coordinator_address)
        self._heartbeat, self._pause = heartbeat, heartbeat / _LOOKS
        self._answered = time.monotonic()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._listen)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends jax's service when all processes are done; until then the threads watch."""
        self._client.wait_at_barrier("uae_jax/done", 2**31 - 1)
        self._closed.set()
        for thread in self._threads:
            thread.join()
        jax.distributed.shutdown()

    def leave(self, error: BaseException) -> NoReturn:
        """Ends this process for an error, and with it the others: they are told why.

        The exit code is 2 with one line where the user can fix it or another process is gone, 130 for Ctrl-C, 1 with a
        traceback for bugs.
        """
        gone = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
        if gone:  # most probably a collective that another process left: the threads then find it, and end this one
            time.sleep(1.5 * self._heartbeat)
        self._closed.set()
        said = " ".join(str(error).split())
        if isinstance(error, UserError):
            code = 2
            _print(f"error: {said}")
        elif isinstance(error, KeyboardInterrupt):
            code, said = 130, "interrupted"
            _print(said)
        else:
            code, said = 1, f"{type(error).__name__}: {said}"
            traceback.print_exception(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_ENDED}{self._process}", said[:500], allow_overwrite=True)
        self._exit(code)

    def _talk(self) -> None:
        """Beats, and hears who is gone."""
        silence = Silence(self._count, time.monotonic())
        while not self._closed.wait(self._pause):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # `_listen` judges that
                self._client.key_value_set(f"{_BEATS}{self._process}", str(time.monotonic()), allow_overwrite=True)
                if self._process == 0:
                    beats = {int(name.rsplit("/")[-1]): beat for name, beat in self._client.key_value_dir_get(_BEATS)}
                    for process in silence.longer(beats, time.monotonic(), self._heartbeat):
                        why = f"silent for {self._heartbeat:g} s (config.heartbeat_seconds)"
                        self._client.key_value_set(f"{_ENDED}{process}", why, allow_overwrite=True)
                ended = self._client.key_value_dir_get(_ENDED)
                self._answered = time.monotonic()
                # A moment, in which this process may meet and tell the same fault itself.
                if ended and not self._closed.wait(2 * self._pause):
                    name, why = ended[0]
                    self._end(f"process {name.rsplit('/')[-1]} of {self._count} is gone: {why}")

    def _listen(self) -> None:
        """Notices that process 0 no longer answers: a call to it may hang."""
        while not self._closed.wait(self._pause):
            silent = time.monotonic() - self._answered
            if silent > 1.2 * self._heartbeat:
                self._end(f"process 0 of {self._count} is gone: it has not answered for {silent:.0f} s")

    def lost(self) -> str | None:
        """What to tell when jax aborts this process, which it does as soon as process 0 is gone."""
        if self._process == 0:
            return None
        host, port = self._coordinator.rsplit(":", 1)
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return None
        return f"process 0 of {self._count} is gone; {_AGAIN}"

    def _end(self, why: str) -> NoReturn:
        _print(f"error: {why}; {_AGAIN}")
        self._exit(2)

    def _exit(self, code: int) -> NoReturn:
        """At once: the usual end waits for the others. But while process 0 is there, they can hear why."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._process == 0:
            time.sleep(6 * self._pause)
        os._exit(code)


@contextlib.contextmanager
def on_abort(line: Callable[[], str | None]) -> Iterator[None]:
    """Within it, a process that jax's client aborts ends with one more line and exit code 2, in place of SIGABRT.

    Args:
      line: gives what to tell, or None where the abort has another reason; it then goes on.
    """

    def aborted(_number: int) -> None:
        said = line()
        if said is not None:
            os.write(2, f"error: {said}\n".encode())
            os._exit(2)

    # Python's own handlers run too late: in the main thread.
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGABRT, signal.SIG_DFL)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
