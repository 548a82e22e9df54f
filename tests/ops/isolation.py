"""Owns a process without a network: Linux kills it, or any program that it starts, at the first internet socket."""

import ctypes
import platform
import struct

# The number of socket(2), and the name of the architecture in the kernel's audit interface.
_MACHINES = {"x86_64": (41, 0xC000003E), "aarch64": (198, 0xC00000B7)}
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
_KILL, _ALLOW = 0x80000000, 0x7FFF0000
_INTERNET = (2, 10)  # AF_INET, AF_INET6


def available() -> bool:
    return platform.system() == "Linux" and platform.machine() in _MACHINES


def forbid_internet_sockets() -> None:
    """For subprocess's `preexec_fn`. Cannot be undone, and is inherited by all that the process starts."""
    number, machine = _MACHINES[platform.machine()]
    program = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 0, 6, machine),
        (_LOAD, 0, 0, 0),  # the system call
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, 16),  # its first argument: the address family
        (_EQUAL, 1, 0, _INTERNET[0]),
        (_EQUAL, 0, 1, _INTERNET[1]),
        (_RETURN, 0, 0, _KILL),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(38, ctypes.c_ulong(1), zero, zero, zero):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if libc.prctl(22, ctypes.c_ulong(2), header, zero, zero):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp")
