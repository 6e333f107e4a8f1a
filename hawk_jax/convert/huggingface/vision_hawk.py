"""The modules of HAWK before the decoder: EVA ViT, Q-Former, projections, and what prepares their pictures.  Only torch.

Each is made from sizes alone and names its parameters as the authors' code does.  Norms, softmax and the ViT's residual stream are float32
in every dtype, everything else is in the dtype of the weights.  Axes as in modeling_hawk.py.
"""
import torch
import torch.nn.functional as F
from torch import nn

LN_VISION_EPS = 1e-5
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)     # of EVA-CLIP's training, RGB in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class LayerNorm(nn.LayerNorm):
    """In float32 whatever the input's dtype, which the result has again."""

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def attend(q_BSE, k_BUE, v_BUE, heads: int, dropout: float = 0.0):
    """softmax(q k / sqrt(width of a head)) v; torch's kernels keep scores and softmax in float32 for every dtype."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_BSE, k_BUE, v_BUE))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


class VitAttention(nn.Module):
    """Learned biases for q and v, none for k."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x_NPM):
        q, k, v = self.qkv(x_NPM).chunk(3, dim=-1)
        return self.proj(attend(q + self.q_bias.to(q.dtype), k, v + self.v_bias.to(v.dtype), self.heads))


class VitMlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_NPM):
        return self.fc2(F.gelu(self.fc1(x_NPM)))


class VitBlock(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.norm1, self.attn = LayerNorm(width, eps), VitAttention(width, heads)
        self.norm2, self.mlp = LayerNorm(width, eps), VitMlp(width, mlp)

    def forward(self, x_NPM, dtype):
        """x_NPM float32; matrix products in `dtype`."""
        x_NPM = x_NPM + self.attn(self.norm1(x_NPM).to(dtype))
        return x_NPM + self.mlp(self.norm2(x_NPM).to(dtype))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pictures_NCHW):
        return self.proj(pictures_NCHW).flatten(2).transpose(1, 2)


