"""Notebook use: texts in lists, in memory, with the parameters of belt-nlp; no corpus, no tables, no flows.

    model = ClassifierWithPooling(num_labels=2, batch_size=8, learning_rate=5e-5, epochs=3, chunk_size=510, stride=510,
                                  minimal_chunk_length=1, pretrained_model_name_or_path="bert-base-uncased")
    model.fit(texts, labels)
    model.predict(others)
    model.save("model")    # a checkpoint, for `belt score` too

The four classes are those of belt-nlp by other names. What they compute is what the rest of belt does: mini-batches of
chunks of many texts, exact gradients in fixed memory, and special tokens and padding of the model at hand.

Shape letters: D texts, L labels.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from belt_tasks import checkpoint as checkpoints
from belt_tasks import data_parallel, prepare, scoring
from belt_tasks.checkpoint import Checkpoint
from belt_tasks.data_parallel import Ranks
from belt_tasks.encoder import ChunkModel
from belt_tasks.errors import ConfigError
from belt_tasks.predictions import DocumentScores
from belt_tasks.specs import BatchSpec, ChunkSpec, Head, PoolingSpec, PoolingStrategy, ScoreSpec, Spec, TrainSpec
from belt_tasks.tokens import load_tokenizer
from belt_tasks.trainer import Trainer, build_trainer
from belt_tasks.training_loop import TrainingLoop
from belt_tasks.training_set import TrainingSet

TRUNCATED_SIZE = 510
NUM_NAMED = 3  # wrong values in a message


class Parameters(Spec):
    """Of all four classes."""

    batch_size: int = Field(ge=1)
    """Texts whose loss is computed together."""
    learning_rate: float = Field(gt=0.0)
    """Of AdamW; it stays what it is."""
    epochs: int = Field(ge=1)
    """Passes over the texts."""
    accumulation_steps: int = Field(1, ge=1)
    """Batches before the optimizer moves."""
    pretrained_model_name_or_path: str = Field("bert-base-uncased", min_length=1)
    """The encoder to begin with: a local directory, or a name on the hub."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """cpu, cuda, cuda:N, or auto: cuda where there is one."""
    seed: int = Field(0, ge=0)
    """Of the head's weights, dropout and the order of texts."""

    @property
    def chunks(self) -> ChunkSpec:
        """What is read of a text: its first chunk."""
        return ChunkSpec(chunk_size=TRUNCATED_SIZE, stride=TRUNCATED_SIZE, selection="head")

    @property
    def pooling(self) -> PoolingSpec:
        """Of one chunk."""
        return PoolingSpec()


class PoolingParameters(Parameters):
    """Of the two classes that read texts of any length."""

    chunk_size: int
    """Tokens of a chunk, without special tokens."""
    stride: int
    """Step between the starts of neighbouring chunks."""
    minimal_chunk_length: int
    """Shorter chunks are dropped; a text keeps its last remaining one."""
    maximal_text_length: int | None = None
    """Tokens of a text beyond this many are not read."""
    pooling_strategy: PoolingStrategy = "mean"
    """mean, max, length_weighted_mean or attention."""

    @property
    def chunks(self) -> ChunkSpec:
        """Windows."""
        return ChunkSpec(
            chunk_size=self.chunk_size,
            stride=self.stride,
            minimal_chunk_length=self.minimal_chunk_length,
            maximal_text_length=self.maximal_text_length,
        )

    @property
    def pooling(self) -> PoolingSpec:
        """Of chunk logits."""
        return PoolingSpec(pooling_strategy=self.pooling_strategy)


