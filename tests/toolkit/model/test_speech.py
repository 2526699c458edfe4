import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from shards.errors import UserError
from tests.tiny import HUBERT
from tests.toolkit.model.small_trunks import BASE  # as HuBERT-base
from toolkit.model.build import set_mel_filters
from toolkit.model.layers import Head
from toolkit.model.speech import LayerMix, SpeechEncoder, thirds
from toolkit.model.speech_trunks import BlockConvolution

LARGE = dict(HUBERT)  # as HuBERT-large


def make_trunk(values=LARGE, **more) -> HubertModel:
    torch.manual_seed(0)
    trunk = HubertModel(HubertConfig(**{**values, **more}, mask_time_prob=0.0)).eval()
    for name, parameter in trunk.named_parameters():
        if name.endswith("bias"):  # with the initial zeros, the scale of the waveform would not matter
            nn.init.normal_(parameter, std=0.3)
    return trunk


def make_encoder(values=LARGE, train="none", head_layers=1, **more) -> SpeechEncoder:
    trunk = make_trunk(values, **more)
    torch.manual_seed(1)
    return SpeechEncoder(trunk, 16, train, head_layers, head_heads=4, dropout=0.0).eval()


def make_waves(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    waves = [0.05 + 0.1 * torch.randn(length, generator=generator) for length in lengths]
    return nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor(lengths)


def reference(trunk: HubertModel, waves, lengths, normalize: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states and frame mask computed by transformers; the last state after the trunk's final norm."""
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=True)
    rows = [wave[:length].numpy() for wave, length in zip(waves, lengths, strict=True)]
    inputs = extractor(rows, sampling_rate=16000, padding=True, return_tensors="pt")
    mask = inputs.attention_mask if inputs.attention_mask.min() == 0 else None
    with torch.no_grad():
        output = trunk(inputs.input_values, attention_mask=mask, output_hidden_states=True)
    states = [*output.hidden_states[:-1], output.last_hidden_state]
    return states, trunk._get_feature_vector_attention_mask(states[0].shape[1], inputs.attention_mask)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 40), st.sampled_from([1, 3]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_convolution_by_blocks_equals_a_convolution(stride, strides, more, channels, bias):
    torch.manual_seed(more)
    plain = nn.Conv1d(channels, 4, stride * strides, stride, bias=bias)
    by_blocks = copy.deepcopy(plain)
    by_blocks.__class__ = BlockConvolution
    hidden = torch.randn(2, channels, stride * strides + more)
    results = []
    for convolution in (plain, by_blocks):
        inputs = hidden.clone().requires_grad_()
        output = convolution(inputs)
        output.square().sum().backward()
        results.append((output, inputs.grad, *(parameter.grad for parameter in convolution.parameters())))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_convolutions_of_large_models_are_by_blocks_where_the_stride_divides_the_kernel():
    trunk = make_encoder(conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), conv_dim=(32, 32, 32)).trunk
    kinds = [type(layer.conv) for layer in trunk.feature_extractor.conv_layers]
    assert kinds == [BlockConvolution, nn.Conv1d, BlockConvolution]


@pytest.mark.parametrize(
    ("values", "lengths"), [(BASE, (9000, 9000)), (LARGE, (9000, 9000)), (LARGE, (16000, 9000, 5001))]
)
def test_hidden_states_are_those_of_transformers(values, lengths):
    encoder = make_encoder(values)
    waves, lengths = make_waves(*lengths)
    normed = values is LARGE
    expected, mask = reference(encoder.trunk, waves, lengths, normed)

    (features,) = encoder.frozen_features(waves, lengths)

    assert torch.equal(features.mask, mask.bool())
    assert len(features.states) == len(expected)
    for depth, (state, wanted) in enumerate(zip(features.states, expected, strict=True)):
        wanted = F.layer_norm(wanted, wanted.shape[-1:]) if normed else wanted
        assert torch.allclose(state[mask], wanted[mask], atol=1e-5, rtol=0), f"hidden state {depth} differs"


