# SPDX-License-Identifier: MIT
"""Atomic replacement of files."""

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

if sys.platform != "win32":
    import fcntl


def replace_file(path: str, chunks: Iterable[bytes | memoryview]) -> None:
    """Replace `path` atomically by a file with these contents.

    The new file is flushed to disk before the rename. Temporary files that killed processes left
    are removed by the next call for the same path.
    """
    # As with `open`, follow a symbolic link and replace its target. The temporary file must be in
    # the target's directory for the rename to be atomic.
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    _remove_abandoned(target)
    descriptor, temporary = _new_temporary(target, mode)
    try:
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, descriptor)
            with open(descriptor, "wb", closefd=False) as file:
                file.writelines(chunks)
            # Otherwise the rename could reach the disk before the data, and power be lost between.
            os.fsync(descriptor)
            if sys.platform == "win32":
                opened.close()  # Windows cannot rename open files; elsewhere, keep the lock.
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _flush_directory(target.parent)


def _mode(target: Path) -> int | None:
    """Return the permissions of the file to replace; None if it does not exist."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(mode):
        # The rename would replace a device by a file.
        raise ValueError(f"path must be that of a regular file. Received: {str(target)!r}")
    return stat.S_IMODE(mode)


def _new_temporary(target: Path, mode: int | None) -> tuple[int, str]:
    """Create an empty, locked file beside `target`; return its descriptor and its path.

    Not a `Path`: Python 3.12 never frees the names of which it has made one.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = os.path.join(target.parent, f".{target.name}.{secrets.token_hex(8)}.tmp")
        # 0o666 less the umask, as with `open`.
        descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
        try:
            _lock(descriptor)
            if os.fstat(descriptor).st_nlink == 0:
                # Another process removed it as abandoned before it was locked.
                os.close(descriptor)
                continue
            if mode is not None and stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
                # By descriptor where possible: the name could now be a link to another file.
                if sys.platform == "win32":
                    os.chmod(temporary, mode)
                else:
                    os.fchmod(descriptor, mode)
        except BaseException:
            os.close(descriptor)
            os.unlink(temporary)
            raise
        return descriptor, temporary


def _lock(descriptor: int) -> None:
    # The system releases this lock when the process ends for any reason.
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # not supported by every file system
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary files of killed processes; running processes hold locks on theirs."""
    temporary = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.tmp")
    names: list[str] = []
    with contextlib.suppress(OSError):  # a directory may be writeable without being readable
        names = os.listdir(target.parent)
    for name in names:
        if temporary.fullmatch(name):
            _remove_if_abandoned(os.path.join(target.parent, name))


def _remove_if_abandoned(temporary: str) -> None:
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            descriptor = _open_to_lock(temporary)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The name is unique, so if its writer has renamed it, no other file has it.
                os.unlink(temporary)
            finally:
                os.close(descriptor)


def _open_to_lock(path: str) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # NFS needs write access for an exclusive lock.
        return os.open(path, os.O_WRONLY | flags)
    except PermissionError:
        # It has the permissions of the file it was to replace, which may be read-only.
        return os.open(path, os.O_RDONLY | flags)


def _flush_directory(directory: Path) -> None:
    """Flush the rename. Where this is not supported, power loss may bring back the old file."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
