# SPDX-License-Identifier: MIT
"""The disk operations of a save, and the files that remain if it fails."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import SCHEDULE, Training, names_beside
from fresh_python import output_of
from fusedadam import Adam, atomic_file

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


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
        training.step(1)
    assert names_beside(path) == [path.name]
    assert Adam.load(as_given(path), training.params).iterations == 5


@pytest.mark.parametrize("name", ["a b.é", "*", "[x].?", "x" * 200, "-r", ".hidden", "a\nb"])
@posix
def test_names_with_odd_characters(path: Path, name: str) -> None:
    path = path.with_name(name)
    for _ in range(2):
        (path.parent / f".{name}.0123456789abcdef.tmp").touch()
        Adam().save(path)
        assert names_beside(path) == [name]
    assert Adam.load(path, []).iterations == 0


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000, 0o027])
def test_new_file_has_the_permissions_that_open_gives(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        Adam().save(path)
        path.with_name("opened").touch()
    finally:
        os.umask(before)
    assert path.stat().st_mode == path.with_name("opened").stat().st_mode


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o777, 0o444])
def test_permissions_of_the_old_file_are_kept(path: Path, mode: int) -> None:
    path.touch()
    path.chmod(mode)
    before = os.umask(0o022)
    try:
        Adam().save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert Adam.load(path, []).iterations == 0


@posix
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_symbolic_link_is_written_through(
    path: Path, tmp_path: Path, training: Training, relative: bool, exists: bool
) -> None:
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    if exists:
        target.touch()
    path.symlink_to(Path("../elsewhere/target") if relative else target)
    abandoned = target.with_name(".target.0123456789abcdef.tmp")
    abandoned.touch()
    training.optimizer.save(path)
    assert path.is_symlink()
    assert not target.is_symlink()
    assert Adam.load(target, training.params).iterations == 3
    assert (names_beside(path), names_beside(target)) == ([path.name], ["target"])


def places_without_a_way_to_write(directory: Path) -> dict[str, Path]:
    places = {"no directory": directory / "missing/adam", "a directory": directory / "directory"}
    if os.name == "posix":
        places["a file as directory"] = directory / "file/adam"
        places["a loop"] = directory / "loop"
        places["a name too long"] = directory / ("x" * 300)
    if sys.platform == "linux":
        places["a file system of the kernel's"] = Path("/proc/adam")
    return places


@pytest.mark.parametrize("place", places_without_a_way_to_write(Path()))
def test_place_that_cannot_be_written_is_an_os_error(path: Path, place: str) -> None:
    (path.parent / "directory").mkdir()
    (path.parent / "file").touch()
    if os.name == "posix":
        (path.parent / "loop").symlink_to("loop")
    before = names_beside(path)
    with pytest.raises(OSError):
        Adam().save(places_without_a_way_to_write(path.parent)[place])
    assert names_beside(path) == before
    assert names_beside(path.parent / "directory/x") == []


@posix
def test_what_is_no_regular_file_is_not_replaced(path: Path) -> None:
    # Stands in for a device such as /dev/null, which no test should risk.
    os.mkfifo(path)
    with pytest.raises(ValueError, match="path must be that of a regular file"):
        Adam().save(path)
    assert path.is_fifo()
    assert names_beside(path) == [path.name]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The disk operations of a save, in order."""
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        kind = "directory" if stat.S_ISDIR(status.st_mode) else f"file of {status.st_size}"
        seen.append(f"flush {kind}")
        fsync(descriptor)

    def seen_replace(source: Path, target: Path) -> Path:
        seen.append(f"rename file of {source.stat().st_size}")
        assert source.parent == target.parent
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    return seen


@posix
def test_the_whole_file_is_flushed_before_the_rename(
    path: Path, training: Training, events: list[str]
) -> None:
    training.optimizer.save(path)
    size = path.stat().st_size
    assert events == [f"flush file of {size}", f"rename file of {size}", "flush directory"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("when", ["flush", "rename"])
def test_failed_save_leaves_the_old_file_alone(
    path: Path,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    when: str,
) -> None:
    def fail(*_: object) -> None:
        assert len(names_beside(path)) == 2
        raise error

    training.optimizer.save(path)
    before = path.read_bytes()
    training.step(1)
    with monkeypatch.context() as patch:
        if when == "flush":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "replace", fail)
        with pytest.raises(type(error)):
            training.optimizer.save(path)
    assert names_beside(path) == [path.name]
    assert path.read_bytes() == before
    training.optimizer.save(path)
    assert Adam.load(path, training.params).iterations == 4


@posix
def test_directory_that_cannot_be_flushed_is_no_failure(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "as some file systems say")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    Adam().save(path)
    assert Adam.load(path, []).iterations == 0


@posix
@pytest.mark.parametrize("limit", [0, 100, 5000, 200_000])
def test_full_disk_leaves_the_old_file_alone(path: Path, limit: int) -> None:
    # A file size limit, because a full disk would need a separate disk. Python ignores the signal.
    code = f"""
        import os, resource
        import numpy as np
        from fusedadam import Adam

        params = [np.ones(1000), np.ones(50_000)]
        optimizer = Adam(lr=0.5)
        optimizer.build(params)
        optimizer.save({str(path)!r})
        optimizer.lr = 0.25
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            optimizer.save({str(path)!r})
        except OSError as error:
            print(os.strerror(error.errno))
        assert Adam.load({str(path)!r}, params).lr == 0.5
    """
    assert output_of(code) == os.strerror(errno.EFBIG)
    assert names_beside(path) == [path.name]


