"""Tekken, the tokenizer of Mistral NeMo: reads and writes `tekken.json`, and maps text <-> ids.

An id is a control token if it is below `n_special`, and else the rank of a run of bytes plus
`n_special`. Text only becomes ranks, so it cannot become control. bpe.py splits text into ranks,
and chat.py knows what the control tokens mean.

The official file is 15 MB of JSON and takes half a second to read, so its content is kept in the
user's cache folder in a form that takes a tenth of that. Format: mistral-common, `tekken.py`.
"""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from opennemo.errors import CheckpointError
from opennemo.files import write_whole
from opennemo.tokenizer.bpe import BytePairTokenizer

# The control tokens of files that name none, and the versions of which there are such files.
V3_SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
NAME_NONE = ("v3", "v7")
SINGLE_BYTES = [bytes([i]) for i in range(256)]
MAX_SPECIAL = 2048  # twice what any known file has
MAX_FILE_BYTES = 256 << 20  # the largest known file has 20 MB
MIN_CACHED_BYTES = 4 << 20  # smaller files are read about as fast as their cache would be
CACHE_FORMAT = b"opennemo tekken 2\n"


class Tekken(BytePairTokenizer):
    """A byte-level BPE vocabulary in Mistral's layout.

    Args:
        pattern: regular expression that splits text into pieces which tokens do not cross.
        tokens: bytes of each token in order of rank; first the 256 single bytes, in order.
        version: Mistral's tokenizer version, which says how a chat is laid out.
        settings: what a prompt may set of the model; see Tokenizer.
        special_tokens: names of the first control tokens in order of id, by default those of
            version v3; the ids that are left up to `n_special` are called `<SPECIAL_{id}>`.

    Raises:
        ValueError: these are not the parts of a Tekken vocabulary; says which and why.
    """

    def __init__(
        self,
        pattern: str,
        tokens: Sequence[bytes],
        *,
        version: str = "v3",
        special_tokens: Sequence[str] = V3_SPECIAL_TOKENS,
        n_special: int = 1000,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        if not len(special_tokens) <= n_special <= MAX_SPECIAL:
            raise ValueError(f"{len(special_tokens)} special tokens for {n_special} ids")
        names = list(special_tokens)
        names += [f"<SPECIAL_{id}>" for id in range(len(names), n_special)]
        self.control = {name: id for id, name in enumerate(names)}
        if len(self.control) < n_special or not {"<s>", "</s>"} <= self.control.keys():
            raise ValueError("its special tokens are not unique, or lack <s> or </s>")
        self.version, self.n_special = version, n_special
        self.special_tokens = tuple(special_tokens)
        if list(tokens[:256]) != SINGLE_BYTES:
            raise ValueError("the first 256 tokens are not the single bytes in order")
        super().__init__(pattern, tokens, first_id=n_special)
        self.bos_id, self.eos_id = self.control["<s>"], self.control["</s>"]
        self.instruct_version, self.settings = f"{version}-tekken", settings or {}

    @classmethod
    def load(cls, path: Path) -> "Tekken":
        """Read a `tekken.json`, or its copy in the cache.

        Raises:
            CheckpointError: the file is not a tekken.json; says what is wrong with it.
        """
        try:
            status = path.stat()
            if status.st_size > MAX_FILE_BYTES:
                raise CheckpointError(
                    f"{path}: {status.st_size:,} bytes are too many for a tekken.json "
                    f"(at most {MAX_FILE_BYTES:,})"
                )
            if status.st_size < MIN_CACHED_BYTES:
                return cls(**_parse(path.read_bytes()))
            cache = _cache_file(path, status)
            if (parts := _read_cache(cache)) is None:
                parts = _parse(path.read_bytes())
                tokenizer = cls(**parts)
                _write_cache(cache, parts)
                return tokenizer
            return cls(**parts)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: not a usable tekken.json: {error}") from error

    def save(self, path: Path) -> None:
        """Write a `tekken.json` that mistral-common reads too; same vocabulary, same bytes.

        Entries beyond the vocabulary, which official files carry unused, are not kept.
        """
        config = {
            "pattern": self.pattern,
            "num_vocab_tokens": len(self.tokens),
            "default_vocab_size": self.vocab_size,
            "default_num_special_tokens": self.n_special,
            "version": self.version,
        }
        vocab = [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(token).decode(),
                "token_str": _text(token),
            }
            for rank, token in enumerate(self.tokens)
        ]
        content: dict[str, Any] = {"config": config, "vocab": vocab}
        if self.special_tokens != V3_SPECIAL_TOKENS or self.version not in NAME_NONE:
            content["special_tokens"] = [
                {"rank": id, "token_str": name, "is_control": True}
                for id, name in enumerate(self.special_tokens)
            ]
        if self.settings:
            content["model_settings_builder"] = self.settings
        write_whole(path, json.dumps(content, ensure_ascii=True).encode())


