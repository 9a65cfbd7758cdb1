"""Image files written in the background, as fast as they come: a folder of PNGs, a zip of PNGs, or one npz."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from PIL import Image


def open_writer(path: str | Path, count: int, *, threads: int = 4, pending: int = 8) -> ImageWriter:
    """The writer for `path`: .zip and .npz by their suffix, else a folder.

    count: images that will be written. threads: that encode. pending: batches that may wait; `write` blocks for more.
    """
    kinds: dict[str, type[ImageWriter]] = {".zip": ZipWriter, ".npz": NpzWriter}
    return kinds.get(Path(path).suffix.lower(), FolderWriter)(Path(path), count, threads, pending)


class ImageWriter:
    """Takes batches of pixels; encodes them in threads and stores them in order in another.

    A context manager: leaving it waits for everything. Archives appear under their name only when they are complete.
    """

    def __init__(self, path: Path, count: int, threads: int, pending: int) -> None:
        if min(threads, pending) < 1 or count < 0:
            raise ValueError(f"count, threads, pending: expected ≥ 0, ≥ 1, ≥ 1, got {count}, {threads}, {pending}")
        self.path, self.count, self.written = path, count, 0
        self.errors: dict[str, str] = {}
        """Of files that could not be written: {name: reason}; the others were."""
        self._failure: Exception | None = None
        self._slots = BoundedSemaphore(pending)
        self._encoders = ThreadPoolExecutor(threads, "encode")
        self._sink = ThreadPoolExecutor(1, "store")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def write(self, indices: Sequence[int], pixels: np.ndarray) -> None:
        """Images [n, H, W, 1 or 3] uint8 with their numbers; the array must not be changed afterwards.

        Raises what broke the archive before, if anything did.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != len(indices) or pixels.shape[3] not in (1, 3):
            raise ValueError(
                f"pixels: expected uint8 [{len(indices)}, H, W, 1 or 3], got {pixels.dtype} {list(pixels.shape)}"
            )
        if self._failure is not None:
            raise self._failure
        self._slots.acquire()
        encoded = [self._encoders.submit(self._encode, image) for image in pixels]
        self._sink.submit(self._drain, list(indices), encoded)

    def close(self) -> None:
        """Wait for what is under way and complete the files; raises what broke an archive, without leaving a part."""
        self._encoders.shutdown()
        self._sink.shutdown()
        if self._failure is None:
            try:
                self._finish()
            except (OSError, ValueError) as error:
                self._failure = error
        if self._failure is not None:
            self._discard()
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._encoders.shutdown(cancel_futures=True)
        self._sink.shutdown(cancel_futures=True)
        self._discard()

    def _drain(self, indices: list[int], encoded: list[Future[Any]]) -> None:
        try:
            for index, future in zip(indices, encoded, strict=True):
                if self._failure is None:
                    self._store(index, future.result())
        except Exception as error:  # a thread has nobody else to tell
            self._failure = error
        finally:
            self._slots.release()

    def _encode(self, image: np.ndarray) -> Any:
        return png(image)

    def _open(self) -> None:
        raise NotImplementedError

    def _store(self, index: int, encoded: Any) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        pass

    def _discard(self) -> None:
        pass


class FolderWriter(ImageWriter):
    """000000.png … in a folder. A file that cannot be written is counted, named in `errors`, and left out."""

    def _open(self) -> None:
        self.path.mkdir(exist_ok=True)

    def _store(self, index: int, encoded: bytes) -> None:
        name = _name(index)
        try:
            (self.path / name).write_bytes(encoded)
        except OSError as error:
            self.errors[name] = error.strerror or str(error)
            with contextlib.suppress(OSError):  # what there is of it, if it is a file
                (self.path / name).unlink()
        else:
            self.written += 1


class _ArchiveWriter(ImageWriter):
    _zip: zipfile.ZipFile

    def _open(self) -> None:
        self._partial = self.path.with_name(self.path.name + ".partial")
        # PNGs are compressed already, and raw pixels are quicker to load.
        self._zip = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)

    def _finish(self) -> None:
        self._zip.close()
        if self.written != self.count:
            raise ValueError(f"count: {self.count} images were announced for {self.path}, {self.written} came")
        self._partial.replace(self.path)

    def _discard(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk, or an entry left open: the file goes anyway
            self._zip.close()
        self._partial.unlink(missing_ok=True)


class ZipWriter(_ArchiveWriter):
    """000000.png … in an uncompressed zip, as training code for images reads it."""

    def _store(self, index: int, encoded: bytes) -> None:
        self._zip.writestr(_name(index), encoded)
        self.written += 1


class NpzWriter(_ArchiveWriter):
    """arr_0, uint8 [count, H, W, channels] in the order of arrival, streamed; memory holds a few batches."""

    _array: IO[bytes] | None = None

    def _encode(self, image: np.ndarray) -> np.ndarray:
        return image

    def _store(self, index: int, encoded: np.ndarray) -> None:
        if self._array is None:
            self._array = self._zip.open("arr_0.npy", "w", force_zip64=True)
            shape = (self.count, *encoded.shape)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._array, header)
        self._array.write(np.ascontiguousarray(encoded).data)
        self.written += 1

    def _finish(self) -> None:
        if self._array is not None:
            self._array.close()
        super()._finish()

    def _discard(self) -> None:
        if self._array is not None:
            self._array.close()
        super()._discard()


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 1 or 3] as PNG, at the quickest compression."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _name(index: int) -> str:
    return f"{index:06d}.png"
