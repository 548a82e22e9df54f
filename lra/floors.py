"""Owns the linear floors of a data set: what an untuned linear model on counts of bytes, pixels or words reaches.

A floor maps (train, other split) of examples to a score. What a floor sees is what a model would see: the encoded
sequences, cut to the task's max_len. arXiv:2011.04006 publishes none; a data set without its floor says nothing.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.base import ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import LinearSVC

from data.encoded import EncodedSplit

Matrix = np.ndarray | sparse.csr_matrix


@dataclass(frozen=True)
class Examples:
    """N examples of a split: `rows` [N] of `data`. `text_of` turns true ids into text, where ids are text."""

    data: EncodedSplit
    rows: np.ndarray
    text_of: Callable[[np.ndarray], str]

    @cached_property
    def texts(self) -> list[list[str]]:
        """[N][S]"""
        sequences = range(self.data.num_sequences)
        return [[self.text_of(self.ids(row, each)) for each in sequences] for row in range(len(self.rows))]

    @property
    def labels(self) -> np.ndarray:
        return np.asarray(self.data.labels)[self.rows]

    @property
    def lengths(self) -> np.ndarray:
        """[N, S]"""
        return self.data.lengths()[self.rows]

    def ids(self, example: int, sequence: int = 0) -> np.ndarray:
        place = int(self.rows[example]) * self.data.num_sequences + sequence
        return self.data.tokens[self.data.offsets[place] : self.data.offsets[place + 1]]

    def column(self, sequence: int) -> list[str]:
        return [texts[sequence] for texts in self.texts]

    def histograms(self, sequence: int, num_ids: int) -> np.ndarray:
        """[N, num_ids] share of each id in one sequence of each example."""
        counts = [np.bincount(self.ids(row, sequence), minlength=num_ids) for row in range(len(self.rows))]
        return np.asarray(counts, dtype=np.float32) / np.maximum(self.lengths[:, sequence : sequence + 1], 1)


@dataclass(frozen=True)
class Splits:
    """The three splits, with the names of the tests: features come from `train` alone."""

    train: Examples
    val: Examples
    test: Examples

    @property
    def parts(self) -> tuple[Examples, Examples, Examples]:
        return self.train, self.val, self.test


Scores = tuple[float, float]  # accuracy on val and on test
Floor = Callable[[Splits], Scores]


def majority(splits: Splits) -> Scores:
    """The commonest class of train."""
    common = np.bincount(splits.train.labels).argmax()
    return float((splits.val.labels == common).mean()), float((splits.test.labels == common).mean())


def log_length_lr(splits: Splits) -> Scores:
    return _logistic([np.log1p(part.lengths).astype(np.float64) for part in splits.parts], splits)


def length_difference_lr(splits: Splits) -> Scores:
    return _logistic([np.abs(np.diff(part.lengths, axis=1)).astype(np.float64) for part in splits.parts], splits)


def histogram_lr(splits: Splits) -> Scores:
    """How often each id occurs, order ignored: bag of bytes, of tokens, of grey values."""
    size = _num_ids(splits)
    return _logistic([part.histograms(0, size) for part in splits.parts], splits)


def pair_histogram_lr(splits: Splits) -> Scores:
    """[h1; h2]: what can be read off the two sequences without comparing them."""
    size = _num_ids(splits)
    return _logistic([np.hstack([part.histograms(s, size) for s in (0, 1)]) for part in splits.parts], splits)


def pair_interaction_lr(splits: Splits) -> Scores:
    """[|h1 - h2|; h1 h2]: the two towers compared."""
    size = _num_ids(splits)
    pairs = [(part.histograms(0, size), part.histograms(1, size)) for part in splits.parts]
    return _logistic([np.hstack([np.abs(a - b), a * b]) for a, b in pairs], splits)


def raw_pixel_lr(splits: Splits) -> Scores:
    """Grey values in place, scaled to 0..1; 60 iterations."""
    images = [
        np.stack([part.ids(row) for row in range(len(part.rows))]).astype(np.float32) / 255 for part in splits.parts
    ]
    return _fit(LogisticRegression(max_iter=60), images, splits)


def first_tokens_lr(splits: Splits) -> Scores:
    """The first 16 tokens, one-hot: for ListOps the outermost operator and what is next to it."""
    size = _num_ids(splits)
    features = []
    for part in splits.parts:
        heads = np.zeros((len(part.rows), 16), dtype=np.int64)
        for row in range(len(part.rows)):
            head = part.ids(row)[:16]
            heads[row, : len(head)] = head
        features.append(np.eye(size, dtype=np.float32)[heads].reshape(len(heads), -1))
    return _fit(LogisticRegression(max_iter=300), features, splits)


def char_12_lr(splits: Splits) -> Scores:
    return _tfidf(LogisticRegression(max_iter=300), splits, analyzer="char", ngram_range=(1, 2), min_df=2)


def char_24_svc(splits: Splits) -> Scores:
    hashing = HashingVectorizer(
        analyzer="char", ngram_range=(2, 4), n_features=1 << 18, alternate_sign=False, dtype=np.float32
    )
    return _fit(LinearSVC(C=1.0), [hashing.transform(part.column(0)) for part in splits.parts], splits)


def word_1_lr(splits: Splits) -> Scores:
    return _tfidf(LogisticRegression(max_iter=300), splits, ngram_range=(1, 1), min_df=2)


def word_12_svc(splits: Splits) -> Scores:
    return _tfidf(LinearSVC(C=1.0), splits, ngram_range=(1, 2), min_df=2)


def token_12_lr(splits: Splits) -> Scores:
    """Single tokens and neighbouring pairs of them, each as a share of the sequence; 60 iterations."""
    size = _num_ids(splits)
    features = []
    for part in splits.parts:
        ids = (part.ids(row).astype(np.int64) for row in range(len(part.rows)))
        pairs = [np.bincount(row[:-1] * size + row[1:], minlength=size * size) / len(row) for row in ids]
        features.append(np.hstack([part.histograms(0, size), np.asarray(pairs, dtype=np.float32)]))
    return _fit(make_pipeline(StandardScaler(), LogisticRegression(max_iter=60)), features, splits)


def char_3_cosine(splits: Splits) -> Scores:
    return _cosine(splits, analyzer="char", ngram_range=(3, 3), max_features=1 << 18)


def word_cosine(splits: Splits) -> Scores:
    return _cosine(splits, ngram_range=(1, 1))


def word_product_lr(splits: Splits) -> Scores:
    """Element-wise product of the two documents' TF-IDF vectors, at unit length: which shared words speak for a link,
    however much else the documents share."""
    products = [first.multiply(second).tocsr() for first, second in _pair_vectors(splits, ngram_range=(1, 1))]
    return _fit(make_pipeline(Normalizer(), LogisticRegression(max_iter=300, C=10.0)), products, splits)


FLOORS: Mapping[str, Mapping[str, Floor]] = {
    "listops": {
        "majority": majority,
        "log-length LR": log_length_lr,
        "bag-of-tokens LR": histogram_lr,
        "token 1-2-gram LR": token_12_lr,
        "first 16 tokens LR": first_tokens_lr,
    },
    "text": {
        "majority": majority,
        "log-length LR": log_length_lr,
        "bag-of-bytes LR": histogram_lr,
        "char 1-2-gram TF-IDF LR": char_12_lr,
        "char 2-4-gram hashed LinearSVC": char_24_svc,
        "word 1-gram TF-IDF LR": word_1_lr,
        "word 1-2-gram TF-IDF LinearSVC": word_12_svc,
    },
    "retrieval": {
        "majority": majority,
        "length-difference LR": length_difference_lr,
        "bag-of-bytes [h1; h2] LR": pair_histogram_lr,
        "bag-of-bytes [abs(h1-h2); h1*h2] LR": pair_interaction_lr,
        "char 3-gram TF-IDF cosine": char_3_cosine,
        "word TF-IDF cosine": word_cosine,
        "word TF-IDF product LR": word_product_lr,
    },
    "image": {"majority": majority, "pixel-histogram LR": histogram_lr, "raw-pixel LR": raw_pixel_lr},
    "pathfinder": {"majority": majority, "pixel-histogram LR": histogram_lr, "raw-pixel LR": raw_pixel_lr},
}


def _num_ids(splits: Splits) -> int:
    return 1 + max(int(part.data.tokens.max()) for part in splits.parts)


def _logistic(features: Sequence[Matrix], splits: Splits) -> Scores:
    return _fit(make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)), features, splits)


def _tfidf(classifier: ClassifierMixin, splits: Splits, **options: Any) -> Scores:
    vectoriser = TfidfVectorizer(sublinear_tf=True, dtype=np.float32, **options)
    train = vectoriser.fit_transform(splits.train.column(0))
    return _fit(classifier, [train, *(vectoriser.transform(part.column(0)) for part in splits.parts[1:])], splits)


def _fit(classifier: ClassifierMixin, features: Sequence[Matrix], splits: Splits) -> Scores:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a floor has its iterations, converged or not
        classifier.fit(features[0], splits.train.labels)
    return (
        float(classifier.score(features[1], splits.val.labels)),
        float(classifier.score(features[2], splits.test.labels)),
    )


def _pair_vectors(splits: Splits, **options: Any) -> list[tuple[sparse.csr_matrix, sparse.csr_matrix]]:
    """Per split the TF-IDF vectors of first and second documents; each distinct training document is counted once."""
    vectoriser = TfidfVectorizer(sublinear_tf=True, dtype=np.float32, min_df=2, **options)
    vectoriser.fit(sorted({text for pair in splits.train.texts for text in pair}))
    vectors = []
    for part in splits.parts:
        distinct = {text: place for place, text in enumerate(dict.fromkeys(part.column(0) + part.column(1)))}
        matrix = vectoriser.transform(distinct)
        vectors.append(tuple(matrix[[distinct[text] for text in part.column(sequence)]] for sequence in (0, 1)))
    return vectors


def _cosine(splits: Splits, **options: Any) -> Scores:
    """Linked when the cosine exceeds the threshold that does best on train."""
    cosines = [np.asarray(a.multiply(b).sum(axis=1)).ravel() for a, b in _pair_vectors(splits, **options)]
    threshold = best_threshold(cosines[0], splits.train.labels)
    scores = [
        float(((values > threshold) == part.labels).mean())
        for values, part in zip(cosines[1:], splits.parts[1:], strict=True)
    ]
    return scores[0], scores[1]


def best_threshold(values: np.ndarray, labels: np.ndarray) -> float:
    """The cut that classifies most of `labels` (0 below, 1 above) correctly."""
    order = np.argsort(values, kind="stable")
    right = np.concatenate([[0], np.cumsum(np.where(labels[order] == 0, 1, -1))])  # beyond "all are 1"
    cut = int(right.argmax())
    edges = np.concatenate([[-np.inf], values[order], [np.inf]])
    if cut in (0, len(values)):
        return -np.inf if cut == 0 else np.inf
    return float((edges[cut] + edges[cut + 1]) / 2)