@pytest.mark.parametrize("values", [BASE, LARGE])
@pytest.mark.parametrize("train", ["2", "1", "all"])
def test_the_trained_part_does_not_affect_the_result(values, train):
    waves, lengths = make_waves(9000, 6000)
    frozen, trained = make_encoder(values, "none"), make_encoder(values, train)
    with torch.no_grad():
        wanted, got = (encoder(encoder.frozen_features(waves, lengths)) for encoder in (frozen, trained))
    torch.testing.assert_close(got.embedding, wanted.embedding, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.tokens, wanted.tokens, atol=1e-5, rtol=0)
    assert torch.equal(got.mask, wanted.mask)


def stock_difference(trunk: HubertModel, waves, lengths, normalize: bool) -> float:
    """How much transformers' last states of an utterance change with padding, given an attention mask."""
    together, mask = reference(trunk, waves, lengths, normalize)
    alone = [reference(trunk, waves[row : row + 1], lengths[row : row + 1], normalize)[0] for row in range(len(waves))]
    moved = [
        (together[-1][row, :count] - states[-1][0, :count]).abs().max()
        for row, (states, count) in enumerate(zip(alone, mask.sum(1).tolist(), strict=True))
    ]
    return float(torch.stack(moved).max())


@pytest.mark.parametrize(("values", "stock_moves"), [(BASE, True), (LARGE, False)])
@pytest.mark.parametrize("train", ["none", "all"])
@pytest.mark.parametrize("head_layers", [0, 2])
def test_the_encoding_of_an_utterance_does_not_depend_on_its_batch(values, stock_moves, train, head_layers):
    encoder = make_encoder(values, train, head_layers)
    waves, lengths = make_waves(16000, 7000, 900, 9001)
    moved = stock_difference(make_trunk(values), waves, lengths, values is LARGE)
    assert moved > 0.05 if stock_moves else moved < 1e-4
    check_batch_independence(encoder, waves, lengths)


def check_batch_independence(encoder: SpeechEncoder, waves: torch.Tensor, lengths: torch.Tensor) -> None:
    """Check that utterances with more padding than needed, in one group and in two, are encoded as if alone."""
    waves = F.pad(waves, (0, 5000))
    for groups in (1, 2):
        encoder.groups = groups
        with torch.no_grad():
            together = encoder(encoder.frozen_features(waves, lengths, lengths.tolist()))
            for row, length in enumerate(lengths):
                alone = encoder(encoder.frozen_features(waves[row : row + 1, :length], lengths[row : row + 1]))
                check_same(together, row, alone)


def check_same(together, row: int, alone, embedding: float = 1e-4, tokens: float = 1e-4) -> None:
    """Check that a row of a batch is encoded as if alone, within these tolerances."""
    real = together.mask[row]
    assert int(real.sum()) == alone.tokens.shape[1]
    torch.testing.assert_close(together.embedding[row], alone.embedding[0], atol=embedding, rtol=0)
    torch.testing.assert_close(together.tokens[row][real], alone.tokens[0], atol=tokens, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([BASE, LARGE]),
    st.lists(st.integers(1, 12000), min_size=1, max_size=6),
    st.integers(0, 6000),
    st.integers(1, 4),
)
def test_any_batch_and_any_padding(values, lengths, extra, groups):
    encoder = make_encoder(values)
    encoder.groups = groups
    waves, lengths = make_waves(*lengths)
    with torch.no_grad():
        together = encoder(encoder.frozen_features(F.pad(waves, (0, extra)), lengths, lengths.tolist()))
        alone = encoder(encoder.frozen_features(waves[:1, : lengths[0]], lengths[:1]))
    check_same(together, 0, alone)


@pytest.mark.parametrize("values", [BASE, LARGE])
def test_bf16_differs_by_rounding_only(values):
    exact, half = make_encoder(values), make_encoder(values).bfloat16()
    waves, lengths = make_waves(16000, 7000, 9001)
    with torch.no_grad():
        wanted = exact(exact.frozen_features(waves, lengths))
        together = half(half.frozen_features(waves, lengths))
        for row, length in enumerate(lengths):
            alone = half(half.frozen_features(waves[row : row + 1, :length], lengths[row : row + 1]))
            real = together.mask[row]
            embedding = float((alone.embedding[0] - wanted.embedding[row]).abs().max())
            tokens = float((alone.tokens[0].float() - wanted.tokens[row][real]).abs().max())
            assert embedding < 0.02
            assert tokens < 0.15
            check_same(together, row, alone, 2 * embedding, 2 * tokens)


