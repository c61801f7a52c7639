"""What every command does round its work: flags, preparing the process, errors as one line and an exit code."""

import ctypes
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from uae_jax.errors import UserError


def parse(values: flags.FlagValues, arguments: list[str]) -> ConfigDict:
    """The config of `--config=FILE --config.FIELD=VALUE`.

    Raises:
      UserError: see `parse_flags`; or there is no config, or another argument.
    """
    rest = parse_flags(values, arguments)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: fields are changed by --config.FIELD=VALUE")
    if values.config is None:
        raise UserError("no config: name one by --config=FILE, for example --config=configs/tiny.py")
    return values.config


def parse_flags(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Sets the flags of a command line, and gives its other arguments.

    Raises:
      UserError: a flag or field that does not exist, a value of the wrong type, a config file that cannot be read.
    """
    if "--help" in arguments or "-h" in arguments:
        print(sys.modules["__main__"].__doc__, "\n", values.get_help(), sep="")
        raise SystemExit(0)
    for argument in arguments:
        file = re.match(r"--config=([^:]*)", argument)
        if file and not Path(file[1]).is_file():
            raise UserError(f"--config: there is no file {file[1]!r}")
    for name in values:
        values[name].unparse()  # of an earlier command in this process
    try:
        return values(arguments)[1:]
    except (AttributeError, KeyError) as error:
        raise UserError(unknown_field(arguments, str(error))) from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"a --config value has the wrong type: {' '.join(str(error).split())}") from None
    except (SyntaxError, ImportError, NameError) as error:
        raise UserError(f"--config: the file is not a config ({type(error).__name__}: {error})") from None


def unknown_field(arguments: list[str], error: str) -> str:
    """Names the override that matches no field, and the field that was probably meant."""
    from uae_jax import config

    known = list(flatten(config.default().to_dict()))
    for argument in arguments:
        match = re.match(r"--config\.([\w.]+)", argument)
        if match and match[1] not in known:
            near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.5)
            if not near:
                near = [name for name in known if name.split(".")[-1] == match[1].split(".")[-1]][:1]
            hint = f"did you mean config.{near[0]}?" if near else "uae_jax/config.py lists all fields"
            return f"config.{match[1]} is no field: {hint}"
    return f"a --config override names no field: {' '.join(error.split())}"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names; inner nodes are listed too, so that `--config.reward=...` is known."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat[prefix + name] = value
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
    return flat


def prepare() -> None:
    """Prepares the process before jax is imported: memory allocation, compilation cache, quiet logs."""
    keep_memory()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "uae_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.ERROR)


def refuse_many_processes() -> None:
    """Several processes of one job would each train the whole run, and write to one workdir.

    Raises:
      UserError: SLURM or GKE says that this process is one of several.
    """
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    count = max(int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")), hosts)
    if count > 1:
        raise UserError(
            f"this is one of {count} processes, which do not train together yet: start one process on one host "
            "(SLURM: one GPU on one node; TPU: a slice of one host)"
        )


def environment() -> dict[str, Any]:
    """What shapes the compiled program beside the config: versions, devices, and the compiler flags that are set."""
    import jax
    import jaxlib

    flags_set = {name: os.environ[name] for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS") if os.environ.get(name)}
    devices = {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), "processes": jax.process_count()}
    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "devices": devices, "flags": flags_set}


def keep_memory() -> None:
    """Asks glibc to keep freed memory: XLA's CPU buffers are otherwise mapped and unmapped at every step.

    Two thirds of the processor time went to the kernel for that. Elsewhere than glibc nothing is changed.
    """
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # M_* in glibc's malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28), (arena_max, 1)):
        mallopt(parameter, value)


def quiet_failed_saves() -> None:
    """Drops the tracebacks of writes that end after their save has failed; the failure itself is raised."""
    show_exception, show_unraisable = sys.excepthook, sys.unraisablehook

    def late(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    sys.excepthook = lambda kind, error, trace: None if late(error) else show_exception(kind, error, trace)
    sys.unraisablehook = lambda args: None if late(args.exc_value) else show_unraisable(args)


def run(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Calls `main` and exits: 0 when done, 2 with one line when the user can fix it; bugs keep their traceback."""
    quiet_failed_saves()
    try:
        main(arguments)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        # At once: threads of a checkpoint that the disk refused would add their tracebacks on the way out.
        sys.stdout.flush()
        os._exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
