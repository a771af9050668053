"""Is flash_attn.py right? In the order of a sceptic's questions: what is right (1), which cases are
run (2), and how (3 to 6), what replaces a GPU where there is none (7), the runner (8).

    python check.py             # everything; the last line is `N passed, N failed`
    python check.py -k hopper   # only the cases with "hopper" in their name
    python check.py --list      # the cases, and the seconds that the slow ones take
    python check.py -k search --search 5000   # more random rows

On a GPU the real kernels run. Without a GPU Triton's interpreter executes the Triton code that
Helion generates, with its tiles, masks and order of programs; and GPUs' code is compiled.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import itertools
import math
import multiprocessing
import multiprocessing.util
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
GPU = torch.cuda.is_available()
DEVICE, INF = "cuda" if GPU else "cpu", math.inf
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, which reads it

import configs
import flash_attn
import helion
import triton
from flash_attn import flash_attention
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention.bias import CausalVariant

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in flash_attn.DTYPES}
SPAWN = multiprocessing.get_context("spawn")  # a fork of CUDA's or Triton's state breaks
raises = unittest.TestCase().assertRaisesRegex

# ---- 1. What is right ----------------------------------------------------------------------------


class Rows(collections.namedtuple("Rows", "first last")):  # `visible`
    __repr__ = lambda self: f"Rows{tuple(self.first.shape)}"


def sees(M, N, mask):
    """[M, N] or [B, 1, M, N]: whether row i sees key j. mask: is_causal, (is_causal, window), or
    Rows, as flash_attention takes them."""
    if isinstance(mask, Rows):
        first, last = (x[..., None] for x in mask)
        key = torch.arange(N, device=DEVICE)
        found = (first <= key) & (key <= last)
        return found if found.dim() == 2 else found[:, None]
    is_causal, window = mask if isinstance(mask, tuple) else (mask, (None, None))
    left, right = (INF if x is None or x < 0 else x for x in window)
    aligned = 0 if is_causal in (True, CausalVariant.UPPER_LEFT) else N - M
    distance = torch.arange(N, device=DEVICE) - torch.arange(M, device=DEVICE)[:, None] - aligned
    return (distance >= -left) & (distance <= (0 if is_causal else right))


def asked(mask):
    """The arguments of flash_attention that make this mask."""
    if isinstance(mask, Rows):
        return dict(visible=mask)
    return dict(zip(("is_causal", "window"), mask if isinstance(mask, tuple) else (mask, None)))


def definition(q, k, v, is_causal=False, scale=None, softcap=None):
    """Attention by its formula, and lse. A row that sees no key: out 0, lse -inf, no gradient."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    scores = q @ k.mT * (q.size(3) ** -0.5 if scale is None else scale)
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    mask = sees(q.size(2), k.size(2), is_causal)
    some = mask.any(-1)
    scores = scores.masked_fill(~mask, -math.inf).where(some[..., None], 0.0)
    out = scores.softmax(-1).where(some[..., None], 0.0) @ v
    return out, scores.logsumexp(-1).where(some, -math.inf)


def tolerance(ref, other, factor, unit=1.0, least=0.0):
    """flash-attention's tolerance for the largest error against a reference in high precision:
        factor * max|other - ref| + 2 * max|ref + 0.3 - 0.3 - ref|
    other: PyTorch's result in the same dtype. The second term is one rounding of numbers of size 1
    (hopper/test_flash_attn.py of Dao-AILab/flash-attention). factor: 2 for out (there), 3 for dq,
    dk and dv (tests/test_flash_attn.py). unit: the size of the numbers, if not 1. least: PyTorch's
    error counts at least as much."""
    low = ref.to(other.dtype)
    rounding = (low + 0.3 * unit - 0.3 * unit - low).abs().max().item()
    return factor * max((other - ref).abs().max().item(), least) + 2 * rounding