@pytest.mark.parametrize("values", [BASE, LARGE])
def test_a_padded_utterance_equals_transformers_unpadded_one(values):
    encoder, trunk = make_encoder(values), make_trunk(values)
    waves, lengths = make_waves(16000, 9000, 5001)
    (features,) = encoder.frozen_features(F.pad(waves, (0, 3000)), lengths)
    for row in range(3):
        expected, mask = reference(trunk, waves[row : row + 1], lengths[row : row + 1], values is LARGE)
        frames = int(mask.sum())
        assert int(features.mask[row].sum()) == frames
        for state, wanted in zip(features.states, expected, strict=True):
            wanted = F.layer_norm(wanted, wanted.shape[-1:]) if values is LARGE else wanted
            torch.testing.assert_close(state[row, :frames], wanted[0, :frames], atol=1e-5, rtol=0)


@pytest.mark.parametrize("values", [BASE, LARGE])
def test_speech_shorter_than_a_frame_is_encoded_as_if_followed_by_silence(values):
    encoder = make_encoder(values)
    waves, _ = make_waves(40, 9000)
    alone = encoder(encoder.frozen_features(waves[:1, :40], torch.tensor([40])))
    together = encoder(encoder.frozen_features(waves, torch.tensor([40, 9000])))
    check_same(together, 0, alone)


TRAINED = {
    "none": set(),
    "1": {"encoder.layers.1", "encoder.layer_norm"},
    "2": {"encoder.layers.0", "encoder.layers.1", "encoder.layer_norm"},
}


@pytest.mark.parametrize("train", ["none", "1", "2", "all"])
def test_gradients_reach_exactly_the_trained_part(train):
    encoder = make_encoder(LARGE, train).train()
    encoder(encoder.frozen_features(*make_waves(6000, 5000))).embedding[:, 0].sum().backward()
    for name, parameter in encoder.trunk.named_parameters():
        expected = train == "all" or any(name.startswith(part) for part in TRAINED[train])
        assert parameter.requires_grad == expected, name
        assert (parameter.grad is not None) == expected, name
    for name, parameter in [*encoder.mix.named_parameters(), *encoder.head.named_parameters()]:
        assert parameter.grad is not None, name


@pytest.mark.parametrize("values", [BASE, LARGE])
def test_frozen_parts_have_no_dropout(values):
    dropout = {name: 0.5 for name in HUBERT if name.endswith("dropout")}
    encoder = make_encoder(values, "1", **dropout).train()
    inputs = make_waves(6000, 5000)
    (first,), (second,) = encoder.frozen_features(*inputs), encoder.frozen_features(*inputs)
    assert torch.equal(first.hidden, second.hidden)
    assert all(torch.equal(a, b) for a, b in zip(first.states, second.states, strict=True))
    assert not torch.equal(encoder((first,)).embedding, encoder((first,)).embedding), (
        "the trained layer should drop out"
    )
    assert not first.hidden.requires_grad


def test_mix_is_a_softmax_weighted_sum():
    mix = LayerMix(3)
    states = tuple(torch.randn(2, 4, 5) for _ in range(3))
    torch.testing.assert_close(mix(states), torch.stack(states).mean(dim=0))
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([0.0, 1.0, -1.0]))
    weights = mix.weights.softmax(0)
    torch.testing.assert_close(mix(states), sum(w * s for w, s in zip(weights, states, strict=True)))


