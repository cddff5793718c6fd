"""Families: the weights of BERT and its kin in one form, whatever Hugging Face names their modules.

All of them add up word and position embeddings and run layers of one shape: attention, residual, normalisation, two
linear maps with GELU between them, residual, normalisation. Only names differ, and MPNet adds a bias to attention
scores. An encoder that does not fit has no such form, and runs by its own forward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from belt_tasks.encoder import ChunkModel, FinishedClassifier


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A linear map y = x W' + b, or the scale and shift of a normalisation."""

    weight: Tensor
    """[out, in], or [H]."""
    bias: Tensor
    """[out], or [H]."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One transformer layer, normalised behind each residual."""

    query: Affine
    key: Affine
    value: Affine
    output: Affine
    output_norm: Affine
    feed_forward: Affine
    projection: Affine
    projection_norm: Affine


@dataclass(frozen=True, kw_only=True)
class EncoderWeights:
    """An encoder's weights, shared with the module that they were read from."""

    word_VH: Tensor
    position_PH: Tensor
    """Row 0 belongs to a chunk's first token; the embedding of token type 0 is in it."""
    embedding_norm: Affine
    layers: tuple[Layer, ...]
    num_heads: int
    eps: float
    """Of every normalisation."""
    position_bias_NPP: Tensor | None
    """MPNet's bias of the N heads' attention scores, by position of query and key."""


# The submodules of a layer, in the order of Layer's fields.
BERT_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
DISTILBERT_LAYER = (
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)
MPNET_LAYER = (
    "attention.attn.q",
    "attention.attn.k",
    "attention.attn.v",
    "attention.attn.o",
    "attention.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
# model_type -> where its layers are, and what they consist of
FAMILIES = {
    "bert": ("encoder.layer", BERT_LAYER),
    "camembert": ("encoder.layer", BERT_LAYER),
    "distilbert": ("transformer.layer", DISTILBERT_LAYER),
    "mpnet": ("encoder.layer", MPNET_LAYER),
    "roberta": ("encoder.layer", BERT_LAYER),
    "xlm-roberta": ("encoder.layer", BERT_LAYER),
}


def read_weights(body: PreTrainedModel) -> EncoderWeights | None:
    """The weights of an encoder; None where it is of another form."""
    if body.config.model_type not in FAMILIES or not _is_plain(body):
        return None
    layers_name, names = FAMILIES[body.config.model_type]
    embeddings = body.get_submodule("embeddings")
    norm = embeddings.get_submodule("LayerNorm")
    layers = list(body.get_submodule(layers_name).children())
    return EncoderWeights(
        word_VH=embeddings.get_parameter("word_embeddings.weight").detach(),
        position_PH=_positions(embeddings),
        embedding_norm=_affine(norm),
        layers=tuple(
            Layer(
                **dict(zip(Layer.__annotations__, (_affine(layer.get_submodule(name)) for name in names), strict=True))
            )
            for layer in layers
        ),
        num_heads=body.config.num_attention_heads,
        eps=float(norm.eps),  # type: ignore[arg-type]
        position_bias_NPP=_position_bias(body),
    )


def body_and_head(model: nn.Module) -> tuple[PreTrainedModel | None, nn.Module | None]:
    """The encoder of a model, and its head if that maps first tokens [B, H] alone to chunk outputs [B, K]."""
    match model:
        case ChunkModel():
            return model.body, model.head
        case FinishedClassifier():
            body: PreTrainedModel = model.classifier.base_model  # type: ignore[assignment]
            return body, _finished_head(model.classifier)
        case _:
            return None, None


def _finished_head(classifier: PreTrainedModel) -> nn.Module | None:
    """The head of a finished classifier as it is in eval mode, where dropout does nothing."""
    match type(classifier).__name__:
        case "BertForSequenceClassification":
            steps = [
                classifier.base_model.get_submodule("pooler.dense"),
                nn.Tanh(),
                classifier.get_submodule("classifier"),
            ]
        case "DistilBertForSequenceClassification":
            steps = [classifier.get_submodule("pre_classifier"), nn.ReLU(), classifier.get_submodule("classifier")]
        case (
            "CamembertForSequenceClassification"
            | "MPNetForSequenceClassification"
            | "RobertaForSequenceClassification"
            | "XLMRobertaForSequenceClassification"
        ):
            head = classifier.get_submodule("classifier")
            steps = [head.get_submodule("dense"), nn.Tanh(), head.get_submodule("out_proj")]
        case "ModernBertForSequenceClassification" if classifier.config.classifier_pooling == "cls":
            steps = [classifier.get_submodule("head"), classifier.get_submodule("classifier")]
        case _:
            return None
    return nn.Sequential(*steps)


def _is_plain(body: PreTrainedModel) -> bool:
    """Whether the config asks for nothing but what `Layer` describes."""
    config = body.config
    activation = getattr(config, "activation" if config.model_type == "distilbert" else "hidden_act", None)
    return activation == "gelu" and not (
        getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)
    )


def _affine(module: nn.Module) -> Affine:
    return Affine(weight=module.get_parameter("weight").detach(), bias=module.get_parameter("bias").detach())


def _positions(embeddings: nn.Module) -> Tensor:
    """RoBERTa and MPNet number positions from padding_idx + 1."""
    table = embeddings.get_submodule("position_embeddings")
    reserved = 0 if table.padding_idx is None else int(table.padding_idx) + 1  # type: ignore[arg-type]
    position_PH = table.get_parameter("weight").detach()[reserved:]
    if hasattr(embeddings, "token_type_embeddings"):
        position_PH = position_PH + embeddings.get_parameter("token_type_embeddings.weight").detach()[0]
    return position_PH


def _position_bias(body: PreTrainedModel) -> Tensor | None:
    encoder = dict(body.named_children()).get("encoder")
    if encoder is None or not hasattr(encoder, "compute_position_bias"):
        return None
    num_positions = _positions(body.get_submodule("embeddings")).shape[0]
    with torch.no_grad():
        bias: Tensor = encoder.compute_position_bias(  # type: ignore[operator]
            torch.empty(1, num_positions, 1)
        )[0]
    return bias