def sdpa(q, k, v, is_causal=False, scale=None, softcap=None):
    """PyTorch's attention. It has no softcap: then p by the formula in float32, rounded once."""
    if softcap:
        ones = torch.eye(k.size(2), device=DEVICE).expand(*k.shape[:3], -1)
        p, _ = definition(q.float(), k.float(), ones, is_causal, scale, softcap)
        return p.to(v.dtype) @ v.repeat_interleave(q.size(1) // v.size(1), 1)
    mask = None if is_causal is False else sees(q.size(2), k.size(2), is_causal)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


# ---- 2. The cases --------------------------------------------------------------------------------
HEAD_DIMS = (16, 32, 64, 128, 256)  # others are padded with zeros
D = 128 if GPU else 64  # the head dim of most cases; the interpreter is slow
NAMED = {**configs.CONFIGS, "hopper": configs.HOPPER, "hopper_64": configs.HOPPER_64,
         "hopper_256": configs.HOPPER_256, "few": configs.HOPPER_FEW, "default": None,
         "general": configs.HOPPER_GENERAL, "blackwell": configs.BLACKWELL_CUTE}  # fmt: skip
LOWER_RIGHT = CausalVariant.LOWER_RIGHT
MASKS = {"dense": False, "upper_left": True, "lower_right": LOWER_RIGHT}
WINDOWS = {"window": (False, (70, 40)), "left": (False, (150, None)), "right": (False, (-1, 90)),
           "window_upper": (True, (100, -1)), "window_lower": (LOWER_RIGHT, (130, 0)),
           "diagonal": (False, (0, 0))}  # fmt: skip


def random_rows(B, M, N, grows):
    """Rows whose ends are anywhere, also beyond the keys; or where both ends grow with the row."""
    noise = torch.Generator().manual_seed(0)
    first, last = (torch.randint(-5, N + 5, (B, M), generator=noise) for _ in range(2))
    first[:, 7], last[:, 5], last[:, 9] = 2**31 - 1, -(2**31), 2**31 - 1
    if grows:
        first = first.sort(1).values
        last = first + torch.randint(-2, 60, (B, M), generator=noise)
        last = last.cummax(1).values.clamp(max=2**31 - 1)
    return first.int().to(DEVICE), last.int().to(DEVICE)


def packed_rows(B, M, N, **options):
    """Four sequences, one without queries, one without keys, and rows that belong to none."""
    ends = lambda *x: torch.tensor((0, *x), dtype=torch.int32, device=DEVICE)
    cu_q, cu_k = ends(M // 3, M // 3, M - 40, M - 7), ends(N // 4, N // 3, N - 9, N - 9)
    return flash_attn.packed(cu_q, cu_k, M, **options)


def padded_rows(B, M, N, **options):
    """Row b of the batch has b + 1 keys less on one side."""
    mask = torch.ones(B, N, dtype=torch.int64, device=DEVICE)
    for b in range(B):
        mask[b, : b + 1] = mask[b, N - 60 * b :] = 0
    return flash_attn.padded(mask, M, **options)


INTERVALS = {
    "random": functools.partial(random_rows, grows=False),
    "growing": functools.partial(random_rows, grows=True),
    "packed": packed_rows, "packed_causal": functools.partial(packed_rows, is_causal=True),
    "packed_window": functools.partial(packed_rows, window=(30, 5)),
    "padded": padded_rows, "padded_causal": functools.partial(padded_rows, is_causal=True),
    "edges": lambda B, M, N: [  # the last key of a tile and the first of the next
        torch.full((B, M), x, dtype=torch.int32, device=DEVICE) for x in (127, 128)],
}  # fmt: skip


def mask_of(name, B, M, N):
    known = MASKS | WINDOWS
    return known[name] if name in known else Rows(*INTERVALS[name](B, M, N))


REPORT, BF16, FP16 = tuple(configs.CONFIGS), ("bfloat16",), ("float16",)
HALF = BF16 + FP16
FLOAT, TWO = ("float32",), ("bfloat16", "float32")  # in plain kernels fp16 is another dtype only
PLANS = ("hopper", "general", "default") if GPU else ("hopper", "default")
OURS = ("general", "default") if GPU else ("default",)
HOPPER, DEFAULT, H64, H256 = ("hopper",), ("default",), ("hopper_64",), ("hopper_256",)
# Groups of 1, 2 and 8 heads; one query; rows that see no key; diagonals inside of tiles.
MASKED = ((1, 2, 2, 128, 256), (1, 2, 1, 450, 450), (1, 8, 1, 129, 520), (1, 2, 2, 300, 140),
          (1, 4, 2, 1, 400), (1, 2, 2, 384, 128), (1, 2, 2, 2, 129))  # fmt: skip
WINDOWED = (1, 2, 1, 300, 300), (1, 2, 2, 128, 400), (1, 2, 2, 400, 130)
ROWS_CASES = (2, 2, 1, 300, 340), (2, 2, 2, 130, 260)
FEW = (1, 8, 2, 1, 700), (1, 4, 1, 3, 1300), (2, 4, 4, 9, 300), (1, 16, 1, 4, 513)
SHAPE = (1, 2, 2, 129, 300)
FORWARD = [  # configs, dtypes, D, mask, layout, and (B, H, Hk, M, N) of each case
    # Lengths: one query, one key, less than a tile, a tile, a tile and one more, ragged.
    (PLANS, BF16, D, "dense", "bhsd", (2, 1, 1, 1, 1), (2, 1, 1, 17, 17), (2, 1, 1, 128, 128),
     (2, 2, 2, 129, 129), (1, 3, 3, 300, 1), (1, 3, 3, 300, 129), (1, 3, 3, 300, 520)),
    (HOPPER, FP16, D, "dense", "bhsd", (1, 3, 3, 300, 1), (1, 3, 3, 300, 256)),
    (H64, HALF, 64, "dense", "bhsd", (2, 2, 2, 300, 129)),
    (H256, HALF, 256, "dense", "bhsd", (1, 3, 3, 129, 256), (1, 1, 1, 300, 300)),
    (REPORT, BF16, D, "dense", "bhsd", (1, 3, 3, 300, 129), (1, 3, 3, 17, 520)),
    # Head dims. Padded ones may not read what lies beside them.
    *((HOPPER, HALF, dim, "dense", "bhsd", SHAPE) for dim in (16, 64, 128)),
    *((OURS, TWO, dim, "dense", "bhsd", SHAPE) for dim in (16, 64, 128)),
    (PLANS, BF16, 32, "dense", "bhsd", SHAPE),
    (OURS, HALF, 256, "dense", "bhsd", SHAPE),
    (REPORT, FP16, D, "dense", "bhsd", SHAPE),
    (("autotuned",), FLOAT, 16, "dense", "bhsd", SHAPE),
    (("autotuned",), BF16, 256, "dense", "bhsd", SHAPE),
    *((names, dtypes, dim, "upper_left", "poisoned", (2, 2, 2, 150, 200))
      for names, dtypes, dim in ((PLANS, BF16, 8), (OURS, TWO, 24), (HOPPER, HALF, 72),
                                 (OURS, BF16, 72), (H64, BF16, 40), (H256 + OURS, BF16, 136))),
    (H256, BF16, 192, "dense", "poisoned", (2, 2, 2, 150, 200)),
    # Masks; and keys that a row does not see, in its own tile, larger by 2^20 than all it sees.
    *(row for mask in ("upper_left", "lower_right") for row in (
        (PLANS, BF16, D, mask, "bhsd", *MASKED),
        (HOPPER, FP16, D, mask, "bhsd", *MASKED[::3]),
        (OURS, FLOAT, D, mask, "bhsd", *MASKED[1::3]),
        (H64, BF16, 64, mask, "bhsd", *MASKED[1::2]),
        (H256, HALF, 256, mask, "bhsd", *MASKED[::3]))),
    (H64, BF16, 64, "upper_left", "bhsd", (1, 4, 2, 600, 600)),  # pairs of three tiles
    *((names, dtypes, dim, mask, "unseen", (1, 1, 1, M, N))
      for names, dtypes, dim in ((HOPPER, HALF, D), (OURS, BF16, D), (H64, BF16, 64),
                                 (H256, BF16, 256))
      for mask, M, N in (("upper_left", 256, 256), ("lower_right", 200, 328),
                         ("lower_right", 150, 300))),
    # Layouts. TMA does not read the last ones: the Hopper kernel gets copies.
    *((PLANS, BF16, D, "dense", layout, (2, 2, 2, 129, 300)) for layout in (
        "bshd", "packed", "one_head", "sbhd", "odd", "shifted", "columns", "one_row", "one_batch")),
    (H256, BF16, 256, "dense", "packed", (2, 2, 2, 129, 300)),
    (REPORT, BF16, D, "dense", "bshd", (2, 2, 2, 129, 300)),
    *((("tile128",), BF16, D, "dense", layout, (2, 2, 2, 129, 300))
      for layout in ("packed", "odd")),
    # Windows and `visible`.
    *((PLANS, BF16, D, mask, "bhsd", *WINDOWED) for mask in WINDOWS),
    *((HOPPER + H64 + H256, HALF, 64, mask, "bhsd", WINDOWED[i])
      for i, mask in enumerate(("window", "left"))),
    *((PLANS, BF16, D, mask, "bhsd", *ROWS_CASES) for mask in INTERVALS),
    (HOPPER, FP16, D, "random", "bhsd", ROWS_CASES[0]),
    (OURS, FLOAT, D, "random", "bhsd", ROWS_CASES[0]),
    (H64, BF16, 64, "packed_causal", "bhsd", ROWS_CASES[0]),
    *((H256, BF16, 256, mask, "bhsd", WINDOWED[0]) for mask in ("window", "random")),
    # Few queries: rows of one tile, and programs that share the keys.
    *((DEFAULT, BF16, D, mask, "bhsd", *FEW)
      for mask in ("lower_right", "window_lower", "padded_causal")),
    *((DEFAULT, BF16, D, mask, "bhsd", FEW[1]) for mask in ("dense", "upper_left")),
    *((DEFAULT, dtypes, dim, "lower_right", layout, FEW[1]) for dtypes, dim, layout in (
        (TWO, D, "bshd"), (BF16, 24, "poisoned"), (FP16, 256, "odd"), (FLOAT, 16, "columns"))),
    (DEFAULT, FLOAT, 128, "window_lower", "bhsd", FEW[3]),  # two tiles of 32 rows
]  # fmt: skip
BOTH = HOPPER + DEFAULT  # Hopper's kernels of the gradient, and the others
KEPT = BOTH if D > 64 else DEFAULT  # Hopper's keep no ds at D = 64
GRADIENT = [  # and what of ds is kept at a time: all, two heads of keys, 128 queries of one head
    (BOTH, BF16, D, "dense", "bshd", "all", (1, 2, 2, 128, 256), (1, 2, 2, 1, 200)),
    (HOPPER, FP16, D, "dense", "bshd", "all", (1, 2, 2, 128, 256)),
    (DEFAULT, FLOAT, D, "dense", "bshd", "all", (1, 2, 2, 1, 200)),
    *((names, BF16, dim, "dense", "bshd", "all", (1, 1, 1, 130, 140))
      for names, dim in ((HOPPER, 64), (DEFAULT, 128), (DEFAULT, 256))),
    (HOPPER, FP16, D, "upper_left", "bshd", "all", (1, 2, 1, 150, 200)),
    (KEPT, BF16, D, "dense", "bshd", "heads", (2, 4, 2, 150, 300)),
    (BOTH, BF16, D, "upper_left", "bshd", "queries", (2, 4, 2, 150, 300)),
    (KEPT, BF16, D, "lower_right", "bhsd", "queries", (2, 4, 2, 150, 300), (1, 4, 2, 1, 200)),
    (DEFAULT, FLOAT, D, "upper_left", "bhsd", "queries", (1, 4, 2, 150, 200)),
    (BOTH, BF16, 16, "lower_right", "bshd", "heads", (1, 10, 5, 200, 140)),
    (BOTH, BF16, 40, "upper_left", "columns", "queries", (1, 3, 1, 260, 133)),
    (HOPPER, BF16, 40, "lower_right", "odd", "all", (1, 3, 1, 260, 133)),
    (BOTH, BF16, 64, "upper_left", "bhsd", "queries", (1, 2, 2, 256, 256)),
    (BOTH, BF16, 72, "upper_left", "poisoned", "heads", (2, 4, 1, 129, 200)),
    (BOTH, BF16, 128, "upper_left", "bshd", "queries", (2, 1, 1, 200, 209)),
    (HOPPER, BF16, 128, "dense", "packed", "heads", (2, 2, 1, 200, 209)),
    (HOPPER, BF16, 256, "dense", "bshd", "heads", (2, 1, 1, 200, 209)),
    (BOTH, BF16, 256, "upper_left", "bshd", "queries", (1, 2, 1, 200, 209)),
    (DEFAULT, BF16, D, "lower_right", "bhsd", "all", FEW[1]),
    *((names, BF16, dim, mask, "bhsd", kept, (1, 2, 1, 300, 340))
      for names, mask, dim, kept in (
          (KEPT, "window", D, "queries"), (BOTH, "left", D, "all"),
          (BOTH, "window_lower", 64, "heads"), (KEPT, "window_upper", D, "queries"))),
    # dkdv_kernel's tiles of keys are smaller than dq_kernel's: no ds that was not written is read.
    (DEFAULT, BF16, 256, "window", "bhsd", "all", (1, 1, 1, 390, 256)),  # ds is a band
    (DEFAULT, FLOAT, 128, "window", "bhsd", "all", (1, 1, 1, 256, 256)),
    # Of ds a band, for all heads or for one.
    (HOPPER, BF16, 128, "window", "bhsd", "all", (1, 2, 1, 600, 500)),
    (HOPPER, BF16, 256, "window_lower", "bhsd", "all", (1, 1, 1, 560, 640)),
    (DEFAULT, BF16, D, "window", "bhsd", "heads", (2, 2, 1, 520, 640)),
    *((names, BF16, dim, mask, "bhsd", kept, shape) for names, mask, dim, kept, shape in (
        (BOTH, "random", D, "queries", (2, 2, 1, 301, 340)),
        (BOTH, "growing", D, "queries", ROWS_CASES[0]),
        (BOTH, "padded_causal", D, "heads", ROWS_CASES[0]),
        (BOTH, "packed_causal", 128, "queries", ROWS_CASES[1]),
        (BOTH, "random", 256, "all", (1, 2, 1, 200, 209)),
        (BOTH, "edges", D, "all", ROWS_CASES[1]))),
]  # fmt: skip
SOFTCAP = [  # after what is kept the cap; most scores are below 10
    (BOTH, BF16, D, "dense", "all", 50.0, (1, 2, 1, 150, 300)),
    (HOPPER, HALF, D, "upper_left", "queries", 5.0, (1, 4, 2, 150, 300)),
    (BOTH, BF16, D, "lower_right", "heads", 0.01, (2, 4, 2, 300, 140)),
    (BOTH, BF16, D, "window", "queries", 30.0, (1, 2, 1, 300, 340)),
    (HOPPER, BF16, D, "random", "queries", 30.0, ROWS_CASES[0]),
    (DEFAULT, BF16, D, "random", "all", 30.0, (1, 2, 1, 130, 200)),
    (DEFAULT, BF16, D, "window_lower", "all", 5.0, FEW[1]),
    (BOTH, BF16, 128, "lower_right", "heads", 5.0, (2, 2, 1, 140, 209)),
    (BOTH, BF16, 256, "upper_left", "queries", 50.0, (1, 2, 1, 200, 140)),
    (DEFAULT, FLOAT, D, "upper_left", "queries", 5.0, (1, 2, 1, 150, 200)),
]  # fmt: skip
RAGGED, CAUSAL = ("bfloat16", LOWER_RIGHT, 1, 4096, 4097), ("float16", True)
BY_ROW = -2  # of machine_code: `visible` in place of a window
# Bytes that may spill, as measured: forward_kernel for D = 256 on Hopper (addresses: 112 bytes with
# Triton 3.7.1, 128 with 3.8.0); with 3.9.0 the plain dkdv_kernel for D = 256. With `visible`
# dkdv_kernel has more vectors.
SPILL, SPILL_ROWS = (168, 264) if triton.__version__.startswith("3.9.") else (128, 256)
CODE = [  # name, bytes that may spill, threads of first and last kernels, machine_code's jobs
    # What flash_attention takes by itself, and its gradient with the forward before it. sm_86 and
    # sm_89 have sm_80's instructions and less shared memory.
    ("best_config", 128, None, (), (None, 89, 64), ("gradient", 89, 128)),
    ("best_config", 128, None, (), ("gradient", 89, 256), ("gradient", 100, 128), (None, 120, 32),
     *((None, sm, dim, *BF16, False, 1, m, 4096) for sm, dim, m in ((89, 256, 1), (90, 64, 64)))),
    ("report_config", INF, None, (), ("autotuned", 90), ("tile128", 100)),  # spills: configs.py
    # hopper_forward_kernel is specialised, 12 warps, masked or not, with an
    # exact lse or not; of the gradient dkdv_kernel up to D = 128, and hopper_dq_kernel.
    *(("hopper_forward", SPILL, 384, (),
       *((name, 90, dim, *case) for case in (BF16, RAGGED, FP16)))
      for name, dim in (("hopper_64", 64), ("hopper", 128), ("hopper_256", 256))),
    *(("hopper_gradient", SPILL, 384, last,
       *(("gradient", 90, dim, *case) for case in cases)) for dim, last, *cases in (
          (64, (384, 384), BF16, CAUSAL), (128, (384, 256), BF16, RAGGED),
          (256, (256, 256, 256), RAGGED))),
    # The same with a window, ds a band or not, and with `visible`.
    *(("hopper_code", SPILL_ROWS, 384, (), *(
        ("gradient", 90, dim, *BF16, is_causal, 1, 4096, None, window)
        for is_causal, window in cases))
      for dim, *cases in ((64, (False, BY_ROW)), (256, (False, BY_ROW)),
                          (128, (True, 500), (False, BY_ROW)))),
    ("hopper_code", 16, None, (), ("few", 90, 128), ("few", 90, 128, *FP16, True)),
    # The same with a softcap; with `visible` the plain dkdv_kernel for D = 256 spills 392 bytes.
    *(("hopper_code", 392 if dim == 256 else 256, 384, last,
       ("gradient", 90, dim, *BF16, False, 1, 4096, None, window, 50.0))
      for dim, window, last in ((64, -1, (384, 384)), (128, BY_ROW, (384, 384)),
                                (256, BY_ROW, ()))),
    # Helion's cute backend recognises the loop: causal, GQA, lengths that 256 does not divide.
    *(("blackwell_compiles", 16, None, (), *(("blackwell", 100, dim, *case) for case in (
        BF16, (*BF16, True, 4), (*BF16, False, 1, 384), CAUSAL))) for dim in (64, 128)),
]  # fmt: skip
SECONDS = {  # of the slow cases without a GPU, on an idle core, with Triton's cache empty
    "code best": 20, "code report": 10, "code hopper_forward": 12, "code hopper": 35, "refused": 7,
    "copied_files": 10, "recipe_values": 28, "training": 7, "blackwell_loop": 9, "large_tensor": 10,
    "new_lengths": 13, "another_call": 9, "special_values hopper": 13, "asked_for": 7,
    "hard_rows .* edges": 9, "softcap": 8, r"gradient \S+ \S+ (72|256)": 6, "hard_gradients": 5,
}  # fmt: skip
# The report's tables (NVIDIA B200): shape, Helion ms, PyTorch ms, speedup, TFLOPS, as printed.
PUBLISHED = {
    "autotuned": [
        ((2, 32, 1024, 128), 0.2122, 0.1230, 0.58, 161.9),
        ((4, 32, 2048, 128), 1.0717, 0.7299, 0.68, 256.5),
        ((4, 32, 4096, 128), 3.9385, 2.8049, 0.71, 279.2),
        ((8, 32, 2048, 128), 2.0359, 1.4325, 0.70, 270.0),
        ((16, 64, 4096, 128), 30.5381, 21.9485, 0.72, 288.0)],
    "tma_persistent": [
        ((2, 32, 1024, 128), 0.1928, 0.1231, 0.64, 178.2),
        ((4, 32, 4096, 128), 4.2923, 2.8052, 0.65, 256.2),
        ((16, 64, 4096, 128), 32.8050, 21.9438, 0.67, 268.1)],
    "tile128": [
        ((2, 32, 1024, 128), 0.1470, 0.1235, 0.84, 233.8),
        ((4, 32, 2048, 128), 0.7319, 0.7316, 1.00, 375.6),
        ((4, 32, 4096, 128), 2.7222, 2.8071, 1.03, 403.9),
        ((8, 32, 2048, 128), 1.4363, 1.4337, 1.00, 382.8),
        ((16, 64, 4096, 128), 20.7709, 21.9450, 1.06, 423.5),
        ((8, 64, 8192, 128), 41.6737, 43.5296, 1.04, 422.1)],
}  # fmt: skip


def flops(shape):
    """Floating-point operations of dense attention on [B, H, S, D]: two products, 2 each FMA."""
    B, H, S, D = shape
    return 4 * B * H * S * S * D


def make(shape, dtype="bfloat16", keys=None, heads=None, seed=0):
    """Random normal q: [B, H, S, D] and k, v: [B, heads, keys, D]."""
    generator, (B, H, S, D) = torch.Generator(DEVICE).manual_seed(seed), shape
    kv = heads or H, keys or S
    return [torch.randn(B, h, n, D, generator=generator, device=DEVICE).to(DTYPES[dtype])
            for h, n in ((H, S), kv, kv)]  # fmt: skip


def bshd(x):
    """The same numbers, in memory as [B, S, H, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def poisoned(x):
    """The same numbers, in memory as [B, S, H, D], with NaN and inf beside, below and behind."""
    B, H, S, D = x.shape
    around = x.new_full((B, S + 3, H + 1, D + 40), math.nan)
    around[:, :, H:] = math.inf
    return around[:, :S, :H, :D].copy_(x.transpose(1, 2)).transpose(1, 2)


def unseen(q, k, v):
    """The last six keys are very large, for every query."""
    q[..., 0], k[..., 0] = 8, 0
    k[:, :, -6:, 0] = 2.5 * q.size(3) ** 0.5
    return q, k, v


def shifted(x):
    """The same numbers, from an address that is no multiple of 16 bytes on."""
    return x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)


each = lambda change: lambda q, k, v: (change(q), change(k), change(v))
packed = lambda q, k, v: (bshd(q), *torch.cat([k, v], -1).split(k.size(3), -1))  # k beside v
LAYOUTS = {
    "bhsd": each(lambda x: x),
    "bshd": each(bshd),
    "packed": packed,
    "one_head": lambda *qkv: (qkv[0], *(x[:, :1].expand_as(x) for x in packed(*qkv)[1:])),
    "sbhd": lambda q, k, v: (q.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), bshd(k), k),
    "odd": each(lambda x: torch.cat([x, x], -1)[..., 1 : x.size(3) + 1]),  # no row at 16 bytes
    "shifted": each(shifted),
    "columns": each(lambda x: x.mT.contiguous().mT),  # rows are not contiguous
    "one_row": lambda q, k, v: (q[:, :, :1].expand_as(q), k, v),
    "one_batch": each(lambda x: x[:1].expand_as(x)),
    "poisoned": each(poisoned),
    "unseen": unseen,
}


# ---- 3. Forward and gradient ---------------------------------------------------------------------
# A case is a function with its arguments. It raises where something is wrong, or returns a line.


class Skipped(Exception):
    """A case that cannot run here, and why."""


def compare(out, q, k, v, scale=None, unit=1.0, least=0.0, is_causal=False, lse=None, atol=2e-5,
            ref=None, softcap=None):  # fmt: skip
    """Hold out to the tolerance. Rows with NaN or inf are those that have it by definition.
    lse: held to atol: its error is a relative error of every p. ref: the definition, if known."""
    what = f"at q {tuple(q.shape)}, k {tuple(k.shape)}, is_causal {is_causal}, scale {scale}"
    what += f", softcap {softcap}"
    assert out.shape == (*q.shape[:3], v.size(3)) and out.dtype == q.dtype, (out.shape, what)
    other = sdpa(q, k, v, is_causal, scale, softcap)
    if ref is None or lse is not None:
        ref, lse_ref = definition(q.double(), k.double(), v.double(), is_causal, scale, softcap)
    if lse is not None:
        assert lse.shape == q.shape[:3] and lse.dtype == torch.float32, (lse.shape, lse.dtype, what)
        message = lambda text: f"lse: {text} {what}"
        torch.testing.assert_close(lse.double(), lse_ref, atol=atol, rtol=2e-6, msg=message)
    finite = ref.isfinite().all(-1)
    assert torch.equal(out.isfinite().all(-1), finite), f"not finite in other rows {what}"
    if not other[finite].isfinite().all():  # cuDNN gives NaN where the scale is not positive
        with sdpa_kernel(SDPBackend.MATH):
            other = sdpa(q, k, v, is_causal, scale)
    bound = tolerance(ref[finite], other[finite], 2, unit, least)
    error = (out - ref)[finite].abs().max().item()
    assert error <= bound, f"error {error:.2e} > bound {bound:.2e} {what}"
    return f"error {error:.2e} <= bound {bound:.2e}"


def tuning(config, q, k):
    """The Tuning that flash_attention runs."""
    capability = torch.cuda.get_device_capability() if GPU else None
    (B, H, M, dim), (Hk, N) = q.shape, k.shape[1:3]
    if NAMED[config] is None and H // Hk * M <= 64 and N > 256:
        return configs.best_decode(dim, q.dtype, H // Hk * M)
    return NAMED[config] or configs.best(capability, dim, q.dtype, B * H, M, N)


def forward(config, dtype, D, mask, layout, B, H, Hk, M, N):
    """out, and for our own kernels lse. In bf16 Hopper's kernel has a form without an exact lse."""
    q, k, v = LAYOUTS[layout](*make((B, H, M, D), dtype, N, Hk))
    is_causal, gqa, plan = mask_of(mask, B, M, N), H != Hk, NAMED[config]
    attend = functools.partial(
        flash_attention, q, k, v, **asked(is_causal), enable_gqa=gqa, config=plan)  # fmt: skip
    try:
        out, lse = attend(return_lse=True) if config not in REPORT else (attend(), None)
    except Exception as error:
        if config in (*REPORT, "general") and type(error).__name__ == "OutOfResources":
            raise Skipped(f"does not fit this GPU: {error}") from None
        if config == "tile128" and D != 128 and "PassManager" in str(error):
            raise Skipped("Triton before 3.9 does not compile it for sm_90") from None
        raise
    if mask == "upper_left" and dtype != "float32":
        first = v[:, :, :1].repeat_interleave(H // Hk, 1)
        assert torch.equal(out[:, :, :1], first), "a row that sees one key is not its v"
    if q.stride(3) == 1:
        assert out.stride() == torch.empty_like(q).stride(), "out is not in q's layout"
    if lse is not None and dtype == "bfloat16" and tuning(config, q, k).kernel == "hopper_forward":
        assert torch.equal(attend(), out), "out depends on return_lse"
    in_place = layout in ("bshd", "packed", "one_head", "sbhd")
    if in_place or layout in ("odd", "shifted", "columns"):
        copies, clone = [], torch.Tensor.clone
        noting = lambda x, **options: copies.append(x) or clone(x, **options)
        with mock.patch.object(torch.Tensor, "clone", noting):
            attend()
        # TMA needs rows at multiples of 16 bytes.
        tma = config not in REPORT and tuning(config, q, k).kernel == "hopper_forward"
        assert len(copies) == (0 if in_place or not tma else 3), f"{len(copies)} copies"
    if layout == "unseen":  # the rows that do not see the last keys
        (out, q, k, v), lse = (x[:, :, :-6] for x in (out, q, k, v)), None
    return compare(out, q, k, v, is_causal=is_causal, lse=lse)


@contextlib.contextmanager
def gradient_of(config):
    """Inside, the gradient of a hopper config runs with Hopper's tunings, without a GPU, too."""
    best = configs.best_gradient
    hopper = lambda capability, *rest, **options: best((9, 0), *rest, **options)
    with mock.patch.object(configs, "best_gradient", hopper if "hopper" in config else best):
        yield


def kept_at_most(kept, qkv):
    """Inside, so much of ds is kept at a time."""
    (_, H, M, _), (_, Hk, N, _) = (x.shape for x in qkv[:2])
    of_head = H // Hk * -(-M // 128) * -(-N // 128) * 2**14 * qkv[0].element_size()  # of keys
    budget = {"all": flash_attn.DS_BYTES, "heads": 2 * of_head, "queries": 1}[kept]
    small = dict(DS_BYTES=budget, DS_KEYS=flash_attn.DS_KEYS if kept == "all" else 1)
    return mock.patch.multiple(flash_attn, **small)


def compare_gradients(qkv, options, with_lse=False, scale=None, least=(0.0, 0.0, 0.0),
                      softcap=None):  # fmt: skip
    """Hold dq, dk and dv of random gradients of out and lse to the tolerance. least: of each."""
    is_causal, dtype = options.get("is_causal", False), qkv[0].dtype
    given = {**asked(is_causal), "config": options.get("config")}
    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = *qkv[0].shape[:3], qkv[2].size(3)
    do = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    dlse = torch.randn(do.shape[:3], generator=generator, device=DEVICE) * with_lse

    def gradients(attend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out, lse = attend(*leaves)
        lse = torch.where(lse > -math.inf, lse, 0.0)
        loss = (out * do.to(dtype)).sum().double() + (lse.double() * dlse).sum()
        return torch.autograd.grad(loss, leaves)

    def ours(*qkv):
        attend = functools.partial(flash_attention, enable_gqa=True, **scales, **given)
        return attend(*qkv, return_lse=True) if with_lse else (attend(*qkv), torch.zeros(()))

    scales = dict(scale=scale, softcap=softcap)
    high = functools.partial(definition, is_causal=is_causal, **scales)
    pytorch = lambda *qkv: (sdpa(*qkv, is_causal, **scales), high(*(x.float() for x in qkv))[1])
    found, ref, lines = gradients(ours, dtype), gradients(high, torch.float64), []
    lse = high(*(x.double() for x in qkv))[1]
    lse = lse.where(lse > -INF, 0.0).abs().max().item()
    cap = softcap or 0
    of_p = 2.0**-21 * (2 + lse + cap)  # the relative error of exp(score - lse) in float32
    for name, x, y, other, low in zip("qkv", found, ref, gradients(pytorch, dtype), least):
        unit = y.abs().max().item()
        bound = tolerance(y, other.nan_to_num(), 3, unit, low) + of_p * unit
        error = (x - y).abs().max().item()
        lines.append(f"d{name} {error:.1e} <= {bound:.1e}")
        where = f"at {[tuple(x.shape) for x in qkv]}, {options}, {scales}, lse {with_lse}"
        assert error <= bound, f"not {lines[-1]} {where}"
    return ", ".join(lines)


def gradient(config, dtype, D, mask, layout, kept, B, H, Hk, M, N):
    """dq, dk and dv, with the gradient of lse; if all of ds is kept, with a negative scale."""
    qkv = LAYOUTS[layout](*make((B, H, M, D), dtype, N, Hk))
    plan = NAMED["hopper_256" if config == "hopper" and D > 128 else config]
    plan = None if dtype == "float32" else plan
    options = dict(is_causal=mask_of(mask, B, M, N), config=plan)
    with gradient_of(config), kept_at_most(kept, qkv):
        if kept == "all":
            compare_gradients(qkv, options, scale=-0.3)
        return compare_gradients(qkv, options, with_lse=True)


# ---- 4. Hard rows --------------------------------------------------------------------------------
# The Hopper kernel subtracts no maximum in bf16, and a row is right only if a test notices that its
# numbers left float32's range: these heads have rows on both sides of each edge of that test, where
# random inputs never come. One wrong row hides behind the larger error of another, so the rows of a
# head are alike, and each head is held to the tolerance by itself. Scores are in nats.
HEADS, ROWS, KEYS, MANY = 8, 256 if GPU else 64, 300, 131072 if GPU else 4096
LN2, LOG2E = math.log(2), math.log2(math.e)
LARGEST = {torch.bfloat16: 1e36, torch.float16: 1e4}  # of v


def in_pieces(x):
    """Three columns that sum up to x: one bf16 has 8 bits, which is too few for a score."""
    first = x.bfloat16().double()
    second = (x - first).bfloat16().double()
    return torch.stack([first, second, x - first - second], -1)


def hard_head(dtype, keys, seed, dim=D, shift=0.0, sweep=0.0, spread=0.0, gap=0.0, upper=0.5,
              values="normal", size=1.0, columns=slice(None)):  # fmt: skip
    """q: [ROWS, dim], k, v: [keys, dim]: one head with scores and values to measure.

    shift is added to all scores, and another 0 to sweep from the first row to the last. spread:
    the standard deviation of scores. A share of `upper` of the keys, one at least, is on an upper
    level; the others are lower by gap and another 0 to 1 bit, so that each row rounds its p
    differently. values: "normal", "positive", on the "upper" or "lower" keys only, "opposed" on the
    two levels, or "biased", which sets scores, too. size: of the largest result, unless v would
    exceed LARGEST. columns: v is 0 in others.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)
    low = torch.randperm(keys, generator=generator) >= min(max(round(upper * keys), 1), keys - 1)
    scores, is_odd = torch.zeros(keys, dtype=torch.float64), torch.arange(keys) % 2 == 1
    if values == "biased":
        # The mantissas of p of odd and even keys are a factor of 1.5 or 0.75 apart, and so is what
        # truncation takes from them on average. Rounding to nearest takes nothing.
        scores, low = LN2 * (0.1 * uniform(keys) + 0.6 * is_odd), torch.zeros_like(low)
        v = torch.where(is_odd, -(0.5**0.6), 1.0)[:, None] * (1 + uniform(dim))
    elif values == "positive":
        v = uniform(keys, dim)
    elif values == "opposed":
        v = torch.where(low, 1.0, -1.0)[:, None] * (1 + uniform(dim))
    else:
        share = {"normal": 1.0, "upper": ~low[:, None], "lower": low[:, None]}[values]
        v = normal(keys, dim) * share
    inside = torch.zeros(dim)
    inside[columns] = 1
    v *= inside
    root, rest, along = dim**0.5, dim - 9, torch.linspace(0, 1, ROWS, dtype=torch.float64)
    ones = lambda n: torch.ones(n, 3, dtype=torch.float64)
    shifts, gaps = in_pieces(root * (shift + sweep * along)), in_pieces(root * -(gap + LN2 * along))
    q_rest = normal(ROWS, rest) * spread * (dim / rest) ** 0.5
    q = torch.cat([ones(ROWS), shifts, gaps, q_rest], -1).to(dtype)
    k = [in_pieces(root * scores), ones(keys), ones(keys) * low[:, None], normal(keys, rest)]
    k = torch.cat(k, -1).to(dtype)
    largest = definition(*(x[None, None].double().to(DEVICE) for x in (q, k, v)))[0].abs().max()
    v *= min(size / largest.item(), LARGEST[dtype] / v.abs().max().item())
    return q.to(DEVICE), k.to(DEVICE), v.to(dtype).to(DEVICE)


def rounded_once(q, k, v, ref):
    """The largest error of four ways to do attention in float32 with p rounded to v's dtype once.

    SDPA's error can be 0 by luck: its largest p is exactly 1, and where few keys count the other p
    may be exact, too. A kernel that subtracts another number than the maximum is as right, and has
    that error. So here the largest p is 2^-t for four t, and the sums have four orders.
    """
    errors = []
    for t in (0, 0.25, 0.5, 0.75):
        q_t, k_t = (x.float().roll(int(t * x.size(-1)), -1) for x in (q, k))
        x = (q_t @ k_t.mT) * (q.size(-1) ** -0.5 * LOG2E)
        p = torch.exp2(x - x.amax(-1, keepdim=True) - t).to(v.dtype).float()
        tiles = list(zip(p.split(32, -1), v.float().split(32, -2)))
        acc, l_i = sum(p @ v for p, v in tiles), sum(p.sum(-1, True) for p, _ in tiles)
        errors.append((acc / l_i - ref).abs().max().item())
    return max(errors)


# The rows of a head leave the range in one way: the fix-up computes neighbours of a noticed row.
SHIFTS = [dict(shift=s, sweep=0.5, spread=1.0) for s in (-300, -100, -60, -20, 20, 60, 100, 300)]
# One key is on the upper level, or half of them, or most. At -4 their p sum up to more than 1; at
# -60 to a float32, but p of the lower level are below the smallest float32.
LEVELS = [dict(shift=shift, gap=gap, upper=upper) for shift in (-4, -60, 60) for gap, upper in (
    (2, 0.0), (2, 1.0), (5, 0.5), (8, 0.5), (8, 1.0), (11, 0.5), (20, 0.0), (40, 0.5))]  # fmt: skip
HARD = {
    "shifts": SHIFTS,
    "shifts_in_one_head": [
        dict(shift=-300, sweep=600, spread=spread) for spread in (0, 0.1, 0.3, 1, 2, 3, 5, 10)],
    # Just before 88 nats p sums up to inf in float32 while no single p, sum of a tile or sum of p v
    # is inf: with an offset of 40 bits from 55.1 to 56.1 nats. The last heads are at the lower
    # edge: tiny p of large values, which all p being a few bits smaller would lose.
    "edges": [dict(shift=shift, sweep=0.2, spread=0.1, size=2.0**-10) for shift in (
        *range(-100, 156, 8), *(52 + i / 4 for i in range(24)))] + [
        dict(shift=s, gap=86, upper=1.0, values="lower", size=INF) for s in range(-35, -27)],
    # Two heads leave the range in their first or last columns alone.
    "large_values": [dict(head, values="positive", size=INF, columns=columns)
                     for head, columns in zip(SHIFTS, [slice(None)] * 3 + [
                         slice(-8, None), slice(8)] + [slice(None)] * 3)],
    "spreads": [dict(spread=spread) for spread in (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)],
    "upper_level": [dict(head, values="upper") for head in LEVELS],
    "lower_level": [dict(head, values="lower") for head in LEVELS],
    # One large p and many tiny ones that weigh as much; tiny ones that sum up to 1 or 2.7; biased.
    "many_keys": [
        dict(gap=math.log(MANY), upper=0.0, values="opposed"),
        dict(gap=math.log(MANY), upper=0.0, values="positive", shift=-0.5),
        dict(shift=-math.log(MANY), sweep=1.0, upper=1.0, values="positive"),
        dict(values="biased")],
    # The report's kernel has these alone: equal keys, scores far off, one far above, large values.
    "mixed": [
        dict(), SHIFTS[0], SHIFTS[7], dict(gap=60, upper=0, values="lower"), dict(gap=60, upper=0),
        dict(spread=30.0), dict(SHIFTS[1], values="positive", size=INF), dict(spread=2.0)],
}  # fmt: skip


def drawn(dtype, seed):
    """Random parameters of hard_head."""
    draw = random.Random(seed)
    return dict(
        shift=round(draw.choice([300, 90, 20, 6]) * draw.uniform(-1, 1), 3),
        sweep=draw.choice([0.0, 0.5, 5.0]),
        spread=draw.choice([0.0, 0.1, round(10 ** draw.uniform(-1, 1.5), 3)]),
        gap=round(draw.choice([10, 40]) * draw.random(), 3),
        upper=draw.choice([0.0, 0.1, 0.5, 0.9, 1.0]),
        values=draw.choice(["normal", "positive", "upper", "lower", "lower", "opposed"]),
        size=10.0 ** draw.randint(*(-2, 4) if dtype == "float16" else (-6, 36)),
    )


def hard_rows(config, dtype, kind, draws=0):
    """The heads of a kind, or random ones, the same at every call."""
    heads = [drawn(dtype, seed) for seed in range(draws)] if kind == "search" else HARD[kind]
    keys = MANY if kind == "many_keys" else 256 if config == "hopper_256" else KEYS  # 256: no mask
    missed, dim = [], {"hopper_64": 64, "hopper_256": 256}.get(config, D)
    for first in range(0, len(heads), HEADS):
        some = list(enumerate(heads))[first : first + HEADS]
        made = [hard_head(DTYPES[dtype], keys, seed, dim, **head) for seed, head in some]
        qkv = [torch.stack(x)[None] for x in zip(*made)]
        out = flash_attention(*qkv, config=NAMED[config])
        for i, (seed, head) in enumerate(some):
            q, k, v = (x[:, i : i + 1] for x in qkv)
            ref = definition(q.double(), k.double(), v.double())[0]
            least, unit = rounded_once(q, k, v, ref), ref.abs().max().item()
            try:
                line = compare(out[:, i : i + 1], q, k, v, None, unit, least, ref=ref)
            except AssertionError as error:
                missed.append(f"{error} at seed {seed}, {head}")
    assert not missed, f"{len(missed)} of {len(heads)} heads, the first one: {missed[0]}"
    return f"{len(heads)} heads, the last one: {line}"


def hard_gradients(config, dtype):
    """Rows with scores far from 0, and with two levels, of which one has the values.

    SDPA's error can be small by luck: where one key has most of p, one element of ds in 16 bits
    makes the largest error of dk. So it counts at least a third of four standard deviations of what
    rounding p, ds and out moves, and of what float32's rounding of lse moves."""
    heads = SHIFTS[::3] + [
        dict(head, values=values) for head in LEVELS[::11] for values in ("upper", "lower")]
    rounding, scale = lambda x: x.to(DTYPES[dtype]) - x, D**-0.5
    for i, head in enumerate(heads):
        qkv = [x[None, None] for x in hard_head(DTYPES[dtype], KEYS, i, **head)]
        q, k, v = (x.double() for x in qkv)
        generator = torch.Generator(DEVICE).manual_seed(1)  # as in compare_gradients
        do = torch.randn(q.shape, generator=generator, device=DEVICE).to(q.dtype)
        out, lse = definition(q, k, v)
        p, dp = (q @ k.mT * scale - lse[..., None]).exp(), do @ v.mT
        of_ds = rounding(p * (dp - (out * do).sum(-1, True)))
        of_delta, exact = (rounding(out) * do).sum(-1, True), 2.0**-21 * lse.abs().max() * p * dp
        noise = (scale * (of_ds**2 @ k**2 + (of_delta * (p @ k)) ** 2 + exact**2 @ k**2).sqrt(),
                 scale * ((of_ds**2 + (of_delta * p) ** 2 + exact**2).mT @ q**2).sqrt(),
                 ((rounding(p) ** 2).mT @ do**2).sqrt())  # fmt: skip
        least = [4 / 3 * x.abs().max().item() for x in noise]
        with gradient_of(config):
            line = compare_gradients(qkv, dict(config=NAMED[config]), least=least)
    return f"{len(heads)} heads, the last one: {line}"


# ---- 5. Interface --------------------------------------------------------------------------------
kernels = lambda: {key[0].name.lstrip("_") for key in flash_attn.LAUNCHES}  # that are compiled
refuse_to_compile = functools.partial(
    mock.patch.object, helion.Kernel, "bind", side_effect=AssertionError("it was compiled"))


def another_call(config):
    """A call that differs from the last one in one thing is another call, and what is compiled in
    is in the keys of LAUNCHES."""
    attend = functools.partial(flash_attention, config=NAMED[config])
    x, k, v = make((1, 2, 144, D))
    flash_attn.LAUNCHES.clear()
    for x in (x[..., :32], x):  # small first: the kernel of a large head dim takes a small one
        compare(attend(x, x, x), x, x, x)  # one tensor, then three
    q = make((1, 2, 144, D), seed=1)[0]
    compare(attend(q, k, v), q, k, v)
    known = set(flash_attn.LAUNCHES)
    apart = lambda x: torch.cat([x, x], 2)[:, :, :144]
    some = q, k[:, :, :130], v[:, :, :130]
    each_of = lambda change: [
        ([change(x) if i == j else x for j, x in enumerate((q, k, v))], {}) for i in range(3)]
    for qkv, options in (
        *each_of(apart), *each_of(shifted), (some, dict(is_causal=True)), (some, dict(scale=0.2)),
        (some, dict(is_causal=LOWER_RIGHT)), ([x.half() for x in (q, k, v)], {}),
    ):  # fmt: skip
        compare(attend(*qkv, **options), *qkv, **options)
        compare(attend(q, k, v), q, k, v)
    added = [x[0].name for x in flash_attn.LAUNCHES if x not in known].count("_forward_kernel")
    best = tuning(config, q, k)
    if best.kernel == "forward":  # not aligned; float16
        assert added == 2, f"{added} more of forward_kernel"
    old = best.helion_config
    other = helion.Config(**{**old.config, "num_stages": 1 + old.num_stages % 2})
    known = len(flash_attn.LAUNCHES)
    flash_attention(q, k, v, config=dataclasses.replace(best, helion_config=other))
    assert len(flash_attn.LAUNCHES) > known, "another Tuning, and the kernel of the last one"
    torch.set_default_dtype(torch.bfloat16)
    try:
        flash_attn.LAUNCHES.clear()
        out, lse = attend(q, k, v, return_lse=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(attend(q, k, v), out), "out depends on return_lse"
    return compare(out, q, k, v, lse=lse)


def new_lengths(config):
    """Other lengths, batches, heads and scales compile nothing; nothing that is kept holds a tensor
    of a caller; memory stays where it is; and on a GPU a new length costs the host no more."""
    attend = functools.partial(flash_attention, enable_gqa=True, config=NAMED[config])
    storages = []
    for M, N in ((1, 129), (1, 300), (130, 200), (130, 256)):  # few queries, masked or not
        for is_causal in (False, LOWER_RIGHT):
            qkv = [x.requires_grad_(N == 200) for x in make((1, 2, M, D), keys=N)]
            out = attend(*qkv, is_causal=is_causal)
            if is_causal and N == 200:
                out.square().sum().backward()
            storages += [StorageWeakRef(x.untyped_storage()) for x in (*qkv, out)]
            attend(*(x.detach() for x in qkv), is_causal=is_causal)
    del qkv, out
    known, used = set(flash_attn.LAUNCHES), []
    with refuse_to_compile():
        for i in range(100 if GPU else 10):
            shape = 1 + i % 3, 2 * (1 + i % 2), 130 + 3 * i if i % 2 else 1, D
            qkv = make(shape, keys=200 + 7 * i, heads=2)
            options = dict(is_causal=LOWER_RIGHT if i % 4 == 1 else False, scale=0.1 + i / 1000)
            out = attend(*qkv, **options)
            if i % 20 == 1:
                compare(out, *qkv, **options)
                attend(*(x.requires_grad_() for x in qkv), **options).square().sum().backward()
                qkv += [x.grad for x in qkv]
            storages += [StorageWeakRef(x.untyped_storage()) for x in (*qkv, out)]
            del qkv, out
            gc.collect()
            assert all(x.expired() for x in storages), "a tensor of the caller is kept"
            used.append(torch.cuda.memory_allocated() if GPU else 0)
    assert set(flash_attn.LAUNCHES) == known, "something was compiled"
    assert used[-1] <= used[2], used  # the reference has its workspace by then
    if not GPU:
        return f"{len(used)} calls"
    q, k, v = make((2, 4, 1200, D))
    times = {"new": [], "repeated": []}
    for i in range(300):
        for kind, n in (("new", 300 + 3 * i), ("repeated", 1200)):
            begin = time.perf_counter()
            attend(q[:, :, :n], k[:, :, :n], v[:, :, :n])
            times[kind].append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    new, repeated = (1e6 * sorted(x)[len(x) // 2] for x in times.values())
    assert new <= 1.25 * repeated, f"host time: {new:.0f} us, a repeated call {repeated:.0f} us"
    return f"{len(used)} calls; host time {new:.0f} us, of a repeated call {repeated:.0f} us"


def special_values(config):
    """NaN, inf, scales of any sign or 0, and empty tensors give what SDPA gives."""
    attend = functools.partial(flash_attention, config=NAMED[config])
    for tensor, row, value in ((0, 5, math.nan), (0, 128, INF), (1, 7, INF), (2, 128, math.nan)):
        qkv = make((2, 2, 129, D))
        qkv[tensor][1, 1, row, 3] = value
        compare(attend(*qkv), *qkv)
    q, k, v = make((2, 2, 129, D))
    if config in REPORT:
        return compare(attend(q * 40, k, v, scale=-0.3), q * 40, k, v, -0.3)
    x, *kv = (x.float() for x in (q, k, v))
    negative = torch.complex(x, x).conj().imag  # -x, of which only a bit says so
    found, expected = flash_attention(negative, *kv), flash_attention(-x, *kv)
    assert torch.equal(found, expected), "a negative bit was not seen"
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        mean = v.mean(2, keepdim=True, dtype=torch.float64).expand(-1, -1, 129, -1)
        for scale in (0, -0.0, 1e-50):
            out = attend(q, k, v, scale=scale)
            torch.testing.assert_close(out.double(), mean, atol=1e-3, rtol=1e-2)
        for q_, scale in ((q, 0.3), (q * 40, -0.3)):
            line = compare(attend(q_, k, v, scale=scale), q_, k, v, scale)
    for B, H, S, keys in ((0, 2, 4, 5), (2, 0, 4, 5), (2, 2, 0, 5), (2, 2, 4, 0)):
        q, k, v = (torch.randn(B, H, n, D, device=DEVICE).bfloat16() for n in (S, keys, keys))
        # As SDPA's, where it does not die of a division by zero (torch 2.11).
        assert torch.equal(attend(q, k, v), torch.zeros_like(q)), (B, H, S, keys)
    return line


def bad_input():
    """Each of these is refused, by its name, before anything is compiled."""
    q, k, v = qkv = make((2, 2, 16, 64))
    of_dim = lambda dim: [x.repeat(1, 1, 1, 3)[..., :dim] for x in qkv]
    rows = random_rows(2, 16, 16, True)
    report, of = dict(config=configs.TILE128), lambda config: dict(config=config)
    three_stages = {**configs.HOPPER.helion_config.config, "range_num_stages": [1, 3]}
    with_config = lambda config: of(dataclasses.replace(configs.HOPPER, helion_config=config))
    with refuse_to_compile():
        for error, message, qkv, options in (
            (TypeError, "[kv]", (q, k.half(), v), {}), (TypeError, "v", (q, k, [1.0]), {}),
            (TypeError, "[qv]", (q.double(), k.double(), v.double()), {}),
            (TypeError, "is_causal", qkv, dict(is_causal="yes")),
            (TypeError, "window", qkv, dict(window=5)),
            (TypeError, "window", qkv, dict(window=(1, 0.5))),
            (TypeError, "softcap", qkv, dict(softcap="50")),
            (ValueError, "softcap", qkv, dict(softcap=-50.0)),
            (ValueError, "softcap", qkv, dict(softcap=math.nan)),
            (ValueError, "scale", qkv, dict(softcap=1e-3, scale=1e36)),
            (ValueError, "config", qkv, dict(report, softcap=50.0)),
            (ValueError, "sinks", qkv, dict(sinks=q[0, 0, 0])),
            (ValueError, "sinks", qkv, dict(sinks=1.0)),
            (ValueError, "config", qkv, dict(report, window=(5, 5))),
            (ValueError, "visible", qkv, dict(visible=q)),
            (ValueError, "visible", qkv, dict(visible=random_rows(2, 17, 16, True))),
            (ValueError, "visible", qkv, dict(visible=rows, is_causal=True)),
            (ValueError, "config", qkv, dict(of(configs.BLACKWELL_CUTE), sinks=q[0, 0, :2, 0])),
            (TypeError, "config", qkv, of("tile128")),
            (ValueError, "q", (q[0], k, v), {}), (ValueError, "q", (q[..., :0], k, v), {}),
            (ValueError, "[kv]", (q, k[:1], v), {}), (ValueError, "v", (q, k, v[:, :1]), {}),
            (ValueError, "[kv]", (q, k[..., :32], v), {}),
            (ValueError, "q", (q, k, v.repeat(1, 1, 1, 5)), {}),
            (ValueError, "v", (q, k, v[:, :, :8]), {}),
            (ValueError, "[kv]", (q, k.to("meta"), v), {}),
            (ValueError, "k", (q, k[:, :1], v[:, :1]), {}),
            (ValueError, "scale", qkv, dict(scale=math.nan)),
            (ValueError, "config", [x.float() for x in qkv], of(configs.HOPPER)),
            (ValueError, "config", of_dim(72), of(configs.HOPPER_64)),
            (ValueError, "config", of_dim(136), of(configs.HOPPER)),
            (ValueError, "config", qkv, with_config(helion.Config())),
            (ValueError, "config", qkv, of(configs.DELTA)),
            (ValueError, "config", qkv, with_config(helion.Config(**three_stages))),
            (ValueError, "config", (q.clone().requires_grad_(), k, v), report),
            (ValueError, "config", qkv, dict(report, return_lse=True)),
            (ValueError, "config", qkv, dict(report, is_causal=True)),
            (ValueError, "config", (q[:, :, :1], k, v), report),
            (ValueError, "config", (q, k[:, :, :1], v[:, :, :1]), report),
            (ValueError, "q must be on a CUDA device", [x.cpu() for x in qkv], {}),
        ):
            on = dict(TRITON_INTERPRET="0") if "CUDA" in message else {}
            with mock.patch.dict(os.environ, on), raises(error, f"^([qkv, ]+and )*{message}"):
                flash_attention(*qkv, **options)
        with pretend(80):
            fake = [torch.empty(1, 2, 256, 64, device="cuda", dtype=q.dtype) for _ in "qkv"]
            for name in ("hopper", "blackwell"):
                with raises(ValueError, "^config takes GPUs of compute capability"):
                    flash_attention(*fake, config=NAMED[name])
    return "refused"


def large_tensor(config):
    """More than 2^31 elements from first to last. A CPU backs only pages that are touched."""
    apart = 2**30 + 8 * D
    storage = torch.UntypedStorage(2 * (2 * apart + 2 * 300 * D), device=DEVICE)  # never filled
    for large in ((0, 1, 2), (0,), (1, 2)):
        qkv = make((3, 2, 300, D))
        x = qkv[0].new_empty(0).set_(storage, 0, (3, 2, 300, D), (apart, 300 * D, D, 1))
        x.copy_(qkv[large[0]])
        qkv = [x if i in large else y for i, y in enumerate(qkv)]
        line = compare(flash_attention(*qkv, config=NAMED[config]), *qkv)
    with gradient_of(config):
        compare_gradients(qkv, dict(config=NAMED[config]))
    kept = StorageWeakRef(storage)
    del storage, x, qkv
    gc.collect()
    assert kept.expired(), "a tensor of the caller is kept"
    return line


def windows(config):
    """No tile outside of the window is read; another window compiles nothing; Hopper's kernel needs
    no fix-up; the operators' gradient is the eager one."""
    attend = functools.partial(flash_attention, config=NAMED[config])
    q, k, v = make((1, 2, 600, D))
    expected, lse = attend(q, k, v, window=(60, 30), return_lse=True)
    halves = [x.half() for x in (q, k, v)]  # float16 has no fix-up
    known = attend(*halves, window=(60, 30))
    for x in halves[1:]:
        x[:, :, :128] = x[:, :, 512:] = math.nan
    rows = slice(128 + 128, 512 - 128)  # none of their tiles sees these keys
    found = attend(*halves, window=(60, 30))
    assert torch.equal(found[:, :, rows], known[:, :, rows]), "a tile outside was read"
    real, launched = flash_attn.launch, []

    def launch(kernel, tuning, tensors, numbers, constants, layout):
        if flash_attn.FIXUP_ROWS not in constants:
            real(kernel, tuning, tensors, numbers, constants, layout)
            launched.append(tensors[4].isnan().sum().item())

    with mock.patch.object(flash_attn, "launch", launch):
        for cap in (0, 20.0):
            found = attend(q, k, v, window=(60, 30), softcap=cap)
            compare(found, q, k, v, is_causal=(False, (60, 30)), softcap=cap)
    assert launched == [0, 0], f"{launched} rows asked for the fix-up"
    with refuse_to_compile():
        for window in ((0, 0), (64, None), (1, 2), (598, 0), (128, 127)):
            compare(attend(q, k, v, window=window), q, k, v, is_causal=(False, window))
    assert torch.equal(attend(q, k, v, window=(600, None)), attend(q, k, v)), "a window of all keys"
    return compare(expected, q, k, v, is_causal=(False, (60, 30)), lse=lse)


def softcap(config, dtype, dim, mask, kept, cap, B, H, Hk, M, N):
    """out, lse and gradients of scores that the cap changes; if all of ds is kept, of another cap,
    which compiles nothing. Of the last row exp(-lse) is more than a float16."""
    q, k, v = make((B, H, M, dim), dtype, N, Hk)
    q *= 4
    k[..., 0], q[:, :, -1, 0] = 6, -5 * dim**0.5
    plan = NAMED["hopper_256" if config == "hopper" and dim > 128 else config]
    options = dict(is_causal=mask_of(mask, B, M, N), config=plan)
    attend = functools.partial(
        flash_attention, q, k, v, **asked(options["is_causal"]), enable_gqa=True, config=plan)
    out, lse = attend(softcap=cap, return_lse=True)
    line = compare(out, q, k, v, is_causal=options["is_causal"], lse=lse, softcap=cap,
                   atol=2e-5 + 4e-7 * cap)  # fmt: skip
    with kept_at_most(kept, (q, k, v)), gradient_of(config):
        line += ", " + compare_gradients((q, k, v), options, with_lse=True, softcap=cap)
        if kept == "all":
            with refuse_to_compile():
                compare_gradients((q, k, v), options, with_lse=True, scale=-0.2, softcap=2 * cap)
    return line


def intervals():
    """`packed` and `padded` against masks that are written out; and without a synchronisation."""
    cu_q, cu_k = [0, 5, 5, 12, 20], [0, 3, 9, 20, 21]
    tensors = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (cu_q, cu_k)]
    for is_causal, window in itertools.product((False, True), (None, (2, 1), (None, 1), (3, -1))):
        left, right = (INF if x is None or x < 0 else x for x in window or (-1, -1))
        right = 0 if is_causal else right
        inside = lambda distance: -left <= distance <= right
        options = dict(is_causal=is_causal, window=window)
        found = sees(22, 21, Rows(*flash_attn.packed(*tensors, 22, **options)))
        right_ = torch.zeros(22, 21, dtype=torch.bool)
        for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k)):
            for i, j in itertools.product(range(q0, q1), range(k0, k1)):
                right_[i, j] = inside(j - k1 - (i - q1))
        assert torch.equal(found.cpu(), right_), ("packed", options)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0], [0] * 7], device=DEVICE)
        for asked_, M, end in ((7, 7, 7), (4, 4, 6), (9, 9, 6), (None, 7, 7)):  # no row has key 6
            found = sees(M, 7, Rows(*flash_attn.padded(mask, asked_, **options)))
            right_ = torch.zeros(3, M, 7, dtype=torch.bool)
            for b, i, j in itertools.product(range(3), range(M), range(7)):
                right_[b, i, j] = mask[b, j] > 0 and inside(j - end - (i - M))
                right_[b, i, j] &= asked_ is not None or bool(mask[b, i])
            assert torch.equal(found[:, 0].cpu(), right_), ("padded", asked_, options)
    for window in ((2**31, 0), (2**70, 2**31 - 1)):
        first, last = flash_attn.packed(*tensors, 22, window=window)
        found = flash_attn.padded(mask, window=window)[0].amin()
        assert first[0] == 0 == found and (window[1] == 0 or last[0] == 2), window
    cu, wrong = tensors[0], functools.partial(raises, ValueError)
    with wrong("cu_seqlens"):
        flash_attn.packed(cu[:1], cu[:1], 4)
    with wrong("mask"):
        flash_attn.padded(mask, 0)
    q, k, v = make((1, 2, 200, D))
    rows = packed_rows(1, 200, 200)
    wide = lambda x, facts=flash_attn._facts: (True, *facts(x)[1:])
    with mock.patch.object(flash_attn, "_facts", wide):
        compare(flash_attention(q, k, v, visible=rows), q, k, v, is_causal=Rows(*rows))
        compare_gradients((q, k, v), dict(is_causal=Rows(*rows)))
    flash_attention(q, k, v, visible=rows)
    if GPU:
        torch.cuda.set_sync_debug_mode("error")
        try:
            flash_attention(q, k, v, visible=flash_attn.packed(*tensors, 200))
            flash_attention(q, k, v, visible=flash_attn.padded(mask.new_ones(1, 200)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "as written out"


def sinks(config):
    """One more score in each row's softmax: out, lse and all gradients, by the definition."""
    qkv = make((2, 4, 150, D), keys=200, heads=2)
    hidden = torch.tensor([3, 0, 3], dtype=torch.int32, device=DEVICE)
    q, k, v = (x[:, :, :3].requires_grad_() for x in make((1, 2, 64, D)))
    no_sink = torch.tensor([-INF, 1.0], device=DEVICE)
    out, lse = flash_attention(
        q, k, v, visible=(hidden, hidden * 0 + 2), sinks=no_sink, return_lse=True)  # fmt: skip
    assert out.isfinite().all() and lse[0, 0, 0] == -INF and lse[0, 1, 0] == 1, (out, lse)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))
    sinks = torch.tensor([-3.0, 0.0, 2.0, 9.0], device=DEVICE)
    noise = torch.Generator(DEVICE).manual_seed(2)
    do, dlse = (torch.randn(2, 4, 150, *dim, generator=noise, device=DEVICE) for dim in ((D,), ()))

    def attend(q, k, v, sinks):
        options = dict(sinks=sinks, is_causal=True, enable_gqa=True, config=NAMED[config])
        return flash_attention(q, k, v, return_lse=True, **options)

    def right(q, k, v, sinks):
        out, lse = definition(q, k, v, True)
        whole = torch.logaddexp(lse, sinks[:, None])
        return out * (lse - whole).exp()[..., None], whole

    def results(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (*qkv, sinks)]
        leaves[3] = sinks.double().requires_grad_()
        out, lse = attend(*leaves)
        loss = (out * do.to(dtype)).sum().double() + (lse.double() * dlse).sum()
        return out, lse, *torch.autograd.grad(loss, leaves)

    for found, ref in zip(results(attend, torch.bfloat16), results(right, torch.float64)):
        size = ref.abs().max().item()
        torch.testing.assert_close(found.double(), ref, atol=0.02 * size, rtol=0)
    return "as defined"


def head_dims():
    """Head dims that are no multiple of 8, and another one of v: padded, with their gradients."""
    for dim, dim_v, keys in ((20, 20, 90), (1, 3, 90), (24, 16, 300), (40, 64, 90)):
        q, k, _ = make((1, 4, 70 if keys < 300 else 3, dim), keys=keys, heads=2)
        qkv = q, k, make((1, 2, keys, dim_v), seed=3)[2]
        options = dict(enable_gqa=True, is_causal=LOWER_RIGHT, return_lse=True)
        out, lse = flash_attention(*qkv, **options)
        compare(out, *qkv, is_causal=LOWER_RIGHT, lse=lse)
        line = compare_gradients(qkv, dict(is_causal=LOWER_RIGHT), with_lse=True)
    return line


def few_queries():
    """Parts of the keys that a row does not see, or where each score is -inf. Without the kernel
    that merges them, no part is lost: each key is in one part."""
    q, k, v = make((1, 4, 2, D), "float32", 700, 2)
    q[..., 0], k[:, :, :300, 0] = 1, -INF
    out, lse = flash_attention(q, k, v, enable_gqa=True, return_lse=True)
    assert torch.equal(flash_attention(q, k, v, enable_gqa=True), out), "out depends on return_lse"
    compare(out, q, k, v, lse=lse)
    k[:, 1, :, 0] = -INF
    out, lse = flash_attention(q, k, v, enable_gqa=True, return_lse=True)
    assert out[:, 2:].isnan().all() and (lse[:, 2:] == -INF).all(), "all scores are -inf"
    k[:, :, :, 0], v[0, 0, 600, 3] = 0, INF
    compare(flash_attention(q, k, v, enable_gqa=True), q, k, v)
    q, k, v = (torch.zeros(1, 1, n, D, device=DEVICE, dtype=torch.bfloat16) for n in (1, 700, 700))
    for key in (0, 127, 128, 255, 256, 511, 512, 699):
        v.zero_()[:, :, key] = 700
        torch.testing.assert_close(flash_attention(q, k, v), torch.ones_like(q))
    q, k, v = make((1, 2, 1, D), keys=4000)
    q[..., 0], k[..., 0] = D**0.5, torch.linspace(0, 20, 4000)  # later parts count more
    many = mock.patch.object(flash_attn, "_gpu", lambda device: (None, 132))
    with contextlib.nullcontext() if GPU else many:  # more parts than merge_kernel adds at a time
        compare(flash_attention(q, k, v), q, k, v)
    return "each key counts once"


def one_head():
    """A size of 1 may have a stride of 1. A kernel that is compiled then serves other strides."""
    for M, heads in itertools.product((3, 200), (1, 4)):
        x = [x.flatten(1, 2) for x in make((2, 1, M, D), keys=300)]
        qkv = [x[..., None].permute(0, 3, 1, 2) for x in x]  # strides (S * D, 1, D, 1)
        if heads > 1:
            qkv = make((2, 4, M, D), keys=300)
        compare(flash_attention(*qkv), *qkv)
        line = compare_gradients(qkv, {}, with_lse=True)
    return line


def asked_for(config, dim):
    """No gradient is computed that nobody asked for; the others do not depend on that. out's
    gradient is one number, expanded; q, k and v stay as they are; lse is exact, unasked for."""
    q, k, v = make((1, 2, 140, dim), "float16")
    copies = [x.clone() for x in (q, k, v)]

    def found(*which):
        flash_attn.LAUNCHES.clear()
        leaves = [x.detach().requires_grad_(i in which) for i, x in enumerate((q, k, v))]
        flash_attention(*leaves).sum().backward()
        assert [x.grad is not None for x in leaves] == [i in which for i in range(3)]
        return kernels(), [x.grad for x in leaves]

    with gradient_of(config):
        of_all, expected = found(0, 1, 2)
        again = "hopper_dq_kernel" in of_all  # it does not read ds, which dkdv_kernel keeps
        known, leaves = len(flash_attn.LAUNCHES), [x.clone().requires_grad_() for x in (q, k, v)]
        with mock.patch.multiple(flash_attn, DS_BYTES=1, DS_KEYS=1):
            flash_attention(*leaves).sum().backward()
        assert again or len(flash_attn.LAUNCHES) > known, "dk and dv in float32, and one kernel"
        for i, x in enumerate(expected):
            compiled, grads = found(i)
            of_kv = {"dkdv_kernel"} if again else set()
            unasked = {"dq_kernel", "hopper_dq_kernel"} if i else of_kv
            assert compiled == of_all - unasked, (i, compiled, of_all)
            torch.testing.assert_close(grads[i], x, atol=2e-3, rtol=2e-3)
    assert all(map(torch.equal, (q, k, v), copies)), "an input was written"
    q, k, v = (x.requires_grad_() for x in make((1, 2, 200, dim)))
    with torch.no_grad():
        assert not flash_attention(q, k, v).requires_grad
    named = NAMED["hopper_256" if dim > 128 else "hopper"] if config == "hopper" else None
    out = flash_attention(q, k, v, config=named)
    (lse,) = (x for x in out.grad_fn.saved_tensors[3:5] if x.shape == q.shape[:3])
    compare(out, q, k, v, lse=lse)
    return ", ".join(sorted(of_all))


BACKEND = "inductor" if GPU else "aot_eager"


def in_torch(name):
    """torch's own checks, torch.compile, torch.export, autocast, and where a clear error is due."""
    mask, sink = (True, (90, None)), torch.full((4,), -1e4, device=DEVICE)  # no change
    given = dict(asked(mask), sinks=sink, enable_gqa=True, return_lse=True)
    # Written out, a float is a constant: dynamo compiles twice for one that it finds in an object.
    attend = lambda q, k, v: flash_attention(q, k, v, softcap=2.0, **given)
    q, k, v = make((2, 4, 140, D), "float16", heads=2)
    loss = lambda out, lse: out.square().sum() + lse.sum()
    if name == "opcheck":
        operators, check = torch.ops.flash_attn, torch.library.opcheck
        for qkv in ((q, k, v), map(bshd, (q, k, v))):
            check(operators.forward.default, (*qkv, None, 1, 90, -1, None, 2.0, True))
        for budget in (flash_attn.DS_BYTES, 1):
            with mock.patch.multiple(flash_attn, DS_BYTES=budget, DS_KEYS=1):
                arguments = q, k, v, *attend(q, k, v), None, q, None, 1, 90, -1, None, 2.0
                check(operators.backward.default, arguments, test_utils="test_faketensor")
    elif name == "compile":  # one graph for all lengths, and its gradient
        counter = torch._dynamo.testing.CompileCounterWithBackend(BACKEND)
        options = dict(fullgraph=True, dynamic=True, backend=counter)
        run = torch.compile(lambda *qkv: attend(*qkv), **options)
        for n in (140, 150, 300):
            qkv = [x.requires_grad_() for x in make((2, 4, n, D), "float16", heads=2)]
            out, lse = run(*qkv)
            compare(out, *qkv, is_causal=mask, lse=lse, softcap=2.0)
            expected = torch.autograd.grad(loss(*attend(*qkv)), qkv)
            found = torch.autograd.grad(loss(out, lse), qkv)
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
        assert counter.frame_count == 1, f"{counter.frame_count} graphs"
    elif name == "export":
        module = torch.nn.Module()
        module.forward = attend
        length = torch.export.Dim("length", min=2, max=4096)
        program = torch.export.export(module, (q, k, v), dynamic_shapes=[{2: length}] * 3)
        q, k, v = make((2, 4, 200, D), "float16", heads=2)
        compare(program.module()(q, k, v)[0], q, k, v, is_causal=mask, softcap=2.0)
    elif name == "autocast":
        q, k, v = (x.float() for x in (q, k, v))
        expected = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())[0]
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(attend(q, k, v)[0], expected)
            for wrong in (q.double(), [1.0]):
                with raises(TypeError, "^q"):
                    attend(wrong, k, v)
    return "as documented"


