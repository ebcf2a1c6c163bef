"""Learnt routers from maintained libraries as baselines, and trivial ones that could explain the composite's gain.

Each predicts every candidate's score and chooses the best candidate. The features are the meta LLM's cached states, as
for the composite. Some baselines read the question's words, only the name of its benchmark, or the states of an
untrained model. Their settings (neighbours, strength, size) are chosen on the validation split, as for the composite.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data_prep.labels import fill_unknown
from ..modeling.errors import ExpertokenError, one_line, require_extra

_SEED = 0
_ENOUGH = 50
_NEIGHBOURS = 50
_CELLS = 10_000_000  # scores of neighbours held at once: 80 MB
_COMPONENTS = 64
_MEMBERS = 5
_RANKING_STEPS = 300
_RANKED = 32  # candidates of one step, since the number of pairs is its square


@dataclass(frozen=True)
class Side:
    """One split of a supervision in the form that baselines read.

    Attributes:
        features: `[N, d]` features.
        scores: `[N, C]` scores, NaN where unknown.
        benchmarks: `[N]` names.
        subjects: `[N]` names, empty where a query has none. None if no method needs them.
        prompts: `[N]` texts. None if no method needs them.
        middle: `[N, d]` states of the model's middle layer at the last token. None: `features` are used instead.
        untrained: `[N, d]` states of the same model with random weights, or None.
        text: `[N, d]` states of the texts without their pictures, or None.
    """

    features: np.ndarray
    scores: np.ndarray
    benchmarks: np.ndarray
    subjects: np.ndarray | None = None
    prompts: np.ndarray | None = None
    middle: np.ndarray | None = None
    untrained: np.ndarray | None = None
    text: np.ndarray | None = None

    @property
    def filled(self) -> np.ndarray:
        """Scores without gaps, since regressors can't leave cells out. See `labels.fill_unknown`."""
        return fill_unknown(self.scores, self.benchmarks)

    def __add__(self, other: "Side") -> "Side":
        """Join the queries of both splits."""
        joined: dict[str, Any] = {
            name: None if ours is None else np.concatenate([ours, getattr(other, name)])
            for name, ours in vars(self).items()
        }
        return Side(**joined)

    @classmethod
    def asked(cls, features: np.ndarray) -> "Side":
        """Return queries with features `[N, d]` alone."""
        return cls(features, np.zeros((len(features), 0)), np.full(len(features), ""))


Predictor = Callable[[Side], np.ndarray]
"""Function from a split, without its scores, to expected scores `[N, C]`."""


def means_of(scores: np.ndarray) -> np.ndarray:
    """Return the mean of each candidate's known scores, 0 for a candidate without scores."""
    count = (~np.isnan(scores)).sum(0)
    return np.nan_to_num(scores).sum(0) / np.maximum(count, 1)


def _scaled(features: np.ndarray) -> tuple[Any, np.ndarray]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    return scaler, scaler.transform(features)


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _table(predicted: np.ndarray, side: Side) -> np.ndarray:
    """Return predictions as `[N, C]`. For one candidate scikit-learn returns `[N]`."""
    return np.reshape(predicted, (len(side.benchmarks), -1))


def _given(values: np.ndarray | None) -> np.ndarray:
    assert values is not None, "a method needs a field that the split lacks"
    return values


def names(train: Side, prior: float) -> Predictor:
    """Fit a table of mean scores by benchmark and subject, to measure the value of the data set's name alone.

    Each subject gets `prior` additional queries with its benchmark's mean. A benchmark outside the table gets the
    overall mean.
    """
    subjects = _given(train.subjects)
    kinds = {name: means_of(train.scores[train.benchmarks == name]) for name in np.unique(train.benchmarks)}
    overall = means_of(train.scores)
    table = {}
    for name, subject in {*zip(train.benchmarks, subjects, strict=True)}:
        inside = train.scores[(train.benchmarks == name) & (subjects == subject)]
        known = (~np.isnan(inside)).sum(0)
        table[name, subject] = (np.nan_to_num(inside).sum(0) + prior * kinds[name]) / (known + prior)
    return lambda side: np.stack(
        [table.get(key, kinds.get(key[0], overall)) for key in zip(side.benchmarks, _given(side.subjects), strict=True)]
    )


