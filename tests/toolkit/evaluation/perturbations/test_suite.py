"""The robustness suite on a small random model: what is encoded, against encoding by hand, on one and two ranks."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import soundfile
import torch

from shards.errors import UserError
from shards.manifest import load
from shards.media.audio import SAMPLE_RATE, decode_audio
from shards.reading.reader import Reader
from tests.distributed import run_ranks
from tests.toolkit.evaluation.test_retrieve import CPU, SECONDS, measure, random_model, settings
from toolkit.evaluation.encode import ProcessInfo
from toolkit.evaluation.perturbations.kinds import KINDS, generator_of
from toolkit.evaluation.perturbations.speech import perturb_speech
from toolkit.evaluation.perturbations.suite import Suite, find_noise


def suite_of(folder, rank=0, world_size=1, noise=None, seed=0):
    manifest = load(folder)
    process = ProcessInfo(rank, world_size, CPU)
    return Suite(random_model().eval(), manifest, "test", manifest.rows("test"), settings(folder), seed, process, noise)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    files = tmp_path_factory.mktemp("noise")
    for number in range(2):
        wave = 0.1 * np.random.default_rng(number).standard_normal(5000)
        soundfile.write(files / f"{number}.wav", wave, 16000)
    return find_noise(files)


def test_clean_equals_the_evaluation(folder):
    suite = suite_of(folder)
    clean = suite.measure("clean", None)
    expected = measure(random_model(), suite.manifest, "test", settings(folder), 0, 0, 1, CPU)["coarse"]
    assert clean.speech_to_image == expected["speech_to_image"]
    assert clean.image_to_speech == expected["image_to_speech"]
    assert clean.mean == expected["mean_R@1"]


def test_only_what_is_perturbed_is_encoded_again(folder):
    suite, calls = suite_of(folder), []
    for name in ("encode_image", "encode_speech"):
        inner = getattr(suite.model, name)
        setattr(suite.model, name, lambda *inputs, name=name, inner=inner: calls.append(name) or inner(*inputs))

    def encoded(kind, level):
        calls.clear()
        suite.measure(kind, level)
        return set(calls)

    assert encoded("clean", None) == {"encode_image", "encode_speech"}
    assert encoded("clean", None) == set()
    assert encoded("white", 0.0) == {"encode_speech"}
    assert encoded("blur", 4.0) == {"encode_image"}


@pytest.mark.parametrize(("kind", "level"), [("white", 0.0), ("speed", 0.5), ("truncation", 50.0)])
def test_embeddings_are_those_of_perturbed_captions(folder, kind, level):
    """A caption is truncated to the longest one after it was perturbed."""
    suite = suite_of(folder)
    reader = Reader(suite.manifest)
    with torch.no_grad():
        embeddings = suite._encode_speech(kind, level)
        for at, row in list(enumerate(suite.inputs.captions.tolist()))[::5]:
            wave = perturb_speech(decode_audio(reader.audio(row)), kind, level, generator_of(0, kind, row))
            cut = torch.from_numpy(wave[: int(SECONDS * SAMPLE_RATE)].copy())
            alone = suite.model.encode_speech(cut[None], torch.tensor([len(cut)])).embedding[0]
            torch.testing.assert_close(embeddings[at], alone, atol=1e-5, rtol=0)


def test_babble_is_of_other_pictures(folder, monkeypatch):
    suite, heard = suite_of(folder), []
    caption = suite.inputs.caption
    suite.inputs.caption = lambda row: heard.append(row) or caption(row)
    for index in range(len(suite.inputs.captions)):
        heard.clear()
        suite._background("babble", index)(np.random.default_rng(0))
        own = suite.manifest.captions(int(suite.samples[suite.inputs.caption_picture[index]]))
        assert len(heard) == 4
        assert len(set(heard)) == 4
        assert not set(heard) & set(own)


def test_babble_needs_other_captions(folder):
    suite = suite_of(folder)
    one = suite.samples[:1]
    suite._voices = (np.asarray(suite.manifest.captions(int(one[0]))), np.repeat(one, 1))
    with pytest.raises(UserError, match=r"babble: split test of .* has no captions of other pictures"):
        suite.measure("babble", 0.0)


def every_condition(rank, world_size, folder, noise, seed=0):
    torch.set_num_threads(1)  # for bitwise equality
    suite = suite_of(folder, rank, world_size, noise, seed)
    kinds = [("clean", None), *((name, kind.levels[-1]) for name, kind in KINDS.items())]
    digest = suite._encode_speech("babble", 0.0).detach().numpy().tobytes()
    return [asdict(suite.measure(kind, level)) for kind, level in kinds], digest


def test_two_ranks_and_a_repetition_measure_the_same(folder, noise):
    threads = torch.get_num_threads()
    alone, _ = outcomes = every_condition(0, 1, folder, noise)
    assert every_condition(0, 1, folder, noise) == outcomes
    assert every_condition(0, 1, folder, noise, seed=1) != outcomes
    torch.set_num_threads(threads)
    assert len({str(condition["speech_to_image"]) for condition in alone}) > 3, "nothing is perturbed"
    for distributed in run_ranks(every_condition, 2, folder, noise):
        assert distributed == outcomes


def test_files_of_noise_are_identified_by_their_contents(noise, tmp_path):
    copies = [tmp_path / name for name in ("one", "other")]
    for copy in copies:
        (copy / "inner").mkdir(parents=True)
        (copy / "inner" / "a.flac").write_bytes(noise.files[0].read_bytes())
        (copy / "notes.txt").write_text("not audio")
    first, second = map(find_noise, copies)
    assert first.checksum == second.checksum != noise.checksum
    assert [path.name for path in first.files] == ["a.flac"]
    with pytest.raises(UserError, match=r"--noise .*: no audio files in this folder"):
        find_noise(tmp_path / "none")


def test_a_file_of_noise_that_is_not_audio_is_named(folder, noise, tmp_path):
    bad = tmp_path / "bad.wav"
    bad.write_text("no audio")
    with pytest.raises(UserError, match=r"bad\.wav"):
        suite_of(folder, noise=replace(noise, files=(bad,))).measure("noise", 0.0)
