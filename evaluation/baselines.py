"""Routers that the composite has to beat, from well-kept libraries, on the very features that it uses itself.

Each learns to expect every candidate's score from the meta LLM's cached state of the query and chooses the best. What
it has to choose (neighbours, strength, size) it chooses on the validation side, as the composite does.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..modeling.errors import ExpertokenError, one_line, require_extra

_SEED = 0
_ENOUGH = 50


@dataclass(frozen=True)
class Side:
    """One side of a supervision as baselines see it.

    Attributes:
        features: `[N, d]`.
        scores: `[N, C]`, NaN where not measured.
        benchmarks: `[N]` names.
    """

    features: np.ndarray
    scores: np.ndarray
    benchmarks: np.ndarray

    def __add__(self, other: "Side") -> "Side":
        """The queries of both."""
        ours, theirs = vars(self).values(), vars(other).values()
        return Side(*(np.concatenate(pair) for pair in zip(ours, theirs, strict=True)))


Predictor = Callable[[np.ndarray], np.ndarray]
"""From features `[N, d]` to expected scores `[N, C]`."""


def _filled(scores: np.ndarray) -> np.ndarray:
    """Scores with each candidate's mean where it was not measured: regressors can't leave cells out."""
    return np.where(np.isnan(scores), means_of(scores), scores)


def means_of(scores: np.ndarray) -> np.ndarray:
    """Mean of each candidate's measured scores, 0 for one without any, as everywhere."""
    count = (~np.isnan(scores)).sum(0)
    return np.nan_to_num(scores).sum(0) / np.maximum(count, 1)


def _scaled(features: np.ndarray) -> tuple[Any, np.ndarray]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    return scaler, scaler.transform(features)


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def knn(train: Side, neighbours: int) -> Predictor:
    """Mean scores of the nearest train queries by cosine (arXiv 2309.15789; a strong baseline, arXiv 2505.12601)."""
    from sklearn.neighbors import KNeighborsRegressor

    count = min(neighbours, len(train.features))
    model = KNeighborsRegressor(n_neighbors=count).fit(_unit(train.features), _filled(train.scores))
    return lambda features: model.predict(_unit(features))


def linear(train: Side, alpha: float) -> Predictor:
    """Ridge regression of the scores."""
    from sklearn.linear_model import Ridge

    scaler, scaled = _scaled(train.features)
    model = Ridge(alpha=alpha).fit(scaled, _filled(train.scores))
    return lambda features: model.predict(scaler.transform(features))


