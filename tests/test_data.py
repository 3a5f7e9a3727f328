"""Decoding, transforms, and what a batch is made of."""

import io
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from rae.data.dataset import open_dataset
from rae.data.decoding import center_crop, decode, eval_transform, train_transform
from rae.data.loaders import eval_loader, train_loader

rng = np.random.default_rng(0)
COARSE = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
PHOTO = COARSE.resize((240, 180), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_decode_exactly(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert torch.equal(decode(encode(PHOTO, format, **options)), as_tensor(PHOTO))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_odd_modes_become_rgb(mode):
    format = "JPEG" if mode == "CMYK" else "PNG"
    image = PHOTO.convert(mode)
    decoded = decode(encode(image, format, **({"quality": 95} if format == "JPEG" else {})))
    assert decoded.shape == (3, 180, 240)
    assert decoded.dtype == torch.uint8
    assert (decoded.float() - as_tensor(image.convert("RGB")).float()).abs().mean() < 4


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = decode(encode(Image.fromarray(grey)))
    assert decoded[0].flatten().tolist() == list(range(256))


def test_exif_rotation_is_applied_for_jpeg_and_others():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    for format in ("JPEG", "PNG"):
        assert decode(encode(PHOTO, format, exif=exif)).shape == (3, 240, 180)


def test_transparency_and_animation():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(encode(clear)).sum() == 0
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    animated = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(animated)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("crop", ["random", "center"])
def test_a_run_sees_the_background_that_its_configuration_names(crop):
    from rae.config.sections import Data
    from rae.training.data import _train_transform

    clear = encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    for background, expected in (("black", [0, 0, 0]), ("white", [255] * 3), ("drop", [255, 0, 0])):
        data = Data(image_size=8, background=background, train={"path": "there", "crop": crop})
        assert _train_transform(data.train, data)(clear, Random(0))[:, 0, 0].tolist() == expected


def test_train_transform_is_the_references_resize_and_crop():
    """Against Pillow's bicubic resize of the short side and a crop at the same place."""
    image = train_transform(64, 96)(encode(PHOTO), Random(3))
    resized = PHOTO.resize((128, 96), Image.Resampling.BICUBIC)
    draw = Random(3)
    top, left = draw.randrange(96 - 64 + 1), draw.randrange(128 - 64 + 1)
    expected = as_tensor(resized.crop((left, top, left + 64, top + 64)))
    assert (image.float() - expected.float()).abs().mean() < 1


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1200, 900), (320, 240)])
def test_jpeg_photographs_are_within_a_grey_level_of_the_references(size):
    """Train and eval transforms of a JPEG against Pillow's decoder, bicubic resize, box filter and crops."""
    stored = encode(COARSE.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90)
    photo = Image.open(io.BytesIO(stored)).convert("RGB")
    width, height = (int(384 * side / min(size)) for side in size)
    draw = Random(5)
    top, left = draw.randrange(height - 256 + 1), draw.randrange(width - 256 + 1)
    resized = photo.resize((width, height), Image.Resampling.BICUBIC)
    expected = as_tensor(resized.crop((left, top, left + 256, top + 256)))
    assert (train_transform(256)(stored, Random(5)).float() - expected.float()).abs().mean() < 1
    centre = as_tensor(center_crop(photo, 256))
    assert (eval_transform(256)(stored, Random(5)).float() - centre.float()).abs().mean() < 1


def test_crops_cover_the_image_and_flips_are_optional():
    stored = encode(PHOTO.resize((12, 8)))
    assert len({train_transform(8, 8)(stored, Random(i)).numpy().tobytes() for i in range(50)}) == 5
    assert len({train_transform(8, 8, True)(stored, Random(i)).numpy().tobytes() for i in range(80)}) == 10


@pytest.mark.parametrize("size", [(240, 180), (64, 64), (65, 301), (500, 129), (40, 30)])
def test_center_crop_is_adms(size):
    image = PHOTO.resize(size)
    crop = center_crop(image, 64)
    assert crop.size == (64, 64)
    reference = image
    while min(*reference.size) >= 128:
        reference = reference.resize(tuple(x // 2 for x in reference.size), resample=Image.Resampling.BOX)
    scale = 64 / min(*reference.size)
    reference = np.array(reference.resize(tuple(round(x * scale) for x in reference.size), Image.Resampling.BICUBIC))
    y, x = (reference.shape[0] - 64) // 2, (reference.shape[1] - 64) // 2
    assert np.array_equal(np.array(crop), reference[y : y + 64, x : x + 64])


def batches(shards, seed=0, workers=0, epochs=1, batch_size=8):
    dataset = open_dataset(
        str(shards / "train"), "", transform=train_transform(64, 72), seed=seed, shuffle=True,
        batch_size=batch_size, num_canonical_nodes=1,
    )  # fmt: skip
    loader = train_loader(dataset, batch_size, workers, prefetch=2)
    return [batch["image"] for _ in range(epochs) for batch in loader]


def test_augmentation_depends_on_seed_epoch_and_sample_alone(shards):
    none, two = batches(shards, epochs=2), batches(shards, workers=2, epochs=2)
    assert none[0].dtype == torch.uint8
    assert none[0].shape == (8, 3, 64, 64)
    # Workers deal the samples into batches in another order, but each sample's pixels are the same.
    for epoch in (slice(0, 5), slice(5, 10)):
        assert _images(none[epoch]) == _images(two[epoch])
    assert _images(none[:5]) != _images(none[5:])
    assert _images(none[:5]) != _images(batches(shards, seed=1))


def _images(batch_list):
    return {image.numpy().tobytes() for batch in batch_list for image in batch}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_image_once_in_order(shards, world_size):
    dataset = open_dataset(str(shards / "eval"), "", transform=eval_transform(64), seed=0)
    seen = {}
    for rank in range(world_size):
        loader = eval_loader(dataset, 2, 0, 2, 7, rank, world_size)
        images = torch.cat([batch["image"] for batch in loader])
        for position, image in enumerate(images):
            index = position * world_size + rank
            if index < 7:  # what follows is padding, which Composer drops
                seen[index] = image
    assert sorted(seen) == list(range(7))
    assert all(torch.equal(seen[i], dataset[i]["image"]) for i in range(7))


def test_a_sample_that_does_not_decode_is_named(tmp_path):
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path / "bad"), columns={"image": "bytes", "label": "int", "path": "str"}) as writer:
        writer.write({"image": b"\xff\xd8 no picture", "label": 0, "path": "cats/broken.jpg"})
    dataset = open_dataset(str(tmp_path / "bad"), "", transform=eval_transform(64), seed=0)
    with pytest.raises(RuntimeError, match=r"cats/broken\.jpg"):
        dataset[0]
