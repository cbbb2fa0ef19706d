"""The network of configs/numbers.py in PyTorch, for train_step.py: diffusers' UNet and a trained text encoder.

diffusers' `UNet2DConditionModel` has spatial transformers (norms, attention, MLP) where ours has two attentions, among
the pixels and to the tokens. Two of diffusers' `Attention`s replace each of them; the other blocks are diffusers' own.
"""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

VOCAB_SIZE, LENGTH, WIDTH = 512, 12, 64
TOLD = 9  # tokens of a caption, the others are padding
DROPOUT = 0.1  # the share of captions that are dropped


class Attentions(torch.nn.Module):
    """Called as the blocks call a `Transformer2DModel`."""

    def __init__(self, channels):
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
        self.tokens = Attention(channels, cross_attention_dim=WIDTH, **common)

    def forward(self, hidden_states, encoder_hidden_states, encoder_attention_mask, **_):
        hidden_states = self.pixels(hidden_states)
        return (self.tokens(hidden_states, encoder_hidden_states, attention_mask=encoder_attention_mask),)


class CaptionedUNet(torch.nn.Module):
    """The UNet and the encoder, a vector for each token and its position, and a norm."""

    def __init__(self):
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=(8, 16),
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=1,
            cross_attention_dim=WIDTH,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=WIDTH,
            norm_eps=1e-6,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
        )
        for block in (self.unet.down_blocks[1], self.unet.mid_block, self.unet.up_blocks[0]):
            block.attentions = torch.nn.ModuleList([Attentions(64) for _ in block.attentions])
        self.tokens = torch.nn.Embedding(VOCAB_SIZE, WIDTH)
        self.positions = torch.nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, x_t, t, ids, mask):
        dropped = torch.rand(len(ids), 1, device=ids.device) < DROPOUT
        ids, mask = (
            torch.where(dropped, 0, ids),
            torch.where(dropped, torch.arange(LENGTH, device=ids.device) < 1, mask),
        )
        states = self.norm(self.tokens(ids) + self.positions)
        pooled = torch.einsum("bl,bld->bd", mask / mask.sum(-1, keepdim=True), states)
        return self.unet(x_t, t, states, class_labels=pooled, encoder_attention_mask=mask)


def captions(batch_size, device):
    """Random tokens and the mask of those that are not padding."""
    mask = (torch.arange(LENGTH, device=device) < TOLD).expand(batch_size, LENGTH)
    return torch.randint(0, VOCAB_SIZE, (batch_size, LENGTH), device=device), mask
