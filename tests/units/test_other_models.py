"""Checkpoint folders of transformers as unit models, compared with transformers itself, one utterance at a time."""

import json
import random
import shutil

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from tests.helpers import options
from tests.units.small_models import UNITS, Evil, convert_small, edit_weights, set_keys
from usdm_sft.audio.frames import num_frames
from usdm_sft.cli.main import main
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.tokenizer import CORRESPOND, UNIT_0, build_tokenizer
from usdm_sft.units import base
from usdm_sft.units.convert import convert
from usdm_sft.units.folder import unit_model_digest
from usdm_sft.units.model import UnitModel
from usdm_sft.units.tokenizer import UnitTokenizer

WIDTH, NUM_LAYERS, NUM_UNITS = 32, 4, 60
FLOAT_ROUNDING = 5e-6  # of a squared distance, as a share of the squares that it is the sum of
TINY = {
    "hidden_size": WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 8,
}
PRE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
POST = {"do_stable_layer_norm": False, "feat_extract_norm": "group", "conv_bias": False}
MODELS = {
    "wav2vec2 pre-norm": (Wav2Vec2Config, PRE, True),
    "wav2vec2 post-norm": (Wav2Vec2Config, POST, True),
    "hubert pre-norm": (HubertConfig, PRE, True),
    "hubert post-norm": (HubertConfig, POST, False),
    "hubert post-norm, layer": (HubertConfig, POST | {"feat_extract_norm": "layer"}, True),
    "hubert pre-norm, group": (HubertConfig, PRE | {"feat_extract_norm": "group"}, True),
    "hubert with batch norm": (HubertConfig, POST | {"conv_pos_batch_norm": True}, True),
    "hubert without projection norm": (HubertConfig, POST | {"feat_proj_layer_norm": False}, False),
    "wav2vec2 with adapters in the layers": (Wav2Vec2Config, PRE | {"adapter_attn_dim": 6}, True),
    "wav2vec2 with an adapter behind the layers": (Wav2Vec2Config, PRE | {"add_adapter": True}, True),
}
LENGTHS = (400, 401, 719, 720, 721, 1039, 1040, 16_079, 16_080, 9_999, 12_345)


def make_model(config, seed=0):
    """Make a model with random weights, spread so that layers, norms and neighbouring frames change the output."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "encoder.layers" in name and parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def save(model, folder, do_normalize=True, **options):
    model.save_pretrained(folder, **options)
    Wav2Vec2FeatureExtractor(do_normalize=do_normalize).save_pretrained(folder)
    return folder


def make_waveforms(seed=0):
    """Make noise with an offset and rising loudness, so that normalization and padding change the units."""
    rng = np.random.default_rng(seed)
    return [(0.1 + np.linspace(0.2, 1, n) * 0.2 * rng.standard_normal(n)).astype(np.float32) for n in LENGTHS]


def run_transformers(folder, model, waveform):
    """Return the input values and the outputs of transformers for one utterance."""
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    values = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_values
    with torch.inference_mode():
        return values, model(values, output_hidden_states=True)


@torch.inference_mode()
def output_of_layer(folder, model, waveform, layer):
    """Return `hidden_states[layer]`, which in a pre-norm model included the final norm for the last layer until mid-2026."""
    outputs = []
    hook = model.encoder.layers[layer - 1].register_forward_hook(lambda module, args, output: outputs.append(output))
    found = run_transformers(folder, model, waveform)[1].hidden_states[layer]
    hook.remove()
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    if layer == NUM_LAYERS and model.config.do_stable_layer_norm:
        assert torch.equal(found, output) or torch.equal(found, model.encoder.layer_norm(output))
    else:
        assert torch.equal(found, output)
    return output


def nearest(features, centroids):
    """Return the unit of each frame, and the least margin to the second centroid, as a share of the summed squares."""
    distances = torch.cdist(features.double(), torch.from_numpy(centroids).double())
    best, second = distances.topk(2, largest=False).values.square().unbind(-1)
    return distances.argmin(-1)[0].tolist(), ((second - best) / features.double().square().sum(-1)).min().item()


def fit_kmeans(path, features):
    """Save centroids among the features, frames with noise of half their spread, and return the units of the features.

    The first seed is used for which float rounding decides no unit.
    """
    frames = torch.cat([each[0] for each in features]).numpy()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        picked = frames[rng.integers(len(frames), size=NUM_UNITS)]
        centroids = (picked + 0.5 * frames.std(axis=0) * rng.standard_normal(picked.shape)).astype(np.float32)
        found = [nearest(each, centroids) for each in features]
        if min(margin for _, margin in found) > FLOAT_ROUNDING:
            np.save(path, centroids)
            return [units for units, _ in found]
    raise AssertionError("every seed has ties")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small HuBERT folder, and centroids for its second layer."""
    folder = tmp_path_factory.mktemp("source")
    model = make_model(HubertConfig(**TINY, **POST))
    save(model, folder / "model")
    features = [run_transformers(folder / "model", model, each)[1].hidden_states[2] for each in make_waveforms()]
    fit_kmeans(folder / "kmeans.npy", features)
    return folder / "model", folder / "kmeans.npy"


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """The unit model of the second layer of `source`."""
    return convert(*source, tmp_path_factory.mktemp("made") / "m", layer=2)


