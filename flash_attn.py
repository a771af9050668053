"""Flash attention, forward pass, in Helion: softmax(q k^T * scale) v without the score matrix.

    from flash_attn import flash_attention
    out = flash_attention(q, k, v)          # [B, H, S, D] in, [B, H, S, D] out

Copy this file and configs.py into your project: together they are the whole kernel.

The algorithm is FlashAttention-2 (Dao, arXiv:2307.08691): one tile of queries walks over the keys
and keeps the running maximum m_i, the running sum l_i and the unnormalised output acc of its rows.
The exponentials are in base 2, which is the one that the hardware has.
"""
import math
import os

import torch

import configs  # first: it makes helion importable on older torch
import helion
import helion.language as hl

LOG2E = 1.4426950408889634  # log2(e): exp(x) = 2^(x log2(e))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128, 256)


def online_softmax(qk, m_i, l_i, qk_scale):
    """Fold one tile of raw scores into the running softmax of its rows.

    qk: [..., rows, keys] float32. m_i, l_i: [..., rows] float32, maximum and sum so far.
    Returns p, the tile's unnormalised probabilities; alpha, by which everything summed up before
    has to shrink; and the new m_i, l_i. The scale is applied here, in float32: on q in bf16 it
    would round every logit once more than SDPA does. `qk * qk_scale - m` is one FMA.
    """
    m_ij = torch.maximum(m_i, torch.amax(qk, -1) * qk_scale)
    p = torch.exp2(qk * qk_scale - m_ij.unsqueeze(-1))
    alpha = torch.exp2(m_i - m_ij)
    return p, alpha, m_ij, l_i * alpha + torch.sum(p, -1)


# "ieee": float32 inputs are multiplied as float32, not as tf32. It does not touch bf16 and fp16.
@helion.kernel(static_shapes=True, dot_precision="ieee")
def attention_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qk_scale: hl.constexpr
) -> torch.Tensor:
    """The canonical loop. q: [B, H, M, D]; k, v: [B, H, N, D]; qk_scale: scale * log2(e)."""
    B, H, M, D = q.size()
    N = k.size(2)
    D = hl.specialize(D)
    q_bh, k_bh, v_bh = q.reshape(B * H, M, D), k.reshape(B * H, N, D), v.reshape(B * H, N, D)
    out = torch.empty([B * H, M, D], dtype=q.dtype, device=q.device)
    for tile_b, tile_m in hl.tile([B * H, M]):
        m_i = hl.full([tile_b, tile_m], float("-inf"), dtype=torch.float32)
        l_i = hl.zeros([tile_b, tile_m], dtype=torch.float32)
        acc = hl.zeros([tile_b, tile_m, D], dtype=torch.float32)
        q_tile = q_bh[tile_b, tile_m, :]
        for tile_n in hl.tile(N):
            k_tile = k_bh[tile_b, tile_n, :]
            qk = torch.bmm(q_tile, k_tile.transpose(1, 2), torch.float32)
            p, alpha, m_i, l_i = online_softmax(qk, m_i, l_i, qk_scale)
            acc = acc * alpha[:, :, None]
            v_tile = v_bh[tile_b, tile_n, :]
            acc = torch.baddbmm(acc, p.to(v_tile.dtype), v_tile)
        acc = acc * (1 / l_i)[:, :, None]  # one division a row instead of one an element
        out[tile_b, tile_m, :] = acc.to(out.dtype)
    return out.view(B, H, M, D)


@helion.kernel(
    static_shapes=True, dot_precision="ieee", ignore_warnings=[helion.exc.TensorOperationInWrapper]
)
def overlapped_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qk_scale: hl.constexpr,
    block_n: hl.constexpr,
) -> torch.Tensor:
    """The same sum in the order that keeps Hopper's tensor cores busy; arguments as above.

    In the canonical loop everything waits for everything: q k^T, softmax, p v, again. Here an
    iteration issues the product of the *previous* tile's p and v behind q k^T of this tile, and
    the softmax of this tile runs while the tensor cores work on it (FlashAttention-3, section 3.2,
    arXiv:2407.08608). So the first tile's scores come before the loop and the last p v after it.
    block_n is a constant and the loop covers whole tiles only: no masks inside. The keys left
    over, and fewer keys than one tile, take the canonical step at the end.
    """
    B, H, M, D = q.size()
    N = k.size(2)
    D = hl.specialize(D)
    n_full = N // block_n * block_n
    k_full, v_full = k.narrow(2, 0, n_full), v.narrow(2, 0, n_full)
    out = torch.empty_like(q)
    for tile_b, tile_m in hl.tile([B * H, M], block_size=[1, None]):
        b, h = tile_b.begin // H, tile_b.begin % H  # scalars: 2-D tiles of any [B, H] strides
        m_i = hl.full([tile_m], float("-inf"), dtype=torch.float32)
        l_i = hl.zeros([tile_m], dtype=torch.float32)
        acc = hl.zeros([tile_m, D], dtype=torch.float32)
        q_tile = q[b, h, tile_m, :]
        if n_full > 0:
            qk = hl.dot(q_tile, k_full[b, h, 0:block_n, :].T, out_dtype=torch.float32)
            p, alpha, m_i, l_i = online_softmax(qk, m_i, l_i, qk_scale)
            for tile_n in hl.tile(block_n, n_full, block_size=block_n):
                # v is loaded before q k^T is issued: then nothing but the product itself stands
                # between the two tensor-core phases. p stays float32 until it is used, so that it
                # reaches the tensor cores from registers and not through shared memory.
                v_tile = v_full[b, h, tile_n.index + (-block_n), :]
                qk = hl.dot(q_tile, k_full[b, h, tile_n, :].T, out_dtype=torch.float32)
                acc = hl.dot(p.to(v.dtype), v_tile, acc=acc)
                p, alpha, m_i, l_i = online_softmax(qk, m_i, l_i, qk_scale)
                acc = acc * alpha[:, None]
            v_tile = v_full[b, h, n_full - block_n : n_full, :]
            acc = hl.dot(p.to(v.dtype), v_tile, acc=acc)
        if n_full < N:
            for rest in hl.tile(n_full, N, block_size=block_n):
                qk = hl.dot(q_tile, k[b, h, rest, :].T, out_dtype=torch.float32)
                p, alpha, m_i, l_i = online_softmax(qk, m_i, l_i, qk_scale)
                acc = acc * alpha[:, None]
                acc = hl.dot(p.to(v.dtype), v[b, h, rest, :], acc=acc)
        out[b, h, tile_m, :] = (acc * (1 / l_i)[:, None]).to(out.dtype)
    return out