def training(how):
    """A decoder layer with GQA learns tokens; every second step computes it again (checkpointing).
    At each step the gradient of each weight is SDPA's to 0.1%."""
    torch.manual_seed(0)
    tokens = torch.randint(50, (1, 41)).to(DEVICE)
    embed, weight, project = weights = [
        (torch.randn(n, 64) * n**-0.5).to(DEVICE).requires_grad_() for n in (50, 64, 32)]
    ours = functools.partial(flash_attention, is_causal=True, enable_gqa=True)

    def layer(attend):
        x = embed[tokens[:, :-1]]
        heads = (F.rms_norm(x, (64,)) @ weight).unflatten(-1, (4, 16)).transpose(1, 2)
        x = x + attend(*heads.split((2, 1, 1), 1)).transpose(1, 2).flatten(2) @ project
        return F.cross_entropy((x @ embed.T)[0], tokens[0, 1:])

    run = torch.compile(layer, fullgraph=True, backend=BACKEND) if how == "compile" else layer
    again = functools.partial(torch.utils.checkpoint.checkpoint, run, use_reentrant=False)
    optimizer, losses = torch.optim.Adam(weights, lr=1e-2), []
    for step in range(30):
        losses.append((again if step % 2 else run)(ours))
        both = losses[-1], layer(functools.partial(sdpa, is_causal=True))
        for x, ours_, theirs in zip(weights, *(torch.autograd.grad(x, weights) for x in both)):
            error = ((ours_ - theirs).abs().max() / theirs.abs().max()).item()
            assert error < 1e-3, f"step {step}, weight {tuple(x.shape)}: relative error {error:.1e}"
            x.grad = ours_
        optimizer.step()
    assert losses[-1] < losses[0] / 2, losses
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def readme(text):
    """What the README's Python block with this text in it defines: its recipes are what is checked.
    Without a GPU it runs with small tensors."""
    (block,), defined, randn = (x for x in readme_blocks() if text in x), {}, torch.randn
    if "transformers" in block and importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    small = lambda *shape, device=None, **options: randn(
        *(min(n, 40) for n in shape), device=DEVICE, **options)
    with contextlib.nullcontext() if GPU else mock.patch("torch.randn", small):
        exec(block, defined)
    return defined