def words(train: Side, alpha: float) -> Predictor:
    """Fit a ridge regression of the scores on TF-IDF of the words, a baseline without any LLM."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")  # noqa: S106 - of words
    try:
        model = Ridge(alpha=alpha, solver="sparse_cg").fit(
            vectorizer.fit_transform(_given(train.prompts)), train.filled
        )
    except ValueError:  # no words: texts of unsupported signs, or ids of punctuation alone
        overall = means_of(train.scores)
        return lambda side: np.tile(overall, (len(side.benchmarks), 1))
    return lambda side: _table(model.predict(vectorizer.transform(_given(side.prompts))), side)


def guarded_knn(train: Side, bar: float) -> Predictor:
    """Fit nearest neighbours that leave the best single candidate only for a surely better one.

    A candidate is surely better if the mean difference of the scores is over `bar` of its standard errors, paired over
    the neighbours.
    """
    from sklearn.neighbors import NearestNeighbors

    filled = train.filled
    # The same mean as for best single: over benchmarks with equal weights.
    kinds = np.unique(train.benchmarks)
    overall = np.mean([means_of(train.scores[train.benchmarks == kind]) for kind in kinds], 0)
    single, count = int(overall.argmax()), min(_NEIGHBOURS, len(train.features))
    index = NearestNeighbors(n_neighbors=count).fit(_unit(train.features))

    def expected(features: np.ndarray) -> np.ndarray:
        found = filled[index.kneighbors(features, return_distance=False)]  # [N, k, C]
        ahead = found - found[:, :, single, None]
        sure = ahead.mean(1) > bar * ahead.std(1) / np.sqrt(count) + 1e-9
        means = found.mean(1)
        # A candidate that is not surely better is ranked just below the best single.
        below = np.minimum(means, means[:, single, None] - 1e-6)
        below[:, single] = means[:, single]
        return np.where(sure, means, below)

    def predict(side: Side) -> np.ndarray:
        asked = _unit(side.features)
        parts = np.array_split(asked, 1 + len(asked) * count * len(overall) // _CELLS)
        return np.concatenate([expected(part) for part in parts])

    return predict


def _perceptron(features: np.ndarray, scores: np.ndarray, width: int, seed: int) -> Any:
    """Return a fitted perceptron with one hidden layer, stopped early."""
    from sklearn.neural_network import MLPRegressor

    enough = len(features) >= _ENOUGH  # early stopping holds out a tenth of them
    options = {"alpha": 1e-2, "early_stopping": enough, "max_iter": 200, "random_state": seed}
    model = MLPRegressor(hidden_layer_sizes=(width,), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged: stopped early on purpose
        return model.fit(features, scores)


def ensemble(train: Side, width: int) -> Predictor:
    """Fit the prefill router (arXiv 2603.20895): a middle layer's last state, scaling, PCA, and the mean of MLPs."""
    from sklearn.decomposition import PCA

    def read(side: Side) -> np.ndarray:
        return side.features if side.middle is None else side.middle

    scaler, scaled = _scaled(read(train))
    kept = PCA(min(_COMPONENTS, *scaled.shape), random_state=_SEED).fit(scaled)
    reduced = kept.transform(scaled)
    models = [_perceptron(reduced, train.filled, width, seed) for seed in range(_MEMBERS)]

    def predict(side: Side) -> np.ndarray:
        asked = kept.transform(scaler.transform(read(side)))
        return np.mean([_table(model.predict(asked), side) for model in models], 0)

    return predict