def units_of(folder, waveforms, **options):
    tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu", **options)
    return [units.tolist() for units in tokenizer.tokenize_waveforms(waveforms)]


@pytest.fixture
def copy(source, tmp_path):
    return shutil.copytree(source[0], tmp_path / "copy")


@pytest.mark.parametrize("layer", [2, NUM_LAYERS])
@pytest.mark.parametrize("name", MODELS)
def test_units_equal_those_of_transformers(tmp_path, name, layer):
    kind, settings, do_normalize = MODELS[name]
    model = make_model(kind(**TINY, **settings))
    folder = save(model, tmp_path / "model", do_normalize)
    waveforms = make_waveforms()
    features = [output_of_layer(folder, model, waveform, layer) for waveform in waveforms]
    assert [each.shape[1] for each in features] == [num_frames(n) for n in LENGTHS]
    expected = fit_kmeans(tmp_path / "kmeans.npy", features)
    assert len({unit for units in expected for unit in units}) > 20

    made = convert(folder, tmp_path / "kmeans.npy", tmp_path / "unit_model", layer=layer)
    assert len([key for key in load_file(made / "model.safetensors") if key.endswith("q_proj.weight")]) == layer
    for batch_seconds in (0.1, 1, 100):  # alone, in some batches, in one batch a length
        order = list(range(len(waveforms)))
        random.Random(batch_seconds).shuffle(order)
        found = units_of(made, [waveforms[i] for i in order], batch_seconds=batch_seconds)
        assert found == [expected[i] for i in order]


@pytest.mark.parametrize("name", ["wav2vec2 pre-norm", "hubert post-norm", "hubert with batch norm"])
def test_features_of_a_row_do_not_depend_on_its_batch(tmp_path, source, name):
    kind, settings, _ = MODELS[name]
    folder = save(make_model(kind(**TINY, **settings)), tmp_path / "model")
    model = UnitModel.from_pretrained(convert(folder, source[1], tmp_path / "m", layer=3))
    rows = [torch.from_numpy(waveform) for waveform in make_waveforms()]
    frames = torch.tensor([num_frames(len(row)) for row in rows])
    batch = rows if model.rows_alone else torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.inference_mode():
        together = model.features(batch, frames)
        for row, count, features in zip(rows, frames.tolist(), together, strict=True):
            alone = model.features(row[None], torch.tensor([count]))[0]
            assert (alone - features[:count]).abs().max() < 1e-5 * alone.abs().max()