def split_keys(config):
    """The README's merge of results over parts of the keys, by their lse, is attention to all keys.
    A row that no part sees is 0, has lse -inf and a finite gradient."""
    attend = functools.partial(flash_attention, return_lse=True)
    merge = readme("def merge")["merge"]
    q, k, v = make((1, 2, 130, D), keys=400)
    parts = [(k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 150), (150, 151), (151, 400))]
    found, lse = merge(*zip(*(attend(q, *part, config=NAMED[config]) for part in parts)))
    line = compare(found.to(q.dtype), q, k, v, lse=lse)
    leaves = [x.requires_grad_() for x in (column(0, 0), column(0), column(1))]
    out, lse = attend(*leaves, is_causal=LOWER_RIGHT)
    for n in (1, 2):
        found, found_lse = merge([out] * n, [lse] * n)
        holds(found, 0, 1)
        torch.testing.assert_close(found_lse, lse + math.log(n))
        loss = found.sum() + found_lse[..., 1:].sum()
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(x.isfinite().all() for x in grads), grads
        holds(grads[2], 1)
    assert merge([out, out], [lse, lse * math.nan])[0].isnan().all(), "merge hides a NaN"
    return line


def copied_files(where):
    """flash_attn.py and configs.py work where they are copied to, and import nothing else of ours:
    in a folder, where `import configs` gives what flash_attention takes; in a package; and both
    beside a `configs` of the host project."""
    package, theirs = "app.ops." if where == "package" else "", where != "folder"
    interpreter = inspect.getsource(patch_interpreter) + "patch_interpreter()"
    script = f"""
import os, sys
from unittest import mock
import torch
{"import configs; assert configs.THEIRS" if theirs else ""}
import {package}flash_attn, helion
{"" if GPU else interpreter}
{f"import {package}use; from {package}configs import best" if package else ""}
{"" if theirs else "from configs import best"}
from {package}flash_attn import flash_attention
q, k, v = torch.randn(3, 1, 2, 100, 64, device={DEVICE!r}, dtype=torch.float16)
sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v)
for config in (None, best(None, 64, q.dtype, 2, 100, 100) if "best" in globals() else None):
    torch.testing.assert_close(flash_attention(q, k, v, config=config), sdpa, atol=2e-3, rtol=2e-3)
files = [str(getattr(module, "__file__", "")) for module in sys.modules.values()]
assert not [x for x in files if os.path.dirname(x) == {str(HERE)!r}], files
import configs
assert hasattr(configs, "THEIRS") == {theirs}
"""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, *package.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("flash_attn.py", "configs.py"):
            shutil.copy(HERE / name, folder)
        files = {"caller.py": script}
        if package:
            files["configs.py"] = "THEIRS = True"
            files["app/ops/use.py"] = ("from .flash_attn import flash_attention\n"
                                       "from .configs import HOPPER")  # fmt: skip
        elif theirs:  # a package is found before the file beside it
            files["configs/__init__.py"] = "THEIRS = True"
        for name, text in files.items():
            Path(root, name).parent.mkdir(exist_ok=True)
            Path(root, name).write_text(text)
        command = [sys.executable, "caller.py"]
        child = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr.strip()[-500:]
    return "runs there"


