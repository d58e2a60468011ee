"""The limit of a control group: a store that does not fit into it is an error, not a process that the kernel kills."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Run, wait_for

from shmstore.system.processes import memory_left

GROUPS = Path("/sys/fs/cgroup/memory")  # version 1


def machine(root: Path, cgroup: str, mount: str, groups: dict[str, dict[str, str]]) -> Path:
    """Create the kernel's files of control groups below another root."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(f"24 1 0:1 / / rw - ext4 /dev/vda rw\n{mount}\n")
    for group, files in groups.items():
        (root / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / group / name).write_text(text)
    return root


V2 = "31 24 0:28 %s /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw"
V1 = "35 24 0:32 %s /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
STAT = "anon 5\nactive_file 30\ninactive_file 40\nshmem 9\n"


def v2(most: str, used: str, **more: str) -> dict[str, str]:
    return {"memory.max": most, "memory.current": used, **more}


def test_the_smallest_cgroup_limit_applies_and_reclaimable_memory_counts_as_free(tmp_path: Path) -> None:
    groups = {
        "sys/fs/cgroup/system.slice/shop.service": v2("max\n", "10\n"),
        "sys/fs/cgroup/system.slice": v2("1000\n", "600\n") | {"memory.stat": STAT},
    }
    root = machine(tmp_path, "0::/system.slice/shop.service\n", V2 % "/", groups)
    assert memory_left(root) == 470
    (root / "sys/fs/cgroup/system.slice/shop.service/memory.max").write_text("100\n")
    assert memory_left(root) == 90
    (root / "sys/fs/cgroup/system.slice/shop.service/memory.current").write_text("130\n")
    assert memory_left(root) == 0


@pytest.mark.parametrize(("path", "top"), [("/", "/"), ("/docker/abc", "/docker/abc"), ("/docker/abc", "/")])
def test_in_a_container_the_cgroup_is_the_mounted_one(tmp_path: Path, path: str, top: str) -> None:
    group = "sys/fs/cgroup" if path == top else f"sys/fs/cgroup{path}"
    root = machine(tmp_path, f"1:name=systemd:/\n0::{path}\n", V2 % top, {group: v2("1000", "400")})
    assert memory_left(root) == 600


def test_cgroup_version_1(tmp_path: Path) -> None:
    groups = {
        "sys/fs/cgroup/memory": {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "5"},
        "sys/fs/cgroup/memory/shop": {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "400"},
    }
    root = machine(tmp_path, "4:memory:/shop\n3:cpu:/\n", V1 % "/", groups)
    assert memory_left(root) == 600
    (root / "sys/fs/cgroup/memory/shop/memory.limit_in_bytes").write_text("9223372036854771712")
    assert memory_left(root) == math.inf


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_left(tmp_path) == math.inf


@pytest.fixture
def group() -> Iterator[Path]:
    """Return a real control group of 150 MiB."""
    path = GROUPS / f"shmstore-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as exc:
        pytest.skip(f"no control group of version 1 can be made here: {exc}")
    (path / "memory.limit_in_bytes").write_text(str(150 * 2**20))
    yield path

    def removed() -> bool:
        with contextlib.suppress(OSError):
            path.rmdir()
        return not path.exists()

    wait_for(removed, "the end of the group")


IN_GROUP = """
import os, sys
with open(sys.argv[1], "w") as procs:
    procs.write(str(os.getpid()))
from shmstore import StoreFull, StoreManager
for memory in ("200M", "1M"):
    manager = StoreManager("shop", memory=memory, directory=sys.argv[2], persist=False)
    try:
        manager.start()
    except StoreFull as exc:
        print(exc)
    else:
        print("started")
        manager.shutdown()
"""


def test_a_store_too_large_for_its_cgroup_is_refused(run: Run, group: Path, store_dir: Path) -> None:
    told = run(IN_GROUP, group / "cgroup.procs", store_dir).communicate()[0].splitlines()
    assert "the control group of this process allows" in told[0]
    assert "give a smaller memory=" in told[0]
    assert told[1:] == ["started"]