def test_state_that_could_not_be_loaded_is_not_saved(path: Path) -> None:
    class Odd(Adam):
        def get_config(self) -> dict[str, Any]:
            return super().get_config() | {"groups": [1, 2]}

    with pytest.raises(TypeError, match=r"must consist of .* Received: groups=\[1, 2\]"):
        Odd().save(path)
    assert names_beside(path) == []


def test_nothing_is_saved_while_the_averages_are_swapped_in(path: Path) -> None:
    training = Training(use_ema=True)
    training.step(2)
    training.optimizer.save(path)
    before = path.read_bytes()
    training.optimizer.swap_ema()
    with pytest.raises(ValueError, match="swap_ema"):
        training.optimizer.save(path)
    assert path.read_bytes() == before
    assert names_beside(path) == [path.name]
    training.optimizer.swap_ema()
    training.optimizer.save(path)
    assert path.read_bytes() == before


def test_load_does_not_call_the_schedule(path: Path) -> None:
    param = np.ones(3)
    adam = Adam(lr=SCHEDULE)
    adam.apply_gradients([(np.ones(3), param)])
    adam.save(path)

    def schedule(iterations: int) -> float:
        raise AssertionError(iterations)

    assert Adam.load(path, [param], lr=schedule).lr is schedule


def test_save_before_excluded_parameters_are_found(tmp_path: Path) -> None:
    kernel, bias = np.ones(3), np.ones(2)
    adam = Adam(weight_decay=0.1)
    adam.build([kernel, bias])
    adam.exclude_from_weight_decay([bias])
    with pytest.raises(ValueError, match=r"exclude_from_weight_decay.* Received: 1 "):
        adam.save(tmp_path / "adam")
    assert list(tmp_path.iterdir()) == []
    adam.apply_gradients([(np.zeros(3), kernel), (np.zeros(2), bias)])
    adam.save(tmp_path / "adam")
    resumed = Adam.load(tmp_path / "adam", [kernel, bias])
    resumed.apply_gradients([(np.zeros(3), kernel), (np.zeros(2), bias)])
    assert (kernel < 1).all()
    assert (bias == 1).all()


# -- directories that others can write to -----------------------------------------------------


PLANTED = ".adam.safetensors.0123456789abcdef.tmp"


@posix
@pytest.mark.parametrize("planted", ["link", "hard link", "link to nothing", "pipe", "file"])
def test_temporary_file_that_others_have_made_is_not_written_to(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    # As if the name could be guessed.
    tokens = iter(["0123456789abcdef"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(tokens))
    monkeypatch.setattr(atomic_file, "_remove_abandoned", lambda _: None)
    victim = tmp_path / "victim"
    victim.write_text("text")
    place = path.with_name(PLANTED)
    if planted == "link":
        place.symlink_to(victim)
    elif planted == "hard link":
        place.hardlink_to(victim)
    elif planted == "link to nothing":
        place.symlink_to(tmp_path / "new")
    elif planted == "pipe":
        os.mkfifo(place)
    else:
        place.touch()
    before = victim.stat()
    with pytest.raises(FileExistsError):
        Adam().save(path)
    assert victim.read_text() == "text"
    assert (victim.stat().st_mode, victim.stat().st_nlink) == (before.st_mode, before.st_nlink)
    assert not (tmp_path / "new").exists()
    assert names_beside(path) == [PLANTED]


@posix
@pytest.mark.parametrize("planted", ["link", "hard link", "pipe", "pipe with a reader", "socket"])
def test_what_looks_abandoned_may_be_anything(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("text")
    place = path.with_name(PLANTED)
    reader = listening = None
    if planted == "link":
        place.symlink_to(victim)
    elif planted == "hard link":
        place.hardlink_to(victim)
    elif planted == "socket":
        monkeypatch.chdir(path.parent)  # A socket's path may have about 100 bytes.
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(PLANTED)
    else:
        os.mkfifo(place)
        if planted == "pipe with a reader":
            reader = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
    before = victim.stat()
    Adam().save(path)
    assert Adam.load(path, []).iterations == 0
    assert victim.read_text() == "text"
    assert victim.stat().st_mode == before.st_mode
    # Only a name may disappear, that of a hard link or of a pipe.
    assert set(names_beside(path)) <= {path.name, PLANTED}
    if reader is not None:
        assert os.read(reader, 1) == b""
        os.close(reader)
    if listening is not None:
        listening.close()


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
def test_abandoned_file_without_permission_to_write_is_removed() -> None:
    # Root can write to any file, so a process that runs as root becomes another user.
    code = """
        import os, stat, tempfile
        from pathlib import Path
        from fusedadam import Adam

        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "adam"
            Adam().save(path)
            path.chmod(0o444)
            abandoned = path.with_name(".adam.0123456789abcdef.tmp")
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


@pytest.mark.skipif(sys.platform == "win32", reason="the mode is set by another call")
def test_permissions_that_cannot_be_kept_leave_the_old_file_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adam = Adam()
    adam.save(path)
    path.chmod(0o666)  # more than the umask gives to a new file
    before = path.read_bytes()

    def refuse(_descriptor: int, _mode: int) -> None:
        raise PermissionError("fchmod")

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(PermissionError, match="fchmod"):
        adam.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
