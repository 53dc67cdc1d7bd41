"""Keys and values of prefixes in a folder, so that no prompt is computed again after a restart.

One file is one page of the KV cache. Its name is the page's name there: a hash over the prefix that
ends with it, the salt that keeps keys apart, and a secret, which follows from the folder's own
secret, the weights, and how keys and values lie in memory. So another model, another format and
another salt have other names, and names reveal no texts. A file that is damaged or was forged
does not have the checksum that only this secret gives; it is removed and the page is computed.

Files are written by a thread of their own, whole or not at all, readable by this user only.
When they take more room than is allowed, the least recently used are removed, ends of prefixes
first. An error of the folder never affects an answer.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from threading import BoundedSemaphore

import torch

from opennemo.engine.sequence import Sequence as TokenSequence
from opennemo.engine.sizes import EngineConfig
from opennemo.errors import InvalidRequest
from opennemo.files import remove_partials, write_whole
from opennemo.model.pages import Pages
from opennemo.model.transformer import Transformer

log = logging.getLogger(__name__)
MAGIC = b"OpenNemo keys and values, 1\n".ljust(32)
SUFFIX = ".kv"
MOST_PENDING = 512 * 2**20  # bytes that wait to be written


class PrefixStore:
    """A folder of pages.

    Attributes:
        secret: for the names of pages; see `KVCache`.
    """

    def __init__(
        self, folder: Path, max_bytes: int, identity: bytes, pages: Callable[[], list[Pages]]
    ):
        """`identity` names the model that computes keys and values; `pages` hold them.

        Raises:
            InvalidRequest: the folder cannot be used.
        """
        self._folder, self._max_bytes, self._pages = folder, max_bytes, pages
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            own = _own_secret(folder / "secret")
        except OSError as error:
            raise InvalidRequest(f"cache folder {folder}: {error.strerror}") from None
        layout = [
            (
                part.dtype,
                part.shape,
                None if p.scale is None else p.scale.dim() == 2 and p.scale.tolist(),
            )
            for p in pages()
            for part in p.of(0)
        ]
        self.secret = blake2b(MAGIC + identity + repr(layout).encode(), key=own).digest()
        self._n_bytes = sum(part.nbytes for p in pages() for part in p.of(0))
        self._room = BoundedSemaphore(max(1, MOST_PENDING // self._n_bytes))
        self._total, self._has_failed = 0, False
        self._under_way: set[Path] = set()  # pages that wait to be written
        self._writer = ThreadPoolExecutor(1, "opennemo-prefixes")
        self._writer.submit(self._begin)

    def save(self, sequence: TokenSequence, page_size: int) -> None:
        """Queue the pages that a sequence has filled for writing, unless they are stored."""
        for i in range(sequence.n_stored, len(sequence.page_keys)):
            path = self._path(sequence.page_keys[i])
            if path not in self._under_way and not path.exists():
                if not self._room.acquire(blocking=False):  # the disk is slow: later, perhaps
                    return
                page = sequence.pages[i]
                tokens = torch.tensor(sequence.tokens[i * page_size : (i + 1) * page_size])
                parts = [part for p in self._pages() for part in p.of(page)]
                self._under_way.add(path)
                self._writer.submit(self._write, path, [tokens, *map(_copy, parts)])
            sequence.n_stored = i + 1

    def touch(self, page_keys: Iterable[bytes]) -> None:
        """Record that a prefix was used; its end is removed before its start."""
        self._writer.submit(self._touch, [self._path(key) for key in page_keys])

    def restore(self, key: bytes, tokens: bytes, page: int) -> bool:
        """Read the page of that name and those tokens into page `page`, if it is here."""
        path = self._path(key)
        try:
            data = bytearray(path.read_bytes())
        except FileNotFoundError:
            return False
        except OSError as error:
            self._report(error)
            return False
        start = len(MAGIC) + 32
        body = memoryview(data)[start:]
        whole = len(body) == len(tokens) + self._n_bytes and body[: len(tokens)] == tokens
        if not whole or data[:start] != MAGIC + self._checksum(path, [body]):
            log.warning("%s: damaged or not of this cache; it is removed", path)
            with suppress(OSError):
                path.unlink()
            return False
        at = start + len(tokens)
        for part in (part for p in self._pages() for part in p.of(page)):
            stored = torch.frombuffer(data, dtype=torch.uint8, count=part.nbytes, offset=at)
            part.copy_(stored.view(part.dtype).view(part.shape))
            at += part.nbytes
        return True

    def clear(self) -> None:
        """Remove all pages, those of other models too."""
        self._writer.submit(self._trim, 0)

    def close(self) -> None:
        """Write all pending pages, and stop."""
        self._writer.shutdown()

    def _path(self, key: bytes) -> Path:
        return self._folder / (key.hex() + SUFFIX)

    def _checksum(self, path: Path, parts: Iterable[bytes | memoryview]) -> bytes:
        digest = blake2b(path.name.encode(), key=self.secret, digest_size=32)
        for part in parts:
            digest.update(part)
        return digest.digest()

    def _write(self, path: Path, tensors: Sequence[torch.Tensor]) -> None:
        try:
            parts = [t.flatten().view(torch.uint8).numpy().data for t in tensors]
            size = len(MAGIC) + 32 + sum(map(len, parts))
            if self._total + size > self._max_bytes:
                self._trim(max(0, int(0.9 * self._max_bytes) - size))
            if size <= self._max_bytes:
                write_whole(path, MAGIC, self._checksum(path, parts), *parts, mode=0o600)
                self._total += size
        except OSError as error:
            self._report(error)
        finally:
            self._under_way.discard(path)
            self._room.release()

    def _touch(self, paths: list[Path]) -> None:
        now = time.time_ns()  # the file system's clock would give many of them the same time
        for i, path in enumerate(reversed(paths)):
            with suppress(OSError):
                os.utime(path, ns=(now + i, now + i))

    def _begin(self) -> None:
        """Remove partial files of processes that are gone, and files above the bound."""
        with suppress(OSError):
            remove_partials(self._folder, f"*{SUFFIX}")
        self._trim(self._max_bytes)

    def _trim(self, max_bytes: int) -> None:
        """Remove the least recently used files while all take more than `max_bytes`."""
        files = []
        for path in self._folder.glob(f"[!.]*{SUFFIX}"):
            with suppress(OSError):  # another process has removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        self._total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if self._total <= max_bytes:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                self._total -= size

    def _report(self, error: OSError) -> None:
        if not self._has_failed:
            log.warning(
                "cache folder %s: %s; answers come without it", self._folder, error.strerror
            )
        self._has_failed = True


def open_store(
    config: EngineConfig, identity: bytes, pages: Callable[[], list[Pages]]
) -> PrefixStore | None:
    """The store that settings ask for. Raises: InvalidRequest, it cannot be used."""
    if config.cache_dir is None:
        return None
    if config.tensor_parallel_size > 1 or not config.prefix_caching:
        raise InvalidRequest("cache_dir needs prefix_caching, and tensor_parallel_size 1")
    return PrefixStore(config.cache_dir, config.max_cache_size, identity, pages)


def fingerprint(*models: Transformer) -> bytes:
    """A digest of models' shapes and weights; one weight that differs gives another."""
    digest = blake2b(digest_size=32)
    for model in models:
        digest.update(repr(model.config).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.detach().flatten().view(torch.uint8)
            data = data if data.storage_offset() % 8 == 0 else data.clone()
            n = len(data) // 8192 * 8192
            # Sums run at the speed of memory; a hash of all bytes would take many seconds.
            table = data[:n].view(torch.int64).view(-1, 1024)
            for part in (table.sum(0), table.sum(1), data[n:]):
                digest.update(part.cpu().view(torch.uint8).numpy().data)
    return digest.digest()


def _own_secret(path: Path) -> bytes:
    """The secret of a folder, made when it is first used. Raises: OSError."""
    for _ in range(2):
        with suppress(FileNotFoundError):
            if len(secret := path.read_bytes()) == 32:
                return secret
            log.warning("%s: damaged; the prefixes beside it are not used any more", path)
        write_whole(path, secrets.token_bytes(32), mode=0o600)
    return path.read_bytes()


def _copy(part: torch.Tensor) -> torch.Tensor:
    return part.to("cpu", copy=True).contiguous()