def test_head_is_speechclips_transformer():
    """The head equals torch's own post-norm encoder with a class token, given the same weights."""
    torch.manual_seed(3)
    head = Head(width=32, embed_dim=16, layers=2, heads=4, dropout=0.0)
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)
    for mine, other in zip(head.layers, theirs.layers, strict=True):
        attention = mine.attention
        other.self_attn.in_proj_weight.data = torch.cat([attention.query.weight, attention.key_value.weight]).detach()
        other.self_attn.in_proj_bias.data = torch.cat([attention.query.bias, attention.key_value.bias]).detach()
        other.self_attn.out_proj.load_state_dict(attention.output.state_dict())
        other.linear1.load_state_dict(mine.feed_forward[0].state_dict())
        other.linear2.load_state_dict(mine.feed_forward[3].state_dict())
    tokens = torch.randn(3, 6, 32)
    mask = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    with_class = torch.cat([head.class_token.token.expand(3, 1, -1), tokens], dim=1)

    expected = theirs(with_class, src_key_padding_mask=F.pad(~mask, (1, 0), value=False))
    embedding, frames = head(tokens, mask)

    torch.testing.assert_close(embedding, F.normalize(head.project(expected[:, 0]), dim=-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(frames[mask], expected[:, 1:][mask], atol=1e-5, rtol=1e-5)


def test_head_without_layers_averages_the_frames_without_padding():
    head = Head(width=8, embed_dim=4, layers=0, heads=1, dropout=0.0)
    tokens, mask = torch.randn(2, 5, 8), torch.arange(5) < torch.tensor([5, 2])[:, None]
    embedding, same = head(tokens, mask)
    means = torch.stack([tokens[0].mean(0), tokens[1, :2].mean(0)])
    torch.testing.assert_close(embedding, F.normalize(head.project(means), dim=-1))
    assert same is tokens


@pytest.mark.parametrize("train", ["none", "all"])
def test_bf16_gives_float32_embeddings(train):
    encoder = make_encoder(LARGE, train)
    waves, lengths = make_waves(9000, 6000)
    with torch.no_grad():
        full = encoder(encoder.frozen_features(waves, lengths)).embedding
        half = encoder.bfloat16()(encoder.frozen_features(waves, lengths))
    assert (half.embedding.dtype, half.tokens.dtype) == (torch.float32, torch.bfloat16)
    assert (F.cosine_similarity(half.embedding, full) > 0.99).all()


def test_narrow_convolutions_in_bf16_are_refused_on_cpu():
    encoder = make_encoder(conv_dim=[16, 16, 16]).bfloat16()
    with pytest.raises(UserError, match="at least 32"):
        encoder.frozen_features(*make_waves(6000))


@pytest.mark.parametrize("train", ["some", "-1", "3", "1.5", ""])
def test_unknown_part_to_train_is_refused(train):
    with pytest.raises(UserError, match=r"model\.speech\.train: expected none, all or a number .* from 0 to 2"):
        make_encoder(train=train)


def test_a_filter_bank_responds_to_a_tone_at_its_frequency() -> None:
    weight = torch.zeros(64, 1, 400)
    set_mel_filters(weight)
    seconds = torch.arange(400) / 16000
    heard = [
        int((weight[:, 0] @ torch.sin(2 * torch.pi * f * seconds)).abs().argmax()) for f in (200.0, 1000.0, 5000.0)
    ]
    assert heard == sorted(heard)
    assert heard[0] < 16 < heard[1] < 48 < heard[2]
    torch.testing.assert_close(weight.norm(dim=2), torch.ones(64, 1))


def test_thirds_are_weighted_means_for_any_padding():
    generator = torch.Generator().manual_seed(3)
    frames = torch.randn(4, 9, 5, generator=generator, dtype=torch.float64)
    lengths = [9, 6, 2, 1]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]

    pooled = thirds(frames, mask).view(4, 3, 5)

    for row, length in enumerate(lengths):
        for part in range(3):
            total, weights = torch.zeros(5, dtype=torch.float64), 0.0
            for frame in range(length):
                distance = abs((frame + 0.5) / length - (part + 0.5) / 3)
                weight = max(0.0, 1 - 3 * distance)
                total, weights = total + weight * frames[row, frame], weights + weight
            expected = total / weights if weights > 1e-3 else torch.zeros_like(total)
            torch.testing.assert_close(pooled[row, part], expected, atol=2e-4, rtol=0)


def test_the_embedding_of_thirds_depends_on_the_order_and_not_on_the_padding():
    torch.manual_seed(1)
    encoder = SpeechEncoder(make_trunk(), 16, "all", 0, head_heads=4, dropout=0.0, pool="thirds").eval()
    waves, lengths = make_waves(16000, 9000)
    with torch.no_grad():
        together = encoder(encoder.frozen_features(waves, lengths)).embedding
        alone = encoder(encoder.frozen_features(waves[1:, :9000], lengths[1:])).embedding
        frames = torch.randn(1, 12, 32)
        mask = torch.ones(1, 12, dtype=torch.bool)
        forwards, backwards = thirds(frames, mask), thirds(frames.flip(1), mask)
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(forwards.view(3, -1), backwards.view(3, -1).flip(0))
    assert (forwards - backwards).abs().max() > 0.1
