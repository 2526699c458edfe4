import os
import stat

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from shards.errors import UserError
from tests.tiny import tiny_model
from toolkit.config import schema as config
from toolkit.model.build import build_model
from toolkit.model.retrieval import SpeechImageModel, Temperature, build_teacher


def build(train="all") -> SpeechImageModel:
    torch.manual_seed(0)
    model = tiny_model()
    model.speech.train = model.image.train = train
    return build_model(model)


def make_batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    lengths = torch.tensor([9000, 7000, 6000])
    waveforms = 0.1 * torch.randn(3, 9000, generator=generator) * (torch.arange(9000) < lengths[:, None])
    return images, waveforms, lengths


def results(model: SpeechImageModel) -> list[torch.Tensor]:
    with torch.no_grad():
        speech, image = model.eval()(*make_batch())
        return [speech.embedding, speech.tokens, image.embedding, image.tokens, model.match(speech, image)]


@pytest.mark.parametrize("train", ["none", "1", "all"])
def test_round_trip_is_exact(tmp_path, train):
    model = build(train)
    model.save_pretrained(tmp_path)
    again = SpeechImageModel.from_pretrained(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert not again.training
    assert again.speech.trunk.config._attn_implementation == again.image.trunk.config._attn_implementation == "sdpa"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for got, wanted in zip(results(again), results(model), strict=True):
        assert torch.equal(got, wanted)


def test_a_saved_model_that_lacks_a_weight_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["match_head.bias"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of SpeechImageModel: match_head\.bias"):
        SpeechImageModel.from_pretrained(tmp_path)


def test_building_is_deterministic_and_keeps_the_initialization():
    """transformers' own machinery does not initialize the heads a second time."""
    first, second = build(), build()
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert float(first.match_head.bias.detach().abs().sum()) > 0, "transformers would have set this bias to zero"


def test_match_depends_on_speech_and_patches_but_not_on_embeddings():
    model = build().train()
    speech, image = model(*make_batch())
    logits = model.match(speech, image)
    assert logits.shape == (3, 2)
    logits.sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    # Embeddings and temperature belong to the contrastive loss.
    assert unused == [n for n, _ in model.named_parameters() if ".head.project." in n or n.startswith("temperature")]
    swapped = model.match(speech, image[torch.tensor([1, 2, 0])])
    assert not torch.allclose(swapped, logits, atol=1e-4)


def test_everything_runs_in_bf16():
    model = build().bfloat16()
    speech, image = model(*make_batch())
    assert speech.embedding.dtype == image.embedding.dtype == torch.float32
    assert speech.tokens.dtype == image.tokens.dtype == torch.bfloat16
    torch.testing.assert_close(speech.embedding.norm(dim=1), torch.ones(3))
    logits = model.match(speech, image)
    assert logits.dtype == model.temperature().dtype == torch.float32
    (logits.sum() + (speech.embedding * image.embedding).sum() / model.temperature()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("train", ["none", "1", "all"])
def test_parameters_are_used_only_by_the_module_that_owns_them(train):
    """As under ZeRO-3, a parameter is available only during the `forward` of its module."""
    model = build(train).eval()
    wanted = results(model)

    def owned(module: nn.Module):
        return module.parameters(recurse=False)

    for module in model.modules():
        for parameter in owned(module):
            parameter.whole = parameter.data
            parameter.data = torch.empty(0)

        def gather(module, _inputs):
            for parameter in owned(module):
                parameter.data = parameter.whole

        def release(module, _inputs, _output):
            for parameter in owned(module):
                parameter.data = torch.empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        images, waveforms, lengths = make_batch()
        speech, image = model.encode_speech(waveforms, lengths), model.encode_image(images)
        got = [speech.embedding, speech.tokens, image.embedding, image.tokens, model.match(speech, image)]
        assert model.temperature() > 0
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("train", ["none", "1", "all"])
def test_teacher_shares_frozen_parameters(train):
    student = build(train).train()
    teacher = build_teacher(student)
    copies = dict(teacher.named_parameters())
    encoders = [name for name, _ in student.named_parameters() if name.startswith(("speech.", "image."))]
    shared = 0
    for name in encoders:
        parameter, copy = student.get_parameter(name), copies[name]
        assert (parameter.data_ptr() == copy.data_ptr()) == (not parameter.requires_grad), name
        assert torch.equal(parameter, copy), name
        assert not copy.requires_grad, name
        shared += not parameter.requires_grad
    assert (shared > 0) == (train != "all")
    assert not any(module.training for module in teacher.modules())
    assert student.training
    assert student.match_head.weight.requires_grad
    assert not any(name.startswith("fusion") for name in copies), "the teacher needs no fusion encoder"

    features = student.frozen_features(*make_batch())
    student.eval()
    for mine, theirs in zip(student.encode(*features), teacher.encode(*features), strict=True):
        assert torch.equal(mine.embedding, theirs.embedding)
        assert torch.equal(mine.tokens, theirs.tokens)
        assert not theirs.embedding.requires_grad


@pytest.mark.parametrize("train", ["none", "1"])
def test_frozen_parameters_are_not_needed_after_frozen_features(train):
    model = build(train)
    teacher = build_teacher(model)
    with torch.no_grad():
        features = model.frozen_features(*make_batch())
        wanted = [part.embedding for part in model.encode(*features)]
        for encoder in (model.speech, model.image):
            for module in encoder.frozen_modules():
                for parameter in module.parameters():
                    parameter.data = torch.empty(0)  # as under ZeRO-3, which gathers only for the student's modules
        for encoders in (model, teacher):
            for got, embedding in zip(encoders.encode(*features), wanted, strict=True):
                assert torch.equal(got.embedding, embedding)


def test_teacher_does_not_share_trained_parameters():
    student = build("1")
    teacher = build_teacher(student)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    for name, copy in teacher.named_parameters():
        parameter = student.get_parameter(name)
        assert torch.equal(parameter, copy) == (not parameter.requires_grad), name


def test_temperature_is_learned_and_clamped():
    temperature = Temperature()
    assert temperature().item() == pytest.approx(0.07)
    temperature().backward()
    assert temperature.log_temperature.grad.item() == pytest.approx(0.07)
    for value, clamped, inwards in ((-20.0, 0.001, -1), (3.0, 0.5, 1)):
        with torch.no_grad():
            temperature.log_temperature.fill_(value)
        assert temperature().item() == pytest.approx(clamped)
        for direction, gradient in ((inwards, inwards * clamped), (-inwards, 0)):
            temperature.log_temperature.grad = None
            (direction * temperature()).backward()
            assert temperature.log_temperature.grad.item() == pytest.approx(gradient), (
                "the gradient back into the range is blocked"
            )
    assert not Temperature(learned=False).log_temperature.requires_grad


def test_an_export_whose_match_logit_depends_on_embeddings_is_refused(tmp_path):
    model = build_model(tiny_model())
    model.config.fusion["agreement"] = False  # as in earlier exports without it
    model.save_pretrained(tmp_path)
    assert SpeechImageModel.from_pretrained(tmp_path).config.match_weight is None
    model.config.fusion["agreement"] = True
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"match logit depends on the embeddings \(fusion.agreement\)"):
        SpeechImageModel.from_pretrained(tmp_path)


def test_the_fitted_weight_is_saved_with_the_model(tmp_path):
    model = build_model(tiny_model())
    model.config.match_weight = 0.125
    model.save_pretrained(tmp_path)
    assert SpeechImageModel.from_pretrained(tmp_path).config.match_weight == 0.125


@pytest.mark.parametrize("outwards", [1, -1], ids=["low", "high"])
def test_temperature_does_not_drift_beyond_its_bounds(outwards):
    temperature = Temperature(0.02, 0.01, 0.04)
    optimizer = torch.optim.AdamW(temperature.parameters(), lr=1e-2, weight_decay=0.0)

    def step(direction: int) -> float:
        optimizer.zero_grad()
        (direction * temperature()).backward()
        optimizer.step()
        return temperature().item()

    reached = [step(outwards) for _ in range(1000)][-1]
    assert reached == pytest.approx(0.01 if outwards == 1 else 0.04, rel=1e-3)
    returning = [step(-outwards) for _ in range(40)]
    assert abs(returning[-1] - reached) / reached > 0.05, "it drifted while it was clamped"


def test_temperature_comes_from_the_configuration(tmp_path):
    contrastive = config.Contrastive(
        temperature=0.05, min_temperature=0.01, max_temperature=0.1, learn_temperature=False
    )
    build_model(tiny_model(), contrastive).save_pretrained(tmp_path)
    temperature = SpeechImageModel.from_pretrained(tmp_path).temperature
    assert temperature().item() == pytest.approx(0.05)
    assert (temperature.minimum, temperature.maximum) == (0.01, 0.1)
    assert not temperature.log_temperature.requires_grad


def test_embeddings_have_unit_length():
    speech, _, image, _, _ = results(build())
    for embedding in (speech, image):
        assert embedding.shape == (3, 16)
        torch.testing.assert_close(embedding, F.normalize(embedding, dim=1))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.speech.config.update(hidden_sise=1), r"model\.speech\.config\.hidden_sise: no such value"),
        (lambda m: m.speech.config.update(conv_dim=[32]), r"model\.speech\.config: .*conv_dim"),
        (
            lambda m: m.image.config.update(num_attention_heads=5),
            r"model\.image\.config.*attention.heads(: 5 does not| \(5\))",
        ),
        (lambda m: setattr(m.speech, "head_heads", 5), r"model\.speech\.head_heads: 5 does not divide the width 32"),
        (lambda m: setattr(m.fusion, "heads", 3), r"model\.fusion\.heads: 3 does not divide the width 32"),
        (lambda m: setattr(m.image, "train", "most"), r"model\.image\.train: expected none, all or a number"),
    ],
)
def test_inconsistent_values_are_refused(edit, message):
    model = tiny_model()
    edit(model)
    with pytest.raises(UserError, match=message):
        build_model(model)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_saved_weights_have_the_permissions_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        build().save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()} == {mode}
