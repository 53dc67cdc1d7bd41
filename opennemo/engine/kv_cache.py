"""Which page of the KV cache belongs to which sequence, and which prefixes lie there already.

A page is never erased, only forgotten. A page that no sequence uses keeps its keys and values
and its name until it is handed out again, least recently used first; a request that begins with
the same tokens finds it by that name. A full page's name is a keyed BLAKE2b hash over its parent's
name and its tokens, so it stands for the whole prefix; on a hit the tokens are compared too.

This is bookkeeping alone, in plain Python; the tensor belongs to the runner. The paged cache is
that of vLLM (arXiv:2309.06180).
"""

import secrets
from array import array
from dataclasses import dataclass
from hashlib import blake2b

from opennemo.engine.prefix_store import PrefixStore
from opennemo.engine.sequence import Sequence


@dataclass
class _Page:
    n_users: int = 0
    key: bytes | None = None  # name of the prefix that ends with this page, once it is full
    tokens: bytes = b""


class KVCache:
    """Pages with reference counts.

    A page is in exactly one of two states: used by one or more sequences (`n_users > 0`), or free
    and queued in `_free`, perhaps still carrying a prefix.
    """

    def __init__(
        self,
        n_pages: int,
        page_size: int,
        prefix_caching: bool = True,
        store: PrefixStore | None = None,
    ):
        self.n_pages, self.page_size, self.prefix_caching = n_pages, page_size, prefix_caching
        self.n_hit_tokens = 0  # prompt tokens that lay in the cache, of
        self.n_asked_tokens = 0  # prompt tokens looked up, since the start
        self._free = dict.fromkeys(range(n_pages))  # in order of use: the first is reused next
        self._pages = [_Page() for _ in range(n_pages)]
        self._by_key: dict[bytes, int] = {}
        # Without the secret, a client who can compute hashes could aim for a collision.
        self._store = store
        self._secret = secrets.token_bytes(32) if store is None else store.secret

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_used(self) -> int:
        return self.n_pages - self.n_free

    def match(self, sequence: Sequence) -> int | None:
        """Give a sequence that has no pages those that already hold the beginning of its tokens.

        The tokens from `first_row` on are left to compute: there must be rows to take logits from.
        -> a page of its leader's that also begins with its next tokens, to be copied: they count as
        computed.
        """
        assert not sequence.pages and sequence.n_computed == 0
        if (n_most := sequence.first_row) == 0:
            return None
        for i in range(n_most // self.page_size):
            key, data = self._name(sequence, i)
            page = self._find(key, data)
            if page is None:
                page = self._restore(sequence, key, data)
            if page is None:
                break
            self._free.pop(page, None)
            self._pages[page].n_users += 1
            sequence.pages.append(page)
            sequence.page_keys.append(key)
        sequence.n_computed = len(sequence.pages) * self.page_size
        sequence.n_cached = sequence.n_computed if sequence.n_output == 0 else sequence.n_cached
        self.n_asked_tokens += len(sequence.tokens)
        self.n_hit_tokens += sequence.n_computed
        leader, n_shared = sequence.leader, min(sequence.n_shared, n_most)
        if leader is None or not 0 < n_shared - sequence.n_computed < self.page_size:
            return None
        i = len(sequence.pages)
        if leader.pages:
            page = leader.pages[i]
        else:  # it has ended, but its page may still be cached
            page = self._find(*self._name(leader, i, sequence.page_keys))
        if page is not None:
            sequence.n_computed = n_shared
        return page

    def extend(self, sequence: Sequence, n_tokens: int) -> bool:
        """Give the sequence pages for its first `n_tokens`; False if too few are free."""
        missing = -(-n_tokens // self.page_size) - len(sequence.pages)
        if missing > self.n_free:
            return False
        for _ in range(missing):
            page = next(iter(self._free))
            del self._free[page]
            self._forget(page)
            self._pages[page].n_users = 1
            sequence.pages.append(page)
        return True

    def publish(self, sequence: Sequence) -> None:
        """Name the pages that the sequence has filled, so that others can find them.

        For a score that is computed, also the last page, which the sequences that it leads copy.
        """
        n_full, n_rest = divmod(sequence.n_computed, self.page_size)
        n_full += n_rest > 0 and sequence.max_tokens == 0 and sequence.n_pending == 0
        for i in range(len(sequence.page_keys), n_full):
            key, data = self._name(sequence, i)
            sequence.page_keys.append(key)
            if key not in self._by_key:  # two sequences may fill the same page side by side
                self._give_name(sequence.pages[i], key, data)
        if self._store is not None and self._stores(sequence):
            self._store.save(sequence, self.page_size)

    def release(self, sequence: Sequence) -> None:
        """Take all pages back from a sequence; those that no other uses become free."""
        for page in reversed(sequence.pages):  # the end of a prefix is forgotten before its start
            self._pages[page].n_users -= 1
            assert self._pages[page].n_users >= 0, f"page {page} was released twice"
            if self._pages[page].n_users == 0:
                self._free[page] = None
        if self._store is not None and self._stores(sequence):
            self._store.touch(sequence.page_keys[: sequence.n_stored])
        sequence.n_stored = 0
        sequence.pages.clear()
        sequence.page_keys.clear()
        sequence.n_computed = sequence.n_drafted = 0

    def reset(self) -> None:
        """Forget every prefix; pages in use stay in use."""
        for page in list(self._by_key.values()):
            self._forget(page)

    def _find(self, key: bytes, data: bytes) -> int | None:
        page = self._by_key.get(key)
        return page if page is not None and self._pages[page].tokens == data else None

    def _restore(self, sequence: Sequence, key: bytes, data: bytes) -> int | None:
        """A free page that now holds the content of the file of that name."""
        if self._free and self._store is not None and self._stores(sequence):
            page = next(iter(self._free))
            self._forget(page)
            if self._store.restore(key, data, page):
                self._give_name(page, key, data)
                return page
        return None

    def _stores(self, sequence: Sequence) -> bool:
        """Whether a sequence's pages are kept on the disk: those of answers without an adapter."""
        return sequence.adapter is None and sequence.max_tokens > 0

    def _give_name(self, page: int, key: bytes, data: bytes) -> None:
        self._by_key[key] = page
        self._pages[page].key, self._pages[page].tokens = key, data

    def _forget(self, page: int) -> None:
        key = self._pages[page].key
        if key is not None:
            del self._by_key[key]
            self._pages[page].key, self._pages[page].tokens = None, b""

    def _name(
        self, sequence: Sequence, i: int, page_keys: list[bytes] | None = None
    ) -> tuple[bytes, bytes]:
        """Key of the prefix that ends with page i, and the page's own tokens."""
        page_keys = sequence.page_keys if page_keys is None else page_keys
        tokens = sequence.tokens[i * self.page_size : (i + 1) * self.page_size]
        data = array("q", tokens).tobytes()
        salt = sequence.salt
        if not self.prefix_caching:  # the answers of one request still share its prompt
            salt += b"/%d" % sequence.request_id
        parent = page_keys[i - 1] if i else blake2b(salt, key=self._secret).digest()
        key = blake2b(parent + data, key=self._secret, digest_size=32).digest()
        return key, data
