"""Checkpoints on their way to a bucket, beside training."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from rae.survival.storage import RemoteFolder, reason

log = logging.getLogger(__name__)


class Uploader:
    """Copies checkpoints to a bucket, one after the other, in a thread that cannot keep the process from ending.

    Args:
        folder: where they go.
        attempts: before an upload counts as failed; pauses between them double from a second on.
    """

    def __init__(self, folder: str, attempts: int):
        self.folder, self.attempts = folder.rstrip("/"), attempts
        self.queue: queue.Queue[tuple[Path, list[str], Callable[[], None]]] = queue.Queue()
        self.used = False
        """Whether this rank has anything to upload."""
        self.done = ""
        """The newest checkpoint of which this rank's part has arrived."""
        self.failure = ""
        """What went wrong, once an upload has failed for good. None is begun after that."""
        threading.Thread(target=self._work, name="upload", daemon=True).start()

    def put(self, checkpoint: Path, files: list[str], then: Callable[[], None]) -> None:
        """Upload ``files`` of a checkpoint in this order, delete them here, and call ``then``."""
        self.used = True
        self.queue.put((checkpoint, files, then))

    @property
    def busy(self) -> bool:
        """Whether there is something still to be uploaded, and hope."""
        return self.queue.unfinished_tasks > 0 and not self.failure

    def _work(self) -> None:
        while True:
            checkpoint, files, then = self.queue.get()
            try:
                if not self.failure:
                    self._send(checkpoint, files)
                    then()
            except Exception as error:
                self.failure = (
                    f"checkpoint {checkpoint.name} could not be uploaded to {self.folder} in {self.attempts} "
                    f"attempts: {reason(error)}; it is kept in {checkpoint}"
                )
            self.queue.task_done()

    def _send(self, checkpoint: Path, files: list[str]) -> None:
        from composer.utils import retry

        remote = RemoteFolder(f"{self.folder}/{checkpoint.name}")

        @retry(Exception, num_attempts=self.attempts)
        def send(file: str) -> None:
            try:
                remote.upload(checkpoint / file, file)
            except Exception as error:
                log.warning("uploading %s of checkpoint %s: %s", file, checkpoint.name, reason(error))
                raise

        for file in files:
            send(file)
        for file in reversed(files):  # the seal first: what is left of a kill here is incomplete
            (checkpoint / file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other ranks of this node may still be sending theirs
            checkpoint.rmdir()
        self.done = checkpoint.name
