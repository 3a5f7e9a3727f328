"""Where images come from, recognised: folders, buckets, tar files; with labels that are kept apart."""

import glob
import os
from collections.abc import Callable
from typing import Any

from rae.config.errors import UserError
from rae.data.kinds import NoImagesError
from rae.data.listing import list_images
from rae.data.tars import Tars
from rae.data.truth import Relabelled, is_imagenet_validation, labelled


def open_source(
    place: str,
    skip_empty_classes: bool = False,
    caption: str | None = None,
    labels: str | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
    no_labels: bool = False,
) -> Any:
    """Images below a local folder or ``s3://…``, or in tar files; see :class:`rae.data.conversion.ImageSource`.

    Args:
        skip_empty_classes, caption: see :class:`rae.data.listing.ImageFolder`.
        labels: see :class:`rae.data.truth.labelled`.
        image_key, label_key: see :class:`rae.data.tars.Tars`.
        no_labels: labels are of no interest.

    Raises:
        UserError: there are no images.
    """
    keys = caption, image_key, label_key
    if not os.path.isdir(place) and (".tar" in place.rpartition("/")[2] or "::" in place):
        source: Any = Tars(place, *keys)
    else:
        try:
            source = list_images(place, skip_empty_classes, caption)
        except NoImagesError as error:
            if ".tar" not in error.kinds:
                raise
            if apart := [name for name in error.kinds[".tar"]["names"] if "ILSVRC2012_img_" in name]:
                raise UserError(f"{place!r} holds ImageNet's files; give one of them: {', '.join(apart)}") from error
            source = Tars(f"{glob.escape(place)}/*.tar", *keys, are_folders=True)
    if labels:
        return labelled(source, labels)
    if source.classes in ([], ["."]) and is_imagenet_validation(source.name(0)) and not no_labels:
        raise UserError(
            f"{place!r} holds ImageNet's validation images without folders of classes: name what says their classes, "
            "--labels ILSVRC2012_devkit_t12.tar.gz (or torchvision's meta.bin), or do without by --no-labels"
        )
    return source


def of_one_class_list(sources: list[Any]) -> list[Any]:
    """The same sources, whose labels mean the same: each class has one number in all of them."""
    longest = max((source.classes for source in sources), key=len)
    if all(longest[: len(source.classes)] == source.classes for source in sources):
        classes = longest
    else:
        classes = sorted({name for source in sources for name in source.classes})
    numbers = {name: number for number, name in enumerate(classes)}

    def label_of(names: list[str]) -> Callable[[str, int], int]:
        return lambda _, label: numbers[names[label]] if label >= 0 else -1

    return [Relabelled(source, classes, label_of(source.classes)) for source in sources]
