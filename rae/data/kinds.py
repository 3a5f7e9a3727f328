"""Which files are images, by their names; formats of optional packages are among them where these are installed."""

import contextlib
import functools
import os

from PIL import Image

from rae.config.errors import UserError
from rae.data.formats import FORMATS

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
with contextlib.suppress(ImportError):
    import pillow_jxl  # noqa: F401 - registers itself

_OPTIONAL = (".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl")
_THUMBNAILS = ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN")


@functools.cache
def _suffixes() -> frozenset[str]:
    Image.init()
    return frozenset(suffix for suffix, format in Image.EXTENSION.items() if format in FORMATS and format in Image.OPEN)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image (and not hidden)."""
    return why_not(os.path.basename(name)) is None


def apart(name: str) -> str | None:
    """Why a file or folder of this relative path is not looked at, whatever it holds; None if it is."""
    for part in name.split("/"):
        if part in _THUMBNAILS:
            return part
        if part.startswith("."):
            return "hidden"
    return None


def why_not(name: str) -> str | None:
    """Why a file of this relative path is not taken for an image; None for an image."""
    suffix = os.path.splitext(name)[1]
    return apart(name) or (None if suffix.lower() in _suffixes() else suffix or "without a suffix")


class Aside:
    """What a listing passed over: how many of each kind, and the first of them.

    Attributes:
        kinds: {a suffix, or another reason: {count, names}}.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, dict] = {}

    def note(self, kind: str, name: str) -> None:
        """Count a file or folder."""
        if kind not in self.kinds and len(self.kinds) >= 1000:  # suffixes may be anything
            kind = "of more kinds"
        here = self.kinds.setdefault(kind, {"count": 0, "names": []})
        here["count"] += 1
        if len(here["names"]) < 100:
            here["names"].append(name)

    def line(self) -> str:
        """What was passed over, in a line; '' for nothing."""
        return said_of(self.kinds)

    def no_images(self, place: str) -> "NoImagesError":
        """What to say where there is no image."""
        return NoImagesError(place, self)


class NoImagesError(UserError):
    """There is no image where some were listed.

    Attributes:
        kinds: what there is instead, see :class:`Aside`.
    """

    def __init__(self, place: str, aside: Aside):
        self.kinds = aside.kinds
        hint = "; convert/hf_to_mds.py reads Parquet" if ".parquet" in self.kinds else ""
        super().__init__(f"there are no images below {place!r}{'; ' * bool(self.kinds)}{aside.line()}{hint}")


def said_of(kinds: dict[str, dict]) -> str:
    """The line for :attr:`Aside.kinds`: how many of which, and what reads those that a package would."""
    if not kinds:
        return ""
    most = sorted(kinds, key=lambda kind: -kinds[kind]["count"])
    counts = ", ".join(f"{kinds[kind]['count']:,} {kind}" for kind in most[:20]) + ", …" * (len(most) > 20)
    total = sum(each["count"] for each in kinds.values())
    able = [kind for kind in most if kind.lower() in _OPTIONAL]
    hint = f"; pip install '.[formats]' reads {', '.join(able)}" if able else ""
    return f"{total:,} {'was' if total == 1 else 'were'} not looked at: {counts}{hint}"