def test_final_norm_gives_the_units_of_last_hidden_state(tmp_path):
    """The units are those of `last_hidden_state` of a pre-norm model."""
    model = make_model(Wav2Vec2Config(**TINY, **PRE))
    sources = save(model, tmp_path / "model"), tmp_path / "kmeans.npy"
    waveforms = make_waveforms()
    features = [run_transformers(sources[0], model, waveform)[1].last_hidden_state for waveform in waveforms]
    expected = fit_kmeans(sources[1], features)
    normed = convert(*sources, tmp_path / "normed", layer=NUM_LAYERS, final_norm=True)
    plain = convert(*sources, tmp_path / "plain", layer=NUM_LAYERS)
    assert units_of(normed, waveforms) == expected != units_of(plain, waveforms)
    assert unit_model_digest(normed) != unit_model_digest(plain)
    with pytest.raises(FileExistsError, match="was not made from these files and settings"):
        convert(*sources, normed, layer=NUM_LAYERS)


def test_final_norm_of_a_pt_file(tmp_path):
    waveform = torch.from_numpy(make_waveforms()[-1])[None]
    frames = torch.tensor([num_frames(waveform.shape[1])])
    normed, plain = (
        UnitModel.from_pretrained(convert_small(tmp_path / str(final_norm), layer=6, final_norm=final_norm))
        for final_norm in (True, False)
    )
    weights = torch.load(UNITS / "model_fairseq.pt", weights_only=True)["model"]
    norm = [weights[f"encoder.layer_norm.{part}"].float() for part in ("weight", "bias")]
    with torch.inference_mode():
        expected = torch.nn.functional.layer_norm(plain.features(waveform, frames), norm[0].shape, *norm)
        assert torch.equal(normed.features(waveform, frames), expected)


def test_final_norm_that_the_model_lacks_is_refused(tmp_path, source):
    with pytest.raises(ValueError, match=r"final_norm needs the last layer \(4\) of a model with pre-norm layers"):
        convert(*source, tmp_path / "m", layer=4, final_norm=True)
    folder = save(make_model(HubertConfig(**TINY, **PRE)), tmp_path / "model")
    with pytest.raises(ValueError, match="and layer 3 of this model is not one: leave it out"):
        convert(folder, source[1], tmp_path / "m", layer=3, final_norm=True)


def test_waveforms_are_normalized_as_by_the_extractor(tmp_path, source):
    model = make_model(HubertConfig(**TINY, **POST))
    folders = []
    for do_normalize, normalization in ((True, "transformers"), (False, "none")):
        folder = save(model, tmp_path / normalization, do_normalize)
        folders.append(convert(folder, source[1], tmp_path / f"m-{normalization}", layer=2))
        assert json.loads((folders[-1] / "unit_model.json").read_text())["normalization"] == normalization
        tokenizer = UnitTokenizer.from_pretrained(folders[-1], device="cpu")
        waveforms = [*make_waveforms(), np.zeros(401, np.float32)]
        prepared = tokenizer._prepare(map(torch.from_numpy, waveforms), [""] * len(waveforms))
        for ours, waveform in zip(prepared, waveforms, strict=True):
            assert torch.equal(ours.samples[None], run_transformers(folder, model, waveform)[0])
            assert ours.samples.dtype == torch.float32 and ours.num_samples == len(waveform)
    assert (folders[0] / "config.json").read_bytes() == (folders[1] / "config.json").read_bytes()
    assert unit_model_digest(folders[0]) != unit_model_digest(folders[1])


def test_digest_of_folders_made_from_pt_files_stays_the_same(unit_model):
    """The digest is part of every cache key."""
    import hashlib

    description = json.loads((unit_model / "unit_model.json").read_text())
    assert "normalization" not in description
    identity = json.dumps([description["layer"], description["files"]], sort_keys=True)
    assert unit_model_digest(unit_model) == hashlib.sha256(identity.encode()).hexdigest()


def test_unknown_normalization(tmp_path, made):
    path = shutil.copytree(made, tmp_path / "m") / "unit_model.json"
    path.write_text(path.read_text().replace('"transformers"', '"peak"'))
    with pytest.raises(ValueError, match=r"unit_model\.json is not what convert wrote"):
        UnitTokenizer.from_pretrained(tmp_path / "m")


