"""Image files in the background: all of them, in order, with back-pressure, and errors that are counted."""

import io
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from mtedit_fast.onestep import open_writer
from mtedit_fast.onestep.writers import FolderWriter, NpzWriter, ZipWriter, png


def images(count: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 7, channels), dtype=np.uint8)


def read(path) -> np.ndarray:
    if path.suffix == ".npz":
        return np.load(path)["arr_0"]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            pictures = [Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    else:
        pictures = [Image.open(file) for file in sorted(path.iterdir())]
    arrays = [np.asarray(picture) for picture in pictures]
    return np.stack([array if array.ndim == 3 else array[..., None] for array in arrays])


@pytest.mark.parametrize("name", ["folder", "images.zip", "images.npz"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("threads", "pending"), [(1, 1), (4, 3)])
def test_what_goes_in_comes_out(tmp_path, name, channels, threads, pending):
    pixels, path = images(11, channels), tmp_path / "new" / name
    with open_writer(path, 11, threads=threads, pending=pending) as writer:
        for start in range(0, 11, 4):
            part = pixels[start : start + 4]
            writer.write(range(start, start + len(part)), part)
    assert (writer.written, writer.errors) == (11, {})
    assert np.array_equal(read(path), pixels)
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_the_suffix_chooses(tmp_path):
    for name, kind in (("a.ZIP", ZipWriter), ("a.npz", NpzWriter), ("a", FolderWriter), ("a.png", FolderWriter)):
        with open_writer(tmp_path / name, 0) as writer:
            assert type(writer) is kind


def test_numbers_name_the_files(tmp_path):
    with open_writer(tmp_path / "out", 2) as writer:
        writer.write([41, 1234567], images(2))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["000041.png", "1234567.png"]


def test_write_waits_while_too_much_is_pending(tmp_path):
    gate = threading.Event()

    class Slow(FolderWriter):
        def _store(self, index, encoded):
            gate.wait()
            super()._store(index, encoded)

    writer = Slow(tmp_path / "out", 4, 1, 2)
    for i in range(2):
        writer.write([i], images(1))
    third = threading.Thread(target=writer.write, args=([2], images(1)))
    third.start()
    third.join(0.1)
    assert third.is_alive()
    gate.set()
    third.join()
    writer.close()
    assert writer.written == 3


def test_files_that_cannot_be_written_are_counted_and_named(tmp_path):
    (tmp_path / "out" / "000001.png").mkdir(parents=True)  # a folder in the way, for any user
    with open_writer(tmp_path / "out", 3) as writer:
        writer.write(range(3), images(3))
    assert writer.written == 2
    assert list(writer.errors) == ["000001.png"]
    assert writer.errors["000001.png"]


@pytest.mark.parametrize("name", ["images.zip", "images.npz"])
def test_an_archive_is_whole_or_not_there(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"older")
    writer = open_writer(path, 5)
    writer.write(range(3), images(3))
    with pytest.raises(ValueError, match=r"count: 5 images were announced for .*, 3 came"):
        writer.close()

    def interrupted():
        with open_writer(path, 5) as writer:
            writer.write(range(3), images(3))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        interrupted()
    assert path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", [ZipWriter, NpzWriter])
def test_what_breaks_an_archive_is_raised(tmp_path, kind):
    class Full(kind):
        def _store(self, index, encoded):
            if index == 1:
                raise OSError(28, "No space left on device")
            super()._store(index, encoded)

    writer = Full(tmp_path / "images", 9, 1, 1)

    def write_all():
        for i in range(9):
            writer.write([i], images(1))

    with pytest.raises(OSError, match="No space left"):
        write_all()
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "pixels",
    [images(2).astype(np.float32), images(3), images(2)[0], np.zeros((2, 4, 4, 2), np.uint8)],
    ids=["float", "more than numbers", "one image", "two channels"],
)
def test_other_pixels_are_refused(tmp_path, pixels):
    with (
        open_writer(tmp_path / "out", 2) as writer,
        pytest.raises(ValueError, match=r"pixels: expected uint8 \[2, H, W"),
    ):
        writer.write([0, 1], pixels)


@pytest.mark.parametrize("options", [{"threads": 0}, {"pending": 0}])
def test_bad_options(tmp_path, options):
    with pytest.raises(ValueError, match="threads, pending"):
        open_writer(tmp_path / "out", 1, **options)


def test_png_is_lossless():
    for channels in (1, 3):
        image = images(1, channels)[0]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image)))).reshape(image.shape), image)