class _Model:
    """What the four classes have in common."""

    _accepts: ClassVar[type[Parameters]] = Parameters
    _model: ChunkModel | None
    """None before there are weights."""
    _scored_by: Checkpoint | None
    """Made of the weights as they are; None after they moved."""

    def __init__(self, head: Head, given: dict[str, Any]) -> None:
        try:
            parameters = self._accepts.model_validate(given)
            # as belt-nlp trains: PyTorch's AdamW as it is, and nothing held out
            self._spec = TrainSpec(
                task=head.task,
                chunks=parameters.chunks,
                pooling=parameters.pooling,
                device=parameters.device,
                epochs=parameters.epochs,
                learning_rate=parameters.learning_rate,
                schedule="constant",
                warmup_fraction=0.0,
                documents_per_batch=parameters.batch_size,
                accumulation_steps=parameters.accumulation_steps,
                max_grad_norm=None,
                validation_fraction=0.0,
                seed=parameters.seed,
            )
        except ValidationError as error:
            raise ConfigError("\n".join(map(_in_words, error.errors()))) from None
        self._head, self._source = head, parameters.pretrained_model_name_or_path
        self._model = self._scored_by = None

    def save(self, model_dir: str) -> None:
        """Write a checkpoint.

        Args:
            model_dir: a directory; any fsspec URL.

        Raises:
            ConfigError: there is nothing to save yet, or it cannot be written there.
        """
        checkpoints.save_checkpoint(
            self._fitted(),
            model_dir,
            tokenizer_source=self._source,
            head=self._head,
            chunks=self._spec.chunks,
            pooling=self._spec.pooling,
            data_fingerprint="",
            metrics={},
            training=self._spec.model_dump(),
            calibration=None if self._scored_by is None else self._scored_by.calibration,
        )

    @classmethod
    def load(cls, model_dir: str, device: str = "auto") -> Self:
        """A model that was saved, or another checkpoint of belt's with such a head; it can be fitted further.

        Args:
            model_dir: a local directory.
            device: cpu, cuda, cuda:N or auto.

        Raises:
            ConfigError: it is no such checkpoint.
        """
        checkpoint, card = checkpoints.load_checkpoint(model_dir), checkpoints.read_card(model_dir)
        is_regression = issubclass(cls, _Regressor)
        if card is None or not isinstance(checkpoint.model, ChunkModel):
            raise ConfigError(f"{model_dir}: not a checkpoint of belt's own: it has no {checkpoints.CARD_NAME}")
        if card.head.task not in (("regression",) if is_regression else ("multiclass",)):
            raise ConfigError(f"{model_dir}: a {card.head.task} model, which {cls.__name__} is not")
        known = {name: value for name, value in card.training.items() if name in TrainSpec.model_fields}
        now = {"device": device, "chunks": card.chunks, "pooling": card.pooling, "task": card.head.task}
        model = cls.__new__(cls)
        model._restore(checkpoint, TrainSpec.model_validate(known | now))  # noqa: SLF001 - our own
        return model

    def _restore(self, checkpoint: Checkpoint, spec: TrainSpec) -> None:
        self._head, self._source, self._spec = checkpoint.head, checkpoint.uri, spec
        self._model, self._scored_by = cast("ChunkModel", checkpoint.model), checkpoint

    def _fit(self, x_train: Sequence[str], target: NDArray[Any], epochs: int | None) -> None:
        """Train; done again, it goes on from the weights of before."""
        texts = _texts("x_train", x_train)
        if len(target) != len(texts):
            raise ConfigError(
                f"x_train and y_train must be equally long, got {len(texts)} texts and {len(target)} labels"
            )
        if epochs is not None and epochs < 1:
            raise ConfigError(f"epochs must be 1 or more, got {epochs}")
        spec = self._spec if epochs is None else self._spec.model_copy(update={"epochs": epochs})
        tokens = load_tokenizer(self._source).tokenize(texts)
        training_set = TrainingSet(
            doc_ids=list(map(str, range(len(texts)))),
            input_ids_T=tokens.input_ids_T,
            first_token_D=tokens.offsets[:-1],
            num_tokens_D=tokens.num_tokens_D,
            document_seed_D=prepare.document_seeds(prepare.content_fingerprints(texts)),
            target=target,
            head=self._head,
            fingerprint="",
        )
        self._scored_by = None
        with data_parallel.alone(spec.device, spec.precision) as ranks:
            trainer = self._trainer(training_set, spec, ranks)
            for _ in TrainingLoop(trainer=trainer, documents=np.arange(len(texts))).epochs():
                pass

    def _trainer(self, training_set: TrainingSet, spec: TrainSpec, ranks: Ranks) -> Trainer:
        if self._model is None:
            trainer = build_trainer(training_set, spec, encoder_source=self._source, ranks=ranks)
            self._model = trainer.model
            return trainer
        return Trainer(
            model=self._model.to(ranks.device),
            training_set=training_set,
            special=load_tokenizer(self._source).special,
            spec=spec,
            ranks=ranks,
        )

    def _score(self, x: Sequence[str], batch_size: int | None) -> DocumentScores:
        texts, model, chunks = _texts("x", x), self._fitted(), self._spec.chunks
        if self._scored_by is None:
            self._scored_by = Checkpoint(
                model=model.cpu().eval(),
                tokenizer=load_tokenizer(self._source),
                head=self._head,
                chunks=chunks,
                pooling=self._spec.pooling,
                digest="",
                uri=self._source,
            )
        num_special = self._scored_by.tokenizer.special.num_tokens
        budget = None if batch_size is None else max(batch_size, 1) * (chunks.chunk_size + num_special)
        spec = ScoreSpec(
            chunks=chunks,
            pooling=self._spec.pooling,
            device=self._spec.device,
            batches=BatchSpec(max_batch_tokens=budget),
        )
        return scoring.score_texts(texts, self._scored_by, spec)

    def _fitted(self) -> ChunkModel:
        if self._model is None:
            raise ConfigError("this model knows nothing yet: call fit, or load one that was saved")
        return self._model


