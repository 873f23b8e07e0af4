"""Stores and their cache: what heals is tried again, what does not is one line, and nothing damaged is taken for whole."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import xxhash

from eit_lab.command import RunError
from eit_lab.config import ConfigError
from eit_lab.data.cache import FileCache
from eit_lab.data.prefetch import Prefetcher, Wanted
from eit_lab.data.store import Store, StoreError
from fault_server import FaultServer

SIZE = 3000
FILES = [f"train/{i}.bin" for i in range(8)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files of 3000 bytes in train/, one of 3 MB, and one with a name that must be quoted."""
    root = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(0)
    for name, size in [(name, SIZE) for name in FILES] + [("large.bin", 3_000_001), ("a %41 & b?#.txt", 5)]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(rng.bytes(size))
    return root


@pytest.fixture
def server(files: Path) -> Iterator[FaultServer]:
    served = FaultServer(files)
    yield served
    served.close()


def quick(root: str | Path, *, retries: int = 2, timeout_s: float = 10.0, fault: str = "fine") -> Store:
    if fault in ("hang", "stall"):
        timeout_s = 0.4
    return Store(str(root), retries=retries, timeout_s=timeout_s, wait_s=0.01)


def checksum(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def content(cache: FileCache, name: str, **facts: object) -> bytes:
    with os.fdopen(cache.open(name, **facts), "rb") as file:
        return file.read()


def forked(body: Callable[[], None]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=body, daemon=True)
    process.start()
    return process


def below(folder: Path) -> set[str]:
    """Files that a cache keeps, by their names in the store, and what is on its way."""
    return {
        path.name.partition("-")[2] or str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "slots" and path.name != "lock"
    }


# The store


def test_a_folder_and_a_server_give_the_same_files(files: Path, server: FaultServer, tmp_path: Path) -> None:
    for store in (quick(files), quick(f"file://{files}"), quick(server.url), quick(f"{server.url}/")):
        assert store.exists("large.bin")
        assert not store.exists("large.txt")
        assert not store.exists("train")
        assert store.read("a %41 & b?#.txt") == (files / "a %41 & b?#.txt").read_bytes()
        with pytest.raises(FileNotFoundError, match=r"large\.txt is not there$"):
            store.read("large.txt")
        whole = files / "large.bin"
        target = tmp_path / "copy"
        store.fetch("large.bin", target, size=3_000_001, checksum=checksum(whole))
        assert target.read_bytes() == whole.read_bytes()
        assert list(tmp_path.iterdir()) == [target]
    assert quick(files).names() == {**dict.fromkeys(FILES, SIZE), "large.bin": 3_000_001, "a %41 & b?#.txt": 5}
    assert quick(files).names("train/") == dict.fromkeys(FILES, SIZE)
    assert quick(server.url).names() == {"train/": None, "large.bin": None, "a %41 & b?#.txt": None}
    assert quick(server.url).names("train") == dict.fromkeys(FILES)
    for store in (quick(files), quick(server.url)):
        with pytest.raises(FileNotFoundError, match=r"/val is not there$"):
            store.names("val")


def test_a_fetch_over_http_is_one_request(server: FaultServer, tmp_path: Path) -> None:
    quick(server.url).fetch("large.bin", tmp_path / "copy")
    assert server.requests == {("GET", "large.bin"): 1}


@pytest.mark.parametrize("fault", ["500", "503", "hang", "stall", "half", "short", "flip", "reset"])
def test_a_fault_that_goes_away_is_logged_and_healed(
    fault: str, files: Path, server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail("large.bin", fault, fault)
    facts = {"size": 3_000_001, "checksum": checksum(files / "large.bin")}
    quick(server.url, fault=fault).fetch("large.bin", tmp_path / "copy", **facts)
    assert (tmp_path / "copy").read_bytes() == (files / "large.bin").read_bytes()
    assert server.gets("large.bin") == 3
    lines = [record.getMessage() for record in caplog.records]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    for turn, line in enumerate(lines, start=2):
        assert re.fullmatch(rf"{server.url}/large\.bin: .+; attempt {turn} of 3 in 0\.0 s", line), line


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("500", r"the server answered 500 Internal Server Error \(3 attempts in \d s\): check the server and the way to it"),
        ("hang", r"no byte came for 0\.4 s \(3 attempts in \d s\): check the server and the way to it"),
        ("stall", r"no byte came for 0\.4 s \(3 attempts in \d s\): check the server and the way to it"),
        ("half", r"the transfer ended after 1500000 of 3000001 bytes \(3 attempts in \d s\): check the server .*"),
        ("reset", r"the connection was cut \(3 attempts in \d s\): check the server and the way to it"),
        ("short", r"it has 1500000 bytes instead of 3000001 \(3 attempts .*\): the file there is damaged or another version: .*"),
        ("flip", r"its checksum is \w{32} instead of \w{32} \(3 attempts .*\): the file there is damaged or another version: .*"),
        ("403", r"reading it was refused \(403 Forbidden\): check the address and the rights"),
    ],
)  # fmt: skip
def test_a_fault_that_stays_ends_in_one_line_and_leaves_no_file(
    fault: str, line: str, files: Path, server: FaultServer, tmp_path: Path
) -> None:
    server.always("large.bin", fault)
    began = time.monotonic()
    facts = {"size": 3_000_001, "checksum": checksum(files / "large.bin")}
    with pytest.raises(StoreError) as caught:
        quick(server.url, fault=fault).fetch("large.bin", tmp_path / "copy", **facts)
    assert re.fullmatch(rf"{server.url}/large\.bin: {line}", str(caught.value))
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - began < 5