def ranking(train: Side, decay: float) -> Predictor:
    """Fit a linear scorer with a pairwise ranking loss (EquiRouter, arXiv 2602.03478).

    The loss is `mean over pairs i, j with y_i > y_j of (y_i - y_j) log(1 + exp(s_j - s_i))`. For large pools each step
    uses some candidates at random. The outputs rank the candidates and are no estimates of their scores.
    """
    import torch

    scaler, scaled = _scaled(train.features)
    states = torch.from_numpy(np.column_stack([scaled, np.ones(len(scaled))]).astype(np.float32))
    wanted = torch.from_numpy(train.filled.astype(np.float32))
    count = wanted.shape[1]
    generator = torch.Generator().manual_seed(_SEED)
    weights = torch.zeros(states.shape[1], count, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=1e-2, weight_decay=decay)
    for _ in range(_RANKING_STEPS):
        rows = torch.randint(len(states), (min(len(states), 1024),), generator=generator)
        some = torch.randperm(count, generator=generator)[:_RANKED]
        scores, truth = states[rows] @ weights[:, some], wanted[rows][:, some]
        lead = (truth[:, :, None] - truth[:, None, :]).clamp(min=0)
        loss = (lead * torch.nn.functional.softplus(scores[:, None, :] - scores[:, :, None])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = weights.detach().numpy()

    def predict(side: Side) -> np.ndarray:
        asked = scaler.transform(side.features)
        scores = np.column_stack([asked, np.ones(len(asked))]) @ found
        return torch.from_numpy(scores).softmax(1).numpy()

    return predict


def untrained(train: Side, alpha: float) -> Predictor:
    """Fit a ridge regression on the states of the same model with random weights, to measure its training's value."""
    return _ridge(train, alpha, lambda side: _given(side.untrained))


def text_only(train: Side, alpha: float) -> Predictor:
    """Fit a ridge regression on the states of the texts without pictures, to measure the value of the pictures."""
    return _ridge(train, alpha, lambda side: _given(side.text))


def _ridge(train: Side, alpha: float, states: Callable[[Side], np.ndarray]) -> Predictor:
    from sklearn.linear_model import Ridge

    scaler, scaled = _scaled(states(train))
    model = Ridge(alpha=alpha).fit(scaled, train.filled)
    return lambda side: _table(model.predict(scaler.transform(states(side))), side)


def knn(train: Side, neighbours: int) -> Predictor:
    """Fit mean scores of the nearest train queries by cosine (arXiv 2309.15789, a strong baseline in 2505.12601)."""
    from sklearn.neighbors import KNeighborsRegressor

    count = min(neighbours, len(train.features))
    model = KNeighborsRegressor(n_neighbors=count).fit(_unit(train.features), train.filled)
    return lambda side: model.predict(_unit(side.features))


def linear(train: Side, alpha: float) -> Predictor:
    """Fit a ridge regression of the scores."""
    from sklearn.linear_model import Ridge

    scaler, scaled = _scaled(train.features)
    model = Ridge(alpha=alpha).fit(scaled, train.filled)
    return lambda side: model.predict(scaler.transform(side.features))


def mlp(train: Side, width: int) -> Predictor:
    """Fit a perceptron with one hidden layer, stopped early."""
    scaler, scaled = _scaled(train.features)
    model = _perceptron(scaled, train.filled, width, _SEED)
    return lambda side: _table(model.predict(scaler.transform(side.features)), side)


def clusters(train: Side, count: int) -> Predictor:
    """Fit mean scores of k-means clusters (Avengers, arXiv 2505.19797, and C-RoBERTa of RouterEval)."""
    from sklearn.cluster import KMeans

    count = min(count, len(train.features))
    model = KMeans(n_clusters=count, n_init=3, random_state=_SEED).fit(_unit(train.features))
    overall = means_of(train.scores)
    means = np.empty((count, train.scores.shape[1]))
    for cluster in range(count):
        inside = train.scores[model.labels_ == cluster]
        known = (~np.isnan(inside)).sum(0)
        # Each cluster gets one additional query with the overall mean, so that a tiny cluster has no winner by luck.
        means[cluster] = (np.nan_to_num(inside).sum(0) + overall) / (known + 1)
    return lambda side: means[model.predict(_unit(side.features))]


def factors(train: Side, rank: int) -> Predictor:
    """Fit a matrix factorisation of queries and candidates (EmbedLLM, arXiv 2410.02223, and RouteLLM, 2406.18665).

    Score = bias + (state mapped to `rank` factors) . (candidate's factors). The fit is a reduced-rank ridge regression,
    whose least squares solution has a closed form. The papers fit the same model by gradient descent.
    """
    scaler, scaled = _scaled(train.features)
    scores = train.filled
    bias = scores.mean(0)
    gram = scaled.T @ scaled + 100.0 * np.eye(scaled.shape[1])
    full = np.linalg.solve(gram, scaled.T @ (scores - bias))
    _, _, right = np.linalg.svd(scaled @ full, full_matrices=False)
    kept = right[:rank]
    return lambda side: bias + (scaler.transform(side.features) @ full) @ kept.T @ kept


METHODS: dict[str, tuple[Callable[..., Predictor], tuple[Any, ...]]] = {
    "names": (names, (1.0, 10.0, 100.0)),
    "words": (words, (0.3, 1.0, 3.0, 10.0)),
    "kNN": (knn, (5, 20, 50, 100)),
    "guarded-kNN": (guarded_knn, (1.0, 2.0, 3.0)),
    "linear": (linear, (1e2, 1e3, 1e4, 1e5)),
    "MLP": (mlp, (32, 128)),
    "ensemble": (ensemble, (32, 128)),
    "ranking": (ranking, (0.01, 0.1, 1.0)),
    "clusters": (clusters, (4, 8, 16, 32, 64)),
    "factors": (factors, (1, 2, 4)),
    "untrained": (untrained, (1e2, 1e3, 1e4, 1e5)),
    "text-only": (text_only, (1e2, 1e3, 1e4, 1e5)),
}
"""Methods by name, each with the settings that validation chooses from."""

TEXT_ONLY = "text-only"

ON_REQUEST = ("untrained", TEXT_ONLY)
"""Methods outside the default: they need a second model in memory, or an extra pass over all queries."""


def predict(
    name: str, train: Side, validation: Side, asked: Side, score: Callable[[np.ndarray, Side], float]
) -> tuple[np.ndarray, Any, float]:
    """Predict expected scores with the setting that is best on validation, fitted again on train and validation.

    Args:
        name: Key of `METHODS`.
        train: Split to learn from.
        validation: Split to choose the setting on.
        asked: Queries to predict.
        score: Function that scores decisions `[N]` on a split.

    Returns:
        Expected scores `[N, C]`, the setting, and the seconds of the prediction.

    Raises:
        ImportError: The extra `eval` is not installed.
    """
    require_extra("sklearn", "eval")
    method, settings = METHODS[name]
    reached = {s: score(method(train, s)(validation).argmax(1), validation) for s in settings}
    best = max(settings, key=reached.__getitem__)
    predictor = method(train + validation, best)
    started = time.perf_counter()
    predicted = predictor(asked)
    return predicted, best, time.perf_counter() - started


def check_model(model: str) -> None:
    """Check whether the model of an embedder or an encoder exists, before the slow steps.

    Raises:
        ExpertokenError: The model does not exist or is no transformers model.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ExpertokenError(
            f"{model}: expected the hub id or the folder of an encoder, found none ({one_line(error)})"
        ) from None


def embed(model: str, texts: Sequence[str]) -> np.ndarray:
    """Compute a sentence-transformers model's embeddings of texts, `[N, d]`.

    Args:
        model: Hub id or folder of the model.
        texts: N texts.

    Raises:
        ImportError: The extra `embed` is not installed.
    """
    library = require_extra("sentence_transformers", "embed")
    return library.SentenceTransformer(model).encode(list(texts), show_progress_bar=len(texts) > 256)


def encoder(
    model: str, texts: dict[str, list[str]], train: Side, *, epochs: int = 3, batch_size: int = 16
) -> np.ndarray:
    """Fine-tune an encoder with a sigmoid per candidate on the train split, and predict the test split.

    Bench-CoE and RouterEval (MLC) use such encoders.

    Args:
        model: Hub id or folder of any model for `AutoModelForSequenceClassification`.
        texts: Texts of `train` and `test`.
        train: Split to learn from. Its scores are the targets.
        epochs: Number of epochs over the train split.
        batch_size: Number of texts per step.

    Returns:
        Expected scores of the test texts, `[N, C]`.
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
        learnt: Any = examples("train", train.filled)
        trainer = Trainer(network, arguments, data_collator=collate, train_dataset=learnt)
        trainer.train()
        asked: Any = examples("test", None)
        logits = np.asarray(trainer.predict(asked).predictions)
    return 1 / (1 + np.exp(-logits))
