# SPDX-License-Identifier: MIT
"""The disk operations of a save, and the files that remain if it fails."""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import names_beside
from fresh_python import output_of
from fusedadam import Adam, atomic_file
from training import Training

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
TOKEN = "0123456789abcdef"
PLANTED = f".adam.safetensors.{TOKEN}.tmp"


# -- places -----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_given", [Path, str, os.fsencode, Path.name.__get__])
def test_save_leaves_one_file(
    path: Path,
    training: Training,
    as_given: Callable[[Path], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(path.parent)
    for _ in range(3):
        training.optimizer.save(as_given(path))
        training.step()
    assert names_beside(path) == [path.name]
    assert Adam.load(as_given(path), training.params).iterations == 5


@pytest.mark.parametrize("name", ["a b.é", "*", "[x].?", "x" * 200, "-r", ".hidden", "a\nb"])
@posix
def test_names_with_odd_characters(path: Path, name: str) -> None:
    path = path.with_name(name)
    for _ in range(2):
        path.with_name(f".{name}.{TOKEN}.tmp").touch()
        Adam().save(path)
        assert names_beside(path) == [name]
    assert Adam.load(path, []).iterations == 0


@posix
def test_symbolic_link_is_written_through(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    path.symlink_to("../elsewhere/target")
    target.with_name(f".target.{TOKEN}.tmp").touch()
    Adam(lr=0.5).save(path)
    assert path.is_symlink()
    assert not target.is_symlink()
    assert Adam.load(target, []).lr == 0.5
    assert (names_beside(path), names_beside(target)) == ([path.name], ["target"])


@posix
@pytest.mark.parametrize(
    ("place", "make", "error"),
    [
        ("missing/adam", None, FileNotFoundError),
        ("place", Path.mkdir, IsADirectoryError),
        ("place/adam", lambda place: place.parent.touch(), NotADirectoryError),
        ("place", lambda place: place.symlink_to("place"), OSError),
        ("x" * 300, None, OSError),
        # Stands in for a device such as /dev/null, which no test should risk.
        ("place", lambda place: os.mkfifo(place), ValueError),
        ("/proc/adam", None, OSError),
    ],
)
def test_place_that_cannot_be_written_is_left_as_it_is(
    path: Path, place: str, make: Callable[[Path], object] | None, error: type[Exception]
) -> None:
    def there() -> list[tuple[Path, int]]:
        return sorted((file, file.lstat().st_mode) for file in path.parent.rglob("*"))

    if make is not None:
        make(path.parent / place)
    before = there()
    with pytest.raises(error, match=re.escape(Path(place).name)):
        Adam().save(path.parent / place)
    assert there() == before


@posix
@pytest.mark.parametrize(
    ("old", "mask"),
    [
        *[(None, mask) for mask in (0o022, 0o077, 0o000, 0o027)],
        *[(mode, 0o022) for mode in (0o600, 0o640, 0o666, 0o777, 0o444)],
    ],
)
def test_permissions_are_those_of_the_old_file_or_of_open(
    path: Path, old: int | None, mask: int
) -> None:
    if old is not None:
        path.touch()
        path.chmod(old)
    before = os.umask(mask)
    try:
        Adam().save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == (0o666 & ~mask if old is None else old)
    assert Adam.load(path, []).iterations == 0


# -- faults -----------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("flushes_directories", [True, False])
def test_the_whole_file_is_flushed_before_the_rename(
    path: Path, training: Training, monkeypatch: pytest.MonkeyPatch, flushes_directories: bool
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        is_directory = stat.S_ISDIR(status.st_mode)
        events.append("flush directory" if is_directory else f"flush file of {status.st_size}")
        if is_directory and not flushes_directories:
            raise OSError(errno.EINVAL, "as some file systems say")
        fsync(descriptor)

    def seen_replace(source: str, target: Path) -> None:
        events.append(f"rename file of {Path(source).stat().st_size}")
        assert Path(source).parent == target.parent
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    training.optimizer.save(path)
    size = path.stat().st_size
    assert events == [f"flush file of {size}", f"rename file of {size}", "flush directory"]
    assert Adam.load(path, training.params).iterations == 3


@posix
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails", ["os.fsync", "os.fchmod", "os.replace"])
def test_failed_save_leaves_the_old_file_alone(
    path: Path,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
    error: BaseException,
) -> None:
    def fail(*_: object) -> None:
        assert len(names_beside(path)) == 2
        raise error

    training.optimizer.save(path)
    path.chmod(0o666)  # more than the umask gives to a new file
    before = path.read_bytes()
    training.step()
    with monkeypatch.context() as patch:
        patch.setattr(fails, fail)
        with pytest.raises(type(error)):
            training.optimizer.save(path)
    assert names_beside(path) == [path.name]
    assert path.read_bytes() == before
    training.optimizer.save(path)
    assert Adam.load(path, training.params).iterations == 4


@posix
@pytest.mark.parametrize("limit", [0, 5000, 200_000])
def test_full_disk_leaves_the_old_file_alone(path: Path, limit: int) -> None:
    # A file size limit, because a full disk would need a separate disk. Python ignores the signal.
    import resource

    optimizer = Adam()
    optimizer.build([np.ones(1000), np.ones(50_000)])
    optimizer.save(path)
    before = path.read_bytes()
    optimizer.lr = 0.25
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            optimizer.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert path.read_bytes() == before
    assert names_beside(path) == [path.name]


# -- directories that others can write to -----------------------------------------------------


def plant(kind: str, path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Place something under the name of a temporary file. Return what must stay open."""
    place = path.with_name(PLANTED)
    if kind == "link":
        place.symlink_to(victim)
    elif kind == "hard link":
        place.hardlink_to(victim)
    elif kind == "link to nothing":
        place.symlink_to(victim.with_name("new"))
    elif kind == "file":
        place.touch()
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # A socket's path may have about 100 bytes.
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(PLANTED)
        return listening
    else:
        os.mkfifo(place)
        if kind == "pipe with a reader":
            return os.fdopen(os.open(place, os.O_RDONLY | os.O_NONBLOCK), "rb")
    return None


@posix
def test_temporary_file_that_is_gone_before_it_is_locked_is_made_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, locked = atomic_file._lock, list[list[str]]()

    def lock_what_another_process_removes(descriptor: int) -> None:
        locked.append(names_beside(path))
        if len(locked) == 1:
            path.with_name(*locked[0]).unlink()
        lock(descriptor)

    monkeypatch.setattr(atomic_file, "_lock", lock_what_another_process_removes)
    Adam(lr=0.5).save(path)
    assert len(locked) == 2
    assert names_beside(path) == [path.name]
    assert Adam.load(path, []).lr == 0.5


# Of names that are guessed, and of files that look abandoned.
@posix
@pytest.mark.parametrize(
    ("kind", "guessed"),
    [
        *((kind, True) for kind in ("link", "hard link", "link to nothing", "pipe", "file")),
        *((kind, False) for kind in ("link", "hard link", "pipe", "pipe with a reader", "socket")),
    ],
)
def test_what_others_put_under_the_name_of_a_temporary_file_is_not_written_to(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, guessed: bool
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("text")
    opened = plant(kind, path, victim, monkeypatch)
    before = victim.stat()
    if guessed:
        tokens = iter([TOKEN])
        monkeypatch.setattr(secrets, "token_hex", lambda _: next(tokens))
        monkeypatch.setattr(atomic_file, "_remove_abandoned", lambda _: None)
        with pytest.raises(FileExistsError):
            Adam().save(path)
        assert victim.stat().st_nlink == before.st_nlink
        assert names_beside(path) == [PLANTED]
    else:
        Adam().save(path)
        assert Adam.load(path, []).iterations == 0
        # Only a name may disappear, that of a hard link or of a pipe.
        assert set(names_beside(path)) <= {path.name, PLANTED}
    assert victim.read_text() == "text"
    assert victim.stat().st_mode == before.st_mode
    assert not (tmp_path / "new").exists()
    if kind == "pipe with a reader":
        assert opened.read(1) == b""
    if opened is not None:
        opened.close()


@posix
def test_permissions_are_set_of_the_file_and_not_of_its_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.touch()
    path.chmod(0o666)  # the umask restricts it, so it has to be set explicitly
    victim = tmp_path / "victim"
    victim.touch(0o600)
    lock = atomic_file._lock

    def lock_and_swap(descriptor: int) -> None:
        lock(descriptor)
        (temporary,) = set(path.parent.iterdir()) - {path}
        temporary.rename(tmp_path / "moved")
        temporary.symlink_to(victim)

    monkeypatch.setattr(atomic_file, "_lock", lock_and_swap)
    Adam().save(path)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert victim.stat().st_size == 0


@forks
def test_temporary_files_of_the_dead_are_removed_and_of_the_living_are_not(path: Path) -> None:
    import fcntl

    def beside(name: str) -> Path:
        return path.with_name(name)

    living, dead, link, directory = (
        beside(f".{path.name}.00000000000000{two}.tmp") for two in ("aa", "bb", "cc", "dd")
    )
    others = [
        *(beside(f".{path.name}{end}") for end in (".tmp", f".{TOKEN[:-1]}.tmp", f".{TOKEN}")),
        *(beside(f"{path.name}.{TOKEN}.tmp"), beside(f".{path.name}.{TOKEN}g.tmp")),
        *(beside(f".adam.{TOKEN}.tmp"), beside(TOKEN)),
    ]
    for file in (living, dead, *others):
        file.touch()
    link.symlink_to(others[0])
    directory.mkdir()
    kept = {file.name for file in (path, living, link, directory, *others)}
    with living.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Adam().save(path)
        assert set(names_beside(path)) == kept
    Adam().save(path)
    assert set(names_beside(path)) == kept - {living.name}


@forks
def test_abandoned_file_without_permission_to_write_is_removed() -> None:
    # Root can write to any file, so a process that runs as root becomes another user.
    code = f"""
        import os, stat, tempfile
        from pathlib import Path
        from fusedadam import Adam

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "adam"
            Adam().save(path)
            path.chmod(0o444)
            abandoned = path.with_name(".adam.{TOKEN}.tmp")
            abandoned.touch(0o444)
            if os.geteuid() == 0:
                for file in (path.parent, path, abandoned):
                    os.chown(file, 65534, -1)
                os.seteuid(65534)
            Adam().save(path)
            print(stat.S_IMODE(path.stat().st_mode) == 0o444, os.listdir(directory))
            os.seteuid(os.getuid())
    """
    assert output_of(code) == "True ['adam']"
