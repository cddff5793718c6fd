"""The tiny encoders are what they say they are; everything else stands on them."""

import pytest
from transformers import AutoModel, AutoTokenizer

from tests.conftest import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_encoder_loads_with_its_tokenizer(tiny_encoders, family):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoders(family))
    model = AutoModel.from_pretrained(tiny_encoders(family))

    output = model(**tokenizer("a quick window", return_tensors="pt", return_token_type_ids=False))

    assert model.config.model_type == family
    assert output.last_hidden_state.shape[-1] == 32