def column(*numbers, dim=8, dtype=torch.float32):
    """[1, 1, S, dim]: each row repeats one number."""
    x = torch.tensor(numbers, dtype=dtype, device=DEVICE)
    return x[None, None, :, None].repeat(1, 1, 1, dim)


def holds(x, *numbers):
    """x is column(*numbers), also as [B, S, H, D]."""
    found, expected = x.detach().float().flatten(0, 2), column(*numbers, dim=x.size(3))[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def sdpa_backend(how):
    """SDPA's flash backend is ours while it is registered, forward and backward, with the backend's
    is_causal, which is lower right. A CPU has only the backend's operator."""
    from torch.nn.attention import bias

    attend = lambda *qkv, mask: F.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=0.1)
    if not GPU:
        operator = torch.ops.aten._scaled_dot_product_flash_attention
        attend = lambda *qkv, mask: operator(*qkv, 0.0, True, scale=0.1)[0]
    run = torch.compile(attend, backend=BACKEND) if how == "compile" else attend
    q, k, v = (x.requires_grad_() for x in make((1, 2, 70, 64), "float16", 100))
    registered = flash_attn._Registered(DEVICE.upper())
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = run(q, k, v, mask=bias.causal_lower_right(70, 100))
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
    finally:
        registered.remove()
    expected = flash_attention(q, k, v, is_causal=LOWER_RIGHT, scale=0.1)
    expected = torch.autograd.grad(expected.square().sum(), (q, k, v))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    known = getattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["helion"])
    assert "helion" in known()  # torch 2.13 lists them
    return compare(out, q, k, v, is_causal=LOWER_RIGHT, scale=0.1)