def mlp(train: Side, width: int) -> Predictor:
    """A perceptron with one hidden layer, stopped early."""
    from sklearn.neural_network import MLPRegressor

    scaler, scaled = _scaled(train.features)
    enough = len(train.features) >= _ENOUGH  # a tenth of them is what it stops on
    options = {"alpha": 1e-2, "early_stopping": enough, "max_iter": 200, "random_state": _SEED}
    model = MLPRegressor(hidden_layer_sizes=(width,), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged: stopped early on purpose
        model.fit(scaled, _filled(train.scores))
    return lambda features: np.atleast_2d(model.predict(scaler.transform(features))).reshape(len(features), -1)


def clusters(train: Side, count: int) -> Predictor:
    """The best candidate of the query's k-means cluster (Avengers, arXiv 2505.19797; C-RoBERTa of RouterEval)."""
    from sklearn.cluster import KMeans

    count = min(count, len(train.features))
    model = KMeans(n_clusters=count, n_init=3, random_state=_SEED).fit(_unit(train.features))
    overall = means_of(train.scores)
    means = np.empty((count, train.scores.shape[1]))
    for cluster in range(count):
        inside = train.scores[model.labels_ == cluster]
        known = (~np.isnan(inside)).sum(0)
        # One query of the overall mean tops each cluster up: a tiny cluster has no winner of its own.
        means[cluster] = (np.nan_to_num(inside).sum(0) + overall) / (known + 1)
    return lambda features: means[model.predict(_unit(features))]


def factors(train: Side, rank: int) -> Predictor:
    """Matrix factorisation: queries and candidates in one space (EmbedLLM, arXiv 2410.02223; RouteLLM, 2406.18665).

    Score = bias + (state mapped to `rank` factors) . (candidate's factors), fitted as a reduced-rank ridge regression:
    the least squares solution has a closed form, its gradient descent in the papers does not differ in the model.
    """
    scaler, scaled = _scaled(train.features)
    scores = _filled(train.scores)
    bias = scores.mean(0)
    gram = scaled.T @ scaled + 100.0 * np.eye(scaled.shape[1])
    full = np.linalg.solve(gram, scaled.T @ (scores - bias))
    _, _, right = np.linalg.svd(scaled @ full, full_matrices=False)
    kept = right[:rank]
    return lambda features: bias + (scaler.transform(features) @ full) @ kept.T @ kept


METHODS: dict[str, tuple[Callable[..., Predictor], tuple[Any, ...]]] = {
    "kNN": (knn, (5, 20, 50, 100)),
    "linear": (linear, (1e2, 1e3, 1e4, 1e5)),
    "MLP": (mlp, (32, 128)),
    "clusters": (clusters, (4, 8, 16, 32, 64)),
    "factors": (factors, (1, 2, 4)),
}
"""Name to (method, the settings that validation chooses from)."""


def predict(
    name: str, train: Side, validation: Side, features: np.ndarray, score: Callable[[np.ndarray, Side], float]
) -> tuple[np.ndarray, Any]:
    """Expected scores of a baseline, with the setting that was best on validation, fitted again on both sides.

    Args:
        name: a key of `METHODS`.
        train: what is learnt from.
        validation: what the setting is chosen on.
        features: `[N, d]` of the queries to predict.
        score: of choices `[N]` on a side.

    Returns:
        `[N, C]`, and the setting.

    Raises:
        ImportError: the extra `eval` is not installed.
    """
    require_extra("sklearn", "eval")
    method, settings = METHODS[name]
    reached = {s: score(method(train, s)(validation.features).argmax(1), validation) for s in settings}
    best = max(settings, key=reached.__getitem__)
    return method(train + validation, best)(features), best


def check_model(model: str) -> None:
    """See that a model of an embedder or an encoder is there, before anything else takes its time.

    Raises:
        ExpertokenError: it is not, or is none.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ExpertokenError(f"{model}: no such encoder; expected a hub id or a folder ({one_line(error)})") from None


def embed(model: str, texts: Sequence[str]) -> np.ndarray:
    """A sentence-transformers model's embeddings of texts, `[N, d]`.

    Args:
        model: hub id or folder.
        texts: N of them.

    Raises:
        ImportError: the extra `embed` is not installed.
    """
    library = require_extra("sentence_transformers", "embed")
    return library.SentenceTransformer(model).encode(list(texts), show_progress_bar=len(texts) > 256)


def encoder(
    model: str, texts: dict[str, list[str]], train: Side, *, epochs: int = 3, batch_size: int = 16
) -> np.ndarray:
    """An encoder with a sigmoid per candidate (Bench-CoE's and RouterEval's MLC kind), fine-tuned on the train side.

    Args:
        model: any model for `AutoModelForSequenceClassification`: hub id or folder.
        texts: `train` and `test`.
        train: what is learnt from; scores are the targets.
        epochs: over the train side.
        batch_size: texts a step.

    Returns:
        expected scores of the test texts, `[N, C]`.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

    set_seed(_SEED)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(
        model,
        num_labels=train.scores.shape[1],
        problem_type="multi_label_classification",
        ignore_mismatched_sizes=True,
    )
    network.config.pad_token_id = tokenizer.pad_token_id

    def examples(side: str, scores: np.ndarray | None) -> list[dict]:
        encoded = tokenizer(texts[side], truncation=True, max_length=512).input_ids
        found = [{"input_ids": ids} for ids in encoded]
        return found if scores is None else [e | {"labels": row} for e, row in zip(found, scores, strict=True)]

    def collate(rows: list[dict]) -> dict:
        batch = dict(tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt"))
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor(np.stack([row["labels"] for row in rows]), dtype=torch.float32)
        return batch

    with tempfile.TemporaryDirectory(prefix="encoder-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            learning_rate=2e-5,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            train_sampling_strategy="group_by_length",
            use_cpu=not torch.accelerator.is_available(),
        )
        learnt: Any = examples("train", _filled(train.scores))
        trainer = Trainer(network, arguments, data_collator=collate, train_dataset=learnt)
        trainer.train()
        asked: Any = examples("test", None)
        logits = np.asarray(trainer.predict(asked).predictions)
    return 1 / (1 + np.exp(-logits))
