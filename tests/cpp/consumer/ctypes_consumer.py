# SPDX-License-Identifier: MIT
"""Step through the shared library from another language, and check what it exports in C.

python3 ctypes_consumer.py build/installed/lib/libfusedadam.so
"""

from __future__ import annotations

import ctypes
import subprocess
import sys

# A program that was compiled earlier may use any of them: names are only added.
FUNCTIONS = """
    abi_version active_isa get_num_threads global_norm options_copy options_create options_free
    options_get_bool options_get_double options_get_int64 options_get_text options_is_set
    options_reset options_set_bool options_set_double options_set_int64 options_set_text
    read_values set_isa set_num_threads step step_sparse supported_isa threading_runtime version
    version_number write_values
"""


class Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("param", Array),
        ("grad", Array),
        ("size", ctypes.c_int64),
        ("m", Array),
        ("v", Array),
        ("packed", Array),
        ("low_bits", Array),
        ("vhat", Array),
        ("ema", Array),
        ("accumulator", Array),
        ("first_index", ctypes.c_int64),
    ]


class Group(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("tensors", ctypes.POINTER(Tensor)),
        ("tensor_count", ctypes.c_size_t),
        ("options", ctypes.c_void_p),
        ("steps", ctypes.POINTER(ctypes.c_int64)),
    ]


class Progress(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("iterations", ctypes.c_int64),
        ("skipped_steps", ctypes.c_int64),
        ("accumulated", ctypes.c_int64),
        ("dynamic_loss_scale", ctypes.c_double),
        ("good_steps", ctypes.c_int64),
    ]


def check_exports(path: str) -> None:
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", path]
    names = [line.split()[0] for line in subprocess.check_output(command, text=True).splitlines()]
    exported = sorted(name for name in names if name.startswith("fusedadam_"))
    assert exported == [f"fusedadam_{name}" for name in FUNCTIONS.split()], exported


def check_step(library: ctypes.CDLL) -> None:
    message = ctypes.create_string_buffer(300)

    def call(name: str, *arguments: object) -> None:
        size = ctypes.c_size_t(len(message))
        status = getattr(library, f"fusedadam_{name}")(*arguments, message, size)
        if status != 0:
            raise ValueError(message.value.decode())

    options = ctypes.c_void_p()
    call("options_create", ctypes.byref(options))
    call("options_set_double", options, b"beta_1", ctypes.c_double(0.5))
    arrays = {
        name: (ctypes.c_float * 2)(*values)
        for name, values in {"param": [1, 2], "grad": [4, 8], "m": [0, 0], "v": [0, 0]}.items()
    }
    tensor = Tensor(struct_size=ctypes.sizeof(Tensor), size=2)
    for name, array in arrays.items():
        setattr(tensor, name, Array(ctypes.addressof(array), 0))
    group = Group(ctypes.sizeof(Group), ctypes.pointer(tensor), 1, options)
    progress = Progress(struct_size=ctypes.sizeof(Progress), dynamic_loss_scale=2.0**15)
    outcome = ctypes.c_int32(-1)
    step = ctypes.byref(group), ctypes.c_size_t(1), ctypes.byref(progress), ctypes.byref(outcome)
    call("step", *step)
    assert [*arrays["m"]] == [2, 4]
    assert arrays["param"][0] < 1
    assert (progress.iterations, outcome.value) == (1, 0)

    tensor.v.data = None
    try:
        call("step", *step)
    except ValueError as error:
        assert str(error) == "tensors[0].v must not be null. Received: null, size=2"  # noqa: PT017
    else:
        raise AssertionError("a null pointer was accepted")
    assert progress.iterations == 1
    library.fusedadam_options_free(options)


if __name__ == "__main__":
    check_exports(sys.argv[1])
    check_step(ctypes.CDLL(sys.argv[1]))