def test_every_way_to_save_a_model_gives_the_same_unit_model(tmp_path, source):
    """Shards, a .bin file with the older names of the weight norm, float16, a model with a head."""
    config = Wav2Vec2Config(**TINY, **PRE)
    model = make_model(config)
    with_head = Wav2Vec2ForCTC(config)
    with_head.wav2vec2.load_state_dict(model.state_dict())
    older = {
        f"wav2vec2.{key}".replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for key, tensor in model.state_dict().items()
    }
    assert "wav2vec2.encoder.pos_conv_embed.conv.weight_g" in older
    save(model, tmp_path / "whole")
    save(model, tmp_path / "shards", max_shard_size="40KB")
    save(with_head, tmp_path / "head")
    shutil.copytree(tmp_path / "whole", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(older, tmp_path / "bin" / "pytorch_model.bin")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    made = {
        name: convert(tmp_path / name, source[1], tmp_path / f"m-{name}", layer=3)
        for name in ("whole", "shards", "head", "bin")
    }
    whole = load_file(made["whole"] / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in whole.items())
    for folder in made.values():
        assert (folder / "model.safetensors").read_bytes() == (made["whole"] / "model.safetensors").read_bytes()
    sources = json.loads((made["shards"] / "unit_model.json").read_text())["sources"]
    assert set(sources) == {"kmeans", *(path.name for path in (tmp_path / "shards").glob("*.safetensors"))}

    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        save(make_model(config).to(dtype), tmp_path / name)
        weights = load_file(convert(tmp_path / name, source[1], tmp_path / f"m-{name}", layer=3) / "model.safetensors")
        assert all(torch.equal(tensor, model.state_dict()[key].to(dtype).float()) for key, tensor in weights.items())


def test_converting_again_leaves_the_folder(tmp_path, copy, source):
    made = convert(copy, source[1], tmp_path / "m", layer=2)
    before = (made / "unit_model.json").stat().st_mtime_ns
    assert convert(copy, source[1], made, layer=2) == made
    assert (made / "unit_model.json").stat().st_mtime_ns == before
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(copy)
    with pytest.raises(FileExistsError, match="was not made from these files and settings"):
        convert(copy, source[1], made, layer=2)


def test_folder_opens_in_transformers_and_names_no_code(tmp_path, copy, source, capfd):
    keys = {"_name_or_path": "/me/model", "auto_map": {"AutoModel": "evil.Model"}, "torch_dtype": "float16"}
    set_keys(**keys)(copy / "config.json")
    (copy / "evil.py").write_text("print('code ran')\nclass Model: pass\n")
    made = convert(copy, source[1], tmp_path / "m", layer=2)
    assert capfd.readouterr() == ("", "")
    config = json.loads((made / "config.json").read_text())
    assert not {"_name_or_path", "auto_map", "torch_dtype"} & config.keys()
    assert (config["model_type"], config["num_hidden_layers"], config["dtype"]) == ("hubert", 2, "float32")
    model, report = HubertModel.from_pretrained(made, output_loading_info=True)
    assert len(model.encoder.layers) == 2
    assert not report["missing_keys"] and not report["unexpected_keys"]


def config_with(**values):
    return lambda folder: set_keys(**values)(folder / "config.json")


def without(name):
    return lambda folder: (folder / name).unlink()


def weights_with(change):
    return lambda folder: edit_weights(change)(folder / "model.safetensors")


def evil_bin(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"encoder.layer_norm.weight": Evil()}, folder / "pytorch_model.bin")


def preprocessor_with(**values):
    return lambda folder: set_keys(**values)(folder / "preprocessor_config.json")


