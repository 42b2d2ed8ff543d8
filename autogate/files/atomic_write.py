"""Write a file whole or not at all."""

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
    """A file to write to that takes the place of `path` when all of it is on the disk, and not before."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        temporary.touch(exist_ok=False)
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))  # safetensors makes files for nobody else to read
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise AutogateError(
            f"it could not be written ({error}); what was there before, if anything, is whole.", where=str(path)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
