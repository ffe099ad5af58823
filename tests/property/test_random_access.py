"""Random reads of every kind, on one thread and many, against the bytes of the disk."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import imgcore
from tests.helpers import qemu
from tests.helpers.images import MIB
from tests.helpers.random_access import NAMES, USES, Disk, use_at_random, vmdk_chain, write_disks

N_THREADS = 16
CACHES = ("0", "4096", "1M", "32M")

relaxed = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
steps = st.lists(st.tuples(st.sampled_from(sorted(USES)), st.integers(0, 2**32)), max_size=20)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Disk]:
    folder = tmp_path_factory.mktemp("disks")
    found = write_disks(folder)
    if qemu.find_program("qemu-img"):
        found["child.vmdk"] = vmdk_chain(folder)
    return found


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Disk]:
    """Return images of the same names with other content."""
    return write_disks(tmp_path_factory.mktemp("others"), 101)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_reads_of_every_kind(name: str, cache: str, disks: dict[str, Disk]) -> None:
    disk = disks[name]

    @relaxed
    @given(steps=steps)
    def check(steps: list[tuple[str, int]]) -> None:
        with imgcore.open(disk.path, cache=cache) as image:
            assert image.virtual_size == len(disk.content)
            for use, seed in steps:
                USES[use](image, disk.content, random.Random(seed))

    check()


def test_reads_of_a_vmdk_with_a_parent(disks: dict[str, Disk]) -> None:
    qemu.require_qemu_img()
    disk = disks["child.vmdk"]
    for cache in CACHES:
        with imgcore.open(disk.path, cache=cache) as image:
            use_at_random(image, disk.content, 1, 100)


class Crowd:
    """Threads that use an image until they are through, or until it is closed."""

    def __init__(self, disk: Disk, n_uses: int, seed: int, **keywords: Any) -> None:
        self.content = disk.content
        self.image = imgcore.open(disk.path, **keywords)
        self.n_uses = n_uses
        self.seed = seed
        self.failures: list[BaseException] = []
        self.n_closed = 0
        self.started = threading.Barrier(N_THREADS + 1)
        self.threads = [threading.Thread(target=self.work, args=(n,)) for n in range(N_THREADS)]
        for thread in self.threads:
            thread.start()
        self.started.wait()

    def work(self, number: int) -> None:
        self.started.wait()
        for turn in range(self.n_uses):
            try:
                use_at_random(self.image, self.content, (self.seed, number, turn).__hash__(), 1)
            except ValueError as error:
                if "is closed" not in str(error):
                    self.failures.append(error)
                self.n_closed += 1
                return
            except BaseException as error:
                self.failures.append(error)
                return

    @property
    def is_at_work(self) -> bool:
        return any(thread.is_alive() for thread in self.threads)

    def end(self) -> None:
        """Wait for all threads; fail as the first that failed."""
        for thread in self.threads:
            thread.join()
        self.image.close()
        if self.failures:
            raise self.failures[0]


def n_uses(few: int, many: int) -> Any:
    """Run a test with few uses for each thread, and another time with many."""
    marks = pytest.mark.slow
    return pytest.mark.parametrize(
        "n_uses", [pytest.param(few, id="few"), pytest.param(many, id="many", marks=marks)]
    )


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", NAMES)
@n_uses(6, 400)
def test_many_threads(name: str, cache: str, n_uses: int, disks: dict[str, Disk]) -> None:
    crowd = Crowd(disks[name], n_uses, 1, cache=cache)
    crowd.end()
    assert crowd.n_closed == 0


@pytest.mark.parametrize("cache", ["4096", "32M"])
@pytest.mark.parametrize("name", NAMES)
@n_uses(1, 60)
def test_many_threads_and_one_that_closes(
    name: str, cache: str, n_uses: int, disks: dict[str, Disk], others: dict[str, Disk]
) -> None:
    """What is read is right, or the image is closed; never is it another file's."""
    rng = random.Random(name + cache)
    for turn in range(n_uses):
        crowd = Crowd(disks[name], 1 << 30, turn, cache=cache)
        use_at_random(crowd.image, crowd.content, turn, rng.randrange(20))
        crowd.image.close()
        # The numbers of its descriptors belong to other images now.
        taken = [imgcore.open(others[name].path) for _ in range(3)]
        crowd.end()
        assert crowd.n_closed == N_THREADS
        for image in taken:
            image.close()


