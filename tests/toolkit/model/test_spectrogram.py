"""Log-mel spectrograms in place of the waveform, for trunks with random weights."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_model
from tests.toolkit.model.small_trunks import with_random
from tests.toolkit.model.test_retrieval import results
from tests.toolkit.model.test_speech import check_batch_independence, make_waves
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.model.retrieval import SpeechImageModel
from toolkit.model.speech import SpeechEncoder
from toolkit.model.speech_trunks import MEL_FLOOR, _mel_filters, mel_power, normalized_log_mel
from toolkit.training.metrics.flops import count_frames, speech_flops

BINS = 32
SHORTEST = 400 + 11 * 160  # samples of one frame: twelve windows


def settings(architecture: str = "hubert", groups: int = 1) -> config.Model:
    model = tiny_model() if architecture == "hubert" else with_random(architecture)
    model.speech.train, model.speech.mel_bins, model.speech.groups = "all", BINS, groups
    model.speech.config |= {
        "conv_dim": [48, 32], "conv_kernel": [8, 2], "conv_stride": [4, 1], "feat_extract_norm": "layer",
        "do_stable_layer_norm": True, "num_feat_extract_layers": 2,
    }  # fmt: skip
    return model


def make_encoder(architecture: str = "hubert") -> SpeechEncoder:
    return build_model(settings(architecture)).speech.eval()


def naive_log_mel(wave: Tensor) -> np.ndarray:
    """One utterance, window by window, by the discrete Fourier transform as it is defined."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    transform = np.exp(-2j * np.pi * np.outer(np.arange(201), np.arange(400)) / 400)
    rows = []
    for first in range(0, len(wave) - 399, 160):
        power = np.abs(transform @ (hann * wave[first : first + 400].double().numpy())) ** 2
        rows.append(np.log(_mel_filters(BINS).T @ power + MEL_FLOOR))
    logs = np.array(rows).T
    centered = logs - logs.mean(axis=1, keepdims=True)
    return centered / np.sqrt(centered.var(axis=1, keepdims=True) + MEL_FLOOR)


def test_the_spectrogram_is_that_of_its_definition_without_padding():
    waves, lengths = make_waves(9000, 5000)
    waves = waves / waves.std()
    mask = torch.arange(54) < torch.tensor([[54], [29]])
    got = normalized_log_mel(waves, mask, BINS)
    for row, length in enumerate(lengths):
        frames = (int(length) - 400) // 160 + 1
        wanted = torch.from_numpy(naive_log_mel(waves[row, :length])).float()
        torch.testing.assert_close(got[row, :, :frames], wanted, atol=2e-4, rtol=0)
        assert (got[row, :, frames:] == 0).all()


@pytest.mark.parametrize("bins", [8, 40, 128])
def test_a_tone_raises_the_band_of_its_frequency(bins):
    power = mel_power(torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000)[None], bins, centered=False)
    peaks = torch.from_numpy(_mel_filters(bins)).argmax(dim=0) * 40.0  # Hz, the highest point of each band
    loudest = peaks[power[0].mean(dim=1).argmax()]
    assert (peaks - 1000).abs().min() == (loudest - 1000).abs()


@pytest.mark.parametrize("architecture", ["hubert", "wav2vec2", "wavlm"])
def test_the_encoding_of_an_utterance_does_not_depend_on_its_batch(architecture):
    encoder = make_encoder(architecture)
    waves, lengths = make_waves(20000, 7000, 900, 9001, 40)
    check_batch_independence(encoder, waves, lengths)


def test_loudness_changes_nothing_and_another_utterance_does():
    encoder = make_encoder()
    waves, lengths = make_waves(12000, 12000)
    with torch.no_grad():
        embedding = encoder(encoder.frozen_features(waves, lengths)).embedding
        quieter = encoder(encoder.frozen_features(waves * 0.1, lengths)).embedding
    torch.testing.assert_close(quieter, embedding, atol=1e-4, rtol=0)
    assert (embedding[0] - embedding[1]).abs().max() > 1e-3


@pytest.mark.parametrize("samples", [1, SHORTEST - 1, SHORTEST, SHORTEST + 639, SHORTEST + 640, 16000])
def test_frames_and_flops_are_counted_without_running_the_trunk(samples):
    model = settings()
    model.speech.config |= {"conv_dim": [32], "conv_kernel": [12], "conv_stride": [4], "num_feat_extract_layers": 1}
    encoder = build_model(model).speech.eval()
    waves, lengths = make_waves(samples)
    with torch.no_grad():
        frames = int(encoder(encoder.frozen_features(waves, lengths)).mask.sum())
    assert frames == max(1, (samples - SHORTEST) // 640 + 1) == int(count_frames(encoder, lengths.numpy())[0])
    convolution = 2.0 * frames * BINS * 32 * 12
    plain = build_model(model).speech
    plain.trunk.config.conv_dim = [64]  # the count follows the configuration: twice the channels
    wider = speech_flops(plain, lengths.numpy())[1] - speech_flops(encoder, lengths.numpy())[1]
    assert wider == convolution + 2.0 * frames * 32 * encoder.token_dim


def test_every_weight_is_trained_and_an_export_computes_the_same(tmp_path):
    model = build_model(settings(groups=2)).train()
    encoder = model.speech
    first = encoder.trunk.feature_extractor.conv_layers[0].conv
    assert first.weight.shape == (48, BINS, 8)
    encoded = encoder(encoder.frozen_features(*make_waves(6000, 5000)))
    (encoded.embedding[:, 0].sum() + encoded.tokens.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert first.weight.grad.abs().sum() > 0
    before = results(model.eval())
    model.save_pretrained(tmp_path)
    loaded = SpeechImageModel.from_pretrained(tmp_path)
    assert loaded.speech.calls.mel_bins == BINS
    for got, wanted in zip(results(loaded), before, strict=True):
        assert torch.equal(got, wanted)
