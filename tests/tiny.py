"""Small configurations for tests."""

from toolkit.config import schema as config

HUBERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [32, 32, 32],
    "conv_kernel": [20, 8, 8],
    "conv_stride": [10, 8, 8],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 1,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}

# For ZeRO 3: its defaults leave weights as small as these unpartitioned, and search the rest of the step for the next
# use of a module's weights, which takes as long as such steps themselves.
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}}


def tiny_model() -> config.Model:
    """HuBERT of 2 layers of 32 (25 frames per second), ViT of 2 layers of 32 at 32 px, 1 fusion layer; fully trained.

    Without dropout: the same input and weights give the same output in training mode.
    """
    return config.Model(
        embed_dim=16,
        speech=config.Speech(config=dict(HUBERT), train="all", head_layers=1, head_heads=4, dropout=0.0),
        image=config.Image(config=dict(VIT), train="all", head_layers=0, head_heads=4, dropout=0.0),
        fusion=config.Fusion(width=32, layers=1, heads=4, pool=2, dropout=0.0),
    )
