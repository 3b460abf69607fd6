"""Runs in a process of its own, started by `sandbox.py`: gives up every power it does not need, then runs a program.

Standard library only, and nothing of this package: what is imported here, the program could reach. In on standard
input is `{"roots": paths that may be read, "cpu_seconds", "memory_bytes", "code", "expressions"}`; out on standard
output is one line, `{"values": [...], "error": text or null}`, a value as `encode` writes it.

Order matters: limits first (they need powers), then files (Landlock), then system calls (seccomp), then the program.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from typing import Any

# Number of each system call that a program which computes needs, for x86-64 and for aarch64. All others are refused.
CALLS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "newfstatat": (262, 79), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "open": (2, None), "openat": (257, 56),
    "stat": (4, None), "lstat": (6, None), "statx": (332, 291), "getdents64": (217, 61), "getcwd": (79, 17),
    "readlink": (89, None), "readlinkat": (267, 78), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160), "getpid": (39, 172),
    "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96),
    "rseq": (334, 293), "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
# Calls of many commands; only these are granted. Of fcntl: copying a descriptor and its flags, but not who gets
# which signal when it is ready (F_SETOWN, F_SETSIG), which would kill any process of the user. Of ioctl: what is asked
# of a file before it is read.
COMMANDS = {
    (72, 25): (0, 1, 2, 3, 4, 1030),
    (16, 29): (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
}
CLONE = (56, 220)
CLONE3 = 435
CLONE_THREAD = 0x00010000
ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
# Landlock's rights on files by the version that brought them: 13 at first, then refer, truncate, ioctl.
RIGHTS = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 5: 1 << 16}
READ = 1 << 2 | 1 << 3  # read a file, list a folder
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
NO_NEW_PRIVS, SECCOMP_FILTER = 38, 22

libc = ctypes.CDLL(None, use_errno=True)


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    for name, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (value, value))


def restrict_files(roots: "list[str]") -> None:
    """Only reading, and only below the roots."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        raise OSError("this kernel has no Landlock")
    handled = sum((1 << 13) - 1 if since == 1 else right >> 1 for since, right in RIGHTS.items() if since <= version)
    attributes = struct.pack("<Q", handled)
    ruleset = checked(libc.syscall(CREATE_RULESET, attributes, len(attributes), 0))
    for root in roots:
        try:
            folder = os.open(root, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rule = struct.pack("<Qi", READ, folder)
        checked(libc.syscall(ADD_RULE, ruleset, 1, rule, 0))
        os.close(folder)
    checked(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    checked(libc.syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def restrict_calls() -> None:
    """Only the calls and commands above, and threads but no processes."""
    column, arch = ARCHES[platform.machine()]
    allowed = [number for numbers in CALLS.values() if (number := numbers[column]) is not None]
    load, equal, at_least, is_set, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, arch),
        (answer, 0, 0, KILL),
        (load, 0, 0, 0),
        # The x32 numbers of x86-64 are other doors to the same rooms.
        (at_least, 0, 1, 0x40000000),
        (answer, 0, 0, KILL),
        # glibc falls back to clone where clone3 is unknown, and clone's flags can be read here.
        (equal, 0, 1, CLONE3),
        (answer, 0, 0, ERRNO | ENOSYS),
        (equal, 0, 4, CLONE[column]),
        (load, 0, 0, 16),
        (is_set, 0, 1, CLONE_THREAD),
        (answer, 0, 0, ALLOW),
        (answer, 0, 0, ERRNO | EPERM),
    ]
    for numbers, commands in COMMANDS.items():
        program += [(equal, 0, 2 * len(commands) + 2, numbers[column]), (load, 0, 0, 24)]
        for command in commands:
            program += [(equal, 0, 1, command), (answer, 0, 0, ALLOW)]
        program.append((answer, 0, 0, ERRNO | EPERM))
    for number in allowed:
        program += [(equal, 0, 1, number), (answer, 0, 0, ALLOW)]
    program.append((answer, 0, 0, ERRNO | EPERM))
    code = b"".join(struct.pack("<HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    checked(libc.prctl(SECCOMP_FILTER, 2, header, 0, 0))


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def encode(value: Any, depth: int = 0) -> "dict[str, object]":
    """Plain data as JSON with its type; anything else is refused, so that no object can answer for itself."""
    kind = type(value)
    if depth > 20:
        raise TypeError("nested too deep")
    if value is None or kind in (bool, str):
        return {"plain": value}
    if kind is int:
        return {"int": hex(value)}
    if kind is float:
        return {"float": value.hex()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind in (list, tuple, set, frozenset):
        return {kind.__name__: [encode(one, depth + 1) for one in value]}
    if kind is dict:
        return {"dict": [[encode(key, depth + 1), encode(one, depth + 1)] for key, one in value.items()]}
    raise TypeError(f"{kind.__name__} is no plain value")


def main() -> None:
    order = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    limit(order["cpu_seconds"], order["memory_bytes"])
    restrict_files(order["roots"])
    restrict_calls()
    values, error = [], None
    space = {"__name__": "__main__"}
    try:
        exec(compile(order["code"], "<program>", "exec"), space)
        for one in order["expressions"]:
            values.append(encode(eval(compile(one, "<test>", "eval"), space)))
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"[:500]
    os.write(answer, json.dumps({"values": values, "error": error}).encode() + b"\n")
    os._exit(0)


main()
