"""WavLM, data2vec-audio and w2v-BERT 2.0 as unit models, compared with transformers itself, one utterance at a time."""

import json
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import cache

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    Data2VecAudioConfig,
    HubertConfig,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
)

from tests.folder.test_number_of_units import make_corpus
from tests.helpers import edit_counts, find_problems, options
from tests.units.small_models import change_file, set_keys
from tests.units.test_other_models import FLOAT_ROUNDING, NUM_UNITS, POST, PRE, TINY, make_model
from usdm_sft.audio.frames import FRAMINGS
from usdm_sft.audio.reading import AudioError, read_waveform
from usdm_sft.folder.layout import read_counts
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.dry_run import dry_run
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.tokenizer import build_tokenizer
from usdm_sft.units import batches
from usdm_sft.units.batches import prepare_waveform
from usdm_sft.units.convert import convert
from usdm_sft.units.model import UnitModel, start_units
from usdm_sft.units.tokenizer import UnitTokenizer, open_for
from usdm_sft.units.transformers_model import TransformersModel

WIDTH, NUM_LAYERS = TINY["hidden_size"], TINY["num_hidden_layers"]
DATA2VEC = {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5, "num_conv_pos_embedding_groups": 4}
BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_depthwise_kernel_size": 7,
}
WITH_ADAPTER = {"add_adapter": True, "use_intermediate_ffn_before_adapter": True}
MODELS = {
    "wavlm post-norm": WavLMConfig(**TINY, **POST),
    "wavlm pre-norm": WavLMConfig(**TINY, **PRE),
    "wavlm with an adapter": WavLMConfig(**TINY, **PRE, add_adapter=True),
    "data2vec": Data2VecAudioConfig(**TINY | DATA2VEC),
    "w2v-bert": Wav2Vec2BertConfig(**BERT),
    "w2v-bert relative": Wav2Vec2BertConfig(**BERT, position_embeddings_type="relative", max_source_positions=20),
    "w2v-bert rotary": Wav2Vec2BertConfig(**BERT, position_embeddings_type="rotary"),
    "w2v-bert without positions": Wav2Vec2BertConfig(**BERT, position_embeddings_type=None),
    "w2v-bert with an adapter": Wav2Vec2BertConfig(**BERT, **WITH_ADAPTER),
}
ONE_OF_EACH = ("wavlm post-norm", "data2vec", "w2v-bert")
# The shortest of each kind, and around the ends of frames: 400 + 320 k, and for log-mel frames 400 + 160 k.
LENGTHS = (400, 401, 560, 719, 720, 879, 880, 1_039, 1_040, 9_999, 16_080)


pytestmark = pytest.mark.usefixtures("one_thread")


def save(config, folder, **extractor):
    """Save a model with random weights and its feature extractor, and return the folder."""
    make_model(config).save_pretrained(folder)
    if isinstance(config, Wav2Vec2BertConfig):
        # The padding of the published model, which must not matter.
        SeamlessM4TFeatureExtractor(**{"padding_value": 1.0} | extractor).save_pretrained(folder)
    else:
        Wav2Vec2FeatureExtractor(**extractor).save_pretrained(folder)
    return folder


def make_waveform(num_samples, seed=0):
    rng = np.random.default_rng([seed, num_samples])
    loudness = np.linspace(0.05, 0.3, num_samples)
    return (0.1 + loudness * rng.standard_normal(num_samples)).astype(np.float32)


@cache
def open_with_transformers(folder):
    return AutoFeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval().double()


@torch.inference_mode()
def run_transformers(folder, waveform, layer):
    """Return `hidden_states[layer]` and `last_hidden_state` of transformers in float64, without frames that its mask leaves out."""
    extractor, model = open_with_transformers(folder)
    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
    values = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
    outputs = model(**values, output_hidden_states=True)
    # In releases before mid-2026 the last of `hidden_states` had the final norm.
    caught = []
    hook = model.encoder.layers[layer - 1].register_forward_hook(lambda module, args, output: caught.append(output))
    model(**values)
    hook.remove()
    output = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    if layer < NUM_LAYERS:
        assert torch.equal(outputs.hidden_states[layer], output)
    kept = inputs["attention_mask"][0].bool() if "input_features" in inputs else slice(None)
    return output[0][kept], outputs.last_hidden_state[0]


def save_kmeans(path, features):
    """Save centroids among the features: frames with noise."""
    rng = np.random.default_rng(0)
    picked = features[rng.integers(len(features), size=NUM_UNITS)].numpy()
    np.save(path, (picked + 0.5 * features.std(0).numpy() * rng.standard_normal(picked.shape)).astype(np.float32))
    return path