def tracing(name):
    """While a TorchDispatchMode is active a call is one operator, also after a call of the same
    shapes, so that graphs have it, policies can save it and its operations are counted."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils import checkpoint, flop_counter

    ours, flops = torch.ops.flash_attn, 4 * 2 * 64 * 64 * 32
    attend = lambda q, k, v: flash_attention(q, k, v, enable_gqa=True)
    q, k, v = make((1, 2, 64, 32), "float32")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with_leaves = lambda *qkv: [x.detach().requires_grad_() for x in qkv]
    gradients = lambda *qkv: torch.autograd.grad(attend(*(qkv := with_leaves(*qkv))).sum(), qkv)
    if name == "make_fx":
        for function, right, operators in (
            (attend, out, {ours.forward.default}),
            (gradients, expected, {ours.forward.default, ours.backward.default}),
        ):
            graph = make_fx(function)(q, k, v)
            targets = [node.target for node in graph.graph.nodes]
            assert operators <= set(targets) and "empty" not in str(targets), graph.code
            torch.testing.assert_close(graph(q, k, v), right)
    elif name == "flops":
        with flop_counter.FlopCounterMode(display=False) as mode:
            attend(q, k, v)
            attend(q, k[:, :1], v[:, :1])
            torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), expected)
            with raises(ValueError, "config must be None under"):
                flash_attention(q, k, v, config=NAMED["general"])
        assert mode.get_total_flops() == 4.5 * flops, mode.get_total_flops() / flops
    elif name == "selective":  # a policy that saves the output: it is not computed again
        for saved, products in ((True, 3.5), (False, 4.5)):
            policy = lambda ctx, op, *args, **options: saved and op is ours.forward.default
            contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, policy)
            with flop_counter.FlopCounterMode(display=False) as mode:
                options = dict(use_reentrant=False, context_fn=contexts)
                found = checkpoint.checkpoint(attend, *leaves, **options)
                torch.testing.assert_close(torch.autograd.grad(found.sum(), leaves), expected)
            assert mode.get_total_flops() == products * flops, mode.get_total_flops() / flops
    return "one operator"


def unknown_triton():
    """On Hopper a Triton that nobody has tried gets the plain kernels, and one warning."""
    configs.warn_of_plain_kernels.cache_clear()
    unknown = mock.patch.object(configs, "SPECIALISED", False)
    with unknown, warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for tunings in ([configs.best((9, 0), D, torch.bfloat16, 8, 4096, 4096)],
                        configs.best_gradient((9, 0), D, torch.bfloat16)) * 2:  # fmt: skip
            assert not any(x.kernel.startswith("hopper") for x in tunings if x), tunings
    configs.warn_of_plain_kernels.cache_clear()
    (text,) = (str(x.message) for x in found)
    assert triton.__version__ in text and "check.py -k hopper" in text, text
    if configs.SPECIALISED:
        assert configs.best((9, 0), D, torch.bfloat16, 8, 4096, 4096) is configs.HOPPER
    return text


def clear_errors():
    """Where flash_attention cannot run, one sentence says what to do instead."""
    q, k, v = make((2, 2, 8, 16), "float32")
    attend = lambda q: flash_attention(q, k, v)
    parts = [x[:, : 8 - i].transpose(0, 1) for i, x in enumerate(q)]  # [S, H, D]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    strided = torch.nested.nested_tensor([x.transpose(0, 1) for x in parts])
    total = lambda q: attend(q).square().sum()
    twice = lambda: torch.autograd.grad(total(q.requires_grad_()), q, create_graph=True)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        for error, message, call in (
            (RuntimeError, "func.*autograd.grad", lambda: torch.func.grad(total)(q)),
            (RuntimeError, "func.*autograd.grad", lambda: torch.func.vjp(attend, q)),
            (RuntimeError, "vmap.*fold", lambda: torch.vmap(attend)(torch.stack([q, q]))),
            (RuntimeError, "jit.trace.*export", lambda: torch.jit.trace(attend, (q,))),
            (RuntimeError, "forward-mode", lambda: attend(forward_ad.make_dual(q, q))),
            (RuntimeError, "once_differentiable", lambda: twice()[0].sum().backward()),
            (ValueError, "q must not be .*nested.*: pad", lambda: flash_attention(*[jagged] * 3)),
            (ValueError, "q must not be .*nested.*: pad", lambda: flash_attention(*[strided] * 3)),
            (ValueError, "k must not be .*nested", lambda: flash_attention(q, jagged, jagged)),
        ):  # fmt: skip
            with raises(error, message):
                call()
    return "as documented"


def recipe_values():
    """The README's recipe for transformers: each keyword that changes the result does so, with
    flash_attention and with SDPA, or is refused by name; and each keyword that a model of
    transformers gives is one that it knows."""
    recipe = readme("AttentionInterface")
    attend, count = recipe["helion_attention"], mock.Mock(wraps=flash_attention)
    recipe["flash_attention"] = count
    decoder, encoder, unknown = (torch.nn.Identity() for _ in range(3))
    decoder.is_causal, encoder.is_causal = True, False
    row = lambda *numbers: torch.tensor([numbers], device=DEVICE)
    mask = torch.tensor([[[[True, False]]]], device=DEVICE)
    additive = torch.zeros(1, 1, 1, 2, device=DEVICE).masked_fill(~mask, -INF)
    bias, sink = additive.masked_fill(~mask, math.log(3)), torch.zeros(1, device=DEVICE)

    def right(numbers, values, M=1, mask=None, module=decoder, ours=(20,), sdpas=(264,),
              dim_v=None, **options):  # fmt: skip
        for dim in (*ours, *sdpas):  # head dims that flash_attention and SDPA compute
            count.reset_mock()
            q, k = column(*[0] * M, dim=dim), column(*[0] * len(values), dim=dim)
            v = column(*values, dim=dim_v or dim)
            out, weights = attend(module, q, k, v, mask, **options)
            holds(out, *numbers)
            assert weights is None and out.shape == (1, M, 1, v.size(3)) and out.is_contiguous()
            assert count.called == (dim in ours), (dim, options)

    only_ours, only_sdpa = dict(sdpas=()), dict(ours=(), sdpas=(20,))
    for options in ({}, dict(scaling=0.1, softcap=None, output_attentions=False, dropout=0.0,
                             sliding_window=None, position_ids=row(5, 6))):  # fmt: skip
        right((1, 2), (1, 3), 2, **options)
        right((4 / 3, 1), (1, 3, 0, 0), 2, **options)  # the last two rows
        right((1,), (1, 3, 0, 0), **options)
        right((1, 2), (1, 3, 0, 0), 2, row(1, 1, 0, 0), **options)  # a static cache with room
        right((2,), (1, 3, 0, 0), 1, row(1, 1, 0, 0), **options)
        right((1, 1), (1, 3, 0, 0), 2, module=encoder, **options)
        right((1, 1), (1, 3, 0, 0), 2, is_causal=False, **options)
    right((3, 4), (1, 3, 5), 2, row(0, 1, 1))
    for M in (1, 2, 3):  # a query of cross attention has no place among the keys
        right((3,) * M, (1, 3), M, row(0, 1), encoder)
    right((0, 0.5, 1.5, 2.5), (0, 1, 2, 3), 4, sliding_window=2)
    right((2.5, 3.5), (0, 1, 2, 3, 4), 2, sliding_window=2)
    right((1.5, 2.5), (0, 1, 2, 3, 4), 2, row(0, 1, 1, 1, 0), sliding_window=2)
    right((0.5, 1, 2, 2.5), (0, 1, 2, 3), 4, module=encoder, sliding_window=2)
    four, ends = (0, 2, 4, 8), row(0, 2, 4)[0]
    for packs in (dict(position_ids=row(0, 1, 0, 1)), dict(position_ids=row(2, 3, 2, 3)),
                  dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=2)):  # fmt: skip
        right((0, 1, 4, 6), four, 4, **packs)
        apart = (3.5,) * 4 if "position_ids" in packs else (1, 1, 6, 6)  # as transformers' masks
        right(apart, four, 4, module=encoder, **packs)
        right(four, four, 4, sliding_window=1, **packs)
    right((1, 6), four, 2, cu_seq_lens_q=row(0, 1, 2)[0], cu_seq_lens_k=ends)
    for options in (dict(s_aux=sink), dict(s_aux=sink, softcap=2.0)):
        options |= only_ours
        right((0.5, 2 / 3, 0.75), (1, 1, 1), 3, **options)
        right((0.5, 2 / 3, 2 / 3), (1, 1, 1), 3, sliding_window=2, **options)
        right((0.5,), (1, 5), mask=row(1, 0), **options)
        right((0.5, 0.5), (1, 1), 2, position_ids=row(0, 0), **options)
    out, _ = attend(decoder, column(1), *[column(1, 0)] * 2, None, scaling=1, softcap=3.0)
    holds(out, 1 / (1 + math.exp(-3 * math.tanh(8 / 3))))
    right((0.75,), (0, 1), position_bias=bias, **only_sdpa)
    right((0, 0.75), (0, 1), 2, position_bias=bias.expand(1, 1, 2, 2), **only_sdpa)
    for some in (mask, additive, row(1, 0)):
        right((0,), (0, 1), mask=some, position_bias=bias, **only_sdpa)
    for some in (mask, additive):
        right((0,), (0, 1), mask=some, sliding_window=1, **only_sdpa)
    for dim, dim_v in ((8, 16), (16, 8)):
        right((1, 2), (1, 3), 2, ours=(dim,), sdpas=(), dim_v=dim_v)
    with sdpa_kernel(SDPBackend.MATH):  # others may divide by 1 - 1
        right((0,), (1, 1), dropout=1.0, **only_sdpa)
    given = dict.fromkeys(("output_attentions", "sinks", "indices", "block_indices"), True)
    for name, some in (given | dict(cu_seq_lens_q=ends, softcap=2.0, s_aux=sink)).items():
        with raises(ValueError, f"no {name} here"):
            attend(decoder, column(0), *[column(0, 0)] * 2, mask, **{name: some})
    with raises(AttributeError, "'Identity' .*'is_causal'"):
        attend(unknown, *[column(0, 0)] * 3, None)

    import transformers

    (text,) = (x for x in readme_blocks() if "AttentionInterface" in x)
    known = {*re.findall(r"\w+", text), "max_length_k"}  # with max_length_q
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    trees = [ast.parse(file.read_text()) for file in files]
    calls = [x for tree in trees for x in ast.walk(tree) if isinstance(x, ast.Call)
             and getattr(x.func, "id", "") == "attention_interface"]  # fmt: skip
    given = {keyword.arg for call in calls for keyword in call.keywords} - {None}
    assert len(calls) > 100 and given <= known, given - known
    return f"{len(calls)} calls in transformers have {len(given)} keywords"


def recipe_masks():
    """With every mask that transformers makes the recipe does what SDPA does with SDPA's mask, and
    flash_attention computes all that are causal, a window, padding or packed sequences."""
    recipe = readme("AttentionInterface")  # skips where transformers is not installed
    import transformers

    sdpa_forward = transformers.AttentionInterface()["sdpa"]
    count = recipe["flash_attention"] = mock.Mock(wraps=flash_attention)
    if "cache" not in inspect.signature(transformers.masking_utils.create_causal_mask).parameters:
        raise Skipped(f"transformers {transformers.__version__} makes masks by other functions")
    config = transformers.LlamaConfig(sliding_window=3, attention_chunk_size=4)
    module, qkv, ours = torch.nn.Identity(), make((2, 2, 12, 16), "float32"), collections.Counter()
    left, right = (torch.ones(2, 12, dtype=torch.int64, device=DEVICE) for _ in range(2))
    left[0, :5], right[0, 8:] = 0, 0
    one, blocks = torch.arange(12, device=DEVICE), [-1, -1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1]
    kinds = {
        "usual": {}, "packed": dict(position_ids=one % 7),
        "blocks": dict(block_sequence_ids=torch.tensor(blocks, device=DEVICE)),
        "or": dict(or_mask_function=lambda b, h, q, kv: kv == 0),
        "and": dict(and_mask_function=lambda b, h, q, kv: kv != 1),
    }  # fmt: skip
    names = ("causal", "sliding_window_causal", "chunked_causal", "bidirectional",
             "bidirectional_sliding_window")  # fmt: skip
    for name, kind, B, mask in itertools.product(names, kinds, (1, 2), (None, left, right)):
        module.is_causal, window = "bidirectional" not in name, 0
        if kind == "packed" and mask is not None or not module.is_causal and kind in (
            "packed", "blocks"
        ):
            continue  # transformers has no such mask
        if "sliding" in name:
            window = 3 if module.is_causal else 4  # there 3 does not count the row's own key
        padding = None if mask is None else mask[:B]
        given = {x: y.expand(B, -1) if torch.is_tensor(y) else y for x, y in kinds[kind].items()}
        q, k, v = (x[:B] for x in qkv)
        make_mask, masks = getattr(transformers.masking_utils, f"create_{name}_mask"), []
        for config._attn_implementation in ("sdpa", "helion"):
            masks.append(make_mask(config, q[:, 0], attention_mask=padding, cache=None, **given))
        expected = sdpa_forward(module, q, k, v, masks[0])[0]
        count.reset_mock()
        found = recipe["helion_attention"](
            module, q, k, v, masks[1], sliding_window=window, position_ids=given.get("position_ids")
        )[0]
        if mask is not None:
            found, expected = found[padding.bool()], expected[padding.bool()]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        ours[kind] += count.called
    whole = transformers.masking_utils.create_causal_mask(
        config, qkv[0][:, 0], None, None, allow_is_causal_skip=False)  # a model adds its own to it
    assert whole.shape == (2, 1, 12, 12) and ours["usual"] == 24 and ours["packed"] == 4, ours
    return f"of {len(names)} kinds of mask, with padding, packed sequences and exceptions"


def recipe_compiles():
    """The recipe is one graph for all lengths but 1; a mask, and positions, make it others."""
    attend, module = readme("AttentionInterface")["helion_attention"], torch.nn.Identity()
    import transformers

    module.is_causal, module.num_key_value_groups = True, 2
    sinks = torch.zeros(2, device=DEVICE)
    options = dict(scaling=0.2, dropout=0.0, sliding_window=9, s_aux=sinks, softcap=2.0)
    call = lambda *given: attend(module, *given[:4], position_ids=given[4], **options)[0]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=BACKEND)
    for padded, packed in ((False, False), (False, True), (True, True)):
        torch.compiler.reset()
        for M, N in ((12, 12), (14, 14), (1, 14), (6, 20)):
            i, j = (torch.arange(n, device=DEVICE)[None] for n in (M, N))
            mask, positions = j > 2 if padded else None, i % 8 if packed else None
            given = *make((1, 2, M, 16), "float32", N, 1), mask, positions
            torch.testing.assert_close(compiled(*given), call(*given), atol=1e-4, rtol=1e-4)
    config, x = transformers.LlamaConfig(attn_implementation="helion"), given[0].new_zeros(2, 9, 8)
    masks = lambda padding, positions: transformers.masking_utils.create_causal_mask(
        config, x, padding, None, positions)  # fmt: skip
    compiled = torch.compile(masks, fullgraph=True, backend=BACKEND)
    assert compiled(None, j[:, :9]) is compiled(None, None) is None
    assert compiled(j[:, 11:].expand(2, -1), None).shape == (2, 9)
    return "one graph"


TOKENS = dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BERT = dict(TOKENS, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2)  # fmt: skip
LLAMA = dict(BERT, num_key_value_heads=1, head_dim=16)
WINDOW, T5 = dict(LLAMA, sliding_window=8), dict(TOKENS, d_model=32, decoder_start_token_id=1)
MODELS = {  # class, how often flash_attention computes its attention, options
    "llama": ("LlamaForCausalLM", 58, LLAMA),
    "mistral": ("MistralForCausalLM", 38, WINDOW),
    "gemma2": ("Gemma2ForCausalLM", 38, WINDOW),
    "gpt_oss": ("GptOssForCausalLM", 38, dict(
        WINDOW, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"])),
    "bert": ("BertModel", 6, BERT),
    "t5": ("T5ForConditionalGeneration", 0, dict(
        T5, d_kv=16, d_ff=32, num_layers=2, num_heads=2)),
    "whisper": ("WhisperForConditionalGeneration", 6, dict(
        T5, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=20, max_target_positions=30)),
}  # fmt: skip


def model(name):
    """A small random model of transformers has with the README's recipe the logits that it has with
    its eager attention: padded, generating with both caches; Llama in steps, packed, and its
    gradients."""
    recipe = readme("AttentionInterface")
    import transformers

    kind, calls, options = MODELS[name]
    numbers = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 50, (2, 24), generator=numbers).to(DEVICE)
    sound = torch.randn(2, 8, 40, generator=numbers).to(DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0  # padded at the left
    config = getattr(transformers, re.sub("(For|Model).*", "Config", kind))(**options)
    tested = getattr(transformers, kind)(config).to(DEVICE).eval()
    if name == "gpt_oss":
        tested.set_experts_implementation("eager")
    for x in tested.parameters():  # not small: attention is not uniform then
        size = 1 if x.dim() == 1 else 2 * x.size(-1) ** -0.5
        x.data = (torch.randn(x.shape, generator=numbers) * size).to(DEVICE)

    def logits(ids=tokens, mask=None, **more):
        more |= {"input_features": sound} if name == "whisper" else {"input_ids": ids}
        more |= {"decoder_input_ids": ids[:, :9]} if name in ("whisper", "t5") else {}
        out = tested(attention_mask=mask, **more)
        found = (out.logits if "logits" in out else out.last_hidden_state).detach()
        return found if mask is None or found.size(1) < 24 else found[mask.bool()]

    def cached(*lengths, cache=None):
        ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        for a, b in zip(ends, ends[1:]):
            seen = torch.ones_like(tokens[:, :b]) if a else None
            options = dict(attention_mask=seen, past_key_values=cache, use_cache=True)
            step = tested(tokens[:, a:b], **options)
            cache = step.past_key_values
            yield step.logits.detach()

    def generated(mask=torch.ones_like(tokens), **more):
        more |= dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
                     return_dict_in_generate=True, disable_compile=True)  # fmt: skip
        found = tested.generate(tokens[:, :9], attention_mask=mask[:, :9], **more)
        return found.sequences, *found.logits

    def results(implementation):
        tested.set_attn_implementation(implementation)
        found = [logits(), logits(tokens[:, :6])]
        found += [logits(mask=mask)] if name != "whisper" else []
        for cache in ("dynamic", "static") if name not in ("whisper", "bert") else []:
            found += generated(cache_implementation=cache)
            found += generated(mask, cache_implementation=cache)
        if name == "llama":
            static = transformers.StaticCache(config=config, max_cache_len=20)
            found += [*cached(12, 3, 1), *cached(12, 1, 1, cache=static)]
            two = torch.arange(24, device=DEVICE)[None] % 12  # sequences
            packed = logits(tokens[:1], position_ids=two, use_cache=False)
            alone = [logits(part, use_cache=False) for part in tokens[:1].split(12, 1)]
            torch.testing.assert_close(packed, torch.cat(alone, 1), atol=2e-4, rtol=2e-4)
            loss = tested.train()(tokens, labels=tokens).loss
            found += [packed, *torch.autograd.grad(loss, list(tested.eval().parameters()))]
        return found

    count = recipe["flash_attention"] = mock.Mock(wraps=flash_attention)
    torch.testing.assert_close(results("helion"), results("eager"), atol=2e-4, rtol=2e-4)
    assert count.call_count == calls, f"flash_attention was called {count.call_count} times"
    return f"as in eager mode, {count.call_count} calls of flash_attention"


# ---- 6. Races, and what else only a GPU can show -------------------------------------------------


def same_bits(config, runs=200):
    """Many runs, in some of which a race between warps would show; of the gradient, too."""
    def with_gradient(*qkv, **options):
        loss = flash_attention(*(x.requires_grad_() for x in qkv), **options).square().sum()
        return torch.autograd.grad(loss, qkv)

    causal, dim = dict(is_causal=True), {"hopper_64": 64, "hopper_256": 256}.get(config, 128)
    calls = [(flash_attention, {}), (flash_attention, causal), (with_gradient, {}),
             (with_gradient, causal), (flash_attention, dict(causal, return_lse=True))]
    for attend, options in calls[: 1 if config in REPORT else None]:
        for B, H, S in ((4, 32, 1024), (2, 16, 1001), (2, 8, 8192)):
            qkv = make((B, H, S, 64 if S == 1001 and config in PLANS else dim))
            run = functools.partial(attend, config=NAMED[config], **options)
            first = run(*qkv)
            for _ in range(runs):
                torch.testing.assert_close(run(*qkv), first, atol=0, rtol=0)
    return f"the same bits as the first, {runs} times each"


def threads():
    """Eight threads make their first calls at once, on a stream each."""
    barrier = threading.Barrier(8)

    def work(i):
        shape, is_causal = (1 + i % 3, 2, 100 + 50 * i, (64, 128)[i % 2]), i % 3 == 0
        q, k, v = make(shape, HALF[i // 4], seed=i)
        torch.cuda.synchronize()
        barrier.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                out = flash_attention(q, k, v, is_causal=is_causal)
        torch.cuda.synchronize()
        return compare(out, q, k, v, is_causal=is_causal)

    flash_attn.LAUNCHES.clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, range(8)))[-1]


def capture():
    """In a CUDA graph: not as the first call, and right afterwards."""
    q, k, v = make((2, 2, 200, 32))
    flash_attn.LAUNCHES.clear()
    with raises(RuntimeError, "before captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        flash_attention(q, k, v)
    flash_attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attention(q, k, v)
    for x, new in zip((q, k, v), make((2, 2, 200, 32), seed=1)):
        x.copy_(new)
    graph.replay()
    return compare(out, q, k, v)


def report_shape(config, *shape):
    """A shape of the report; the float64 reference is taken of two heads."""
    q, k, v = make(shape)
    out = flash_attention(q, k, v, config=NAMED[config])
    for x, y in zip(out, F.scaled_dot_product_attention(q, k, v)):  # one b at a time, for memory
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)
    heads = [[x[b, h][None, None] for x in (out, q, k, v)] for b, h in ((0, 0), (-1, -1))]
    return [compare(*head) for head in heads][-1]


# ---- 7. Without a GPU ----------------------------------------------------------------------------


def patch_interpreter():
    """Close the gaps of Triton's interpreter that our kernels meet (3.7 to 3.9). Make it faster."""
    import dataclasses
    import helion.runtime
    import numpy as np
    import triton.language as tl
    from helion.autotuner.config_spec import ConfigSpec
    from helion.runtime.triton import helpers
    from torch._inductor.runtime.triton_compat import libdevice
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert, create_dot = interpreter._convert_float, builder.create_dot
    create_fmul, reduce = builder.create_fmul, interpreter.ReduceOps.apply_impl
    supports = ConfigSpec.supports_config_key

    def convert_float(x, source, target, rounding_mode):
        """Its own truncates from float32 to bf16, and gets subnormals wrong. To nearest even."""
        if (source, target) == (tl.bfloat16, tl.float32):
            return (x.astype(np.uint32) << 16).reshape(x.shape)
        truncate = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if (source, target) != (tl.float32, tl.bfloat16) or truncate:
            return convert(x, source, target, rounding_mode)
        bits = x.view(np.uint32)
        nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16  # a carry goes on, up to inf
        return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16).reshape(x.shape)

    def to_bf16(x):
        return handle(convert_float(x, tl.float32, tl.bfloat16, None), tl.bfloat16)

    def widened(x):  # it keeps bf16 as uint16, and would multiply these integers
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = convert_float(x.data, tl.bfloat16, tl.float32, None)
        return handle(data.view(np.float32), tl.float32)

    def assembly(self, asm, constraints, values, *rest):
        """flash_attn.py has four: a rounding, an inverse, a load, and one on barriers, which are
        not here."""
        x = values[0]
        if "cvt.rn.bf16x2.f32" in asm:
            x = widened(to_bf16(x.data))
        elif "rcp.approx" in asm:
            x = handle(1 / x.data, x.dtype)
        elif "ld.global.b32" in asm:
            pointers = handle(x.data.astype(np.uint64), tl.pointer_type(tl.int32))
            policies = builder.create_load.__code__.co_argcount - 3  # 2; from Triton 3.9 on 1
            x = self.create_load(pointers, *[""] * policies, False)
        else:
            assert "mbarrier.inval" in asm, asm
        return mock.Mock(get_result=lambda i: x)

    def masked(create, at):  # 3.9 makes int32 of some masks, which it then does not take
        def call(self, *args, **options):
            mask = args[at]
            mask = handle(mask.data.astype(bool), tl.int1) if isinstance(mask, handle) else mask
            return create(self, *args[:at], mask, *args[at + 1 :], **options)

        return call

    def multiply(self, a, b):  # only the cute form of report_kernel does it outside of a product
        product = create_fmul(self, widened(a), widened(b))
        return to_bf16(product.data) if a.dtype.scalar == tl.bfloat16 else product

    def reduce_fast(self, input):  # it would call Helion's max element by element
        fast = self.combine_fn == helpers._maximum_propagate_nan
        return self.min_max(input[0], np.max) if fast else reduce(self, input)

    def call_inner(self, *args, **options):  # it would patch triton.language again at every call
        if tl.core.is_builtin(tl.core.full):
            interpreter._patch_lang(tl.zeros.fn)
        return self.rewrite()(*args, **options)

    libdevice.exp2, libdevice.log2 = lambda x: tl.exp2(x), lambda x: tl.log2(x)  # it has none
    helion._compat._supports_tensor_descriptor = lambda: True  # it has TMA, if Helion is told so
    ConfigSpec.supports_config_key = (
        lambda self, key: key == "host_tensor_descriptors" or supports(self, key))
    helion.runtime.get_num_sm = lambda device, *, reserved_sms=0: 3  # persistent grids ask for it
    interpreter._convert_float = convert_float
    builder.create_fmul, builder.create_inline_asm = multiply, assembly
    builder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
    builder.get_bf16 = lambda self, value: to_bf16(np.float32([value]))
    interpreter.ReduceOps.apply_impl = reduce_fast
    interpreter.InterpretedFunction.__call__ = call_inner
    builder.create_masked_load = masked(builder.create_masked_load, 1)
    builder.create_masked_store = masked(builder.create_masked_store, 2)
    instance = interpreter.interpreter_builder  # a GPU does not look for overflows of integers
    instance.options = dataclasses.replace(instance.options, sanitize_overflow=False)


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_interpreter()