@pytest.mark.parametrize("cache", ["4096", "32M"])
@pytest.mark.parametrize("name", NAMES)
@n_uses(6, 300)
def test_many_threads_and_one_that_refreshes(
    name: str, cache: str, n_uses: int, disks: dict[str, Disk]
) -> None:
    crowd = Crowd(disks[name], n_uses, 1, cache=cache, share=True)
    n_refreshed = 0
    while crowd.is_at_work:
        crowd.image.refresh()
        n_refreshed += 1
    crowd.end()
    assert crowd.n_closed == 0
    assert n_refreshed > 0


@pytest.mark.parametrize("cache", ["4096", "32M"])
@pytest.mark.parametrize(
    "name", ["disk.raw", "disk.qcow2", "zlib.qcow2", "stream.vmdk", "disk.vhd", "disk.vhdx"]
)
@n_uses(6, 100)
def test_many_threads_while_the_image_is_rewritten(
    name: str,
    cache: str,
    n_uses: int,
    disks: dict[str, Disk],
    others: dict[str, Disk],
    tmp_path: Path,
) -> None:
    """A read that starts after a refresh, and ends before the next change, is right."""
    states = (disks[name], others[name])
    path, failures = Path(shutil.copy(states[0].path, tmp_path)), []
    # While it is odd, the image is not what was read of it last.
    epoch, is_over = 0, threading.Event()

    def read(number: int) -> None:
        rng = random.Random(number)
        while not is_over.is_set():
            before = epoch
            try:
                use_at_random(image, states[before // 2 % 2].content, rng.randrange(1 << 40), 1)
            except BaseException as error:
                if before % 2 == 0 and epoch == before:
                    failures.append(error)
                    return

    with imgcore.open(path, cache=cache, share=True) as image:
        threads = [threading.Thread(target=read, args=(n,)) for n in range(N_THREADS)]
        for thread in threads:
            thread.start()
        for turn in range(1, n_uses + 1):
            time.sleep(0.05)
            epoch += 1
            path.write_bytes(states[turn % 2].path.read_bytes())
            image.refresh()
            epoch += 1
        time.sleep(0.05)
        is_over.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


LEAKS = """
import gc, itertools, os, sys
from pathlib import Path
import imgcore
from tests.helpers.random_access import use_at_random, write_disks

folder, n_opens = Path(sys.argv[1]), int(sys.argv[2])
disks = list(write_disks(folder).values())

def grown(n, seed):
    for number in range(n):
        disk = disks[number % len(disks)]
        cache = ("0", "4096", "32M")[number // len(disks) % 3]
        with imgcore.open(disk.path, cache=cache) as image:
            use_at_random(image, disk.content, seed + number, 3)
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))

before = grown(max(3 * len(disks), n_opens // 5), 0)
after = grown(n_opens, 1 << 20)
print(after[0] - before[0], after[1] - before[1])
"""


@pytest.mark.parametrize(
    "n_opens", [300, pytest.param(10_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_images_that_are_opened_read_and_closed_leave_nothing(n_opens: int, tmp_path: Path) -> None:
    """A process that does it thousands of times takes no more memory or descriptors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LEAKS, str(tmp_path), str(n_opens)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    n_more_bytes, n_more_descriptors = map(int, done.stdout.split())
    assert n_more_descriptors == 0
    if "LD_PRELOAD" not in os.environ:  # a sanitizer keeps memory that was freed
        assert n_more_bytes < 8 * MIB
