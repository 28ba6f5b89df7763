"""What keeps a program under test from network, files and processes: namespaces of Linux, by system calls.

Python 3.11 has none of these calls, hence ctypes. Everything here runs in a process that was forked for one
program, and changes only that process and its children. Each step that the machine forbids is left out,
and what could be done is returned as `Protection`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

CAPABILITIES: Final = 64
"""More than Linux has capabilities."""

CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWIPC: Final = 0x0800_0000
CLONE_NEWUSER: Final = 0x1000_0000
CLONE_NEWPID: Final = 0x2000_0000
CLONE_NEWNET: Final = 0x4000_0000
"""Flags of unshare(2)."""

MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
"""Flags of mount(2)."""

SYS_MOUNT_SETATTR: Final = 442
AT_FDCWD: Final = -100
AT_RECURSIVE: Final = 0x8000
MOUNT_ATTR_RDONLY: Final = 1
"""mount_setattr(2), Linux 5.12; the C library has no name for it everywhere."""

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_CAPBSET_DROP: Final = 24
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38
"""Numbers of prctl(2) options."""

FIRST_GUEST: Final = 61184
GUESTS: Final = 4336
"""Ids of the users that programs run as when this process is root's: one for each worker, so that each has
its own count of processes. The range is systemd's for users without a name: https://systemd.io/UIDS-GIDS/"""

COVER_SIZE: Final = 64 << 10
"""Bytes of the empty file systems that cover folders."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Protection(msgspec.Struct, frozen=True):
    """What holds for a program under test, besides its limits of time and memory."""

    network: bool = False
    """It has no network interface, not even loopback."""
    processes: bool = False
    """It sees only its own processes, and all of them end with it, by the kernel."""
    files: bool = False
    """It sees no home folder, and can write nowhere but in its own folder, which is bounded in size."""
    unprivileged: bool = False
    """It is not root's, so that the limit on the number of its processes holds."""


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def prctl(option: int, value: int) -> None:
    _libc.prctl(option, value, 0, 0, 0)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _check(
        _libc.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode() or None
        )
    )


def _read_only(path: str) -> None:
    """Makes the mount at `path` and all below it read-only."""
    attributes = _MountAttr(attr_set=MOUNT_ATTR_RDONLY)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _check(
        _libc.syscall(
            SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, ctypes.byref(attributes), size
        )
    )


def guest() -> int:
    """The user, and group, that programs of this worker run as."""
    return FIRST_GUEST + os.getppid() % GUESTS if os.geteuid() == 0 else os.geteuid()


def enter(folder: str, size: int) -> Protection:
    """Takes this process away from network and files, and its next child from the other processes.

    folder: becomes an empty file system of `size` bytes, gone with the last process in it. Raises OSError
    when half of it could be done.
    """
    uid, gid = os.geteuid(), os.getegid()
    apart = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC
    if _libc.unshare(apart if uid == 0 else apart | CLONE_NEWUSER) != 0:
        return Protection()
    if uid != 0:  # in the new user namespace it stays who it is
        prctl(PR_SET_DUMPABLE, 1)  # else /proc/self is root's
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        prctl(PR_SET_DUMPABLE, 0)
    return Protection(network=True, processes=True, files=_hide_files(folder, size))


def _hide_files(folder: str, size: int) -> bool:
    owner = f"uid={guest()},gid={guest()}," if os.geteuid() == 0 else ""
    try:
        _mount("none", "/", "", MS_REC | MS_PRIVATE)
        kept = [(path, os.open(path, os.O_PATH)) for path in interpreter_folders()]
        for path in covered():
            _mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, f"size={COVER_SIZE},mode=755")
            _uncover(path, kept)
        Path(folder).mkdir(parents=True, exist_ok=True)  # a cover may lie over it
        _read_only("/")
        _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"{owner}size={size},mode=700")
    except OSError:
        return False
    return True


def _uncover(cover: str, kept: Sequence[tuple[str, int]]) -> None:
    for path, place in kept:
        if Path(path).is_relative_to(cover):
            Path(path).mkdir(parents=True, exist_ok=True)
            _mount(f"/proc/self/fd/{place}", path, "", MS_BIND | MS_REC)


def covered() -> list[str]:
    """Folders that no program under test needs and that hold what it must not have: keys, tokens, sockets of
    services. Not one inside the other."""
    candidates = sorted({str(Path.home()), "/root", "/home", "/run"})
    found: list[str] = []
    for path in candidates:
        inside = any(Path(path).is_relative_to(other) for other in found)
        if Path(path).is_dir() and path != "/" and not inside:
            found.append(path)
    return found


def interpreter_folders() -> list[str]:
    """Where this Python and its packages are, which a program under test runs on. Outer ones first."""
    real = Path(sys.executable).resolve()
    folders = {Path(sys.prefix), Path(sys.base_prefix), real.parent.parent}
    return sorted(str(path) for path in folders if path.is_dir() and path != Path("/"))


def show_own_processes() -> None:
    """To be called by the first process of a new process namespace. Does nothing where /proc is not ours."""
    try:
        _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)
    except OSError:
        pass


def give_up_privileges() -> None:
    """What this process executes next has no capability, also as root, and gets none by set-user-ID files."""
    for number in range(CAPABILITIES):
        prctl(PR_CAPBSET_DROP, number)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def give_up_root(program: str, user: int) -> bool:
    """Root becomes `user`, if that one may execute `program`. Whether this process is root no longer."""
    if os.geteuid() != 0:
        return True
    try:
        os.setgroups([])
        os.setegid(user)
        os.seteuid(user)
        allowed = os.access(program, os.X_OK, effective_ids=True)
        os.seteuid(0)
        os.setegid(0)
        if allowed:
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
    except OSError:
        return False
    return allowed
