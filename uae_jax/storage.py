"""Writing to disk: atomic files, and the faults that a user can fix told in one line."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from uae_jax.errors import UserError

_FIXABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


def _reason(error: BaseException | None) -> str | None:
    """The operating system's words for a fault of storage, or None where `error` is something else.

    Only an OSError carries a number; tensorstore tells the same in the message of a ValueError.
    """
    while error is not None:
        if isinstance(error, OSError):
            if error.errno in _FIXABLE:
                # mkdir says "File exists" of a file that stands where the folder should be
                return os.strerror(errno.ENOTDIR if error.errno == errno.EEXIST else error.errno)
        else:
            message = str(error)
            for number in _FIXABLE:
                if os.strerror(number) in message:
                    return os.strerror(number)
        error = error.__cause__
    return None


@contextlib.contextmanager
def storage_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns a fault of storage inside the block into a UserError that names `path`; other exceptions pass.

    Faults: no space, quota, file-size limit, read-only, no permission, a path that is (or lies below) a file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}; make room there or choose another place") from error


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Replaces a file as a whole: a reader, or a run killed in the middle, finds the old one or the new one.

    Parents are made. Raises UserError where the disk refuses; the old file then stands, and no debris.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def only_user(folder: str | os.PathLike) -> Iterator[None]:
    """Holds a folder, which is made where missing, for one process: by a lock that ends with the process, however.

    Raises:
      UserError: another process holds it, or the disk refuses.
    """
    lock = filelock.FileLock(Path(folder) / ".lock")
    with storage_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UserError(
                f"{folder} is in use by another run: wait for its end, or choose another --workdir"
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary folder beside `path`, which takes its name when the block ends and vanishes when that fails.

    Raises UserError where `path` exists and is not an empty folder, or the disk refuses.
    """
    path = Path(path).resolve()
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not an empty folder: choose another place, or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def close_at_exit(close: Callable[[], None], kind: type[BaseException] | None) -> None:
    """Closes; a UserError of it is dropped where an exception of `kind` is on its way out, for that is to be seen."""
    try:
        close()
    except UserError:
        if kind is None:
            raise
