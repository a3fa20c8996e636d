"""Reads drawn digits, and measures the distance of a set of drawings from real ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def named_digit(prompt: str) -> int:
    """Return the digit that a prompt or a class label names: 7 for "a handwritten seven", "the digit 7" and "7".

    Raises:
        ValueError: the text names no digit.
    """
    for word in prompt.split():
        if word in NAMES:
            return NAMES.index(word)
        if word.isdecimal() and int(word) < len(NAMES):
            return int(word)
    raise ValueError(f"{prompt!r} names no digit")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A support vector machine that reads digits, and a small network whose hidden layer gives features.

    Args:
        accuracy: share of real digits, not used in training, that the machine reads right.
        real: float64[N, 64], features of those digits.
    """

    machine: SVC
    network: MLPClassifier
    accuracy: float
    real: Float64

    @staticmethod
    def train() -> Reader:
        """Train on three quarters of scikit-learn's 8x8 digits."""
        data = load_digits()
        train_x, test_x, train_y, test_y = train_test_split(
            data.data, data.target, test_size=0.25, random_state=0, stratify=data.target
        )
        machine = SVC(gamma=0.001, C=10).fit(train_x, train_y)
        network = MLPClassifier((64,), max_iter=300, random_state=0).fit(train_x / 16, train_y)
        return Reader(
            machine=machine, network=network, accuracy=float(machine.score(test_x, test_y)), real=_features(network, test_x)
        )

    def read(self, pictures: Float32) -> npt.NDArray[np.int64]:
        """Return the digit on each picture float32[N, 1, 16, 16] in [-1, 1]."""
        digits: npt.NDArray[np.int64] = self.machine.predict(_small(pictures))
        return digits

    def distance(self, pictures: Float32) -> float:
        """Return the Frechet distance of the pictures' features from the real digits': |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2).

        Source: FID (arXiv 1706.08500), on this network's features.
        """
        features = _features(self.network, _small(pictures))
        first, second = np.cov(self.real.T), np.cov(features.T)
        values = np.linalg.eigvals(first @ second)  # real and not negative, for a product of two covariances
        root = np.sqrt(np.maximum(values.real, 0)).sum()
        shift = np.square(self.real.mean(axis=0) - features.mean(axis=0)).sum()
        return float(shift + np.trace(first) + np.trace(second) - 2 * root)


def _small(pictures: Float32) -> Float64:
    small = pictures.reshape(len(pictures), 8, 2, 8, 2).mean(axis=(2, 4))
    clipped: Float64 = np.clip((small + 1) * 8, 0, 16).reshape(len(pictures), 64)
    return clipped


def _features(network: MLPClassifier, digits: Float64) -> Float64:
    hidden: Float64 = np.maximum(digits / 16 @ network.coefs_[0] + network.intercepts_[0], 0)
    return hidden