class EvaVit(nn.Module):
    """pictures_NCHW -> tokens_NPM of all patches, the class token first; no final norm.  picture: (height, width) in pixels."""

    def __init__(self, picture: tuple[int, int], patch: int, width: int, depth: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (picture[0] // patch) * (picture[1] // patch) + 1, width))
        self.blocks = nn.ModuleList(VitBlock(width, heads, mlp, eps) for _ in range(depth))

    def forward(self, pictures_NCHW):
        dtype = self.patch_embed.proj.weight.dtype
        x_NPM = self.patch_embed(pictures_NCHW.to(dtype)).float()
        cls_N1M = self.cls_token.float().expand(x_NPM.shape[0], -1, -1)
        x_NPM = torch.cat([cls_N1M, x_NPM], dim=1) + self.pos_embed.float()
        for block in self.blocks:
            x_NPM = block(x_NPM, dtype)
        return x_NPM.to(dtype)


# ------------------------------------------------------------------------------------------------ Q-Former, in BERT's names
class BertSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, inputs: int, dropout: float):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(inputs, width), nn.Linear(inputs, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x_BQE, source_BUE):
        dropout = self.dropout if self.training else 0.0
        return attend(self.query(x_BQE), self.key(source_BUE), self.value(source_BUE), self.heads, dropout)


class BertOutput(nn.Module):
    """norm(residual + dropout(dense(x)))."""

    def __init__(self, inputs: int, width: int, eps: float, dropout: float):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(inputs, width), LayerNorm(width, eps), nn.Dropout(dropout)

    def forward(self, x, residual_BQE):
        return self.LayerNorm(residual_BQE + self.dropout(self.dense(x)))


class BertAttention(nn.Module):
    def __init__(self, width: int, heads: int, inputs: int, eps: float, dropout: float):
        super().__init__()
        self.self = BertSelfAttention(width, heads, inputs, dropout)        # the name in the authors' state dict
        self.output = BertOutput(width, width, eps, dropout)

    def forward(self, x_BQE, source_BUE):
        return self.output(self.self(x_BQE, source_BUE), x_BQE)


class BertIntermediate(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.dense = nn.Linear(width, hidden)

    def forward(self, x_BQE):
        return F.gelu(self.dense(x_BQE))


class QFormerLayer(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, source: int | None, eps: float, dropout: float):
        super().__init__()
        self.attention = BertAttention(width, heads, width, eps, dropout)
        self.crossattention = BertAttention(width, heads, source, eps, dropout) if source else None
        self.intermediate_query = BertIntermediate(width, mlp)
        self.output_query = BertOutput(mlp, width, eps, dropout)

    def forward(self, x_BQE, source_BUE):
        x_BQE = self.attention(x_BQE, x_BQE)
        if self.crossattention is not None:
            x_BQE = self.crossattention(x_BQE, source_BUE)
        return self.output_query(self.intermediate_query(x_BQE), x_BQE)


class QFormerEncoder(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layer = nn.ModuleList(layers)


class QFormerEmbeddings(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.LayerNorm = LayerNorm(width, eps)


class QFormerBert(nn.Module):
    """(queries_1QE, source_BUE) -> tokens_BQE; layers 0, freq, 2 freq, ... attend to the source, whose width is `source`."""

    def __init__(self, width: int, depth: int, heads: int, mlp: int, source: int, cross_attention_freq: int, eps: float, dropout: float):
        super().__init__()
        self.embeddings, self.dropout = QFormerEmbeddings(width, eps), nn.Dropout(dropout)
        self.encoder = QFormerEncoder(QFormerLayer(width, heads, mlp, None if i % cross_attention_freq else source, eps, dropout)
                                      for i in range(depth))

    def forward(self, queries_1QE, source_BUE):
        x_BQE = self.embeddings.LayerNorm(queries_1QE.to(source_BUE.dtype)).expand(source_BUE.shape[0], -1, -1)
        x_BQE = self.dropout(x_BQE)
        for layer in self.encoder.layer:
            x_BQE = layer(x_BQE, source_BUE)
        return x_BQE


class QFormer(nn.Module):
    """A `QFormerBert` under the name `bert`; sizes: an `image_qformer` or `video_qformer` of the configuration."""

    def __init__(self, sizes: dict, source: int):
        super().__init__()
        self.bert = QFormerBert(sizes["width"], sizes["depth"], sizes["heads"], sizes["mlp"], source, sizes["cross_attention_freq"],
                                sizes["eps"], sizes["dropout"])

    def forward(self, queries_1QE, source_BUE):
        return self.bert(queries_1QE, source_BUE)


class Projection(nn.Module):
    """x -> (tokens for the decoder, compressed tokens); linear throughout, the first layer is shared."""

    def __init__(self, width: int, compressed: int):
        super().__init__()
        self.encoder_0, self.encoder_1 = nn.Linear(width, width), nn.Linear(width, compressed)
        self.decoder_2 = nn.Linear(width, width)

    def forward(self, x_BQD):
        h_BQD = self.encoder_0(x_BQD)
        return self.decoder_2(h_BQD), self.encoder_1(h_BQD)


# ------------------------------------------------------------------------------------------------ pictures
def resize(pictures_NCHW, picture: tuple[int, int], antialias: bool):
    """Bicubic in float32, not clipped; float pictures of any size -> `picture` (height, width)."""
    return F.interpolate(pictures_NCHW.float(), size=picture, mode="bicubic", align_corners=False, antialias=antialias)


def normalise(pictures_NCHW, pixels: str, overshoot: str):
    """Grey levels outside 0..255 clipped (or truncated and wrapped modulo 256, as the released code's cast does), then scaled."""
    if overshoot == "clip":
        pictures_NCHW = pictures_NCHW.clamp(0.0, 255.0)
    else:
        pictures_NCHW = torch.remainder(torch.trunc(pictures_NCHW), 256.0)
    pictures_NCHW = pictures_NCHW / 255.0
    if pixels == "unit":
        return pictures_NCHW
    mean, std = (pictures_NCHW.new_tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (pictures_NCHW - mean) / std