NORM = "encoder.layer_norm"
QUERY = "encoder.layers.1.attention.q_proj.bias"
ERRORS = {
    "no config": (without("config.json"), r"holds no config\.json: name a folder"),
    "kind": (config_with(model_type="whisper"), r"model_type is 'whisper': name a model of wav2vec2, hubert, wavlm, "),
    "quantized": (config_with(quantization_config={}), "the weights are quantized"),
    "frames": (
        config_with(conv_stride=[5, 2, 2, 2, 2, 2, 1]),
        r"conv_kernel and conv_stride make frames of 400 samples every 160; only models with 400 every 320",
    ),
    "no preprocessor": (
        without("preprocessor_config.json"),
        r"holds no preprocessor_config\.json that can be read, .* copy it from the model that the k-means was fit on",
    ),
    "rate": (preprocessor_with(sampling_rate=8000), "sampling_rate is 8000, not 16000"),
    "extractor": (
        preprocessor_with(feature_extractor_type="WhisperFeatureExtractor"),
        "is a WhisperFeatureExtractor, not a Wav2Vec2FeatureExtractor",
    ),
    "no weights": (without("model.safetensors"), r"holds none of model\.safetensors, "),
    "missing key": (
        weights_with(lambda w: w.pop(QUERY)),
        r"lacks encoder\.layers\.1\.attention\.q_proj\.bias: name a complete checkpoint",
    ),
    "missing keys": (
        weights_with(lambda w: [w.pop(f"{NORM}.{part}") for part in ("bias", "weight")]),
        r"lacks encoder\.layer_norm\.bias and 1 more: name",
    ),
    "shape": (
        weights_with(lambda w: w.update({f"{NORM}.bias": torch.zeros(3)})),
        r"encoder\.layer_norm\.bias has shape \(3,\), config\.json says \(32,\)",
    ),
    "NaN": (
        weights_with(lambda w: w[f"{NORM}.bias"].fill_(float("nan"))),
        r"encoder\.layer_norm\.bias holds NaN or infinite values: download",
    ),
    "damaged": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"hello"),
        "cannot be opened as a model of plain tensors .* save it as safetensors",
    ),
    "pickle": (evil_bin, "cannot be opened as a model of plain tensors .* save it as safetensors"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_checkpoint_folder_is_refused(tmp_path, copy, source, capfd, name):
    damage, message = ERRORS[name]
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(copy, source[1], tmp_path / "m", layer=2)
    assert not (tmp_path / "m").exists()
    assert "code ran" not in capfd.readouterr().out


NO_LAYER = "layer {} does not exist: the model has 4 layers"
REMEDY = ", counted from 1; give the layer that the k-means was fit on with --layer"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 5}, NO_LAYER.format(5) + REMEDY),
        ({}, NO_LAYER.format(35)),
        ({"model_config": "c.json"}, r"model_config c\.json is for a \.pt file: leave it out"),
    ],
    ids=str,
)
def test_bad_options_for_a_folder_are_refused(tmp_path, source, options, message):
    with pytest.raises(ValueError, match=message):
        convert(*source, tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_missing_weights_file_is_named(tmp_path, source):
    folder = save(make_model(HubertConfig(**TINY, **POST)), tmp_path / "model", max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    message = rf"{shard.name} is missing, though model\.safetensors\.index\.json names it"
    with pytest.raises(FileNotFoundError, match=message):
        convert(folder, source[1], tmp_path / "m", layer=2)


def test_layers_after_the_chosen_one_may_be_missing(tmp_path, copy, source):
    weights_with(lambda w: w.pop("encoder.layers.3.attention.q_proj.bias"))(copy)
    assert convert(copy, source[1], tmp_path / "m", layer=3).is_dir()
    with pytest.raises(ValueError, match=r"lacks encoder\.layers\.3\.attention"):
        convert(copy, source[1], tmp_path / "m4", layer=4)


@pytest.mark.parametrize("name", ["wav2vec2 pre-norm", "hubert post-norm"])
def test_half_precision_keeps_most_units(tmp_path, name):
    kind, settings, do_normalize = MODELS[name]
    model = make_model(kind(**TINY, **settings))
    folder = save(model, tmp_path / "model", do_normalize)
    waveforms = make_waveforms()
    features = [run_transformers(folder, model, waveform)[1].hidden_states[3] for waveform in waveforms]
    expected = np.concatenate(fit_kmeans(tmp_path / "kmeans.npy", features))
    made = convert(folder, tmp_path / "kmeans.npy", tmp_path / "m", layer=3)
    for precision, share in (("fp16", 0.97), ("bf16", 0.9)):
        tokenizer = UnitTokenizer.from_pretrained(made, device="cpu", precision=precision)
        layer = tokenizer.model.layers[0]
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        assert {each.dtype for part in (layer.attention, layer.feed_forward) for each in part.parameters()} == {half}
        norms = [*layer.layer_norm.parameters(), *layer.final_layer_norm.parameters()]
        assert {each.dtype for each in norms} == {torch.float32}
        assert np.mean(np.concatenate(tokenizer.tokenize_waveforms(waveforms)) == expected) > share


def test_number_of_distances_in_memory_is_bounded(monkeypatch, made):
    """The bound covers rows times centroids, and units do not depend on it."""
    model = UnitModel.from_pretrained(made)
    features = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = model.nearest(features)
    held = []
    argmin = torch.Tensor.argmin
    monkeypatch.setattr(torch.Tensor, "argmin", lambda self, dim: held.append(tuple(self.shape)) or argmin(self, dim))
    monkeypatch.setattr(base, "KMEANS_DISTANCES", 300 * NUM_UNITS + 5)
    assert torch.equal(model.nearest(features), expected)
    assert held == [(300, NUM_UNITS)] * 3 + [(100, NUM_UNITS)]
    monkeypatch.setattr(base, "KMEANS_DISTANCES", 1)
    assert torch.equal(model.nearest(features[:2]), expected[:2])


@pytest.fixture
def run(mini, tmp_path):
    """prepare() of the mini corpus."""

    def run(unit_model, num_units):
        build_tokenizer(num_units=num_units).save_pretrained(tmp_path / "tokenizer")
        tokenizer = {"pretrained_model_name_or_path": str(tmp_path / "tokenizer")}
        prepare(**options(mini, unit_model, tmp_path, **tokenizer, shard_dialogs=64))
        return datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "datasets"))

    return run


