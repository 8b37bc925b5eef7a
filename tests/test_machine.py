"""How many CPUs and how much memory a process may use, from the files of control groups."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isomerge_fast import machine
from isomerge_fast.planning import budget

V2 = "30 23 0:26 {top} {point} rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 25 0:29 {top} {point} ro,nosuid,nodev,noexec,relatime master:11 - cgroup cgroup rw,{controllers}"
OTHERS = ["23 1 0:21 / / rw - ext4 /dev/root rw", "24 23 0:5 / /proc rw - proc proc rw,cpu,memory", "cut short", ""]
CPUS, MEMORY = 64, 1 << 40


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: CPUS)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(CPUS)))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": MEMORY // 4096}.__getitem__)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def v2(top: str = "/", point: str = "/sys/fs/cgroup") -> str:
    return V2.format(top=top, point=point)


def v1(controllers: str, top: str = "/", point: str = "") -> str:
    return V1.format(top=top, point=point or f"/sys/fs/cgroup/{controllers}", controllers=controllers)


def lay_out(root: Path, groups: list[str], mounts: list[str], files: dict[str, str]) -> Path:
    """Write ``/proc/self`` and files of control groups below ``root``; names are below ``/sys/fs/cgroup``."""
    contents = {"proc/self/cgroup": "\n".join([*groups, ""]), "proc/self/mountinfo": "\n".join([*OTHERS, *mounts])}
    contents |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


DOCKER_V1 = ["4:memory:/docker/abc", "3:cpu,cpuacct:/docker/abc", "1:name=systemd:/docker/abc"]
INSIDE = [v1("cpu,cpuacct", "/docker/abc"), v1("memory", "/docker/abc")]
SLICE = ["0::/user.slice/job"]
# Groups, mounts, files; CPUs and bytes that are left.
CASES = {
    "no control groups": ([], [], {}, CPUS, MEMORY),
    "v2": (["0::/job"], [v2()], {"job/cpu.max": "200000 100000\n", "job/memory.max": "1024\n"}, 2, 1024),
    "v2 without limits": (
        ["0::/job"],
        [v2()],
        {"job/cpu.max": "max 100000\n", "job/memory.max": "max\n"},
        CPUS,
        MEMORY,
    ),
    "v2 in a container": (["0::/"], [v2()], {"cpu.max": "300000 100000\n", "memory.max": "1024\n"}, 3, 1024),
    "v2, a group around is tighter": (
        SLICE,
        [v2()],
        {
            "user.slice/job/cpu.max": "800000 100000",
            "user.slice/job/memory.max": "max",
            "user.slice/cpu.max": "100000 50000",
            "user.slice/memory.max": "4096",
        },
        2,
        4096,
    ),
    "v2, the group is tighter than that around": (
        SLICE,
        [v2()],
        {
            "user.slice/job/cpu.max": "20000 10000",
            "user.slice/job/memory.max": "512",
            "user.slice/cpu.max": "400000 100000",
            "user.slice/memory.max": "4096",
        },
        2,
        512,
    ),
    "v2, another group has a limit": (SLICE, [v2()], {"job/cpu.max": "1 1", "job/memory.max": "1"}, CPUS, MEMORY),
    "v2, the path is the host's": (["0::/docker/abc"], [v2()], {"cpu.max": "200000 100000"}, 2, MEMORY),
    "v2, only a part is mounted": (["0::/a/b"], [v2("/a")], {"b/cpu.max": "200000 100000"}, 2, MEMORY),
    "v2, a group outside of what is seen": (
        ["0::/../b"],
        [v2(point="/sys/fs/cgroup/a")],
        {"a/cpu.max": "200000 100000", "b/cpu.max": "100000 100000"},
        2,
        MEMORY,
    ),
    "v2, mounted at a name with a space": (
        ["0::/a b"],
        [v2(point="/sys/fs/cgroup/so\\040named")],
        {"so named/a b/memory.max": "1024"},
        CPUS,
        1024,
    ),
    "v1": (
        ["4:memory:/job", "3:cpu,cpuacct:/job"],
        [v1("cpu,cpuacct"), v1("memory")],
        {
            "cpu,cpuacct/job/cpu.cfs_quota_us": "400000\n",
            "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            "memory/job/memory.limit_in_bytes": "1024\n",
        },
        4,
        1024,
    ),
    "v1 without limits": (
        ["4:memory:/", "3:cpu:/"],
        [v1("cpu"), v1("memory")],
        {
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
        CPUS,
        MEMORY,
    ),
    "v1 in a container": (
        DOCKER_V1,
        INSIDE,
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "200000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "1024",
        },
        2,
        1024,
    ),
    "v1, a group around is tighter": (
        ["4:memory:/docker/abc/inner", "3:cpu,cpuacct:/docker/abc/inner"],
        INSIDE,
        {
            "cpu,cpuacct/inner/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/inner/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/cpu.cfs_quota_us": "150000",
            "cpu,cpuacct/cpu.cfs_period_us": "50000",
            "memory/inner/memory.limit_in_bytes": "4096",
            "memory/memory.limit_in_bytes": "2048",
        },
        3,
        2048,
    ),
    "v1, files of another controller": (
        ["3:cpuset:/"],
        [v1("cpuset")],
        {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "100000"},
        CPUS,
        MEMORY,
    ),
    "hybrid: v1 with an empty v2 beside": (
        ["4:memory:/job", "1:cpu:/", "0::/"],
        [v1("cpu"), v1("memory"), v2(point="/sys/fs/cgroup/unified")],
        {
            "cpu/cpu.cfs_quota_us": "200000",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/job/memory.limit_in_bytes": "1024",
            "unified/cgroup.controllers": "",
        },
        2,
        1024,
    ),
    "hybrid: CPUs in v2, memory in v1": (
        ["4:memory:/job", "0::/job"],
        [v1("memory"), v2(point="/sys/fs/cgroup/unified")],
        {"unified/job/cpu.max": "200000 100000", "memory/job/memory.limit_in_bytes": "1024"},
        2,
        1024,
    ),
    "not mounted": (["0::/job"], [], {"job/cpu.max": "100000 100000"}, CPUS, MEMORY),
    "no group": ([], [v2()], {"cpu.max": "100000 100000"}, CPUS, MEMORY),
    "no files": (["0::/job"], [v2()], {}, CPUS, MEMORY),
    "lines of another form": (["", "0", "0:", "nothing at all"], [v2()], {"cpu.max": "1 1"}, CPUS, MEMORY),
}


@pytest.mark.parametrize("case", CASES)
def test_limits_of_control_groups(case: str, tmp_path: Path) -> None:
    groups, mounts, files, cpus, memory = CASES[case]
    root = lay_out(tmp_path, groups, mounts, files)
    assert (machine.usable_cpus(root), machine.memory_bytes(root)) == (cpus, memory)


@pytest.mark.parametrize(
    ("text", "cpus", "said"),
    [
        ("50000 100000", 1, "1 (CPU quota of the control group: 0.5)"),
        ("150000 100000", 1, "1 (CPU quota of the control group: 1.5)"),
        ("200000 100000", 2, "2 (CPU quota of the control group: 2)"),
        ("299999 100000", 2, "2 (CPU quota of the control group: 2.99999)"),
        ("6400000 100000", CPUS, "64 (all that there are)"),
        ("9900000 100000", CPUS, "64 (all that there are)"),
        *((text, CPUS, "64 (all that there are)") for text in ("", "\n", "max", "100000", "1 2 3", "0 100000")),
        *((text, CPUS, "64 (all that there are)") for text in ("100000 0", "-1 100000", "1e5 100000", "² 1", "x y")),
        ("9" * 5000 + " 100000", CPUS, "64 (all that there are)"),
    ],
)
def test_a_quota_leaves_whole_cpus_and_at_least_one(text: str, cpus: int, said: str, tmp_path: Path) -> None:
    root = lay_out(tmp_path, ["0::/"], [v2()], {"cpu.max": text})
    assert machine.usable_cpus(root) == cpus
    assert machine.describe_cpus(root) == said


@pytest.mark.parametrize("text", ["", "max\n", "0", "-1", "1.5G", "GiB", "9223372036854771712", "9" * 5000])
def test_what_is_no_limit_of_memory(text: str, tmp_path: Path) -> None:
    root = lay_out(tmp_path, ["0::/"], [v2()], {"memory.max": text})
    assert machine.memory_bytes(root) == MEMORY
    assert machine.describe_memory(root) == "1024.0 GiB"


def test_a_limit_of_memory_in_words(tmp_path: Path) -> None:
    root = lay_out(tmp_path, ["0::/"], [v2()], {"memory.max": str(3 << 29)})
    assert machine.describe_memory(root) == "1.5 GiB (limit of the control group; the machine has 1024.0 GiB)"


def test_tensors_are_resident_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = []
    for limit in (64 << 30, 16 << 30):
        monkeypatch.setattr(budget, "memory_bytes", lambda limit=limit: limit)
        ahead.append(next(budget.budgets_to_try(1 << 40, host=None, vram=None, on_gpu=False)).read_ahead)
    assert ahead[0] == 4 * ahead[1] <= 64 << 30


def test_unreadable_files_limit_nothing(tmp_path: Path) -> None:
    root = lay_out(tmp_path, ["0::/"], [v2()], {"cpu.max/is": "a folder", "memory.max/is": "a folder"})
    assert (machine.usable_cpus(root), machine.memory_bytes(root)) == (CPUS, MEMORY)


@pytest.mark.parametrize(
    ("asked", "cpus"),
    [
        *(("1", 1), (" 2 ", 2), ("2,4", 2), ("3, 1", 3)),
        *((text, 4) for text in ("4", "5", "999", "", "0", "-1", "2.5", "2 3", "x", ",2", "²")),
    ],
)
def test_fewer_threads_may_be_asked_for(asked: str, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    root = lay_out(tmp_path, ["0::/"], [v2()], {"cpu.max": "400000 100000"})
    why = "OMP_NUM_THREADS" if cpus < 4 else "CPU quota of the control group: 4"
    assert machine.usable_cpus(root) == 4
    assert machine.describe_cpus(root) == f"{cpus} ({why})"


def test_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert machine.describe_cpus(tmp_path) == "2 (affinity)"
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.describe_cpus(tmp_path) == "64 (all that there are)"
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.describe_cpus(tmp_path) == "1 (all that there are)"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity_of_a_process() -> None:
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    code += "from isomerge_fast.machine import usable_cpus; print(usable_cpus())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
