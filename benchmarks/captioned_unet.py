"""A text-to-image network with a trained text encoder in PyTorch, for networks.py.

diffusers' `UNet2DConditionModel` has spatial transformers (norms, attention, MLP) where ours has two attentions, among
the pixels and to the tokens. Two of diffusers' `Attention`s replace each of them; the other blocks are diffusers' own.
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention


class Attentions(torch.nn.Module):
    """Called as the blocks call a `Transformer2DModel`."""

    def __init__(self, channels, states):
        super().__init__()
        common = {
            "heads": 1,
            "dim_head": channels,
            "norm_num_groups": 32,
            "eps": 1e-6,
            "bias": True,
            "residual_connection": True,
        }
        self.pixels = Attention(channels, **common)
        self.tokens = Attention(channels, cross_attention_dim=states, **common)

    def forward(self, hidden_states, encoder_hidden_states, encoder_attention_mask, **_):
        hidden_states = self.pixels(hidden_states)
        return (self.tokens(hidden_states, encoder_hidden_states, attention_mask=encoder_attention_mask),)


class CaptionedUNet(torch.nn.Module):
    """The UNet, and the encoder: a vector for each token and its position, Transformer layers, and a norm."""

    def __init__(self, text, options):
        """`text` is config.text, `options` are those of the UNet."""
        super().__init__()
        self.dropout = text.dropout
        self.unet = UNet2DConditionModel(
            attention_head_dim=1,
            cross_attention_dim=text.width,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=text.width,
            **options,
        )
        for block in (*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks):
            if hasattr(block, "attentions"):
                channels = block.resnets[-1].out_channels
                block.attentions = torch.nn.ModuleList(Attentions(channels, text.width) for _ in block.attentions)
        self.tokens = torch.nn.Embedding(text.vocab_size, text.width)
        self.positions = torch.nn.Parameter(0.02 * torch.randn(text.max_length, text.width))
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(
                text.width, text.num_heads, 4 * text.width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(text.num_layers)
        )
        self.norm = torch.nn.LayerNorm(text.width)

    def forward(self, x_t, t, ids, mask):
        return self.denoise(x_t, t, *self.encode(ids, mask))

    def encode(self, ids, mask):
        """What `denoise` takes, so that sampling runs the encoder once."""
        if self.training:
            dropped = torch.rand(len(ids), 1, device=ids.device) < self.dropout
            ids = torch.where(dropped, 0, ids)
            mask = torch.where(dropped, torch.arange(ids.shape[1], device=ids.device) < 1, mask)
        states = self.tokens(ids) + self.positions
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=~mask)
        states = self.norm(states)
        pooled = torch.einsum("bl,bld->bd", mask / mask.sum(-1, keepdim=True), states)
        return states, pooled, mask

    def denoise(self, x_t, t, states, pooled, mask):
        return self.unet(x_t, t, states, class_labels=pooled, encoder_attention_mask=mask)


def captions(text, told, batch_size, device):
    """Random tokens, and the mask of those that are not padding."""
    mask = (torch.arange(text.max_length, device=device) < told).expand(batch_size, text.max_length)
    return torch.randint(0, text.vocab_size, (batch_size, text.max_length), device=device), mask
