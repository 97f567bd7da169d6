"""`hf:` models on the command line: what a config may say, and what is refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

Invoke = Callable[..., Any]

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def plan(invoke: Invoke, **fields: Any) -> Any:
    Path("c.json").write_text(json.dumps(SMALL | fields))
    of_texts = () if fields.get("model_type") == "vit" else ("--seq-len", "8")
    return invoke("plan", "hf:c.json", "-b", "1GiB", "--batch-size", "2", *of_texts, "--json")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "bert"},
        {"model_type": "bert", "architectures": ["BertForQuestionAnswering"]},
        {"model_type": "bert", "architectures": ["BertForTokenClassification"]},
        {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "image_size": 16,
            "patch_size": 8,
        },
    ],
    ids=lambda fields: "-".join(map(str, (fields["model_type"], *fields.get("architectures", ())))),
)
def test_a_config_is_planned_for(invoke: Invoke, fields: dict[str, Any]) -> None:
    result = plan(invoke, **fields)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["budget"] == 1 << 30


def test_images_have_no_tokens(invoke: Invoke) -> None:
    """It was ignored."""
    Path("c.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"]}))
    result = invoke("plan", "hf:c.json", "-b", "1GiB", "--device", "meta", "--seq-len", "8")
    assert result.exit_code == 2
    assert "--seq-len is of texts, and 'hf:c.json' is a model of images." in result.stderr
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    Path("c.json").write_text(
        json.dumps({"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32, **small})
    )
    result = invoke("fits", "hf:c.json", "-b", "2MiB", "--max-batch", "--json")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "llama", "architectures": ["NoSuchModel"]}, "'NoSuchModel', which is no model of transformers"),
        ({"model_type": "llama", "architectures": ["AutoConfig"]}, "'AutoConfig', which is no model of transformers"),
        ({"model_type": "llama", "architectures": [3]}, "a list of class names is wanted"),
        ({"model_type": "llama", "architectures": "LlamaForCausalLM"}, "a list of class names is wanted"),
        pytest.param(
            {"model_type": "llama", "num_attention_heads": 5},
            "transformers cannot",
            marks=pytest.mark.skipif(
                transformers.__version__ < "5", reason="transformers 4 makes this model, whose forward then fails"
            ),
        ),
        ({"model_type": "llama", "vocab_size": 0}, "transformers cannot make a model of the config 'c.json'"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "takes no labels and has no loss"),
        ({"model_type": "bert", "architectures": ["BertForMultipleChoice"]}, "none for BertForMultipleChoice"),
        ({"model_type": "bert", "architectures": ["BertForPreTraining"]}, "none for BertForPreTraining"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}, "none for Wav2Vec2ForCTC"),
    ],
)
def test_what_cannot_be_planned_is_told_before_any_work(invoke: Invoke, fields: dict[str, Any], words: str) -> None:
    result = plan(invoke, **fields)
    assert result.exit_code == 2, result.output
    assert words in json.loads(result.stdout)["error"]["message"]
    assert "capture" not in result.stderr