class _Classifier(_Model):
    def __init__(self, num_labels: int, **parameters: Any) -> None:  # noqa: ANN401 - those of `_accepts`
        if num_labels < 2:  # noqa: PLR2004 - one class is no choice
            raise ConfigError(f"num_labels must be 2 or more, got {num_labels}")
        super().__init__(Head(task="multiclass", labels=tuple(map(str, range(num_labels)))), parameters)

    def fit(self, x_train: Sequence[str], y_train: Sequence[int], epochs: int | None = None) -> None:
        """Train; done again, it goes on from the weights of before.

        Args:
            x_train: D texts.
            y_train: their classes, from 0 to num_labels - 1; booleans are 0 and 1.
            epochs: instead of the model's own.

        Raises:
            ConfigError: texts or labels are wrong, the encoder cannot be loaded, or the loss stops being a number.
        """
        num_labels = len(self._head.labels)
        wrong = [label for label in y_train if not _is_integer(label) or not 0 <= label < num_labels]
        if wrong:
            shown = ", ".join(map(repr, wrong[:NUM_NAMED]))
            raise ConfigError(
                f"y_train must hold integers from 0 to {num_labels - 1}, got {shown} and such in {len(wrong)} places"
            )
        self._fit(x_train, np.array([int(label) for label in y_train], dtype=np.int64), epochs)

    def predict(self, x: Sequence[str], batch_size: int | None = None) -> NDArray[np.int64]:
        """The class of each text, int64 [D]; parameters are those of `predict_scores`."""
        return np.asarray(self.predict_scores(x, batch_size).argmax(axis=1))

    def predict_scores(self, x: Sequence[str], batch_size: int | None = None) -> NDArray[np.float64]:
        """The probability of each class, float64 [D, L].

        Args:
            x: D texts.
            batch_size: most chunks at a time, which decides memory and no score; None suits the device.

        Raises:
            ConfigError: there are no texts, or no weights yet.
        """
        return np.asarray(self._score(x, batch_size).scores_DL)


class _Regressor(_Model):
    def __init__(self, **parameters: Any) -> None:  # noqa: ANN401 - those of `_accepts`
        super().__init__(Head(task="regression", labels=("target",)), parameters)

    def fit(self, x_train: Sequence[str], y_train: Sequence[float], epochs: int | None = None) -> None:
        """Train; done again, it goes on from the weights of before.

        Args:
            x_train: D texts.
            y_train: their numbers.
            epochs: instead of the model's own.

        Raises:
            ConfigError: texts or numbers are wrong, the encoder cannot be loaded, or the loss stops being a number.
        """
        try:
            target = np.array(list(y_train), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"y_train must hold numbers: {error}") from error
        if target.ndim != 1:
            raise ConfigError(f"y_train must hold one number for each text, got {target.ndim} dimensions")
        if len(wrong := np.flatnonzero(~np.isfinite(target))):
            raise ConfigError(f"y_train must hold finite numbers, got {target[wrong[0]]} at position {wrong[0]}")
        self._fit(x_train, target, epochs)

    def predict(self, x: Sequence[str], batch_size: int | None = None) -> NDArray[np.float64]:
        """The number of each text, float64 [D].

        Args:
            x: D texts.
            batch_size: most chunks at a time, which decides memory and no result; None suits the device.

        Raises:
            ConfigError: there are no texts, or no weights yet.
        """
        return np.asarray(self._score(x, batch_size).scores_DL[:, 0])


class ClassifierWithPooling(_Classifier):
    """Classes of texts of any length: num_labels, and PoolingParameters by name. Raises ConfigError for wrong ones."""

    _accepts = PoolingParameters


class ClassifierTruncated(_Classifier):
    """Classes of the beginnings of texts: num_labels, and Parameters by name. Raises ConfigError for wrong ones."""


class RegressorWithPooling(_Regressor):
    """Numbers of texts of any length: PoolingParameters by name. Raises ConfigError for wrong ones."""

    _accepts = PoolingParameters


class RegressorTruncated(_Regressor):
    """Numbers of the beginnings of texts: Parameters by name. Raises ConfigError for wrong ones."""


def _texts(name: str, texts: Sequence[str]) -> list[str]:
    """Texts, checked: a string alone is a sequence of letters, which nobody means."""
    if isinstance(texts, str):
        raise ConfigError(f"{name} must be a list of texts, got one text")
    found = list(texts)
    if not found:
        raise ConfigError(f"{name} must hold at least one text, got none")
    wrong = [i for i, text in enumerate(found) if not isinstance(text, str)]
    if wrong:
        raise ConfigError(f"{name} must hold texts, got {found[wrong[0]]!r} at position {wrong[0]}")
    return found


def _is_integer(label: object) -> bool:
    return isinstance(label, int | np.integer | np.bool_)


def _in_words(error: Any) -> str:  # noqa: ANN401 - pydantic's
    where = ".".join(map(str, error["loc"])) or "parameters"
    got = "" if error["type"] == "missing" else f", got {error['input']!r}"
    return f"{where}: {error['msg']}{got}"