# SMs of the largest part, and KiB of shared memory per SM (CUDA C++ Programming Guide).
CHIPS = {80: (108, 164), 86: (84, 100), 89: (128, 100), 90: (132, 228), 100: (148, 228),
         120: (188, 100)}  # fmt: skip
LAUNCHED = []  # (kernel, grid, arguments, options) of what was launched for a GPU that is not here


def record(kernel, grid, *args, **options):
    LAUNCHED.append((kernel, grid, args, options))


@contextlib.contextmanager
def pretend(sm):
    """Inside, torch and Helion believe in a GPU of compute capability sm / 10, tensors are fake,
    and a launch is recorded."""
    from helion._compiler.compile_environment import CompileEnvironment
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    (sms, kib), capability = CHIPS[sm], divmod(sm, 10)
    common = dict(multi_processor_count=sms, major=capability[0], warp_size=32,
                  regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048)  # fmt: skip
    device = mock.Mock(
        minor=capability[1], gcnArchName="", total_memory=80 << 30, L2_cache_size=50 << 20,
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=(kib - 1) << 10,
        shared_memory_per_multiprocessor=kib << 10, **common)  # fmt: skip
    device.name = f"sm_{sm}"
    properties = DeviceProperties(type="cuda", index=0, cc=sm, **common)
    to_fake = CompileEnvironment._to_fake_tensor

    def to_symbolic(self, x, source):
        """A fake tensor's sizes and strides as symbols, which Helion makes from a real tensor's."""
        if self.settings.static_shapes:
            return to_fake(self, x, source)
        n, none = x.dim(), [None] * x.dim()
        dims = [DimDynamic.DYNAMIC] * n, [DimDynamic.INFER_STRIDE] * n, none, none
        sizes, strides, _ = self.shape_env.create_symbolic_sizes_strides_storage_offset(
            x, source, symbolic_context=StatelessSymbolicContext(*dims))  # fmt: skip
        with self.fake_mode:
            fake = torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device)
        self.input_sources[fake] = source
        return fake

    with contextlib.ExitStack() as stack:
        for target, value in {
            "torch.cuda.is_available": lambda: True,
            "torch.cuda.device_count": lambda: 1,
            "torch.cuda.current_device": lambda: 0,
            "torch.cuda.device_of": lambda x: contextlib.nullcontext(),
            "torch.cuda.is_current_stream_capturing": lambda: False,
            "torch.cuda.get_device_capability": lambda device=None: capability,
            "torch.cuda.get_device_properties": lambda index=None: device,
            "torch.version.cuda": "13.0",
            "helion.runtime.default_launcher": record,
            "helion.runtime.default_cute_launcher": record,
        }.items():
            stack.enter_context(mock.patch(target, value))
        for owner, name, value in (
            (DeviceProperties, "create", lambda device: properties),
            (CompileEnvironment, "tensor_descriptor_base_is_aligned", lambda self, tensor: True),
            (CompileEnvironment, "_to_fake_tensor", to_symbolic),
            (FakeTensor, "data_ptr", lambda self: 16),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode())
        yield


def resources(cubin, sm, threads, shared):
    """What the file cubin takes for a CTA of so many threads and bytes of shared memory: these two,
    registers per thread, spilled bytes per thread, CTAs that fit on an SM (0: none does), and the
    tensor-core instruction in the machine code with its count, or "none"."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    run = lambda tool, option: subprocess.run(
        (tools / tool, option, cubin), capture_output=True, text=True, check=True).stdout
    usage, sass = run("cuobjdump", "-res-usage"), run("nvdisasm", "-c")
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    of_shared = (CHIPS[sm][1] << 10) // (shared + 1024)
    per_sm = 65536 // (registers * threads), of_shared, 2048 // threads
    names = {"UTCHMMA": "tcgen05", "HGMMA": "wgmma", "HMMA": "mma"}
    counts = {op: len(re.findall(rf"\b{op}\b", sass)) for op in names}
    found = next((f"{names[op]} ({n} {op})" for op, n in counts.items() if n), "none")
    return dict(threads=threads, registers=registers, spilled=spilled, shared=shared,
                ctas=min(per_sm), instruction=found)  # fmt: skip


def cute_code(sm, kernel, grid, args, options):
    """resources of what Helion's cute backend launched, by the compiler in cutlass-dsl."""
    import cutlass.cute
    from cuda.bindings.driver import CUstream
    from helion.runtime.cute import launcher

    block = (*options["block"], 1, 1)[:3]
    with pretend(sm):
        entry = launcher._build_cute_schema_and_args(kernel, args, (*grid, 1, 1)[:3])
        wrapper = launcher._create_cute_wrapper(kernel, entry.schema, block, num_sm=CHIPS[sm][0])
    with tempfile.TemporaryDirectory() as folder:
        options = f"--enable-tvm-ffi --keep-cubin --dump-dir={folder}"
        code = cutlass.cute.compile(wrapper, *entry.launch_args, CUstream(0), options=options)
        # The launch's dynamic shared memory: the i64 among the fields of cudaLaunchConfig_t.
        host, fields = str(code.ir_module), r"array<3 x i32>, array<3 x i32>, i64, "
        field = re.search(rf"\[0, 2\] : .*struct<\({fields}.*\n.*store (%\w+), ", host)
        constant = rf"{field[1]} = llvm.mlir.constant\((\d+) : i64\)"
        shared = int(re.findall(constant, host[: field.start()])[-1])
        return resources(next(Path(folder).glob("*.cubin")), sm, math.prod(block), shared)


def invalidated(ptx):
    """Whether no mbarrier can come back over a tile. With Triton 3.6 and 3.7, whether
    inval_dead_mbarriers does what it says: the mbarriers in the first 16 bytes of shared memory are
    made invalid and not used, and no others lie under the first tile. From 3.8 on each mbarrier is
    made invalid where the kernel ends: nothing else takes its place before."""
    dead = [f"mbarrier.inval.shared::cta.b64 [global_smem{at}];" in ptx for at in ("", "+8")]
    sums = re.findall(r"add\.s32\s+(%r\d+), (%r\d+), (%?\w+);", ptx)
    sums = {register: terms for register, *terms in sums}
    begin = set(re.findall(r"mov\.b32\s+(%r\d+), global_smem;", ptx))

    def first_16(register):
        """Whether an address may be there: not where 16 or more is added to the beginning."""
        x, y = sums.get(register, (register, "0"))
        near = not y.isdigit() or int(y) < 16
        return near and (first_16(x) if x in sums else x in begin)

    places = lambda what: [tuple(sums.get(register, (register, "0"))) for register in re.findall(
        rf"mbarrier\.{what}[\w.:]+\s+\[(%r\d+)\]", ptx)]  # fmt: skip
    made = places("init")
    if not configs.DEAD_MBARRIERS:
        return len(made) > 0 and set(made) == set(places("inval")) and not any(dead)
    under = {y for x, y in made if x in begin and y.isdigit() and int(y) < 1024}  # a tile is larger
    used = re.findall(r"mbarrier\.(?!init|inval)[\w.:]+\s+[^;]*\[(%r\d+)\]", ptx)
    return all(dead) and len(used) > 0 and under == {"0", "8"} and not any(map(first_16, used))


