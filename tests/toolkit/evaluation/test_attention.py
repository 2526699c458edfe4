"""Attention weights equal a naive softmax(QK/sqrt(d)), and computing them changes nothing."""

import math

import pytest
import torch

from tests.tiny import tiny_model
from toolkit.evaluation.attention import cross_attention
from toolkit.model.build import build_model
from toolkit.model.fusion import pool_tokens


def model_and_pair(layers, seconds=0.5):
    torch.manual_seed(layers)
    settings = tiny_model()
    settings.fusion.layers = layers
    model = build_model(settings).eval()
    with torch.no_grad():  # sharper than at initialization
        for layer in model.fusion.layers:
            layer.cross_attention.query.weight.mul_(5)
        waves = 0.3 * torch.randn(1, int(16000 * seconds))
        speech = model.encode_speech(waves, torch.tensor([waves.shape[1]]))
        image = model.encode_image(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8))
    return model, speech, image


@torch.no_grad()
def naive(model, speech, image):
    """For each layer [queries, P], in loops over heads, queries and patches; the fusion encoder written out."""
    fusion = model.fusion
    tokens, mask = pool_tokens(speech.tokens, speech.mask, fusion.pool)
    x = fusion._with_positions(fusion.query_input(tokens))
    context = fusion._with_positions(fusion.context_input(image.tokens))
    x, mask = fusion.class_token(x, mask)
    found = []
    for depth, layer in enumerate(fusion.layers, 1):
        first_only = depth == len(fusion.layers)
        seen = layer.self_norm(x)
        rows = 1 if first_only else x.shape[1]
        middle = x[:, :rows] + layer.self_attention(seen[:, :rows], seen, mask)
        attention = layer.cross_attention
        queries = attention.query(layer.cross_norm(middle))[0]
        keys = attention.key_value(context)[0, :, : queries.shape[1]]
        size = queries.shape[1] // attention.heads
        weights = torch.zeros(rows, len(keys))
        for head in range(attention.heads):
            part = slice(head * size, (head + 1) * size)
            for row in range(rows):
                scores = [float(queries[row, part] @ key[part]) / math.sqrt(size) for key in keys]
                exponentials = [math.exp(score) for score in scores]
                for patch, value in enumerate(exponentials):
                    weights[row, patch] += value / sum(exponentials) / attention.heads
        found.append(weights)
        x = layer(x, mask, context, None, first_only)
    return found


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_weights_equal_a_naive_softmax(layers):
    model, speech, image = model_and_pair(layers)
    weights, expected = cross_attention(model, speech, image), naive(model, speech, image)
    torch.testing.assert_close(weights.match, expected[-1][0], atol=1e-6, rtol=1e-5)
    if layers == 1:  # only the class token attends
        assert weights.frames.shape == (0, 16)
        assert weights.total.equal(weights.match)
        return
    frames = sum(expected[:-1])[1:] / (layers - 1)
    assert len(frames) == math.ceil(speech.tokens.shape[1] / 2)
    torch.testing.assert_close(weights.frames, frames, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights.total, frames.mean(dim=0), atol=1e-6, rtol=1e-5)
    assert weights.frames.std(dim=0).max() > 1e-3  # frames differ, so that the comparison means something
    torch.testing.assert_close(weights.frames.sum(dim=1), torch.ones(len(frames)))


def test_the_model_is_left_as_it_was():
    model, speech, image = model_and_pair(2)
    with torch.no_grad():
        before = model.match(speech, image)
        assert cross_attention(model, speech, image).logits.equal(before[0])
        assert model.match(speech, image).equal(before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_padding_is_no_frame():
    model, speech, image = model_and_pair(2)
    alone = cross_attention(model, speech, image)
    with torch.no_grad():
        waves = torch.zeros(2, 16000)
        torch.manual_seed(2)
        padded = model.encode_speech(waves, torch.tensor([8000, 16000]))[torch.tensor([0])]
    assert padded.tokens.shape[1] > speech.tokens.shape[1]
    assert cross_attention(model, padded, image).frames.shape == alone.frames.shape


def test_one_pair_at_a_time():
    model, speech, image = model_and_pair(2)
    with pytest.raises(ValueError, match="2 utterances and 1 images"):
        cross_attention(model, speech[torch.tensor([0, 0])], image)
