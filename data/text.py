"""Sentencepiece with the LLaMA-2 rules of the released code (hawk.md 1.8), on numpy.

What is notable: text is split on specials explicitly and each piece between them is encoded on its own, so that each starts with its
own dummy prefix; pad = unk = 0; the id of `<ImageHere>` is the first one after the model's and never reaches a batch.
Agreement with the authors' tokenizer is tested token for token.
"""
import hashlib
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece

from hawk_jax.config import ConfigError

UNK, BOS, EOS = 0, 1, 2                  # LLaMA-2; padding has no id of its own, the released code uses unk
IMAGE = "<ImageHere>"
EMBEDDED = Path(__file__).parent / "embedded" / "tokenizer.model"
CACHED_TEXTS = 1 << 15                   # ids of that many texts are kept; about 1 KB each


class Tokenizer:
    """A sentencepiece model used as LLaMA-2's tokenizer.  Safe for threads; travels between processes as its path.

    `name` is the path of a `tokenizer.model`, or "embedded" (the small one of the synthetic world).  A missing, broken or ill-numbered
    model raises ConfigError.
    """

    def __init__(self, name: str = "embedded"):
        self.name = name
        path = EMBEDDED if name == "embedded" else Path(name)
        if not name or not path.is_file():
            raise ConfigError(f"input.tokenizer={name!r}: no such file; give the path of a sentencepiece tokenizer.model, or 'embedded'")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"input.tokenizer={name!r} cannot be read: {error.strerror}") from error
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise ConfigError(f"input.tokenizer={name!r} is not a sentencepiece model ({error})") from error
        ids = (self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id())
        if ids != (UNK, BOS, EOS):
            raise ConfigError(f"input.tokenizer={name!r} numbers unk, bos, eos as {ids}; LLaMA-2 has (0, 1, 2)")
        self.size = self.pieces.get_piece_size()                 # vocabulary without `<ImageHere>`
        self.digest = hashlib.sha256(content).hexdigest()[:16]   # names the content
        self.specials = {"<unk>": UNK, "<s>": BOS, "</s>": EOS, IMAGE: self.size}
        self._split = re.compile("(" + "|".join(map(re.escape, self.specials)) + ")")
        self.plain = lru_cache(CACHED_TEXTS)(self._plain)

    def __reduce__(self):
        return Tokenizer, (self.name,)                           # the sentencepiece object and the cache stay behind

    def _plain(self, text: str) -> np.ndarray:
        """int32 [S]: ids of a text in which specials mean nothing; read-only, kept (`plain` is the cached form)."""
        ids = np.array(self.pieces.encode(text), np.int32)
        ids.flags.writeable = False
        return ids

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text in which `<s>`, `</s>`, `<unk>` and `<ImageHere>` are specials.

        As transformers 4.28 does it: white space next to `<ImageHere>` is dropped, next to the others kept.
        """
        parts = self._split.split(text)                          # text, special, text, special, ..., text
        for i in range(1, len(parts), 2):
            if parts[i] == IMAGE:
                parts[i - 1], parts[i + 1] = parts[i - 1].rstrip(), parts[i + 1].lstrip()
        ids = [BOS] if bos else []
        for i, part in enumerate(parts):
            ids.extend([self.specials[part]] if i % 2 else self.plain(part).tolist())
        return ids

    def ending(self, symbol: str, text: str) -> np.ndarray:
        """int32 [S]: ids of `text` followed by an end symbol, which is a special or text itself."""
        if symbol in self.specials:
            return np.append(self.plain(text), np.int32(self.specials[symbol]))
        return self.plain(text + symbol)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids up to the first `</s>`, stripped; unk and BOS are left out."""
        kept = []
        for i in map(int, ids):
            if i == EOS:
                break
            if i not in (UNK, BOS) and i < self.size:
                kept.append(i)
        return self.pieces.decode(kept).strip()


def clean_caption(text: str, max_words: int = 50) -> str:
    """The released stage-1 cleaning (BlipCaptionProcessor): lower case, some punctuation to spaces, the first `max_words` words."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def times_text(times: Iterable[float], template: str) -> str:
    """The time message of hawk.md 5.2; `times` in seconds."""
    seconds = [f"{float(str(t)):.1f}" for t in times]            # through the shortest decimal: float32(0.45) rounds as 0.45 does
    return template.format(count=len(seconds), seconds=", ".join(seconds))
