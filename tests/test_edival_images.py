"""Images of every kind, from folders of every layout."""

import numpy as np
import pytest
import torch
from PIL import Image

from mtedit_fast.edival.images import ImageFolder, UnreadableImage, load_image, save_image, start_images


def picture(mode, size=(12, 8)):
    generator = np.random.default_rng(0)
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8), mode)


def test_images_of_every_mode(tmp_path):
    def loaded(image, name="x.png", **options):
        image.save(tmp_path / name, **options)
        return (load_image(tmp_path / name) * 255).permute(1, 2, 0).numpy()

    rgb, grey, clear = picture("RGB"), picture("L"), picture("RGBA")
    np.testing.assert_array_equal(loaded(rgb), np.array(rgb))
    np.testing.assert_array_equal(loaded(grey), np.array(grey)[..., None].repeat(3, 2))
    pixels = np.array(clear).astype(float)
    alpha = pixels[..., 3:] / 255
    over_white = pixels[..., :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(loaded(clear), over_white, atol=1)
    np.testing.assert_allclose(loaded(picture("LA")), loaded(picture("LA").convert("RGBA")), atol=1)
    deep = np.random.default_rng(1).integers(0, 65536, (8, 12), dtype=np.uint16)
    np.testing.assert_allclose(loaded(Image.fromarray(deep)), (deep / 257).round()[..., None].repeat(3, 2), atol=0)
    np.testing.assert_allclose(loaded(Image.fromarray(deep), "x.tiff")[..., 0], (deep / 257).round())
    floats = np.random.default_rng(2).random((8, 12), dtype=np.float32)
    np.testing.assert_allclose(loaded(Image.fromarray(floats), "x.tiff")[..., 1], floats * 255, atol=0.5)
    cmyk = picture("CMYK")
    np.testing.assert_array_equal(loaded(cmyk, "x.tiff"), np.array(cmyk.convert("RGB")))
    palette = rgb.quantize(8)
    np.testing.assert_array_equal(loaded(palette), np.array(palette.convert("RGB")))
    see_through = loaded(palette, transparency=0)
    assert (see_through[np.array(palette) == 0] == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° to display
    assert loaded(rgb, exif=exif).shape == (12, 8, 3)


def test_images_are_resized_and_written(tmp_path):
    image = picture("RGB", (50, 30))
    image.save(tmp_path / "x.png")
    expected = np.array(image.resize((16, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal((load_image(tmp_path / "x.png", 16) * 255).permute(1, 2, 0), expected)
    tensor = torch.rand(3, 5, 7)
    save_image(tensor, tmp_path / "y.png")
    torch.testing.assert_close(load_image(tmp_path / "y.png"), (tensor * 255).round() / 255)


def test_unreadable_files(tmp_path):
    whole = tmp_path / "whole.png"
    picture("RGB", (64, 64)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-3000])
    picture("RGB", (64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-800])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.png", "cut.jpg", "text.png", "empty.png"):
        with pytest.raises(UnreadableImage, match=name):
            load_image(tmp_path / name)
    with pytest.raises(UnreadableImage, match=r"missing\.png: no such file"):
        load_image(tmp_path / "missing.png")


def test_folder_layouts(tmp_path):
    def write(*names, size=(8, 8)):
        for i, name in enumerate(names):
            Image.new("RGB", size, (i, 0, 0)).save(tmp_path / name)

    write("3_0.png", "3_1.png", "3_2.jpg", "3_10.png", "a_b_0.webp", "a_b_1.PNG", "notes.png")
    write("9_input_raw.jpg", "9_input_raw_turn_1.png", "9_input_raw_turn_2.png")
    write("5_1.png")
    (tmp_path / "3_3.txt").write_text("")
    folder = ImageFolder(tmp_path, size=None)
    assert list(folder) == ["3", "5", "9", "a_b"]
    assert [len(folder[i]) for i in ("3", "9", "a_b")] == [3, 3, 2]
    assert (folder["9"][:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2]
    with pytest.raises(UnreadableImage, match=r"5_0\.png: no such file, the image the chain starts from"):
        folder["5"]
    write("3_1.png", size=(8, 9))
    with pytest.raises(UnreadableImage, match=r"3_1.png: 9×8 pixels, the chain starts with 8×8; give a size"):
        ImageFolder(tmp_path, size=None)["3"]
    assert ImageFolder(tmp_path, size=6)["3"].shape == (3, 3, 6, 6)
    assert ImageFolder(tmp_path)["3"].shape[2:] == (512, 512)
    assert set(start_images(tmp_path)) == {"3", "9", "a_b"}
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match=r"nothing in .* is named \{image_index\}_\{turn\}.png"):
        ImageFolder(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"images: no \.png"):
        start_images(tmp_path / "plain")
    with pytest.raises(ValueError, match="images: no folder"):
        ImageFolder(tmp_path / "nowhere")
    picture("RGB").save(tmp_path / "plain/my dog.jpeg")
    assert start_images(tmp_path / "plain") == {"my dog": tmp_path / "plain/my dog.jpeg"}
