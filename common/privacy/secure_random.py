"""Cryptographically secure randomness for privacy noise and patient sampling.

The server knows the study's seed, so noise and samples that hide a patient must not
come from it; nor from PyTorch's or NumPy's generators, whose state can be worked out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

KEY_BYTES = 32
NONCE = bytes(16)
"""Always the same: no key is used twice."""
PAIRS = 2
"""Pairs of Gaussian numbers in each value."""


class SecretRandom:
    """The keystream of ChaCha20 under a key of the operating system.

    Each draw ends the life of its key: the first bytes of the keystream are the next
    one, so that a state found later reveals nothing drawn before.
    """

    def __init__(self) -> None:
        self._key = os.urandom(KEY_BYTES)

    def normal(self, shape: Sequence[int], std: float) -> Tensor:
        """Return Gaussian noise of mean 0, float64.

        Floating-point Gaussians have gaps that betray what they were added to (Mironov
        2012). Each value is therefore half the sum of four independent ones, in
        float64, of which no two are of the same Box-Muller pair.

        References
        ----------
        Holohan and Braghin (2021), arXiv 2107.10138, section 5.1.
        """
        n = math.prod(shape)
        # One more pair than values, so that each value's sines are of the next's pair.
        radius, angle = self._uniform(2 * PAIRS * (n + 1)).view(2, PAIRS, n + 1)
        radius.log_().mul_(-2).sqrt_()
        angle.mul_(2 * math.pi)
        total = (radius * angle.cos())[:, :-1].sum(0)
        total += radius.mul_(angle.sin_())[:, 1:].sum(0)
        noise: Tensor = total.mul_(std / math.sqrt(2 * PAIRS))
        return noise.reshape(tuple(shape))

    def bernoulli(self, n: int, rate: float) -> Tensor:
        """Return n independent draws that are true with probability `rate`, bool."""
        drawn: Tensor = self._uniform(n) < rate
        return drawn

    def seed(self) -> int:
        """Return a number below 2**63, to seed a generator that stays in here."""
        return int.from_bytes(self._bytes(8), "little") >> 1

    def _uniform(self, n: int) -> Tensor:
        """Return n odd multiples of 2**-53 between 0 and 1, float64.

        52 random bits are the fraction of a number from 1 to 2, of which 1 is taken.
        """
        words = np.frombuffer(bytearray(self._bytes(8 * n)), dtype="<u8")
        words >>= np.uint64(12)
        words |= np.uint64(0x3FF << 52)
        return torch.from_numpy(words.view("<f8")).sub_(1 - 2.0**-53)

    def _bytes(self, n: int) -> bytes:
        encryptor = Cipher(ChaCha20(self._key, NONCE), mode=None).encryptor()
        self._key = encryptor.update(bytes(KEY_BYTES))
        return encryptor.update(bytes(n))
