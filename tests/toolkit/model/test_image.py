"""Image encoder against transformers' trunks, and the convolutional stem."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from shards.errors import UserError
from tests.tiny import VIT, tiny_model
from toolkit.model.build import build_model
from toolkit.model.image import ConvolutionalStem, ImageEncoder
from toolkit.model.retrieval import SpeechImageModel

TRUNKS = {"clip": (CLIPVisionConfig, CLIPVisionModel), "blip2": (Blip2VisionConfig, Blip2VisionModel)}


def make_trunk(architecture="clip", **more):
    config, model = TRUNKS[architecture]
    torch.manual_seed(0)
    return model(config(**{**VIT, **more})).eval()


def make_encoder(trunk, train="none", head_layers=0, **more) -> ImageEncoder:
    torch.manual_seed(1)
    trunk = getattr(trunk, "vision_model", trunk)
    return ImageEncoder(trunk, 16, train, head_layers, head_heads=4, dropout=0.0, **more).eval()


def make_pictures(size=32) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("train", ["none", "1", "2", "all"])
@pytest.mark.parametrize("architecture", ["clip", "blip2"])
def test_features_are_those_of_transformers(architecture, train):
    trunk = make_trunk(architecture)
    encoder = make_encoder(trunk, train)
    images = make_pictures()
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    with torch.no_grad():
        output = trunk(pixel_values=processor(list(images), return_tensors="pt").pixel_values)
        hidden = output.last_hidden_state
        if architecture == "clip":  # BLIP-2's output is already normalized
            hidden = encoder.trunk.post_layernorm(hidden)
        encoded = encoder(encoder.frozen_features(images))
        embedding = F.normalize(encoder.head.project(hidden[:, 0]), dim=-1)

    assert trunk.config._attn_implementation == "sdpa"
    torch.testing.assert_close(encoded.embedding, embedding, atol=1e-6, rtol=0)
    torch.testing.assert_close(encoded.tokens, hidden[:, 1:], atol=1e-5, rtol=0)
    assert encoded.mask.shape == encoded.tokens.shape[:2]
    assert encoded.mask.all()


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("none", ()),
        ("1", ("encoder.layers.1", "post_layernorm")),
        ("all", ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")),
    ],
)
def test_gradients_reach_exactly_the_trained_part(train, trained):
    encoder = make_encoder(make_trunk(), train, head_layers=1).train()
    encoder(encoder.frozen_features(make_pictures())).embedding[:, 0].sum().backward()
    for name, parameter in encoder.trunk.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == name.startswith(trained), name
    for name, parameter in encoder.head.named_parameters():
        assert parameter.grad is not None, name


def test_frozen_parts_have_no_dropout():
    encoder = make_encoder(make_trunk(attention_dropout=0.5), "1").train()
    images = make_pictures()
    features = encoder.frozen_features(images)
    assert torch.equal(features.hidden, encoder.frozen_features(images).hidden)
    assert not torch.equal(encoder(features).embedding, encoder(features).embedding), (
        "the trained layer should drop out"
    )


@pytest.mark.parametrize("architecture", ["clip", "blip2"])
def test_pictures_of_another_size_have_interpolated_positions(architecture):
    trunk = make_trunk(architecture)
    encoder = make_encoder(trunk)
    images = make_pictures(48)
    encoded = encoder(encoder.frozen_features(images))
    assert encoded.tokens.shape == (3, 36, 32)
    pixels = CLIPImageProcessor(do_resize=False, do_center_crop=False)(list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        hidden = trunk(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    hidden = encoder.trunk.post_layernorm(hidden) if architecture == "clip" else hidden
    torch.testing.assert_close(encoded.tokens, hidden[:, 1:], atol=1e-5, rtol=0)


def test_bf16_gives_float32_embeddings():
    encoder = make_encoder(make_trunk(), "all", head_layers=1)
    images = make_pictures()
    with torch.no_grad():
        full = encoder(encoder.frozen_features(images)).embedding
        half = encoder.bfloat16()(encoder.frozen_features(images))
    assert (half.embedding.dtype, half.tokens.dtype) == (torch.float32, torch.bfloat16)
    assert (F.cosine_similarity(half.embedding, full) > 0.99).all()


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"model\.image\.train: .* from 0 to 2, got '3'"):
        make_encoder(make_trunk(), "3")


@pytest.mark.parametrize("size", [32, 48])
def test_a_grid_is_the_mean_of_each_cells_patches(size):
    encoder = make_encoder(make_trunk(patch_size=4), "all", pool="grid")
    with torch.no_grad():
        encoded = encoder(encoder.frozen_features(make_pictures(size)))
        side = size // 4
        patches = encoded.tokens.view(3, side, side, -1)
        cell = side // 4
        # Channels first, then rows and columns of cells: the order in which the projection reads them.
        means = torch.stack([
            patches[:, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].mean(dim=(1, 2))
            for y in range(4)
            for x in range(4)
        ], dim=-1)  # fmt: skip
        embedding = F.normalize(encoder.head.project(means.flatten(1)), dim=-1)
    assert encoder.head.project.in_features == 16 * VIT["hidden_size"]
    torch.testing.assert_close(encoded.embedding, embedding, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["clip", "blip2"])
def test_a_stem_replaces_the_patch_projection(architecture):
    encoder = make_encoder(make_trunk(architecture), "all", stem="convolutions")
    stem = encoder.trunk.embeddings.patch_embedding
    assert isinstance(stem, ConvolutionalStem)
    pictures = make_pictures()
    encoded = encoder(encoder.frozen_features(pictures))
    assert encoded.tokens.shape == (3, (32 // VIT["patch_size"]) ** 2, VIT["hidden_size"])
    encoded.tokens.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in stem.parameters())
    # The embedding of a picture does not depend on its batch.
    torch.testing.assert_close(
        encoder(encoder.frozen_features(pictures[1:2])).tokens, encoded.tokens[1:2], atol=1e-5, rtol=0
    )


def test_a_stem_is_convolutions_that_halve_the_side():
    stem, pixels = ConvolutionalStem(16, 8), torch.randn(2, 3, 32, 32)
    x = F.conv2d(pixels, stem[0].weight, stride=2, padding=1)
    x = F.gelu((x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt())
    x = F.conv2d(x, stem[3].weight, stride=2, padding=1)
    x = F.gelu((x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt())
    x = F.conv2d(x, stem[6].weight, stride=2, padding=1)
    assert [stem[place].weight.shape[0] for place in (0, 3, 6)] == [4, 8, 16]
    torch.testing.assert_close(stem(pixels), x)


@pytest.mark.parametrize("width", [16, 64])
def test_a_stem_in_bf16_on_a_cpu_computes_its_convolutions_in_float32(width):
    torch.manual_seed(0)
    stem, pixels = ConvolutionalStem(width, 8).bfloat16(), torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    exact = copy.deepcopy(stem).float()
    for module in stem:
        if isinstance(module, torch.nn.Conv2d):
            x = torch.randn(2, module.in_channels, 8, 8, dtype=torch.bfloat16)
            assert torch.equal(module(x), F.conv2d(x.float(), module.weight.float(), stride=2, padding=1).bfloat16())
    embedded = stem(pixels)
    assert embedded.dtype == torch.bfloat16
    torch.testing.assert_close(embedded.float(), exact(pixels.float()), atol=0.03, rtol=0.03)
    embedded.sum().backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in stem.parameters())


def test_an_export_in_bf16_with_a_stem_is_evaluated_on_a_cpu(tmp_path):
    model = tiny_model()
    model.image.stem = "convolutions"
    build_model(model).bfloat16().save_pretrained(tmp_path)
    encoded = SpeechImageModel.from_pretrained(tmp_path, dtype="auto").encode_image(make_pictures())
    assert encoded.tokens.dtype == torch.bfloat16
    exact = SpeechImageModel.from_pretrained(tmp_path, dtype=torch.float32).encode_image(make_pictures())
    torch.testing.assert_close(encoded.embedding, exact.embedding, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("patch_size", "widths"), [(2, [16]), (4, [4, 16]), (8, [4, 8, 16]), (16, [4, 8, 16, 16]), (32, [4, 8, 16, 16, 16])]
)
def test_the_width_of_a_stem_doubles_up_to_the_trunks(patch_size, widths):
    stem = ConvolutionalStem(16, patch_size)
    assert [module.out_channels for module in stem if isinstance(module, torch.nn.Conv2d)] == widths
    assert stem(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 64 // patch_size, 64 // patch_size)


@pytest.mark.parametrize(("width", "patch_size"), [(16, 12), (16, 1), (18, 8)])
def test_a_stem_that_does_not_halve_is_refused(width, patch_size):
    with pytest.raises(UserError, match="power of 2"):
        ConvolutionalStem(width, patch_size)
