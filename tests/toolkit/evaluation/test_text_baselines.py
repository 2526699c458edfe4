"""Baselines by text: models that transformers wrote with random weights, pocketsphinx on a synthesized utterance."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from shards.errors import UserError
from shards.files import read_records
from shards.manifest import load
from shards.media.audio import SAMPLE_RATE, decode_audio, read_audio
from shards.reading.reader import Reader
from tests.toolkit.evaluation.test_retrieve import CPU, settings
from toolkit import analyze
from toolkit.evaluation import text_baselines
from toolkit.evaluation.encode import ModelInputs
from toolkit.evaluation.results import load_results
from toolkit.evaluation.text_baselines import (
    TextImageModel,
    load_recognizer,
    transcribe,
    word_error_rate,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "tiny-clip"
    words = ["[PAD]", "[UNK]", "[EOS]", "caption", "of", *"0123456789", *(f"test{n}" for n in range(13))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")
    wrapped.save_pretrained(out)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = small | {"vocab_size": len(words), "max_position_embeddings": 6, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(out)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "tiny-asr"
    out.mkdir()
    letters = {letter: n for n, letter in enumerate(["<pad>", "<unk>", "|", *"abcdefgh"])}
    (out / "vocab.json").write_text(json.dumps(letters))
    Wav2Vec2CTCTokenizer(str(out / "vocab.json"), pad_token="<pad>", unk_token="<unk>").save_pretrained(out)
    Wav2Vec2FeatureExtractor().save_pretrained(out)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    layers = {"conv_dim": (32, 32), "conv_kernel": (10, 8), "conv_stride": (10, 8), "num_feat_extract_layers": 2}
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **small, **layers, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=1, vocab_size=11
    )
    Wav2Vec2ForCTC(config).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A Whisper that writes some of the letters a to h."""
    out = tmp_path_factory.mktemp("models") / "tiny-whisper"
    vocabulary = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    words = "startoftranscript", "en", "transcribe", "translate", "nospeech", "notimestamps"
    tokenizer.add_tokens([f"<|{word}|>" for word in words], special_tokens=True)
    tokenizer.add_tokens([f"<|{n * 0.02:.2f}|>" for n in range(1501)])
    tokenizer.save_pretrained(out)
    WhisperFeatureExtractor().save_pretrained(out)
    number = {word: tokenizer.convert_tokens_to_ids(f"<|{word}|>") for word in ("endoftext", *words)}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), number["endoftext"])
    ends["decoder_start_token_id"] = number["startoftranscript"]
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32) | {"max_target_positions": 64}
    sizes |= dict.fromkeys(
        ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=len(tokenizer), **sizes, **ends))
    model.model.decoder.embed_tokens.weight.data[[vocabulary[letter] for letter in "abcdefgh"]] *= 100
    tasks = {task: number[task] for task in ("transcribe", "translate")}
    model.generation_config = GenerationConfig(
        **ends, max_length=20, is_multilingual=True, lang_to_id={"<|en|>": number["en"]}, task_to_id=tasks,
        no_timestamps_token_id=number["notimestamps"], return_timestamps=False, max_initial_timestamp_index=50,
    )  # fmt: skip
    model.save_pretrained(out)
    return out


def text(run, clip, *arguments):
    analyze.main(["text", "--run", str(run), "--clip", str(clip), *map(str, arguments)])


def test_recall_by_text_equals_loops_and_stands_beside_other_results(run, folder, clip, recognizer, capsys):
    text(run, clip, "--recognizer", recognizer)
    oracle, recognized = sorted(load_results(run), key=lambda result: "asr" in result.checkpoint)
    assert (oracle.checkpoint, recognized.checkpoint) == ("oracle-text-tiny-clip", "asr-tiny-asr-tiny-clip")
    manifest = load(folder)
    pictures = manifest.rows("test").tolist()
    model, inputs = TextImageModel.load(str(clip), CPU), ModelInputs(manifest, manifest.rows("test"), settings(folder))
    images = [
        model.embed_images(1, lambda _, at=at: text_baselines.read_image(inputs, at))[0] for at in range(len(pictures))
    ]
    hits = []
    for at, sample in enumerate(pictures):
        for number in range(len(manifest.captions(sample))):
            name = manifest.image_id[sample].decode()
            embedding = model.embed_texts([f"caption {number} of {name}"])[0]
            scores = [float(embedding @ image) for image in images]
            hits.append(sum(score > scores[at] + 1e-6 for score in scores) < 5)
    assert oracle.report["coarse"]["speech_to_image"]["R@5"] == pytest.approx(100 * np.mean(hits), abs=1e-2)
    assert oracle.report["baseline"]["word_error_rate"] is None
    rate = recognized.report["baseline"]["word_error_rate"]
    assert rate >= 99
    printed = capsys.readouterr().out
    assert f"word error rate of tiny-asr: {rate:.1f} %" in printed
    assert "oracle-text-tiny-clip" in printed
    assert len(oracle.ranks("speech_to_image").ahead) == len(hits)