def test_a_missing_file_is_not_asked_for_again(server: FaultServer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^{server.url}/train/9\.bin is not there$"):
        quick(server.url).fetch("train/9.bin", tmp_path / "copy")
    assert server.requests == {("GET", "train/9.bin"): 1}


def test_a_refused_connection_names_address_and_attempts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(
        StoreError, match=rf"^{url}/x: the connection was refused \(3 attempts in 0 s\): check the server"
    ):
        quick(url).read("x")
    with pytest.raises(StoreError, match=r"x: the connection was refused"):
        quick(url).exists("x")


def test_a_slow_server_is_waited_for(files: Path, server: FaultServer) -> None:
    server.always("large.bin", "slow")
    assert quick(server.url, retries=0).read("large.bin") == (files / "large.bin").read_bytes()


def test_a_server_without_lists_or_with_403_for_what_is_missing(
    server: FaultServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.listing = False
    with pytest.raises(StoreError, match=rf"^{server.url}: reading it was refused \(403 Forbidden\)"):
        quick(server.url).names()
    server.always("manifest.json", "403")
    assert not quick(server.url).exists("manifest.json")
    assert "taken as not there" in caplog.text


def test_a_password_is_sent_and_never_shown(server: FaultServer) -> None:
    store = quick(server.url.replace("://", "://me:se%40cret@"))
    assert len(store.read(FILES[0])) == SIZE
    assert server.logins == ["Basic bWU6c2VAY3JldA=="]
    assert store.root == server.url
    with pytest.raises(FileNotFoundError) as caught:
        store.read("x")
    assert "cret" not in str(caught.value)


def test_waits_leave_the_random_numbers_of_a_run_alone(server: FaultServer) -> None:
    import random

    random.seed(3)
    expected = random.random()
    random.seed(3)
    server.fail(FILES[0], "500")
    quick(server.url).read(FILES[0])
    assert random.random() == expected


def test_a_backend_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.root must be a folder or an address that fsspec knows .*got 'what://is/this'"
    ):
        quick("what://is/this").read("x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        StoreError, match=r"^s3://b/data: the backend for s3:// is not installed: pip install 'eit_lab\[s3\]'$"
    ):
        quick("s3://b/data").read("x")


def test_any_other_protocol_goes_through_fsspec() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/data/train/x.bin", b"abc")
    store = quick("memory://data")
    assert store.names() == {"train/x.bin": 3}
    assert store.read("train/x.bin") == b"abc"
    assert store.exists("train/x.bin")
    assert not store.exists("train")
    assert not store.exists("y")


def test_the_modules_load_quickly_and_nothing_heavy() -> None:
    code = (
        "import sys; from eit_lab.data import store, cache, prefetch;"
        "print([m for m in ('torch', 'fsspec', 'aiohttp', 's3fs', 'pydantic', 'http.client') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# S3


@pytest.fixture(scope="module")
def bucket(files: Path) -> Iterator[None]:
    """The same files below s3://shelf/data, served by moto on loopback, with the environment that a user would set."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "me")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        import botocore.session

        client = botocore.session.get_session().create_client("s3")
        client.create_bucket(Bucket="shelf")
        for path in files.rglob("*"):
            if path.is_file():
                client.put_object(Bucket="shelf", Key=f"data/{path.relative_to(files)}", Body=path.read_bytes())
        client.close()
        yield
    server.stop()


@pytest.mark.usefixtures("bucket")
def test_s3_gives_the_same_files(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = quick("s3://shelf/data/")
    assert store.names() == quick(files).names()
    assert store.names("train") == dict.fromkeys(FILES, SIZE)
    assert store.names("val") == {}
    assert store.exists("large.bin")
    assert not store.exists("large.txt")
    monkeypatch.setattr("eit_lab.data.store._S3_BLOCK", 1_000_000)
    store.fetch("large.bin", tmp_path / "copy", size=3_000_001, checksum=checksum(files / "large.bin"))
    assert (tmp_path / "copy").read_bytes() == (files / "large.bin").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"^s3://shelf/data/large\.txt is not there$"):
        store.read("large.txt")
    with pytest.raises(FileNotFoundError, match=r"^s3://other/large\.txt is not there$"):
        quick("s3://other").read("large.txt")

    def child() -> None:
        assert store.read(FILES[1]) == (files / FILES[1]).read_bytes()

    process = forked(child)
    process.join(20)
    assert process.exitcode == 0
    assert store.read(FILES[2]) == (files / FILES[2]).read_bytes()
    assert pickle.loads(pickle.dumps(store)).read(FILES[3]) == (files / FILES[3]).read_bytes()


@pytest.mark.usefixtures("bucket")
def test_s3_without_credentials_names_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(
        StoreError, match=r"^s3://shelf/data/x: reading it was refused \(.*\): .* or set EIT_LAB_S3_ANON=1 "
    ):
        quick("s3://shelf/data").read("x")
    monkeypatch.setenv("EIT_LAB_S3_ANON", "1")
    with pytest.raises(FileNotFoundError, match="is not there"):
        quick("s3://shelf/data").read("x")


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("503", "Service Unavailable"),
        ("stall", r"no byte came for 0\.4 s"),
        pytest.param("hang", "Read timeout .*", marks=pytest.mark.slow),
        pytest.param("half", ".*received 1500000 of 3000001 bytes.*", marks=pytest.mark.slow),
        pytest.param("reset", "Could not connect .*", marks=pytest.mark.slow),
    ],
)
def test_a_failing_s3_server_is_tried_as_often_as_asked(
    fault: str, line: str, files: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.folder = files.parent
    for name, value in (("AWS_ENDPOINT_URL", server.url), ("AWS_ACCESS_KEY_ID", "me"), ("AWS_SECRET_ACCESS_KEY", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = quick(f"s3://{files.name}", retries=1, fault=fault)
    path = f"{files.name}/large.bin"
    server.always(path, fault)
    with pytest.raises(StoreError, match=rf"^s3://{path}: {line} \(2 attempts in \d s\): check the server"):
        store.read("large.bin")
    if fault != "reset":  # which its own http client tries again
        assert max(server.requests.values()) == 2
    server.always(path, "fine")
    server.fail(path, fault)
    assert store.read("large.bin") == (files / "large.bin").read_bytes()


# The cache


def test_processes_that_share_a_cache_fetch_each_file_once(files: Path, server: FaultServer, tmp_path: Path) -> None:
    server.always("*", "slow")

    def child(turn: int) -> None:
        cache = FileCache(tmp_path, limit_bytes=10**6, store=quick(server.url))
        for name in FILES[turn:] + FILES[:turn]:
            assert content(cache, name, size=SIZE) == (files / name).read_bytes()

    processes = [forked(lambda turn=turn: child(turn)) for turn in (0, 0, 1, 5)]
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.requests == {("GET", name): 1 for name in FILES}


@pytest.mark.parametrize("known", [True, False])
def test_the_cache_stays_within_its_limit_and_drops_what_was_used_longest_ago(
    known: bool, server: FaultServer, tmp_path: Path
) -> None:
    facts = {"size": SIZE} if known else {}
    cache = FileCache(tmp_path, limit_bytes=3 * SIZE + 200, store=quick(server.url), touch_s=0.0)
    for name in FILES[:3]:
        cache.path(name, **facts)
        time.sleep(0.01)
    cache.path(FILES[0], **facts)
    time.sleep(0.01)
    for name in FILES[3:5]:
        cache.path(name, **facts)
        time.sleep(0.01)
        kept = sum(path.stat().st_size for path in cache.kept.rglob("*") if path.is_file())
        assert kept <= cache.limit_bytes
    assert below(tmp_path) == {"0.bin", "3.bin", "4.bin"}
    assert server.gets(FILES[0]) == 1
    cache.path(FILES[1], **facts)
    assert server.gets(FILES[1]) == 2


def test_the_limit_holds_over_all_stores_and_processes_in_a_folder(
    files: Path, server: FaultServer, tmp_path: Path
) -> None:
    limit = 4 * SIZE + 300

    def child(root: str) -> None:
        cache = FileCache(tmp_path, limit_bytes=limit, store=quick(root))
        for name in FILES * 2:
            assert content(cache, name, size=SIZE) == (files / name).read_bytes()

    processes = [forked(lambda root=root: child(root)) for root in (server.url, str(files), f"{server.url}/train/..")]
    most = 0
    while any(process.is_alive() for process in processes):
        sizes = [file.size for file in FileCache(tmp_path, limit_bytes=limit, store=quick(files))._files()]
        most = max(most, sum(sizes))
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0] * 3
    assert 0 < most <= limit


def test_a_file_that_was_dropped_while_open_stays_readable(files: Path, server: FaultServer, tmp_path: Path) -> None:
    cache = FileCache(tmp_path, limit_bytes=SIZE + 100, store=quick(server.url))
    file = cache.open(FILES[0], size=SIZE)
    path = cache.path(FILES[1], size=SIZE)
    assert below(tmp_path) == {"1.bin"}
    assert path.read_bytes() == (files / FILES[1]).read_bytes()
    assert os.pread(file, SIZE, 0) == (files / FILES[0]).read_bytes()
    os.close(file)


def test_a_damaged_copy_is_fetched_anew(
    files: Path, server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FileCache(tmp_path, limit_bytes=10**6, store=quick(server.url))
    cache.path(FILES[0], size=SIZE).write_bytes(b"cut short")
    assert content(cache, FILES[0], size=SIZE) == (files / FILES[0]).read_bytes()
    assert "9 bytes instead of 3000" in caplog.text
    cache.path(FILES[0], size=SIZE, checksum=checksum(files / FILES[0]))  # another version, as far as names go
    cache.drop(FILES[0])
    cache.drop("never/here.bin")
    assert below(tmp_path) == set()
    cache.path(FILES[0], size=SIZE)
    assert server.gets(FILES[0]) == 4


def test_what_is_made_of_a_file_is_kept_instead_of_it(files: Path, server: FaultServer, tmp_path: Path) -> None:
    cache = FileCache(tmp_path, limit_bytes=10**6, store=quick(server.url))

    def backwards(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[::-1])

    for _ in range(2):
        assert content(cache, FILES[0], size=SIZE, make=backwards) == (files / FILES[0]).read_bytes()[::-1]
    assert below(tmp_path) == {"0.bin.made"}
    assert server.gets(FILES[0]) == 1
    cache.drop(FILES[0])
    assert below(tmp_path) == set()

    def fails(source: Path, target: Path) -> None:
        target.write_bytes(b"half of")
        raise ValueError("not what it should be")

    with pytest.raises(ValueError, match="not what it should be"):
        cache.open(FILES[0], size=SIZE, make=fails)
    assert below(tmp_path) == set()


def test_a_process_killed_while_it_fetches_blocks_nobody_and_leaves_nothing(
    files: Path, server: FaultServer, tmp_path: Path
) -> None:
    server.fail("large.bin", "stall")
    cache = FileCache(tmp_path, limit_bytes=4_000_000, store=quick(server.url))
    process = forked(lambda: os.close(cache.open("large.bin", size=3_000_001)))
    while not any(path.stat().st_size >= 1 << 20 for path in tmp_path.glob("work/*/source")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert content(cache, "large.bin", size=3_000_001) == (files / "large.bin").read_bytes()
    assert below(tmp_path) == {"large.bin"}
    assert list((tmp_path / "work").iterdir()) == []


def test_files_on_their_way_count_and_are_waited_for(
    files: Path, server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail(FILES[0], "slow")
    cache = FileCache(tmp_path, limit_bytes=2 * SIZE - 1, store=quick(server.url))
    first = threading.Thread(target=lambda: cache.path(FILES[0], size=SIZE))
    first.start()
    while not list(tmp_path.glob("work/*/source")):
        time.sleep(0.001)
    assert content(cache, FILES[1], size=SIZE) == (files / FILES[1]).read_bytes()
    first.join()
    assert "train/1.bin waits for room" in caplog.text
    assert below(tmp_path) == {"1.bin"}


def test_a_file_larger_than_the_cache_is_one_line_before_it_is_fetched(server: FaultServer, tmp_path: Path) -> None:
    cache = FileCache(tmp_path, limit_bytes=2_000_000, store=quick(server.url))
    line = r"^data\.cache_gb must be at least what large\.bin takes \(3,000,001 bytes\), got 0\.002; nearest: 0\.004$"
    for facts, gets in (({"size": 3_000_001}, 0), ({}, 1)):
        with pytest.raises(ConfigError, match=line):
            cache.open("large.bin", **facts)
        assert server.gets("large.bin") == gets
    assert below(tmp_path) == set()


def test_what_the_server_lacks_leaves_nothing_in_the_cache(server: FaultServer, tmp_path: Path) -> None:
    cache = FileCache(tmp_path, limit_bytes=10**6, store=quick(server.url))
    with pytest.raises(FileNotFoundError, match=rf"^{server.url}/train/9\.bin is not there$"):
        cache.open("train/9.bin", size=SIZE)
    server.always(FILES[0], "half")
    with pytest.raises(StoreError, match="1500 of 3000 bytes"):
        cache.open(FILES[0], size=SIZE)
    assert below(tmp_path) == set()
    for name in ("../x", "/etc/passwd", "a//b", ""):
        with pytest.raises(RunError, match="is no name of a file below it"):
            cache.open(name)


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, server: FaultServer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"^data\.cache_dir: .*/file/x cannot be used \(Not a directory\): choose a folder on a "
    ):
        FileCache(tmp_path / "file" / "x", limit_bytes=10, store=quick(server.url))


SMALL_DISK = """
import os, sys
from fnmatch import fnmatch
from pathlib import Path
from eit_lab.command import RunError
from eit_lab.data.cache import FileCache
from eit_lab.data.store import Store
url, folder, shown = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "shown"
if not shown:  # as with a quota: the disk seems to have room
    FileCache._free = lambda self: float("inf")
cache = FileCache(folder / "cache", limit_bytes=10**9, store=Store(url, retries=0))
for i in range(8):
    with os.fdopen(cache.open(f"{i}.bin", size=300_000), "rb") as file:
        assert len(file.read()) == 300_000
    assert 1 <= len(list(cache.kept.glob("*-*.bin"))) <= 3
with (folder / "other").open("wb", buffering=0) as file:
    while file.write(bytes(4096)) if os.statvfs(folder).f_bavail else 0: pass
try:
    cache.open("large.bin", size=1_000_000)
except RunError as error:
    print(error)
assert not list(cache.kept.glob("*-*.bin")) and not list((folder / "cache/work").iterdir())
"""


@pytest.mark.parametrize("shown", ["shown", "hidden"])
def test_a_full_disk_costs_old_files_first_and_then_one_line(shown: str, tmp_path: Path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/disk"
    (tmp_path / "disk").mkdir()
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("no file system of its own may be mounted here")
    served = tmp_path / "served"
    served.mkdir()
    for i in range(8):
        (served / f"{i}.bin").write_bytes(bytes(300_000))
    (served / "large.bin").write_bytes(bytes(1_000_000))
    server = FaultServer(served)
    try:
        done = subprocess.run(
            [*unshare, f'{mount} && exec "$@"', "sh", sys.executable, "-c", SMALL_DISK, server.url, str(tmp_path / "disk"), shown],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )  # fmt: skip
    finally:
        server.close()
    assert re.fullmatch(
        r"data\.cache_dir: no space left for large\.bin in .*/disk/cache \(0\.\d{3} GB free after dropping what could be\): "
        r"choose another folder, or free space there and lower data\.cache_gb\n",
        done.stdout,
    ), done.stdout + done.stderr
    asked = [server.gets(f"{i}.bin") for i in range(8)]
    assert asked == [1] * 8 if shown == "shown" else sum(asked) > 8  # room is made before, where that can be seen


def test_a_write_that_finds_the_disk_full_drops_an_old_file_and_goes_on(
    files: Path, server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no small file system can be mounted: a write that fails as on a full disk, until a file has gone."""
    cache = FileCache(tmp_path, limit_bytes=10**6, store=quick(server.url))
    cache.path(FILES[0], size=SIZE)
    write = os.write

    def full(file: int, block: bytes) -> int:
        if len(block) > 100 and "0.bin" in below(tmp_path):
            raise OSError(28, os.strerror(28))
        return write(file, block)

    monkeypatch.setattr(os, "write", full)
    assert content(cache, FILES[1], size=SIZE) == (files / FILES[1]).read_bytes()
    assert below(tmp_path) == {"1.bin"}


# Fetching ahead


@pytest.fixture
def ahead(server: FaultServer, tmp_path: Path) -> Iterator[Callable[..., Prefetcher]]:
    made: list[Prefetcher] = []

    def make(**options: int) -> Prefetcher:
        cache = FileCache(tmp_path, limit_bytes=10**6, store=quick(server.url))
        made.append(Prefetcher(cache, **options))
        return made[-1]

    yield make
    for prefetcher in made:
        prefetcher.close()


WANTED = [Wanted(name, SIZE) for name in FILES]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def kept(folder: Path) -> set[str]:
    # os.walk goes past a folder that a thread at work removes meanwhile; Path.rglob raises there.
    names = (name for _, _, names in os.walk(folder) for name in names)
    return {name.partition("-")[2] for name in names if fnmatch(name, "*-*.bin")}


def test_files_are_fetched_ahead_in_order_and_as_far_as_told(
    server: FaultServer, tmp_path: Path, ahead: Callable[..., Prefetcher]
) -> None:
    prefetcher = ahead(ahead_bytes=3 * SIZE)
    prefetcher.want(WANTED)
    until(lambda: len(kept(tmp_path)) == 3)
    time.sleep(0.05)
    assert kept(tmp_path) == {"0.bin", "1.bin", "2.bin"}
    prefetcher.reached(2)
    until(lambda: len(kept(tmp_path)) == 5)
    prefetcher.want(WANTED[7:])
    until(lambda: "7.bin" in kept(tmp_path))
    assert set(server.requests.values()) == {1}


def test_an_error_ahead_is_a_line_and_the_rest_comes_later(
    server: FaultServer, tmp_path: Path, ahead: Callable[..., Prefetcher], capfd: pytest.CaptureFixture[str]
) -> None:
    server.always(FILES[0], "403")
    prefetcher = ahead(parallel=1)
    prefetcher.want(WANTED[:3])
    until(lambda: server.gets(FILES[0]) == 1)
    time.sleep(0.1)
    assert kept(tmp_path) == set()
    prefetcher.reached(1)
    until(lambda: kept(tmp_path) == {"1.bin", "2.bin"})
    line = rf"eit_lab: not fetched ahead: {server.url}/train/0\.bin: reading it was refused .*\n"
    assert re.fullmatch(line, capfd.readouterr().err)


def test_workers_forked_while_files_are_fetched_ahead_read_what_they_need(
    files: Path, server: FaultServer, tmp_path: Path, ahead: Callable[..., Prefetcher]
) -> None:
    server.always("*", "slow")
    prefetcher = ahead()
    prefetcher.want(WANTED)
    cache = FileCache(tmp_path, limit_bytes=10**6, store=quick(server.url))

    def child() -> None:
        for name in reversed(FILES):
            assert content(cache, name, size=SIZE) == (files / name).read_bytes()

    until(lambda: sum(server.requests.values()) == 4)
    processes = [forked(child) for _ in range(3)]
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 3
    assert server.requests == {("GET", name): 1 for name in FILES}


def test_closing_throws_away_what_is_on_its_way(
    server: FaultServer, tmp_path: Path, ahead: Callable[..., Prefetcher]
) -> None:
    server.always("*", "hang")
    prefetcher = ahead()
    prefetcher.want(WANTED)
    until(lambda: len(list((tmp_path / "work").iterdir())) == 4)
    prefetcher.close()
    prefetcher.want(WANTED)
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_fetching_ahead_ends_with_the_process_that_asked_for_it(end: str, server: FaultServer, tmp_path: Path) -> None:
    server.always("*", "hang")
    code = (
        "import os, sys, time; from pathlib import Path; from eit_lab.data.prefetch import *; from eit_lab.data.store import Store;"
        "cache = FileCache(Path(sys.argv[2]), limit_bytes=10**6, store=Store(sys.argv[1], timeout_s=60));"
        "ahead = Prefetcher(cache); ahead.want([Wanted('x', 5), Wanted('y', 5)]);"
        f"time.sleep(0.5); print(ahead._process.pid, flush=True); {end}"
    )
    command = [sys.executable, "-c", code, server.url, str(tmp_path)]
    # NOTE: its output has an end only when the other process, too, has ended.
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.stderr == ""
    assert done.returncode == (-9 if end else 0)
    until(lambda: not Path("/proc", done.stdout.strip()).exists())
