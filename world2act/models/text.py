"""Prompts as hashed words: no vocabulary file, no hub. Each word falls into one of 1024 buckets, each with a learned vector."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

import torch
from torch import nn

BUCKETS = 1024
MAX_WORDS = 16
_PADDING, _START = 0, 1


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits of any script, without regard to case. A script without spaces gives one a clause."""
    text = unicodedata.normalize("NFC", text.casefold())
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()


def word_ids(text: str) -> list[int]:
    """Bucket numbers of the first 16 words of `text`, after a start token (so '' is one token: no condition)."""
    hashes = (hashlib.blake2b(word.encode(), digest_size=8) for word in words(text)[:MAX_WORDS])
    return [_START] + [2 + int.from_bytes(h.digest(), "big") % BUCKETS for h in hashes]


def token_batch(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts -> ids int64 (B, 17) and mask bool (B, 17), True at words. The width is fixed so that no row depends on another."""
    ids = torch.full((len(texts), 1 + MAX_WORDS), _PADDING, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens = word_ids(text)
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids, ids != _PADDING


class WordEmbedding(nn.Module):
    """Learned vectors of hashed words plus their place in the sentence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(BUCKETS + 2, width, padding_idx=_PADDING)
        self.places = nn.Parameter(torch.randn(1 + MAX_WORDS, width) * 0.02)

    def forward(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts -> vectors (B, 17, width), mask (B, 17)."""
        ids, mask = token_batch(texts)
        device = self.places.device
        vectors: torch.Tensor = self.words(ids.to(device)) + self.places
        return vectors, mask.to(device)