def _text(token: bytes) -> str | None:
    """The token as a string, or None if its bytes are not UTF-8."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _parse(data: bytes) -> dict[str, Any]:
    """The constructor's arguments from the content of a tekken.json; ValueError if it is wrong."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    rank = 0
    try:
        config, vocab = content["config"], content["vocab"]
        if not isinstance(config["pattern"], str) or not isinstance(config["version"], str):
            raise ValueError("its pattern and its version must be strings")
        n_special = config["default_num_special_tokens"]
        n_tokens = config["default_vocab_size"] - n_special
        if not isinstance(n_tokens, int) or not 256 <= n_tokens <= len(vocab):
            raise ValueError(f"it says {n_tokens} tokens, but has {len(vocab)}")
        tokens = []
        for rank, entry in enumerate(vocab[:n_tokens]):
            if entry["rank"] != rank:
                raise ValueError(f"rank {rank} is missing (rank {entry['rank']} is in its place)")
            tokens.append(binascii.a2b_base64(entry["token_bytes"], strict_mode=True))
        parts = {
            "pattern": config["pattern"],
            "version": config["version"],
            "n_special": n_special,
            "tokens": tokens,
        }
        if special := content.get("special_tokens"):
            if [entry["rank"] for entry in special] != list(range(len(special))):
                raise ValueError("the ranks of the special tokens are not 0, 1, 2, ...")
            parts["special_tokens"] = [entry["token_str"] for entry in special]
        elif parts["version"] not in NAME_NONE:
            raise ValueError(f"version {parts['version']} must list its special_tokens")
        if choices := content.get("model_settings_builder"):
            parts["settings"] = {k: _setting(k, v) for k, v in choices.items() if v is not None}
    except KeyError as error:
        raise ValueError(f"the key {error} is missing") from None
    except binascii.Error as error:
        raise ValueError(f"token {rank} is not base64 ({error})") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"it is not laid out as one ({error})") from None
    return parts


def _setting(name: str, choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that the file declares. Raises: ValueError, one is not understood."""
    kind, values, default = (choice.get(key) for key in ("type", "values", "default"))
    texts = [value for value in values if isinstance(value, str)] if values else []
    if (name, kind) == ("json_schema", "json_schema"):
        return choice
    if (name, kind) != ("reasoning_effort", "enum") or texts != values or default not in texts:
        raise ValueError(
            f"its model_settings_builder has {name}: {choice}; understood are json_schema, and "
            "reasoning_effort of type enum with a list of values and a default among them"
        )
    return choice


def _cache_file(path: Path, status: os.stat_result) -> Path:
    """Where the compact copy of this very file is, if there is one."""
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "opennemo", f"tekken-{hashlib.sha256(key.encode()).hexdigest()[:24]}")


def _read_cache(file: Path) -> dict[str, Any] | None:
    """The constructor's arguments, or None unless every byte is as it was written."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    body = data[len(CACHE_FORMAT) + 32 :]
    if data != CACHE_FORMAT + hashlib.sha256(body).digest() + body:
        return None
    header, _, rest = body.partition(b"\n")
    parts = json.loads(header)
    n_bytes = 4 * parts["tokens"]
    ends = np.frombuffer(rest[:n_bytes], "<u4").tolist()
    rest = rest[n_bytes:]
    parts["tokens"] = [rest[start:end] for start, end in pairwise([0, *ends])]
    return parts


def _write_cache(file: Path, parts: dict[str, Any]) -> None:
    """Cache the parts for the next time; a cache folder that cannot be written costs only time."""
    tokens = parts["tokens"]
    header = json.dumps({**parts, "tokens": len(tokens)}).encode()
    ends = np.array(list(accumulate(map(len, tokens))), "<u4").tobytes()
    body = b"\n".join([header, ends + b"".join(tokens)])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, CACHE_FORMAT + hashlib.sha256(body).digest() + body)
    except OSError:
        pass
