"""Peers that run on PyTorch: belt, belt-nlp, a loop over the tokenizer's overflow, sentence-transformers, a pipeline.

What only one of them needs is imported by that one, so that the memory of a peer holds nothing of the others.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from belt_tasks.specs import ChunkSpec, CorpusSpec, ScoreSpec
from tests.benchmarks import documents
from tests.benchmarks.protocol import Configurations, Precision, Score, Setup, UnavailableError, Work

CHUNKS_PER_BATCH = 8  # of the overflow loop
TEXTS_PER_CALL = 256  # of the overflow loop's tokenizer
BELT_NLP_IDS = (101, 102, 0)  # [CLS], [SEP] and padding, which belt-nlp has in its code
BELT_NLP_POSITIONS = 512
HEAD_NAME = "head.safetensors"  # of a belt checkpoint


def belt(setup: Setup, *, precision: Precision) -> Configurations:
    """What a flow does, without Prefect."""
    from belt_tasks.score_corpus import score_corpus

    def score(work: Work) -> None:
        chunks = ChunkSpec(chunk_size=work.chunk_size, stride=work.stride)
        spec = ScoreSpec(chunks=chunks, device="cpu", precision=precision)
        score_corpus(work.corpus, setup.checkpoint, work.output, CorpusSpec(), spec)

    return {"": lambda: score}


def belt_nlp(setup: Setup, *, batch_size: int) -> Configurations:
    """belt-nlp's own classifier, tokenization and batches around our weights.

    Raises:
        UnavailableError: the model is not one that belt-nlp can run.
    """
    from belt_nlp.bert import BertNN
    from belt_nlp.bert_classifier_with_pooling import BertClassifierWithPooling

    body, linear = load_encoder(setup.checkpoint)
    tokenizer = load_hf_tokenizer(setup.checkpoint)
    if (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id) != BELT_NLP_IDS:
        raise UnavailableError("belt-nlp has the ids of BERT's special tokens in its code, and this model has others")
    if getattr(body.config, "max_position_embeddings", BELT_NLP_POSITIONS) < BELT_NLP_POSITIONS:
        raise UnavailableError("belt-nlp pads every chunk to 512 tokens, more than this model reads")
    network = BertNN(body, linear.out_features)
    network.linear = linear  # belt-nlp's is 768 wide whatever the encoder

    def score(work: Work) -> None:
        doc_ids, texts = documents.read_texts(work.corpus)
        classifier = BertClassifierWithPooling(
            num_labels=linear.out_features,
            batch_size=batch_size,
            learning_rate=0.0,
            epochs=1,
            chunk_size=work.chunk_size,
            stride=work.stride,
            minimal_chunk_length=1,
            pooling_strategy="mean",
            tokenizer=tokenizer,
            neural_network=network,
            device="cpu",
        )
        documents.write_scores(work.output, doc_ids, classifier.predict_scores(texts).double().numpy())

    return {"": lambda: score}


def overflow_loop(setup: Setup) -> Configurations:
    """What one writes with transformers alone: overflowing tokens, batches in order, padded to the longest."""
    body, linear = load_encoder(setup.checkpoint)
    tokenizer = load_hf_tokenizer(setup.checkpoint)
    special = documents.tokenizer_of(setup.checkpoint).special
    num_prefix, num_suffix = len(special.prefix_ids), len(special.suffix_ids)

    def windows(texts: Sequence[str], work: Work) -> tuple[list[list[int]], list[int]]:
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=work.chunk_size + special.num_tokens,
            stride=work.chunk_size - work.stride,  # of tokenizers, the overlap
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        chunks, document_of_chunk = [], []
        mapping = encoded["overflow_to_sample_mapping"]
        for i, ids in enumerate(encoded["input_ids"]):
            chunks.append(ids)
            if i + 1 == len(mapping) or mapping[i + 1] != mapping[i]:
                content = ids[num_prefix : len(ids) - num_suffix]
                tails = contained_tails(content, stride=work.stride)
                chunks += [[*special.prefix_ids, *tail, *special.suffix_ids] for tail in tails]
            document_of_chunk += [mapping[i]] * (len(chunks) - len(document_of_chunk))
        return chunks, document_of_chunk

    def score(work: Work) -> None:
        doc_ids, texts = documents.read_texts(work.corpus)
        chunks: list[list[int]] = []
        document_of_chunk: list[int] = []
        for first in range(0, len(texts), TEXTS_PER_CALL):
            more, document_of_more = windows(texts[first : first + TEXTS_PER_CALL], work)
            chunks += more
            document_of_chunk += [first + document for document in document_of_more]
        logits = []
        with torch.inference_mode():
            for first in range(0, len(chunks), CHUNKS_PER_BATCH):
                batch = tokenizer.pad({"input_ids": chunks[first : first + CHUNKS_PER_BATCH]}, return_tensors="pt")
                logits.append(linear(body(**batch).last_hidden_state[:, 0]))
        doc_of_chunk_C = np.array(document_of_chunk, dtype=np.int64)
        probabilities_DL = documents.pool(torch.cat(logits).numpy(), doc_of_chunk_C, len(doc_ids))
        documents.write_scores(work.output, doc_ids, probabilities_DL)

    return {"": lambda: score}


def contained_tails(content: list[int], *, stride: int) -> list[list[int]]:
    """Windows inside a document's last one: BELT keeps them, and a tokenizer's overflow does not."""
    return [content[start:] for start in range(stride, len(content), stride)]


def sentence_transformers(setup: Setup) -> Configurations:
    """`SentenceTransformer.encode` over the chunks' texts: first-token embeddings, sorted batches of 32."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    _, linear = load_encoder(setup.checkpoint)
    transformer = Transformer(setup.checkpoint, processor_kwargs={"split_special_tokens": True})
    encoder = SentenceTransformer(modules=[transformer, Pooling(linear.in_features, "cls")], device="cpu")
    without_pooler(encoder)

    def score(work: Work) -> None:
        chunks = documents.cut(work, setup.checkpoint)
        transformer.max_seq_length = work.chunk_size + chunks.special.num_tokens
        embeddings_CH = encoder.encode(
            chunks.chunk_texts(), batch_size=32, convert_to_tensor=True, show_progress_bar=False
        )
        with torch.inference_mode():
            logits_CL = linear(embeddings_CH).numpy()
        probabilities_DL = documents.pool(logits_CL, chunks.windows.doc_of_chunk_C, len(chunks.doc_ids))
        documents.write_scores(work.output, chunks.doc_ids, probabilities_DL)

    return {"": lambda: score}


