"""Which scikit-learn class fits a job told in words: TF-IDF over the library's own documentation."""

import json
import re
from typing import Any

import numpy as np

NUM_ANSWERS = 3


class Model:
    example = {"job": ["find outliers with random trees"]}

    def load(self, context: Any) -> None:
        index = json.loads((context.path / "index.json").read_text())
        self.words = {word: i for i, word in enumerate(index["words"])}
        self.names, self.summaries = np.array(index["names"]), np.array(index["summaries"])
        with np.load(context.path / "index.npz") as arrays:
            self.weights = arrays["weights"]
            self.vectors = arrays["vectors"].astype(np.float32)

    def infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """For each job the best classes, with what they are for and how well they match."""
        jobs = np.zeros((len(inputs["job"]), len(self.words)), np.float32)
        for row, job in zip(jobs, inputs["job"], strict=True):
            for word in words_of(job.decode()):
                if word in self.words:
                    row[self.words[word]] += 1
        jobs *= self.weights
        jobs /= np.linalg.norm(jobs, axis=1, keepdims=True) + 1e-9
        scores = jobs @ self.vectors.T
        best = np.argsort(-scores, axis=1)[:, :NUM_ANSWERS]
        return {"name": self.names[best], "purpose": self.summaries[best], "score": np.take_along_axis(scores, best, axis=1)}


def words_of(text: str) -> list[str]:
    """Lower-case words, CamelCase taken apart."""
    return re.findall(r"[a-z][a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower())


def vectors_of(texts: list[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The words, the weight of each, and one unit vector a text."""
    words: dict[str, int] = {}
    counted = [[words.setdefault(word, len(words)) for word in words_of(text)] for text in texts]
    counts = np.stack([np.bincount(text, minlength=len(words)) for text in counted]).astype(np.float32)
    weights = np.log(len(texts) / (counts > 0).sum(axis=0)) + 1
    vectors = np.log1p(counts) * weights
    return list(words), weights.astype(np.float32), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
