"""Ranks that begin with everything imported: forked by a process that has done it once, which spares each 8 seconds.

What they run is what a launcher would start; that launchers start it is tested where they are themselves.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATIENCE = 1200
"""Seconds after which what a test waits for counts as hanging: more than it takes on the busiest machine."""
_forks = multiprocessing.get_context("forkserver")


def run_ranks(folder: Path, *words: str, count: int = 2, **env: str) -> list[str]:
    """Run a Python script's command line as ranks of one machine; returns what each said.

    Args:
        folder: what they say is kept here.
        words: a script, from the project's folder, and its arguments.
    """
    from tests.s3 import free_port

    folder.mkdir(parents=True, exist_ok=True)
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", **env}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks, said = [], [folder / f"rank{rank}" for rank in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # of the process that forks, which must find this package
        patch.setenv("OMP_NUM_THREADS", "1")
        _forks.set_forkserver_preload(["tests.forks", "rae.training.run"])
        for rank, file in enumerate(said):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(_forks.Process(target=_run, args=(words, own, file)))
            ranks[-1].start()
    try:
        for process in ranks:
            process.join(PATIENCE)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    texts = [file.read_text() for file in said]
    assert [process.exitcode for process in ranks] == [0] * count, "\n".join(texts)
    return texts


def _run(words: tuple[str, ...], environment: dict[str, str], out: Path) -> None:
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