def triton_code(sm, kernel, grid, args, options):
    """resources of what was launched, by Triton's compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    shorts = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
              torch.int32: "i32"}  # fmt: skip
    signature, constexprs, attributes = {}, {}, {}
    for i, (param, arg) in enumerate(zip(kernel.params, args)):
        specialized = isinstance(arg, int) and not param.do_not_specialize
        name, kind = param.name, shorts.get(getattr(arg, "dtype", None))
        if param.is_constexpr or specialized and arg == 1:
            signature[name], constexprs[name] = "constexpr", arg
        elif hasattr(arg, "block_shape"):  # a TMA descriptor
            block = str(list(arg.block_shape)).replace(" ", "")
            signature[name] = f"tensordesc<{shorts[arg.base.dtype]}{block}>"
        else:
            signature[name] = f"*{kind}" if kind else "fp32" if isinstance(arg, float) else "i32"
            if kind or specialized and arg % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    code = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    threads, shared = 32 * code.metadata.num_warps, code.metadata.shared  # with loading warps
    tmem = getattr(code.metadata, "tmem_size", None) or 0
    if tmem > 512:  # the code is empty, and a launch would raise OutOfResources
        raise RuntimeError(f"needs {tmem} columns of tensor memory, an SM has 512")
    if threads == 384 and not invalidated(code.asm["ptx"]):  # specialised
        raise RuntimeError("barriers in the first 16 bytes of shared memory are used, or valid")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(code.asm["cubin"])
        return resources(cubin, sm, threads, shared)


def machine_code(config, sm, head_dim=128, dtype="bfloat16", is_causal=False, group=1, length=4096,
                 keys=None, window=-1, softcap=None):  # fmt: skip
    """Compile what flash_attention launches on compute capability sm / 10, without such a GPU.

    config: as flash_attention takes it, or "gradient", with the forward before it. group: how many
    heads of q share one of k. window: its left, or BY_ROW. Returns `resources` of the first kernel,
    and under "then" those of the others, without ranges_kernel and order_kernel. Not for a process
    in interpreter mode: see compile_in_child.
    """
    os.environ["CUTE_DSL_ARCH"] = f"sm_{sm}a"
    cute, backward = getattr(config, "kernel", "") == "blackwell", config == "gradient"
    LAUNCHED.clear()
    # All of ds at a time: torch without CUDA does not index a fake tensor of a GPU.
    with pretend(sm), mock.patch.object(flash_attn, "DS_BYTES", 2**40):
        B, H = (1, 16) if backward else (16, 64)
        new = lambda h, n: torch.empty(B, h, n, head_dim, dtype=DTYPES[dtype], device="cuda")
        q, k, v = new(H, length), *(new(H // group, keys or length) for _ in "kv")
        config = None if backward else config
        mask, visible = (int(is_causal), max(window, -1), -1), None
        if window == BY_ROW:
            visible = torch.empty(B, 2, length, dtype=torch.int32, device="cuda")
        scales = None, softcap
        _, lse = flash_attn._forward(q, k, v, visible, mask, *scales, config, backward)
        if backward:
            flash_attn._backward(q, k, v, q, lse, visible, q, None, mask, *scales, True, True)
    codes = [(getattr(launch[0], "__name__", ""), (cute_code if cute else triton_code)(sm, *launch))
             for launch in LAUNCHED]  # fmt: skip
    first, *others = [x for name, x in codes if not re.search("_(ranges|order)_kernel", name)]
    return {**first, "then": others}


CHILDREN = {}  # {sm: a process without the interpreter}, one at a time: Helion remembers the GPU


def end_child():
    for sm in list(CHILDREN):
        CHILDREN.pop(sm).shutdown()


def compile_in_child(jobs):
    """machine_code of each of the jobs, its arguments, in a process that has the interpreter off.
    Returns a list of dicts; {"error": reason} where the compiler refused."""
    reason = lambda error: (str(error).strip().splitlines() or ["no message"])[0][:200]
    codes = []
    for job in jobs:
        if job[1] not in CHILDREN:
            end_child()
            CHILDREN[job[1]] = concurrent.futures.ProcessPoolExecutor(1, SPAWN)
            multiprocessing.util.Finalize(None, end_child, exitpriority=100)  # before its queues
        try:
            with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
                codes.append(CHILDREN[job[1]].submit(machine_code, *job).result())
        except Exception as error:
            codes.append({"error": f"{type(error).__name__}: {reason(error)}"})
            if isinstance(error, concurrent.futures.BrokenExecutor):  # the compiler crashed
                end_child()
    return codes


def code(name, i):
    """Each kernel of a job of CODE fits on an SM and spills no data: a few addresses, at most so
    many bytes per thread. first, last: the threads of the first and the last kernels."""
    _, spilled, first, last, *jobs = CODE[i]
    if name == "blackwell_compiles" and NO_CUTE:
        raise Skipped("needs helion[cute]")
    codes = compile_in_child([(NAMED.get(config, config), *job) for config, *job in jobs])
    for job, code in zip(jobs, codes):
        assert "error" not in code, (job, code["error"])
        for kernel in (code, *code["then"]):
            assert kernel["ctas"] >= 1 and kernel["spilled"] <= spilled, (job, kernel)
        threads = [kernel["threads"] for kernel in (code, *code["then"])]
        assert first in (None, threads[0]), (job, threads)
        assert threads[len(threads) - len(last) :] == list(last), (job, threads)
    return f"{len(jobs)} jobs, all fit: {jobs[0]}, ..."


def refused_code():
    """HOPPER_64 runs for many queries; HOPPER, which takes more shared memory, for few. With
    another order of programs the cute backend refuses the loop: an error, no slow kernel."""
    few = "bfloat16", False, 1, 200, 4096
    many, few = compile_in_child([(None, 90, 64), (None, 90, 64, *few)])
    assert many["shared"] < few["shared"], ("the same tiles for both", many, few)
    if NO_CUTE:
        raise Skipped("needs helion[cute]")
    plan = configs.BLACKWELL_CUTE
    other = helion.Config(**{**plan.helion_config.config, "l2_groupings": [4]})
    (code,) = compile_in_child([(dataclasses.replace(plan, helion_config=other), 100, 64)])
    assert "did not recognise blackwell_kernel" in code.get("error", ""), code
    return "as documented"


NO_CUTE = importlib.util.find_spec("cutlass") is None


def blackwell_loop(dim, dtype):
    """The loop for Blackwell and its lse, without a GPU as Triton code. What it does not take,
    forward_kernel computes."""
    if GPU and (NO_CUTE or torch.cuda.get_device_capability()[0] != 10):
        raise Skipped("needs helion[cute] and a GPU of compute capability 10.x, or none")
    flash_attn.LAUNCHES.clear()
    attend = functools.partial(flash_attention, config=configs.BLACKWELL_CUTE)
    for length, heads, is_causal in ((256, 4, False), (384, 1, True)):
        q, k, v = make((1, 4, length, dim), dtype, heads=heads)
        options = dict(is_causal=is_causal, enable_gqa=True)
        out, lse = attend(q, k, v, return_lse=True, **options)
        line = compare(out, q, k, v, is_causal=is_causal, lse=lse, atol=2e-2)
        assert torch.equal(attend(q, k, v, **options), out) and not kernels(), kernels()
    q, k, v = make((1, 2, 256, dim), dtype)
    apart = torch.cat([q, q], -1)[..., :dim]
    for qkv, scale in (
        ((q[:, :, :129], k, v), None), ((q, k[:, :, :128], v[:, :, :128]), None), ((q, k, v), 0.1),
        ((apart, k, v), None), ([x.float() for x in (q, k, v)], None),
        ([x[..., :32] for x in (q, k, v)], None),
    ):  # fmt: skip
        flash_attn.LAUNCHES.clear()
        compare(attend(*qkv, scale=scale), *qkv, scale)
        assert kernels() == {"forward_kernel"}, kernels()
    return line


# ---- 8. The runner -------------------------------------------------------------------------------
RIGHT, WRONG = "<= last_key[:, None]", "<= last_key[:, None] + 1"


def mutation():
    """In a copy of flash_attn.py the causal mask is off by one: the cases above catch it."""
    caught, text = [], (HERE / "flash_attn.py").read_text()
    assert text.count(RIGHT) > 0, f"flash_attn.py has no {RIGHT!r}"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / "configs.py", folder)
        Path(folder, "mutant.py").write_text(text.replace(RIGHT, WRONG))
        spec = importlib.util.spec_from_file_location("mutant", Path(folder, "mutant.py"))
        mutant = sys.modules["mutant"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mutant)
        with mock.patch.dict(globals(), flash_attention=mutant.flash_attention):
            for mask, shape in itertools.product(MASKS, MASKED[:2]):
                try:
                    forward("default", "bfloat16", D, mask, "bhsd", *shape)
                except AssertionError as error:
                    caught.append(f"forward {mask} {shape}: {str(error).splitlines()[0]}")
    assert caught, f"nothing caught {WRONG!r} in place of {RIGHT!r}"
    return f"{WRONG!r} in place of {RIGHT!r} is caught {len(caught)} times, first by {caught[0]}"


def cases(draws):
    """(group, function, arguments). One worker process runs a group, and compiles its kernels once.
    draws: how many random heads hard_rows tries for each config and dtype."""
    for i, row in enumerate(CODE):
        yield ("code", i), code, (row[0], i)
    yield "refused", refused_code, ()
    for group, function, arguments in (
        ("train", training, ("eager", "compile")),
        ("copied", copied_files, ("folder", "package", "own_configs")),
        ("torch", in_torch, ("opcheck", "compile", "export", "autocast")),
        ("torch", sdpa_backend, ("eager", "compile")),
        ("torch", tracing, ("make_fx", "flops", "selective")),
        ("transformers", model, MODELS),
    ):
        for argument in arguments:
            yield group, function, (argument,)
    for case in (("default", D), ("hopper", 64), ("hopper", 192)):
        yield "asked for", asked_for, case
    for name in PLANS:
        yield ("windows", name), windows, (name,)
        yield ("windows", name), sinks, (name,)
    yield "windows", intervals, ()
    yield "windows", few_queries, ()
    yield "windows", head_dims, ()
    yield "one head", one_head, ()
    for function in (bad_input, clear_errors, unknown_triton, recipe_values, recipe_masks,
                     recipe_compiles):  # fmt: skip
        yield "transformers", function, ()
    tables = (gradient, GRADIENT, 4), (softcap, SOFTCAP, 4), (forward, FORWARD, 3)
    for function, table, n in tables:
        for names, dtypes, *row in table:
            for name, dtype, shape in itertools.product(names, dtypes, row[n:]):
                if dtype != "float32" or not name.startswith("hopper"):
                    padded = name in REPORT or (row[0] - 1).bit_length()
                    yield (name, dtype, padded), function, (name, dtype, *row[:n], *shape)
    some = "shifts_in_one_head", "large_values", "lower_level", "many_keys"
    for name, dtype in itertools.product(BOTH, HALF):
        yield (name, dtype, "hard"), hard_rows, (name, dtype, "search", draws)
        for kind in HARD if (name, dtype) == ("hopper", "bfloat16") else some:
            yield (name, dtype, "hard"), hard_rows, (name, dtype, kind)
        yield (name, dtype, "hard"), hard_gradients, (name, dtype)
    for name, kind in itertools.product(H64 + H256, some):
        yield name, hard_rows, (name, "bfloat16", kind)
    yield "hopper_256", hard_rows, ("hopper_256", "float16", "shifts_in_one_head")
    yield "tile128", hard_rows, ("tile128", "bfloat16", "mixed")
    yield "tile128", special_values, ("tile128",)
    for name in PLANS:
        for function in (special_values, another_call, new_lengths, split_keys, large_tensor):
            yield (name, "calls"), function, (name,)
    for dim, dtype in ((64, "bfloat16"), (128, "float16")):
        yield dim, blackwell_loop, (dim, dtype)
    if GPU:
        yield "threads", threads, ()
        yield "threads", capture, ()
        for name in (*REPORT, *PLANS, *H64, *H256):
            yield ("bits", name), same_bits, (name,)
        for name in (*REPORT, "hopper"):
            for row in PUBLISHED.get(name, PUBLISHED["tile128"]):
                yield ("report", name), report_shape, (name, *row[0])


def label(function, *arguments):
    return " ".join(map(str, (function.__name__, *arguments)))


def prepare():
    """A worker's start."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else 16 more processes for each
    # It fills new memory with NaN, so that an element that nobody writes shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)  # the workers have all the cores already


def run(group):
    """[(label, "ok", "skip" or "FAIL", seconds, text)] of one group, in a worker process."""
    results = []
    for function, arguments in group:
        begin = time.perf_counter()
        hopper = function is not code and any(str(x).startswith("hopper") for x in arguments)
        try:
            if GPU and hopper and torch.cuda.get_device_capability()[0] != 9:
                raise Skipped("needs a GPU of compute capability 9.x, or none")
            outcome, text = "ok", function(*arguments)
        except Skipped as reason:
            outcome, text = "skip", str(reason)
        except Exception as error:
            outcome, text = "FAIL", f"{type(error).__name__}: {str(error).strip()[:600]}"
        seconds = time.perf_counter() - begin
        results.append((label(function, *arguments), outcome, seconds, text))
        if GPU:  # all workers share its memory
            torch.cuda.empty_cache()
    return results


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, groups = parser.add_argument, {}
    add("-k", metavar="REGEX", default="", help="run only the cases in whose name it is found")
    add("--search", metavar="N", type=int, default=64 if GPU else 16, help="random heads a dtype")
    add("--list", action="store_true", help="print the cases, and the seconds of the slow ones")
    args = parser.parse_args()
    for group, function, arguments in (*cases(args.search), ("last", mutation, ())):
        if re.search(args.k, name := label(function, *arguments)):
            groups.setdefault(group, []).append((function, arguments))
            if args.list:
                slow = (f"  # {s} s" for text, s in SECONDS.items() if re.match(text, name))
                print(name + next(slow, ""))
    if args.list:
        return 0
    total, count = sum(map(len, groups.values())), dict.fromkeys(("ok", "FAIL", "skip"), 0)
    workers, last = min(16, os.cpu_count() or 1), groups.pop("last", None)
    where = torch.cuda.get_device_name() if GPU else "a CPU, in Triton's interpreter: no GPU"
    helion_version = importlib.metadata.version("helion")
    print(f"Executing on {where}.\n{total} cases in {workers} processes; torch {torch.__version__},"
          f" triton {triton.__version__}, helion {helion_version}.", flush=True)
    with concurrent.futures.ProcessPoolExecutor(workers, SPAWN, prepare) as pool:

        def report(groups):
            jobs = {pool.submit(run, group): group for group in groups}
            for job in concurrent.futures.as_completed(jobs):
                died = job.exception() and f"a process died, here or elsewhere: {job.exception()}"
                dead = [(label(f, *arguments), "FAIL", 0, died) for f, arguments in jobs[job]]
                for name, outcome, seconds, text in dead if died else job.result():
                    count[outcome] += 1
                    print(f"{outcome:4s} {name} [{seconds:.1f} s]: {text}", flush=True)
                    if outcome == "FAIL":
                        print(f"     alone: python check.py -k '^{re.escape(name)}$'", flush=True)

        report(groups.values())
        if last:
            report([last])
    if not total:
        print(f"{args.k!r} is in no case's name")
    skipped = f", {count['skip']} skipped" if count["skip"] else ""
    print(f"{count['ok']} passed, {count['FAIL']} failed{skipped}")
    return 1 if count["FAIL"] or not count["ok"] else 0


if __name__ == "__main__":
    sys.exit(main())
