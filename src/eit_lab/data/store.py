"""Where a data set's files lie: a folder, an http(s) server, an S3 bucket, or whatever else fsspec opens. No torch.

What may heal is tried again with growing waits, each time with a line in the log: an answer 5xx or 429, a connection that
fails, silence, a transfer that is cut short or is not what was asked for. What does not heal is one line.

Where we differ from fsspec's own http backend: http(s) is read here with the standard library, in the thread that asks. The
backend has its event loop in a thread of its own, which a forked worker process does not have, and asks twice for each file.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

import xxhash

from eit_lab.command import RunError

LOG = logging.getLogger("eit_lab.data")
S3_ANONYMOUS = "EIT_LAB_S3_ANON"
"""Set to 1: S3 is asked without credentials, as a public bucket allows."""

_BLOCK = 1 << 20
_S3_BLOCK = 16 << 20  # each is a request of its own
_LONGEST_WAIT_S = 30.0
_AT_ONCE = 16  # requests that only ask
# Not the generator that other code seeds: a wait must not move a run's random numbers.
_JITTER = random.SystemRandom()
_T = TypeVar("_T")
# What the libraries raise that is no OSError; they are loaded only where they are needed.
_ERRORS = {
    "HTTPException": "http.client",
    "ClientError": "aiohttp",
    "BotoCoreError": "botocore.exceptions",
    "NoCredentialsError": "botocore.exceptions",
    "PartialCredentialsError": "botocore.exceptions",
}


class StoreError(RunError):
    """A file that could not be had, or is not what it should be. The message is one line and names its address."""


class _TransferError(Exception):
    """What one attempt failed of, and another may not."""

    def __init__(self, what: str, advice: str = "check the server and the way to it") -> None:
        super().__init__(what)
        self.what, self.advice = what, advice


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Ranges:
    """An S3 object, read by ranges. NOTE: s3fs's own file turns a time-out in mid-body into an IndexError (2026.9)."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self.filesystem, self.path, self.place = filesystem, path, 0
        found = filesystem.info(path)
        if found["type"] != "file":
            raise FileNotFoundError
        self.size = int(found["size"])

    def read(self, size: int, /) -> bytes:
        end = min(self.place + max(size, _S3_BLOCK), self.size)
        block: bytes = self.filesystem.cat_file(self.path, start=self.place, end=end) if end > self.place else b""
        self.place += len(block)
        return block


