"""File names for images' names, on any file system, and never outside of the folder."""

import itertools
import unicodedata
from pathlib import PurePosixPath


class FileNames:
    """Paths of PNGs for images' names: sub-folders are kept, and no two are the same on any file system."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.folders: set[str] = set()

    def of(self, name: str) -> str:
        """``a/b.jpg`` -> ``a/b.png``, or ``a/b-2.png`` when that was given to another name."""
        # Names come from shards too, which may be a stranger's: nothing may be written outside the folder.
        parts = [_harmless(part) for part in PurePosixPath(name).parts if part.strip("/") not in ("", ".", "..")]
        *folders, last = parts or ["image"]
        folder = ""
        for part in folders:
            folder = _free(folder + part, "", self.files)
            self.folders.add(_key(folder))
            folder += "/"
        file = _free(folder + _shorter(PurePosixPath(last).stem, 240), ".png", self.files, self.folders)
        self.files.add(_key(file))
        return file


def _free(start: str, end: str, *taken: set[str]) -> str:
    candidates = itertools.chain([start + end], (f"{start}-{count}{end}" for count in itertools.count(2)))
    return next(each for each in candidates if not any(_key(each) in names for names in taken))


def _key(path: str) -> str:
    """The same for paths that some file system takes for the same."""
    return unicodedata.normalize("NFC", path).casefold()


def _harmless(part: str) -> str:
    return _shorter("".join("_" if unicodedata.category(c) == "Cc" or c in '\\:*?"<>|' else c for c in part), 250)


def _shorter(text: str, limit: int) -> str:
    """At most so many bytes of UTF-8, which is what file systems limit."""
    return text.encode()[:limit].decode(errors="ignore")
