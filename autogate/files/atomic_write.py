"""Write a file completely or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from rewriters import AutogateError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to `path`. On leaving, it is flushed to the disk and then replaces `path`.

    If writing fails, the temporary file is deleted, and a file that was at `path` before is untouched.

    Raises:
        AutogateError: the file can't be written.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise AutogateError(f"it could not be written: there is no folder {path.parent}.", where=str(path))
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        temporary.touch(exist_ok=False)
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))  # safetensors creates files that only the owner can read
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise AutogateError(
            f"it could not be written ({error}). A file that was there before is unchanged.", where=str(path)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