def lengths_of(name):
    return [length for length in LENGTHS if length >= 560 or not name.startswith("w2v-bert")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the checkpoint folder and the unit model folder of a model of `MODELS` cut to a layer; each is made once."""
    known = {}

    def make(name, layer=2, **options):
        key = (name, layer, *options)
        if key not in known:
            root = tmp_path_factory.mktemp("made")
            source = save(MODELS[name], root / "source")
            features = torch.cat([run_transformers(source, make_waveform(n), layer)[0] for n in lengths_of(name)])
            kmeans = save_kmeans(root / "kmeans.npy", features)
            known[key] = source, convert(source, kmeans, root / "unit_model", layer=layer, **options)
        return known[key]

    return make


open_model = cache(TransformersModel.from_pretrained)


def features_of(folder, waveform):
    model = open_model(folder)
    normalization = json.loads((folder / "unit_model.json").read_text())["normalization"]
    with torch.inference_mode():
        return model.features(prepare_waveform(torch.from_numpy(waveform), "it", normalization).samples)


def nearest(features, centroids):
    """Return the units of float64 features, and for each whether float rounding may decide it."""
    squares = torch.cdist(features.double(), torch.from_numpy(centroids).double()).square()
    best, second = squares.topk(2, largest=False).values.unbind(-1)
    return squares.argmin(-1).numpy(), ((second - best) / features.square().sum(-1) < FLOAT_ROUNDING).numpy()


LAST_LAYERS = [(name, NUM_LAYERS) for name in ("wavlm pre-norm", "data2vec", "w2v-bert")]


@pytest.mark.parametrize(("name", "layer"), [*((name, 2) for name in MODELS), *LAST_LAYERS])
def test_features_and_units_are_those_of_transformers_in_float64(made, name, layer):
    source, folder = made(name, layer)
    centroids, seen = np.load(folder / "kmeans.npy"), set()
    tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu")
    for length in lengths_of(name):
        waveform = make_waveform(length)
        expected, _ = run_transformers(source, waveform, layer)
        found = features_of(folder, waveform)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        units, ties = nearest(expected, centroids)
        assert len(units) == FRAMINGS[tokenizer.normalization].count(length)
        assert np.array_equal(tokenizer.tokenize_waveforms([waveform])[0][~ties], units[~ties])
        seen |= set(units.tolist())
    assert len(seen) > 10


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "w2v-bert relative", "w2v-bert rotary"])
def test_units_of_200_utterances_are_those_of_each_alone(made, name):
    """In threads side by side, of which each computes one utterance."""
    tokenizer = UnitTokenizer.from_pretrained(made(name)[1], device="cpu")
    lengths = np.random.default_rng(1).integers(560, 4_000, 200).tolist()
    waveforms = [make_waveform(length, seed) for seed, length in enumerate(lengths)]
    torch.set_num_threads(4)
    together = tokenizer.tokenize_waveforms(waveforms)
    torch.set_num_threads(1)
    assert sum(map(len, together)) > 1_000
    for waveform, units in zip(waveforms, together, strict=True):
        assert tokenizer.tokenize_waveforms([waveform])[0].tolist() == units.tolist()


@pytest.mark.parametrize("name", ["w2v-bert relative", "w2v-bert rotary"])
def test_module_that_keeps_values_is_called_by_one_thread_at_a_time(made, monkeypatch, name):
    positions = open_model(made(name)[1]).encoder.encoder.embed_positions
    busy = []

    def forward(self, hidden):
        busy.append(True)
        time.sleep(0.01)
        assert len(busy) == 1
        busy.pop()
        return hidden

    monkeypatch.setattr(type(positions.module), "forward", forward)
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(positions, [torch.zeros(1)] * 8))) == 8


def test_final_norm_gives_last_hidden_state(made):
    source, folder = made("wavlm pre-norm", NUM_LAYERS, final_norm=True)
    waveform = make_waveform(9_999)
    plain, normed = run_transformers(source, waveform, NUM_LAYERS)
    found = features_of(folder, waveform)
    assert (found - normed).abs().max() < 1e-5 * normed.abs().max()
    assert (plain - normed).abs().max() > 0.1 * normed.abs().max()


@pytest.mark.parametrize("name", ["wavlm post-norm", "data2vec", "w2v-bert"])
def test_final_norm_that_the_model_lacks_is_refused(made, tmp_path, name):
    source, folder = made(name)
    with pytest.raises(ValueError, match=r"final_norm needs the last layer \(4\) of a model with pre-norm layers"):
        convert(source, folder / "kmeans.npy", tmp_path / "m", layer=NUM_LAYERS, final_norm=True)


@pytest.mark.parametrize(
    ("name", "model_type", "normalization"),
    [
        ("wavlm post-norm", "wavlm", "transformers"),
        ("data2vec", "data2vec-audio", "transformers"),
        ("w2v-bert", "wav2vec2-bert", "seamless_m4t"),
    ],
)
def test_description_names_the_family(made, name, model_type, normalization):
    description = json.loads((made(name)[1] / "unit_model.json").read_text())
    assert description["model_type"] == model_type and description["normalization"] == normalization
    assert list(description) == [
        *("format_version", "layer", "sample_rate", "model_type", "normalization", "sources", "num_units", "files")
    ]


@pytest.mark.parametrize(
    "config", [Wav2Vec2Config(**TINY, **PRE), HubertConfig(**TINY, **POST)], ids=["w2v2", "hubert"]
)
def test_description_of_the_other_families_does_not(tmp_path, config):
    save(config, tmp_path / "source")
    np.save(tmp_path / "k.npy", np.ones((3, WIDTH), np.float32))
    folder = convert(tmp_path / "source", tmp_path / "k.npy", tmp_path / "m", layer=2)
    description = json.loads((folder / "unit_model.json").read_text())
    assert list(description) == [
        *("format_version", "layer", "sample_rate", "normalization", "sources", "num_units", "files")
    ]
    assert isinstance(UnitTokenizer.from_pretrained(folder, device="cpu").model, UnitModel)


def test_waveform_is_taken_as_the_extractor_says(tmp_path):
    """`do_normalize=False`, as WavLM Base has it, gives other units."""
    source = save(MODELS["wavlm post-norm"], tmp_path / "source", do_normalize=False)
    np.save(tmp_path / "k.npy", np.ones((3, WIDTH), np.float32))
    folder = convert(source, tmp_path / "k.npy", tmp_path / "m", layer=2)
    assert json.loads((folder / "unit_model.json").read_text())["normalization"] == "none"
    waveform = make_waveform(9_999)
    expected, _ = run_transformers(source, waveform, 2)
    assert (features_of(folder, waveform) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_number_of_units_of_log_mel_frames():
    """400 samples make a log-mel frame, each further 160 another one, and two of these a unit."""
    expected = {
        0: 0,
        399: 0,
        559: 0,
        560: 1,
        719: 1,
        720: 1,
        879: 1,
        880: 2,
        1_199: 2,
        1_200: 3,
        16_000: 49,
        32_080: 99,
    }
    assert {length: FRAMINGS["seamless_m4t"].count(length) for length in expected} == expected
    extractor = SeamlessM4TFeatureExtractor()
    for length in range(560, 1_600, 40):
        mask = extractor(make_waveform(length), sampling_rate=16_000, return_tensors="np")["attention_mask"]
        assert FRAMINGS["seamless_m4t"].count(length) == mask.sum()


@pytest.mark.parametrize(
    ("name", "fewest", "milliseconds"), [("wavlm post-norm", 400, 25), ("data2vec", 400, 25), ("w2v-bert", 560, 35)]
)
def test_audio_without_a_frame_is_refused(made, name, fewest, milliseconds):
    tokenizer = UnitTokenizer.from_pretrained(made(name)[1], device="cpu")
    message = (
        f"waveform 0 has {fewest - 1} samples at 16 kHz, fewer than the {fewest} \\({milliseconds} ms\\) that make a"
    )
    with pytest.raises(AudioError, match=message):
        tokenizer.tokenize_waveforms([make_waveform(fewest - 1)])
    assert [len(units) for units in tokenizer.tokenize_waveforms([make_waveform(fewest)])] == [1]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_silence_has_units(made, name):
    tokenizer = UnitTokenizer.from_pretrained(made(name)[1], device="cpu")
    [units] = tokenizer.tokenize_waveforms([np.zeros(9_999, np.float32)])
    assert len(units) == FRAMINGS[tokenizer.normalization].count(9_999) > 28


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp16x3", "bf16x3"])
def test_precision_that_does_not_apply_is_refused(made, precision):
    folder = made("wavlm post-norm")[1]
    message = f"precision {precision} does not exist for wavlm models, .*: use fp32, or tf32 on CUDA"
    with pytest.raises(ValueError, match=message):
        open_for("cuda", folder, precision=precision, batch_seconds=None, resampler="soxr")
    if precision in ("fp16", "bf16"):
        with pytest.raises(ValueError, match=message):
            UnitTokenizer.from_pretrained(folder, device="cpu", precision=precision)


def test_tf32_applies(made):
    tokenizer = open_for("cuda", made("w2v-bert")[1], precision="tf32", batch_seconds=None, resampler="soxr")
    assert tokenizer.settings["precision"] == "tf32"
    model = TransformersModel.from_pretrained(tokenizer.folder, "tf32")
    assert model.precision.front == "tf32"


def test_each_utterance_is_a_forward_pass_of_its_own(made, monkeypatch):
    """Also where other models share a padded batch, as on CUDA."""
    model = TransformersModel.from_pretrained(made("w2v-bert")[1])
    shapes, forward = [], type(model.encoder).forward
    monkeypatch.setattr(
        type(model.encoder),
        "forward",
        lambda self, row, **given: shapes.append(row.shape) or forward(self, row, **given),
    )
    waveforms = [
        prepare_waveform(torch.from_numpy(make_waveform(n)), "it", "seamless_m4t") for n in (9_999, 560, 9_999)
    ]
    found, _ = start_units(model, waveforms, [""] * 3, 100, None, FRAMINGS["seamless_m4t"].count)()
    assert sorted(shapes) == [(1, 1, 160), (1, 30, 160), (1, 30, 160)]
    assert found[0].tolist() == found[2].tolist()
    assert batches.padding_share([[9_999, 9_900, 560]], 0, "cuda") == 0


def test_values_that_are_not_finite_are_an_error(made, monkeypatch):
    tokenizer = UnitTokenizer.from_pretrained(made("data2vec")[1], device="cpu")
    monkeypatch.setattr(TransformersModel, "features", lambda self, row: torch.full((3, WIDTH), torch.nan))
    with pytest.raises(ValueError, match="waveform 0: the features are not finite in fp32: leave out the utterance"):
        tokenizer.tokenize_waveforms([make_waveform(1_040)])


def test_out_of_memory_names_the_utterance(made, monkeypatch):
    tokenizer = UnitTokenizer.from_pretrained(made("w2v-bert")[1], device="cpu")

    def fail(self, row):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(TransformersModel, "features", fail)
    message = (
        "out of memory on cpu with a batch of 1 utterances and 2 s of audio: leave out waveform 0, or use a device"
    )
    with pytest.raises(MemoryError, match=message):
        tokenizer.tokenize_waveforms([make_waveform(32_000)])


def test_stopped_utterance_is_not_computed(made):
    model, stopped = TransformersModel.from_pretrained(made("wavlm post-norm")[1]), threading.Event()
    stopped.set()
    with pytest.raises(CancelledError):
        model.forward(torch.zeros(400), stopped)


NOT_SEAMLESS = (
    "the feature extractor is a Wav2Vec2FeatureExtractor, not a SeamlessM4TFeatureExtractor: name another model"
)
BAD_FOLDERS = {
    "mel bins": ("preprocessor_config.json", {"num_mel_bins": 128}, "num_mel_bins is 128, only 80 is supported"),
    "stride": ("preprocessor_config.json", {"stride": 1}, "stride is 1, only 2 is supported"),
    "rate": ("preprocessor_config.json", {"sampling_rate": 8_000}, "sampling_rate is 8000, not 16000"),
    "extractor": ("preprocessor_config.json", {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, NOT_SEAMLESS),
    "width": ("config.json", {"feature_projection_input_dim": 80}, "feature_projection_input_dim is 80; only 160"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_log_mel_frames_of_another_kind_are_refused(tmp_path, name):
    file, keys, message = BAD_FOLDERS[name]
    source = save(MODELS["w2v-bert"], tmp_path / "source")
    set_keys(**keys)(source / file)
    np.save(tmp_path / "k.npy", np.ones((3, WIDTH), np.float32))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "k.npy", tmp_path / "m", layer=2)
    (source / "preprocessor_config.json").unlink()
    set_keys(feature_projection_input_dim=160)(source / "config.json")
    with pytest.raises(FileNotFoundError, match=r"or save one with SeamlessM4TFeatureExtractor\(\)"):
        convert(source, tmp_path / "k.npy", tmp_path / "m", layer=2)


def copy_of(made, name, tmp_path):
    folder = tmp_path / "copy"
    UnitTokenizer.from_pretrained(made(name)[1], device="cpu").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("data2vec", {"num_conv_pos_embeddings": 100_000}, "the config has 100,000 layers of one kind, more than 128"),
        ("wavlm post-norm", {"model_type": "wav2vec2"}, "has model_type 'wav2vec2', unit_model.json 'wavlm'"),
        ("wavlm post-norm", {"model_type": "llama"}, "has model_type 'llama', unit_model.json 'wavlm'"),
        ("wavlm post-norm", {"model_type": ["wavlm"]}, r"has model_type \['wavlm'\], unit_model.json 'wavlm'"),
        ("w2v-bert", {"num_attention_heads": 0}, "the config is not that of a wav2vec2-bert model"),
    ],
)
def test_config_of_an_untrusted_folder_is_refused(made, tmp_path, name, keys, message):
    folder = copy_of(made, name, tmp_path)
    change_file(folder, "config.json", set_keys(**keys))
    with pytest.raises(ValueError, match=f"is not what convert wrote .*{message}"):
        TransformersModel.from_pretrained(folder)


def test_untrusted_number_of_positions_takes_no_memory(made, tmp_path):
    folder = copy_of(made, "w2v-bert relative", tmp_path)
    change_file(folder, "config.json", set_keys(max_source_positions=10**12))
    assert TransformersModel.from_pretrained(folder).encoder.encoder.embed_positions.module.pe.shape == (
        1,
        9_999,
        WIDTH,
    )


@pytest.mark.parametrize("keys", [{"model_type": "whisper"}, {"model_type": []}, {"normalization": "none"}], ids=str)
def test_description_that_contradicts_itself_is_refused(made, tmp_path, keys):
    folder = copy_of(made, "w2v-bert", tmp_path)
    set_keys(**keys)(folder / "unit_model.json")
    with pytest.raises(ValueError, match=r"unit_model\.json is not what convert wrote"):
        UnitTokenizer.from_pretrained(folder, device="cpu")


def given(mini, unit_model, folder, **changes):
    build_tokenizer(num_units=NUM_UNITS).save_pretrained(folder / "tokenizer")
    changes = {"pretrained_model_name_or_path": str(folder / "tokenizer"), "shard_dialogs": 64, **changes}
    return options(mini, unit_model, folder, **changes)


@pytest.mark.parametrize("name", ["wavlm post-norm", "w2v-bert"])
def test_prepared_folder_has_the_units_of_transformers(mini, made, tmp_path, name):
    source, folder = made(name)
    config = given(mini, folder, tmp_path)
    expected_splits = dry_run(PrepareConfig(**config)).splits
    counts = prepare(**config)
    assert counts["splits"] == expected_splits and counts["padding_share"] == 0
    assert counts["unit_model"]["model_type"] == MODELS[name].model_type
    assert verify(tmp_path / "out") == {"train": 10, "test": 3}
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "datasets"))
    centroids = np.load(folder / "kmeans.npy")
    for row in list(rows)[:3]:
        audio = mini / "corpus" / "data" / row["dialog_id"][1:]
        waveform = read_waveform(str(audio / f"{row['turn']}_{row['user_speaker']}_{row['dialog_id']}.wav"))
        units, ties = nearest(run_transformers(source, waveform, 2)[0], centroids)
        assert np.array_equal(np.array(row["user_units"])[~ties], units[~ties])


def test_verify_counts_the_units_of_log_mel_frames(made, mini, tmp_path):
    """880 samples make two units of a waveform, and two of log-mel frames; 720 make two, and one."""
    (tmp_path / "corpus").mkdir()
    corpus = make_corpus(tmp_path / "corpus", [880, 880, 720, 720, 720, 720, 720, 720])
    prepare(**given(mini, made("w2v-bert")[1], tmp_path, data_dir=str(corpus), keep_audio=True))
    assert read_counts(tmp_path / "out")["unit_model"]["normalization"] == "seamless_m4t"
    assert verify(tmp_path / "out") == {"train": 6}
    edit_counts(tmp_path / "out", lambda counts: counts["unit_model"].update(normalization="transformers"))
    assert any("are of 1 frames, which is not the length" in problem for problem in find_problems(tmp_path / "out"))


def test_prepare_refuses_recordings_that_make_no_unit_before_any_work(made, mini, tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    corpus = make_corpus(tmp_path / "corpus", [880, 559, 880, 480])
    config = given(mini, made("w2v-bert")[1], tmp_path, data_dir=str(corpus))
    monkeypatch.setattr(TransformersModel, "from_pretrained", None)
    with pytest.raises(AudioError, match=r"1\.wav has 559 samples at 16 kHz, fewer than the 560 \(35 ms\)") as raised:
        prepare(**config)
    assert "3.wav has 480 samples" in str(raised.value)
