"""The real SmolLM2-135M-Instruct against transformers 5.24.0 on the same dequantized weights.

The golden file is data that transformers made in float32; the template is that of the checkpoint.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.chat import ChatTemplate
from spt_jax.models.hub import find_files
from tests.spt_jax.models.builders import GOLDEN

EXPECTED = json.loads((GOLDEN / "smollm2" / "golden.json").read_text())
CASES = EXPECTED["cases"]
CHAT = """\
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
Hello!<|im_end|>
<|im_start|>assistant
"""


@pytest.fixture(scope="module", autouse=True)
def source():
    try:
        return find_files("smollm2")
    except ValueError as error:  # an environment of pip's own; make setup installs it
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer():
    return spt_jax.load_tokenizer("smollm2")


def test_ids_equal_transformers(tokenizer):
    for case in CASES:
        assert tokenizer.encode(case["text"]).ids == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]


def test_the_chat_template(source, tokenizer):
    template = ChatTemplate.load(source)
    assert template.source == (GOLDEN / "smollm2" / "chat_template.jinja").read_text()
    text = template.render([{"role": "user", "content": "Hello!"}], add_generation_prompt=True)
    assert text == CHAT
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids[:2] == [1, 9690]  # <|im_start|> is one token
    assert tokenizer.decode(ids, skip_special_tokens=False) == CHAT


def test_logits_and_continuations_equal_transformers():
    model = spt_jax.load_pretrained("smollm2", task="causal-lm")
    lengths = [len(case["ids"]) for case in CASES]
    ids = np.zeros((len(CASES), max(lengths)), np.int32)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids[mask] = np.concatenate([case["ids"] for case in CASES])
    rows = np.asarray(model(jnp.asarray(ids), jnp.asarray(mask)))
    for case, row, length in zip(CASES, rows, lengths, strict=True):
        last = row[length - 1]
        np.testing.assert_allclose(last[:8], case["last_logits_first8"], atol=2e-4)
        assert np.argsort(-last)[:5].tolist() == case["last_argmax5"]
        assert row[:length].mean() == pytest.approx(case["mean_logit"], abs=1e-4)
    (new,) = {len(case["greedy"]) - length for case, length in zip(CASES, lengths, strict=True)}
    made = spt_jax.generate(model, [case["ids"] for case in CASES], max_new_tokens=new)
    assert [case["ids"] + list(row) for case, row in zip(CASES, made, strict=True)] == [
        case["greedy"] for case in CASES
    ]