def test_whisper_writes_what_its_own_generation_does_also_beyond_30_seconds(run, folder, clip, whisper):
    text(run, clip, "--recognizer", whisper, "--limit", "3")
    (path,) = (run / "transcripts").iterdir()
    written = {each["caption"]: each["text"] for each in read_records(path)}
    assert "asr-tiny-whisper-tiny-clip-limit-3" in [result.checkpoint for result in load_results(run)]
    model = WhisperForConditionalGeneration.from_pretrained(whisper)
    tokenizer, extractor = WhisperTokenizer.from_pretrained(whisper), WhisperFeatureExtractor.from_pretrained(whisper)
    reader = Reader(load(folder))
    for row, said in written.items():
        wave = decode_audio(reader.audio(row))[:SAMPLE_RATE]  # the run's evaluation.max_seconds are 1 s
        features = extractor(wave, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        (tokens,) = model.generate(features)
        assert said == tokenizer.decode(tokens, skip_special_tokens=True)
        assert set(said) <= set("abcdefgh")
        assert said
    long = np.random.default_rng(0).standard_normal(31 * SAMPLE_RATE).astype(np.float32)
    assert len(load_recognizer(str(whisper), CPU)(long)) > 20, "only the first of two parts"


def test_transcripts_that_are_known_are_not_recognized_again(folder, tmp_path):
    manifest = load(folder)
    inputs, heard, path = ModelInputs(manifest, manifest.rows("test"), settings(folder)), [], tmp_path / "t" / "x.jsonl"

    def recognize(wave):
        if len(heard) == 3:
            raise KeyboardInterrupt
        heard.append(len(wave))
        return f"heard {len(wave)}"

    with pytest.raises(KeyboardInterrupt):
        transcribe(inputs, recognize, path)
    path.write_bytes(path.read_bytes() + b'{"caption": 7, "te')
    texts = transcribe(inputs, lambda wave: f"heard {len(wave)}", path)
    assert texts == [f"heard {len(inputs.speech(index))}" for index in range(len(inputs.captions))]
    assert transcribe(inputs, None, path) == texts


def test_word_error_rate_counts_edits_of_words():
    assert word_error_rate(["A red square, here."], ["a red square here"]) == 0
    assert word_error_rate(["one two three four", "five"], ["one three for", ""]) == pytest.approx(100 * 3 / 5)
    assert word_error_rate(["one"], ["one and more"]) == 200
    assert word_error_rate(["k"], ["a b"]) == 200
    assert word_error_rate(["k i t t e n"], ["s i t t i n g"]) == 50
    assert word_error_rate(["a b"], [""]) == 100


def test_long_texts_are_cut_to_the_positions_of_the_model(clip):
    model = TextImageModel.load(str(clip), CPU)
    embedded = model.embed_texts(["caption of 1", "caption " * 50])
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(model.embed_texts(["caption of 1"])[0], embedded[0], atol=1e-5, rtol=0)


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_pocketsphinx_recognizes_speech(tmp_path):
    pytest.importorskip("pocketsphinx")
    said = "one two three four five six seven"
    subprocess.run(["espeak-ng", "-v", "en-us+f3", "-s", "130", "-w", tmp_path / "said.wav", said], check=True)
    recognize = load_recognizer("pocketsphinx", CPU)
    heard = recognize(read_audio(tmp_path / "said.wav", 30.0))
    assert word_error_rate([said], [heard]) < 60, heard
    assert recognize(np.zeros(8000, np.float32)) == "", "a silent caption has words of the one before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip", "/nowhere"], r"--clip /nowhere: no such folder"),
        (["--clip", "FOLDER"], r"--clip .*: expected a text-image model such as CLIP, but it holds no model of trans"),
        (["--clip", "WHISPER"], r"--clip .*: expected a text-image model .* holds a model of the kind 'whisper': "),
        (["--clip", "TORN"], r"--clip .*: expected a text-image model .* holds a model of the kind 'clip': "),
        (
            ["--clip", "CLIP", "--recognizer", "CLIP"],
            r"--recognizer .*: expected a model of speech recog.* kind 'clip'",
        ),
        (
            ["--clip", "CLIP", "--recognizer", "HEADLESS"],
            r"--recognizer .* 'wav2vec2': Wav2Vec2Model has no head for it",
        ),
        (["--clip", "CLIP", "--recognizer", "/nowhere"], r"--recognizer /nowhere: no such folder"),
        (
            ["--clip", "CLIP", "--recognizer", "FOLDER"],
            r"--recognizer .*: expected a model of speech recognition, .* no model ",
        ),
    ],
)
def test_mistakes_are_one_line(run, clip, recognizer, whisper, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"FOLDER": str(tmp_path / "empty"), "CLIP": str(clip), "WHISPER": str(whisper)}
    if "TORN" in arguments:
        places["TORN"] = str(shutil.copytree(clip, tmp_path / "torn"))
        weights = tmp_path / "torn" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    if "HEADLESS" in arguments:
        places["HEADLESS"] = str(shutil.copytree(recognizer, tmp_path / "headless"))
        Wav2Vec2ForCTC.from_pretrained(recognizer).wav2vec2.save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match=message) as caught:
        analyze.main(["text", "--run", str(run), *(places.get(word, word) for word in arguments)])
    assert "\n" not in str(caught.value)


def test_without_texts_a_recognizer_is_needed(run, clip, monkeypatch):
    monkeypatch.setattr(text_baselines, "read_texts", lambda *_: None)
    with pytest.raises(UserError, match=r"not all captions have text: name a recognizer with --recognizer"):
        text(run, clip)