class FirstTokenClassifier(PreTrainedModel):
    """The model as a pipeline wants it."""

    _supports_sdpa = True  # if the body does, which asks again

    def __init__(self, body: PreTrainedModel, linear: nn.Linear) -> None:
        super().__init__(body.config)
        self.body, self.linear = body, linear

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Chunk logits, [B, L]."""
        return SequenceClassifierOutput(logits=self.linear(self.body(**inputs).last_hidden_state[:, 0]))


def pipeline(setup: Setup) -> Configurations:
    """The pipeline of transformers with truncation, one text at a time or eight."""
    from transformers import pipeline as build

    body, linear = load_encoder(setup.checkpoint)
    tokenizer = load_hf_tokenizer(setup.checkpoint)
    body.config.id2label = {i: str(i) for i in range(linear.out_features)}
    classifier = build(
        "text-classification", model=FirstTokenClassifier(body, linear).eval(), tokenizer=tokenizer, device="cpu"
    )
    num_special = tokenizer.num_special_tokens_to_add()

    def configured(batch_size: int) -> Score:
        def score(work: Work) -> None:
            doc_ids, texts = documents.read_texts(work.corpus)
            answers = classifier(
                texts,
                batch_size=batch_size,
                truncation=True,
                max_length=work.chunk_size + num_special,
                top_k=None,
            )
            probabilities_DL = np.zeros((len(doc_ids), linear.out_features))
            for i, answer in enumerate(answers):
                for label in answer:
                    probabilities_DL[i, int(label["label"])] = label["score"]
            documents.write_scores(work.output, doc_ids, probabilities_DL)

        return score

    return {f"batch {size}": lambda size=size: configured(size) for size in (1, 8)}


def load_encoder(checkpoint: str, *, attention: str = "sdpa") -> tuple[PreTrainedModel, nn.Linear]:
    """The encoder in fp32 as transformers loads it, and belt's head."""
    body = AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation=attention).eval()
    without_pooler(body)
    weights = load_file(Path(checkpoint) / HEAD_NAME)
    linear = nn.Linear(weights["linear.weight"].shape[1], weights["linear.weight"].shape[0])
    linear.load_state_dict({"weight": weights["linear.weight"], "bias": weights["linear.bias"]})
    return body, linear.eval().requires_grad_(requires_grad=False)


def load_hf_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer, told that special tokens in a text are text, as they are to belt."""
    return AutoTokenizer.from_pretrained(checkpoint, split_special_tokens=True)


def without_pooler(model: nn.Module) -> None:
    """Take away the layer behind the first token that no peer reads."""
    for module in model.modules():
        if getattr(module, "pooler", None) is not None:
            module.pooler = None
