"""The codec's C interface through ctypes, for the tests and the benchmark."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).resolve().parents[1]
KERNELS = {"automatic": 0, "scalar": 1, "avx2": 2, "avx512": 3}
_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
_BUFFER_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class CodecError(Exception):
    """A status other than 0, with the library's own sentence; `status` is its number."""

    def __init__(self, status: int, sentence: str):
        super().__init__(f"status {status}: {sentence}")
        self.status = status


class _Field(ctypes.Structure):
    _fields_ = (
        ("num_dimensions", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _Rows(ctypes.Structure):
    _fields_ = (("data_type", ctypes.c_int), ("num_rows", ctypes.c_size_t), ("hidden", ctypes.c_size_t))


class _Options(ctypes.Structure):
    _fields_ = (("rate", ctypes.c_double), ("rounding", ctypes.c_int), ("kernel", ctypes.c_int))


def build_library(directory: Path) -> Path:
    """Build the shared library with CMake in `directory` and return its path; CalledProcessError when that fails."""
    parts = ["-DPLANMOE_ZFP_TESTS=OFF", "-DPLANMOE_ZFP_EXAMPLES=OFF", "-DPLANMOE_ZFP_CUDA=OFF"]
    _run(["cmake", "-S", str(SOURCE), "-B", str(directory), "-DCMAKE_BUILD_TYPE=Release", *parts])
    _run(["cmake", "--build", str(directory), "--config", "Release", "--target", "planmoe_zfp_c"])
    return next(path for suffix in ("so", "dylib", "dll") for path in directory.rglob(f"*planmoe_zfp_c.{suffix}"))


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Codec:
    """The functions of zfp_c.h on numpy arrays; bfloat16 travels as uint16."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.planmoe_zfp_describe.restype = ctypes.c_char_p

    def kernels(self) -> list[str]:
        """Names of the kernels that this processor can run."""
        return [name for name, number in KERNELS.items() if self._library.planmoe_zfp_kernel_available(number)]

    def best_kernel(self) -> str:
        """Name of the kernel that "automatic" stands for."""
        return list(KERNELS)[self._library.planmoe_zfp_best_kernel()]

    def stream_bytes(self, shape: tuple[int, ...], rate: float) -> int:
        """Bytes of the stream of an array of `shape`, (width,) or (height, width)."""
        count = ctypes.c_size_t()
        field = _field(shape, "float32")
        self._check(
            self._library.planmoe_zfp_stream_bytes(ctypes.byref(field), ctypes.c_double(rate), ctypes.byref(count))
        )
        return count.value

    def row_bytes(self, hidden: int, rate: float) -> int:
        """Bytes of one row of `hidden` values."""
        count = ctypes.c_size_t()
        self._check(
            self._library.planmoe_zfp_row_bytes(ctypes.c_size_t(hidden), ctypes.c_double(rate), ctypes.byref(count))
        )
        return count.value

    def encode(self, values: np.ndarray, rate: float, kernel: str = "automatic") -> np.ndarray:
        """Encode a (width,) or (height, width) array; returns the stream as uint8."""
        stream = np.empty(self.stream_bytes(values.shape, rate), np.uint8)
        self.encode_into(values, rate, stream, kernel)
        return stream

    def encode_into(self, values: np.ndarray, rate: float, stream: np.ndarray, kernel: str = "automatic") -> None:
        """Encode into the uint8 array `stream`, which may be larger than needed."""
        field, options = _field(values.shape, _type_name(values)), _Options(rate, 1, KERNELS[kernel])
        self._check(
            self._library.planmoe_zfp_encode(
                ctypes.byref(field),
                ctypes.byref(options),
                _pointer(values),
                _pointer(stream),
                ctypes.c_size_t(stream.size),
            )
        )

    def decode_into(
        self, stream: np.ndarray, rate: float, values: np.ndarray, kernel: str = "automatic", *, round_last: bool = True
    ) -> None:
        """Decode the uint8 array `stream` into a (width,) or (height, width) array."""
        field, options = _field(values.shape, _type_name(values)), _Options(rate, int(round_last), KERNELS[kernel])
        self._check(
            self._library.planmoe_zfp_decode(
                ctypes.byref(field),
                ctypes.byref(options),
                _pointer(stream),
                ctypes.c_size_t(stream.size),
                _pointer(values),
            )
        )

    def decode(
        self,
        stream: np.ndarray,
        shape: tuple[int, ...],
        rate: float,
        kernel: str = "automatic",
        *,
        data_type: str = "float32",
        round_last: bool = True,
    ) -> np.ndarray:
        """Decode into a new array of `shape`."""
        values = np.empty(shape, _BUFFER_TYPES[data_type])
        self.decode_into(stream, rate, values, kernel, round_last=round_last)
        return values

    def encode_rows(self, values: np.ndarray, rate: float, kernel: str = "automatic") -> np.ndarray:
        """Encode each row of a [rows, hidden] array alone; returns uint8 [rows, row_bytes]."""
        rows, options = _rows(values), _Options(rate, 1, KERNELS[kernel])
        stream = np.empty((values.shape[0], self.row_bytes(values.shape[1], rate)), np.uint8)
        self._check(
            self._library.planmoe_zfp_encode_rows(
                ctypes.byref(rows),
                ctypes.byref(options),
                _pointer(values),
                _pointer(stream),
                ctypes.c_size_t(stream.size),
            )
        )
        return stream

    def decode_rows(
        self, stream: np.ndarray, hidden: int, rate: float, data_type: str = "float32", kernel: str = "automatic"
    ) -> np.ndarray:
        """Decode uint8 [rows, row_bytes] into [rows, hidden], rounding last."""
        values = np.empty((stream.shape[0], hidden), _BUFFER_TYPES[data_type])
        rows, options = _rows(values), _Options(rate, 1, KERNELS[kernel])
        self._check(
            self._library.planmoe_zfp_decode_rows(
                ctypes.byref(rows),
                ctypes.byref(options),
                _pointer(stream),
                ctypes.c_size_t(stream.size),
                _pointer(values),
            )
        )
        return values

    def _check(self, status: int) -> None:
        if status != 0:
            raise CodecError(status, self._library.planmoe_zfp_describe(status).decode())


def _type_name(values: np.ndarray) -> str:
    return next(name for name, dtype in _BUFFER_TYPES.items() if values.dtype == dtype)


def _field(shape: tuple[int, ...], data_type: str) -> _Field:
    height = shape[0] if len(shape) == 2 else 1
    return _Field(len(shape), _TYPES[data_type], shape[-1], height)


def _rows(values: np.ndarray) -> _Rows:
    return _Rows(_TYPES[_type_name(values)], *values.shape)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    if not array.flags.c_contiguous:
        raise ValueError("array is not contiguous; pass np.ascontiguousarray(array)")
    return ctypes.c_void_p(array.ctypes.data)