def units_of_transformers(source, audio, kmeans):
    from usdm_sft.audio.reading import read_waveform

    model = HubertModel.from_pretrained(source).eval()
    units, margin = nearest(run_transformers(source, model, read_waveform(audio))[1].hidden_states[2], np.load(kmeans))
    assert margin > FLOAT_ROUNDING
    return units


def test_prepare_with_hubert_gives_the_units_of_transformers(run, mini, source, tmp_path, capsys):
    main(["convert", *map(str, source), str(tmp_path / "m"), "--layer", "2"])
    assert capsys.readouterr().out == f"{tmp_path / 'm'} is a unit model folder\n"
    rows = run(tmp_path / "m", NUM_UNITS)
    assert len(rows) == 10
    for row in rows:
        audio = mini / "corpus" / "data" / row["dialog_id"][1:]
        names = (f"{row['turn']}_{row['user_speaker']}", f"{row['turn'] + 1}_{row['agent_speaker']}")
        user, agent = (
            units_of_transformers(source[0], str(audio / f"{name}_{row['dialog_id']}.wav"), source[1]) for name in names
        )
        assert (row["user_units"], row["agent_units"]) == (user, agent)
        ids = row["input_ids"]
        first, second = (i for i, token_id in enumerate(ids) if token_id == CORRESPOND)
        assert ids[first - len(user) : first] == [UNIT_0 + unit for unit in user]
        assert ids[second + 1 : -3] == [UNIT_0 + unit for unit in agent]


def test_more_units_than_tokens_stop_before_a_forward_pass(run, made, monkeypatch):
    monkeypatch.setattr(UnitModel, "forward_pack", None)
    message = "the unit model has 60 different units, the tokenizer only 59: use the tokenizer that belongs to it, or make one with"
    with pytest.raises(ValueError, match=message):
        run(made, NUM_UNITS - 1)


@pytest.mark.slow
def test_65536_units(run, mini, source, tmp_path):
    """The last unit occurs and gets its token."""
    centroids = np.zeros((65_536, WIDTH), np.float32)
    centroids[:, 0] = 1e6  # far from all features
    centroids[-1] = 0
    np.save(tmp_path / "k.npy", centroids)
    made = convert(source[0], tmp_path / "k.npy", tmp_path / "m", layer=2)
    rows = run(made, 65_536)
    assert rows.features["user_units"].feature.dtype == "uint16"
    for row in rows:
        units = row["user_units"] + row["agent_units"]
        assert set(units) == {65_535}
        assert row["input_ids"].count(UNIT_0 + 65_535) == len(units)
        assert max(row["input_ids"]) == 97_537