class Store:
    """The files below a data root. It may travel to other processes, forked or spawned.

    ``root`` is a folder, or an address: http(s)://[user:password@]host/..., s3://bucket/..., or another protocol that fsspec
    has a backend for. S3 takes endpoint, region and credentials from where boto does (AWS_ENDPOINT_URL, ...), and none
    with EIT_LAB_S3_ANON=1.

    A failing request is tried ``retries`` times more, after about ``wait_s``, 2 ``wait_s``, 4 ``wait_s`` ... seconds; it
    fails where nothing comes for ``timeout_s`` seconds (protocols other than http and s3: as their backend has it).
    """

    def __init__(self, root: str, *, retries: int = 5, timeout_s: float = 30.0, wait_s: float = 0.5) -> None:
        self.retries, self.timeout_s, self.wait_s = retries, timeout_s, wait_s
        scheme, found, rest = root.partition("://")
        self.protocol = scheme.lower() if found else "file"
        self.is_local = self.protocol in ("file", "local")
        if self.is_local:
            self.folder = Path(rest if found else root).expanduser()
            root = str(self.folder)
        self._is_http, self._is_s3 = self.protocol in ("http", "https"), self.protocol in ("s3", "s3a")
        self._url = root
        self._login = ""
        if not self.is_local:
            parts = urlsplit(root)
            self._login, _, host = parts.netloc.rpartition("@")
            root = urlunsplit((parts.scheme, host, parts.path, "", ""))
        self.root: str = root.rstrip("/") or "/"
        """As it may be shown: without a password."""
        self._filesystems: dict[int, tuple[Any, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystems": {}}

    def address(self, name: str = "") -> str:
        """The full address of a file, for messages."""
        if not name:
            return self.root
        return f"{self.root.rstrip('/')}/{quote(name) if self._is_http else name}"

    def names(self, below: str = "") -> dict[str, int | None]:
        """Files below a folder of the root, sorted: name relative to the root -> bytes, None where that is not known.

        Recursively, but of an http server only what that folder's page lists, folders too, with a slash at their end; a
        server that shows no such page has no names. In a bucket, a folder that is not there is an empty one. Raises
        FileNotFoundError, StoreError.
        """
        below = below.strip("/")

        def found() -> dict[str, int | None]:
            if self._is_http:
                return self._listed(below)
            if self.is_local:
                return self._walked(below)
            filesystem, top = self._filesystem()
            files = filesystem.find(f"{top}/{below}", detail=True)
            return {
                name.removeprefix(f"{top}/"): entry["size"] for name, entry in files.items() if entry["type"] == "file"
            }

        return dict(sorted(self._retried(below, lambda: self._judged(below, found)).items()))

    def exists(self, name: str) -> bool:
        """Whether there is such a file. An http server's 403 counts as no, with a line in the log. Raises StoreError."""

        def found() -> bool:
            if self.is_local:
                return (self.folder / name).is_file()
            if not self._is_http:
                filesystem, top = self._filesystem()
                return bool(filesystem.info(f"{top}/{name}")["type"] == "file")
            url = self.address(name)
            with contextlib.closing(self._answer(url, "HEAD") or self._answer(url)) as answer:
                return not answer.geturl().endswith("/")  # to which a server sends those who ask for a folder

        try:
            return self._retried(name, lambda: self._judged(name, found))
        except FileNotFoundError:
            return False
        except _RefusedError as error:
            # Buckets behind http answer so for what is not there.
            LOG.warning("%s; taken as not there", error)
            return False

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Bytes of each of these files that is there; None where the server does not say. Raises StoreError."""
        names = list(names)
        if not self._is_http:
            found = self.names()
            return {name: found[name] for name in names if name in found}

        def size(name: str) -> int | None:
            with contextlib.closing(
                self._answer(self.address(name), "HEAD") or self._answer(self.address(name))
            ) as said:
                length = said.headers.get("Content-Length")
                return None if length is None else int(length)

        def asked(name: str) -> tuple[str, int | None] | None:
            try:
                return name, self._retried(name, lambda: self._judged(name, lambda: size(name)))
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(answer for answer in pool.map(asked, names) if answer is not None)

    def read(self, name: str) -> bytes:
        """A small file's content. Raises FileNotFoundError, StoreError."""
        content = bytearray()

        def attempt() -> None:
            content.clear()
            self._transfer(name, content.extend)

        self._retried(name, attempt)
        return bytes(content)

    def fetch(self, name: str, target: Path, *, size: int | None = None, checksum: str | None = None) -> None:
        """Copy a file to ``target``: whole and as announced, or not at all.

        ``size`` in bytes and ``checksum`` (xxh3-128, hex) are compared where given. Raises FileNotFoundError, StoreError,
        and OSError of the local disk.
        """
        part = target.with_name(f".{target.name}.{os.getpid()}-{_JITTER.getrandbits(32):08x}.part")
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                self.fetch_into(name, file, size=size, checksum=checksum)
            finally:
                os.close(file)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def fetch_into(
        self,
        name: str,
        file: int,
        *,
        size: int | None = None,
        checksum: str | None = None,
        announce: Callable[[int], None] | None = None,
    ) -> None:
        """As ``fetch``, into an open file descriptor; on an error the file's content is of no use.

        ``announce`` is told the number of bytes that will come, before the first is written, where the server says it.
        """

        def attempt() -> None:
            os.lseek(file, 0, os.SEEK_SET)
            os.ftruncate(file, 0)

            def write(block: bytes) -> None:
                rest = memoryview(block)
                while rest:
                    rest = rest[os.write(file, rest) :]

            self._transfer(name, write, size=size, checksum=checksum, announce=announce)

        self._retried(name, attempt)

    def _transfer(
        self,
        name: str,
        write: Callable[[bytes], None],
        *,
        size: int | None = None,
        checksum: str | None = None,
        announce: Callable[[int], None] | None = None,
    ) -> None:
        """One attempt. NOTE: only what the source does is judged; an error of ``write`` is the local disk's."""
        other = "the file there is damaged or another version: put it there again"
        digest, done = xxhash.xxh3_128(), 0
        with contextlib.ExitStack() as stack:
            source, announced = self._judged(name, lambda: self._open(name, stack))
            if size is not None and announced is not None and announced != size:
                raise _TransferError(f"it has {announced} bytes instead of {size}", other)
            if announced is not None and announce is not None:
                announce(announced)
            while True:
                block = self._judged(name, lambda: source.read(_BLOCK))
                if not block:
                    break
                done += len(block)
                if size is not None and done > size:
                    raise _TransferError(f"it has more than {size} bytes", other)
                digest.update(block)
                write(block)
        if announced is not None and done != announced:
            raise _TransferError(f"the transfer ended after {done} of {announced} bytes")
        if size is not None and done != size:
            raise _TransferError(f"it has {done} bytes instead of {size}", other)
        if checksum is not None and digest.hexdigest() != checksum:
            raise _TransferError(f"its checksum is {digest.hexdigest()} instead of {checksum}", other)

    def _open(self, name: str, stack: contextlib.ExitStack) -> tuple[_Source, int | None]:
        """The file, and its size where that is known."""
        if self.is_local:
            local = stack.enter_context((self.folder / name).open("rb"))
            return local, os.fstat(local.fileno()).st_size
        if self._is_http:
            answer = stack.enter_context(contextlib.closing(self._answer(self.address(name))))
            length = answer.headers.get("Content-Length", "")
            return answer, int(length) if length.isdigit() else None
        filesystem, top = self._filesystem()
        if self._is_s3:
            ranges = _Ranges(filesystem, f"{top}/{name}")
            return ranges, ranges.size
        remote = stack.enter_context(filesystem.open(f"{top}/{name}", "rb"))
        return remote, getattr(remote, "size", None)

    def _retried(self, name: str, attempt: Callable[[], _T]) -> _T:
        began = time.monotonic()
        for turn in itertools.count(1):
            try:
                return attempt()
            except _TransferError as error:
                if turn > self.retries:
                    spent = time.monotonic() - began
                    raise StoreError(
                        f"{self.address(name)}: {error.what} ({turn} attempts in {spent:.0f} s): {error.advice}"
                    ) from None
                wait_s = min(_LONGEST_WAIT_S, self.wait_s * 2 ** (turn - 1)) * _JITTER.uniform(0.5, 1)
                LOG.warning(
                    "%s: %s; attempt %d of %d in %.1f s",
                    *(self.address(name), error.what, turn + 1, self.retries + 1, wait_s),
                )
                time.sleep(wait_s)
        raise AssertionError("the loop above ends by itself")

    def _judged(self, name: str, ask: Callable[[], _T]) -> _T:
        """What ``ask`` gives; its exceptions are told apart: not there, refused, or to be tried again."""
        try:
            return ask()
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.address(name)} is not there") from None
        except _errors(PermissionError, "NoCredentialsError", "PartialCredentialsError") as error:
            raise _RefusedError(
                f"{self.address(name)}: reading it was refused ({_said(error)}): {self._rights()}"
            ) from None
        except _errors(OSError, "HTTPException", "ClientError", "BotoCoreError") as error:
            raise _TransferError(self._phrase(error)) from None

    def _rights(self) -> str:
        if self.is_local:
            return "check its permissions"
        if self._is_s3:
            return f"check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...), or set {S3_ANONYMOUS}=1 for a public bucket"
        return "check the address and the rights"

    def _phrase(self, error: Exception) -> str:
        reason = getattr(error, "reason", None)  # urllib wraps what went wrong while connecting
        match reason if isinstance(reason, Exception) else error:
            case TimeoutError():
                return f"no byte came for {self.timeout_s:g} s"
            case ConnectionRefusedError():
                return "the connection was refused"
            case ConnectionError():
                return "the connection was cut"
            case cause:
                return _said(cause)

    # http(s)

    def _answer(self, url: str, method: str = "GET") -> Any:
        """The server's answer to a request, to be closed. None: it does not know HEAD."""
        from urllib.error import HTTPError
        from urllib.request import Request, urlopen

        headers = {"User-Agent": "eit_lab", "Accept-Encoding": "identity"}
        request = Request(url, headers=headers, method=method)
        if self._login:
            login = base64.b64encode(unquote(self._login).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {login}")  # not for another host
        try:
            return urlopen(request, timeout=self.timeout_s)
        except HTTPError as error:
            with error:
                said = f"{error.code} {error.reason}".strip()
            match error.code:
                case 404 | 410:
                    raise FileNotFoundError from None
                case 401 | 403 | 407:
                    raise PermissionError(said) from None
                case 405 | 501 if method == "HEAD":
                    return None
                case code if code >= 500 or code in (408, 425, 429):
                    raise _TransferError(f"the server answered {said}") from None
            raise StoreError(f"{url}: the server answered {said}: check the address") from None

    def _listed(self, below: str) -> dict[str, int | None]:
        from html.parser import HTMLParser

        links: list[str] = []

        class Links(HTMLParser):
            def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
                links.extend(value for key, value in attrs if tag == "a" and key == "href" and value)

        with contextlib.closing(self._answer(f"{self.address(below)}/")) as answer:
            if answer.headers.get_content_type() != "text/html":
                return {}
            page = urljoin(answer.geturl(), ".")
            Links().feed(answer.read().decode("utf-8", errors="replace"))
        found: dict[str, int | None] = {}
        for link in links:
            # Links that sort the page have a query, those to the folders above are shorter.
            parts = urlsplit(urljoin(page, link))
            name = unquote(urlunsplit((*parts[:3], "", ""))).removeprefix(unquote(page))
            if name and "://" not in name and "/" not in name[:-1] and not parts.query:
                found[f"{below}/{name}" if below else name] = None
        return found

    # fsspec, and folders

    def _filesystem(self) -> tuple[Any, str]:
        """(fsspec's file system, the root's path in it), made by this process for itself.

        NOTE: a parent's one, which a fork copies, has a loop whose thread is not there. It is kept nonetheless: its end
        would close connections that the parent still uses.
        """
        if os.getpid() in self._filesystems:
            return self._filesystems[os.getpid()]
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self._is_s3:
            options["anon"] = os.environ.get(S3_ANONYMOUS, "") not in ("", "0")
            # Attempts of its own would multiply with ours.
            once = {"total_max_attempts": 1}
            waits = {"connect_timeout": self.timeout_s, "read_timeout": self.timeout_s, "retries": once}
            options["config_kwargs"] = waits
        try:
            filesystem, top = _fsspec().url_to_fs(self._url, **options)
        except ImportError as error:
            extra = "pip install 'eit_lab[s3]'" if self._is_s3 else _said(error)
            raise StoreError(f"{self.root}: the backend for {self.protocol}:// is not installed: {extra}") from None
        except ValueError:
            from eit_lab.config import ConfigError

            raise ConfigError(
                f"data.root must be a folder or an address that fsspec knows (http, https, s3, ...), got {self.root!r}"
            ) from None
        if self._is_s3:
            filesystem.retries = 1
        return self._filesystems.setdefault(os.getpid(), (filesystem, top.rstrip("/")))

    def _walked(self, below: str) -> dict[str, int | None]:
        top = self.folder / below
        if not top.is_dir():
            raise FileNotFoundError
        found: dict[str, int | None] = {}
        open_folders = [str(top)]
        while open_folders:
            with os.scandir(open_folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir():
                        open_folders.append(entry.path)
                    elif entry.is_file():
                        found[entry.path.removeprefix(f"{self.folder}/")] = entry.stat().st_size
        return found


class _RefusedError(StoreError):
    """A file that the server does not give us."""


@functools.cache
def _fsspec() -> Any:
    import fsspec
    import fsspec.asyn

    # NOTE: fsspec itself resets its loop after a fork, but not the lock that guards its creation (2026.9).
    os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)
    return fsspec


def _errors(kind: type[Exception], *names: str) -> tuple[type[Exception], ...]:
    """``kind``, and those of the libraries' exceptions that can have been raised."""
    return (kind, *(getattr(sys.modules[_ERRORS[name]], name) for name in names if _ERRORS[name] in sys.modules))


def _said(error: Exception) -> str:
    """An exception's text in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
