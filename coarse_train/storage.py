"""Files as people and file systems have them: written whole or not at all, locked where that is possible, read whatever editor
saved them."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from tqdm import tqdm

# What file systems answer that have no locks, or no fsync of folders: some network and FUSE ones, Lustre without flock.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
_NO_LOCKS = _NOT_SUPPORTED | {errno.ENOLCK}
LFS_POINTER = "a git-lfs pointer (`git lfs pull` fetches it)"  # in messages, where `is_lfs_pointer`
_LFS_HEAD = b"version https://git-lfs.github.com/spec/"  # github.com/git-lfs/git-lfs, docs/spec.md


class CheckpointError(RuntimeError):
    """A file of the run cannot be written or read; the message says which, and what is still good."""


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """``write(file)`` into a temporary file beside ``path``, synced to disk, then renamed: whatever happens meanwhile,
    ``path`` is the old file or the new one. Nothing is written through a link, neither through ``path`` nor beside it."""
    temporary = path.with_name(f".{path.name}.part")
    kept = "the last good one is still there" if path.exists() else "there is none yet"
    try:
        try:
            temporary.unlink(missing_ok=True)  # of a process that was killed
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                _sync(file.fileno(), path.parent)
            os.replace(temporary, path)
            kept = "it is there, but may not survive a power cut"
        finally:
            temporary.unlink(missing_ok=True)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                _sync(folder, path.parent)  # the rename itself
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError of its own
        raise CheckpointError(f"{path}: expected to write it, got {_reason(error)}; {kept}") from error


def look_at_file(option: str, path: Path, begins: str) -> None:
    """Raises ValueError, naming the option, where ``path`` cannot be replaced: a folder, or a file that does not begin as
    those of this command do, which is somebody's."""
    if path.is_dir():
        raise ValueError(f"{option}: expected a file to write, got the folder {path}")
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(len(begins.encode()))
        if head and head != begins.encode():
            raise ValueError(
                f"{option}: expected a new file, or an older one of this command, got {path}, another file"
            )


def write_text(path: Path, text: str) -> None:
    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_whole(path, write)


def printable(text: str) -> str:
    """With names of files that are not UTF-8 as Python writes them, \\udce4."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_text(path: Path) -> str:
    """A text in UTF-8, or as Windows writes it: with a byte order mark, also in UTF-16. Raises ValueError for any other."""
    content = path.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte {error.start} ({content[error.start : error.start + 1].hex()})"
        raise ValueError(f"expected text in UTF-8, got none from {place} on; save it as UTF-8") from error


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether this process has ``path`` for itself until the end. A lock goes with its process, whatever ends it; where the
    file system has none, a note says so."""
    # no soft lock, which would outlive a process that is killed
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
        free = True
    except Timeout:
        free = False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _note(f"{path.parent}: the file system has no locks ({error.strerror}); start no other run in this folder")
        free = True
    try:
        yield free
    finally:
        lock.release()


def is_lfs_pointer(path: Path) -> bool:
    """Whether git-lfs has left a few lines in place of the file."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_LFS_HEAD)) == _LFS_HEAD
    except OSError:
        return False


def _sync(descriptor: int, folder: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _note(f"{folder}: the file system cannot sync to disk ({error.strerror}); a power cut may cost a checkpoint")


@cache
def _note(line: str) -> None:
    """Once."""
    tqdm.write(f"note: {line}", file=sys.stderr)


def _reason(error: BaseException) -> str:
    """The OSError behind what torch.save made of it, where there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return one_line(error)


def one_line(error: BaseException) -> str:
    """The first line of its message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
