# SPDX-License-Identifier: MIT
"""Files that are replaced whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import fcntl

# Between the hidden name and the suffix of a temporary file.
_TOKEN: Final = re.compile("[0-9a-f]{16}")
_TEMPORARY_SUFFIX: Final = ".tmp"


def replace_file(path: str, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a new file in the place of `path`: at any instant there is the old one or the new one.

    Flushed to disk before it gets its name. What a killed process left behind, the next call for the
    same path removes.
    """
    # A symbolic link stays one, as with `open`: what it points to is replaced, in whose directory
    # the temporary file then is, since only there a rename is atomic.
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    _remove_abandoned(target)
    descriptor, temporary = _new_temporary(target, mode)
    try:
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, descriptor)
            with open(descriptor, "wb", closefd=False) as file:
                file.writelines(chunks)
            # Before the rename: else a loss of power could leave the new name on missing data.
            os.fsync(descriptor)
            if sys.platform == "win32":
                opened.close()  # No open file is renamed there; elsewhere it is locked till then.
            temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _flush_directory(target.parent)


def _mode(target: Path) -> int | None:
    """The permissions of the file that is to be replaced; None where there is none."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(mode):
        # The rename would put a file in the place of a device.
        raise ValueError(f"path must be that of a regular file. Received: {str(target)!r}")
    return stat.S_IMODE(mode)


def _temporary_prefix(target: Path) -> str:
    return f".{target.name}."


def _new_temporary(target: Path, mode: int | None) -> tuple[int, Path]:
    """A new file beside `target`, empty, open and locked, and its path."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        token = secrets.token_hex(8)
        temporary = target.parent / f"{_temporary_prefix(target)}{token}{_TEMPORARY_SUFFIX}"
        # 0o666, as `open` does: the user's umask takes away from it.
        descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
        try:
            _lock(descriptor)
            if os.fstat(descriptor).st_nlink == 0:
                # Taken for abandoned by another process before it was locked.
                os.close(descriptor)
                continue
            if mode is not None and stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
                _set_mode(descriptor, temporary, mode)
        except BaseException:
            os.close(descriptor)
            temporary.unlink()
            raise
        return descriptor, temporary


def _set_mode(descriptor: int, path: Path, mode: int) -> None:
    # Of the file itself where possible: its name may have become a link to another one.
    if sys.platform == "win32":
        path.chmod(mode)
    else:
        os.fchmod(descriptor, mode)


def _lock(descriptor: int) -> None:
    # The system lets go of this lock when the process ends, however it ends.
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary files of killed processes; those of living ones are locked."""
    prefix = _temporary_prefix(target)
    # A directory that cannot be listed can still be written to.
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            token = path.name.removeprefix(prefix).removesuffix(_TEMPORARY_SUFFIX)
            if _TOKEN.fullmatch(token) and path.name == f"{prefix}{token}{_TEMPORARY_SUFFIX}":
                _remove_if_abandoned(path)


def _remove_if_abandoned(temporary: Path) -> None:
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            descriptor = _open_to_lock(temporary)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its writer may have renamed it meanwhile; no other file ever gets this name.
                temporary.unlink()
            finally:
                os.close(descriptor)


def _open_to_lock(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # NFS gives this lock only to those who may write.
        return os.open(path, os.O_WRONLY | flags)
    except PermissionError:
        # It has the permissions of the file that it was to replace, which may be read-only.
        return os.open(path, os.O_RDONLY | flags)


def _flush_directory(directory: Path) -> None:
    """Flush the rename too. Where that is not possible, power loss may bring back the old file."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
