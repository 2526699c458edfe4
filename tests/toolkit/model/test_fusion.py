import pytest
import torch
from torch import nn

from toolkit.model.fusion import Denoiser, FusionEncoder, pool_tokens, sinusoids
from toolkit.model.layers import Attention

WIDTH, HEADS = 32, 4


def make_fusion(layers=2, pool=1, output="tokens") -> FusionEncoder:
    torch.manual_seed(0)
    return FusionEncoder(24, 20, WIDTH, layers, HEADS, dropout=0.0, pool=pool, output=output)


def make_inputs():
    torch.manual_seed(1)
    queries, context = torch.randn(3, 6, 24), torch.randn(3, 5, 20)
    query_mask = torch.arange(6) < torch.tensor([6, 3, 1])[:, None]
    context_mask = torch.arange(5) < torch.tensor([2, 5, 4])[:, None]
    return queries, query_mask, context, context_mask


def torch_decoder(fusion: FusionEncoder) -> nn.ModuleList:
    """torch's own pre-norm decoder layers with the same weights."""
    layers = nn.ModuleList()
    for mine in fusion.layers:
        other = nn.TransformerDecoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        pairs = ((other.self_attn, mine.self_attention), (other.multihead_attn, mine.cross_attention))
        for theirs, attention in pairs:
            theirs.in_proj_weight.data = torch.cat([attention.query.weight, attention.key_value.weight]).detach()
            theirs.in_proj_bias.data = torch.cat([attention.query.bias, attention.key_value.bias]).detach()
            theirs.out_proj.load_state_dict(attention.output.state_dict())
        other.linear1.load_state_dict(mine.feed_forward[0].state_dict())
        other.linear2.load_state_dict(mine.feed_forward[3].state_dict())
        layers.append(other)
    return layers


def test_fusion_is_a_pre_norm_decoder():
    fusion = make_fusion()
    queries, query_mask, context, context_mask = make_inputs()
    x = fusion.query_input(queries) + sinusoids(6, WIDTH, queries.device)
    memory = fusion.context_input(context) + sinusoids(5, WIDTH, queries.device)
    for layer in torch_decoder(fusion):
        x = layer(x, memory, tgt_key_padding_mask=~query_mask, memory_key_padding_mask=~context_mask)

    got = fusion(queries, query_mask, context, context_mask)

    torch.testing.assert_close(got[query_mask], fusion.norm(x)[query_mask], atol=1e-5, rtol=1e-5)


def test_only_the_class_token_is_computed_in_the_last_layer():
    fusion = make_fusion(layers=2, output="cls")
    queries, query_mask, context, context_mask = make_inputs()
    x = fusion.query_input(queries) + sinusoids(6, WIDTH, queries.device)
    x, mask = fusion.class_token(x, query_mask)
    memory = fusion.context_input(context) + sinusoids(5, WIDTH, queries.device)
    for layer in fusion.layers:
        x = layer(x, mask, memory, context_mask, first_only=False)

    got = fusion(queries, query_mask, context, context_mask)

    assert got.shape == (3, 1, WIDTH)
    torch.testing.assert_close(got, fusion.norm(x)[:, :1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("output", ["cls", "tokens"])
@pytest.mark.parametrize("pool", [1, 2, 4])
def test_padding_does_not_change_the_output(output, pool):
    fusion = make_fusion(pool=pool, output=output)
    queries, query_mask, context, context_mask = make_inputs()
    padded = fusion(queries, query_mask, context, context_mask)
    for row, (length, width) in enumerate(zip(query_mask.sum(1), context_mask.sum(1), strict=True)):
        alone = fusion(queries[row : row + 1, :length], None, context[row : row + 1, :width], None)
        torch.testing.assert_close(padded[row, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)


def test_pooling_averages_neighboring_frames_without_padding():
    tokens = torch.arange(10.0).view(1, 10, 1)
    mask = torch.arange(10)[None] < 7
    pooled, kept = pool_tokens(tokens, mask, 4)
    assert pooled.flatten().tolist() == [1.5, 5.0, 0.0]
    assert kept.tolist() == [[True, True, False]]
    pooled, kept = pool_tokens(tokens, None, 4)
    assert pooled.flatten().tolist() == [1.5, 5.5, 8.5]
    assert kept is None or kept.all()


def test_padding_that_is_not_finite_is_not_pooled():
    tokens = torch.full((1, 4, 2), float("nan"))
    tokens[:, :3] = 1.0
    pooled, _ = pool_tokens(tokens, torch.tensor([[True, True, True, False]]), 2)
    assert torch.equal(pooled, torch.ones(1, 2, 2))


def test_cross_attention_is_skipped_without_context():
    fusion = make_fusion()
    queries, query_mask, _, _ = make_inputs()
    with torch.no_grad():
        before = fusion(queries, query_mask, None)
        for layer in fusion.layers:
            for parameter in layer.cross_attention.parameters():
                parameter.fill_(float("nan"))
        assert torch.equal(fusion(queries, query_mask, None), before)


def test_the_order_of_queries_and_of_context_matters():
    fusion = make_fusion(output="cls")
    queries, _, context, _ = make_inputs()
    straight = fusion(queries, None, context)
    assert not torch.allclose(straight, fusion(queries.flip(1), None, context), atol=1e-3)
    assert not torch.allclose(straight, fusion(queries, None, context.flip(1)), atol=1e-3)


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids(width):
    table = sinusoids(5, width, torch.device("cpu"))
    assert table.shape == (5, width)
    torch.testing.assert_close(table[:, 0], torch.arange(5.0).sin())
    assert len({tuple(row.tolist()) for row in table}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denoiser_returns_tokens_and_uses_the_context(dtype):
    torch.manual_seed(0)
    denoiser = Denoiser(24, 20, WIDTH, 2, HEADS, dropout=0.0).to(dtype)
    queries, query_mask, context, context_mask = make_inputs()
    queries, context = queries.to(dtype).requires_grad_(), context.to(dtype).requires_grad_()
    predicted = denoiser(queries, query_mask, context, context_mask)
    assert (predicted.shape, predicted.dtype) == (queries.shape, dtype)
    predicted[query_mask].float().square().sum().backward()
    assert (context.grad.abs().sum(dim=2) > 0).equal(context_mask), (
        "gradient should reach exactly the context without padding"
    )
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
    assert denoiser(queries, query_mask, None).shape == queries.shape


def test_attention_is_initialized_like_torchs():
    torch.manual_seed(0)
    width = 256
    mine, theirs = Attention(width, 4, 0.0), nn.MultiheadAttention(width, 4)
    pairs = [
        (torch.cat([mine.query.weight, mine.key_value.weight]), theirs.in_proj_weight),
        (mine.output.weight, theirs.out_proj.weight),
    ]
    for ours, torchs in pairs:
        assert ours.shape == torchs.shape
        assert ours.std().item() == pytest.approx(torchs.std().item(), rel=0.01)
        assert ours.abs().max().item() == pytest.approx(torchs.abs().max().item(), rel=0.01)
    for linear in (mine.query, mine.key_value, mine.output):
        assert not linear.bias.any()
