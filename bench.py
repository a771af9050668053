"""Time attention: Helion against PyTorch's scaled_dot_product_attention (SDPA) and FlashAttention.

  python bench.py                          the report's three tables
  python bench.py --config default         what flash_attention runs; also --causal, --kv-heads 8
  python bench.py --shape 1,16,2048,64     your shape [B, H, S, D]
  python bench.py --backward               the gradient, and a training step
  python bench.py --decode                 one to four queries and a cache of keys
  python bench.py --sweep --json run.json  lengths from 512 to 16,384

A result is compared with SDPA's before its time is believed. A time is the median of
triton.testing.do_bench, which flushes L2 before each call. The competitors run in random order in
each of several rounds: clock drift meets all of them. Brackets hold the smallest and the largest
speedup of a round; a difference is real only if both are on the same side of 1.
"""
import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import sys
import textwrap
import time

import check  # first: it chooses between the GPU and the interpreter before triton is imported
import torch
import torch.nn.functional as F
import triton.testing
from flash_attn import configs, flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

ROUNDS, WARMUP_MS, REP_MS, BOTH = 5, 50, 50, (False, True)
HOST_CALLS, REPLANNED_CALLS = 100, 5  # few of PyTorch: at each new length cuDNN plans for 37 ms
# The sweep is FlashAttention's own: batches of 16,384 tokens, all heads together 2,048 wide.
LENGTHS, TOKENS, WIDTH = (512, 1024, 2048, 4096, 8192, 16384), 16384, 2048
DECODE = ((1, 1, 1024), (1, 1, 8192), (1, 1, 65536), (8, 1, 4096), (64, 1, 2048), (32, 1, 8192),
          (1, 4, 8192))  # batch, queries, keys; 32 heads, 8 of keys, head dim 128
REPORT = ("Helion", "PyTorch")  # PyTorch: SDPA with the backend that it chooses by itself
LIBRARIES = (("FA3", "flash_attn_interface"), ("FA3", "fa3_fwd_interface"), ("FA2", "flash_attn"),
             ("FA4", "flash_attn.cute"))  # FA3 first: beside FA4's namespace it fails to import
PACKAGES = ("torch", "triton", "helion", "flash-attn", "flash-attn-3", "fa3-fwd", "flash-attn-4")
INSTALLED = {x.name.replace("_", "-") for x in importlib.metadata.distributions()}
say = functools.partial(print, file=sys.stderr, flush=True)


# ---- What is called (args is the command line) ---------------------------------------------------
def inputs(shape, args, decode=False):
    """q, k, v and the keywords that SDPA and flash_attention share. decode: one query."""
    B, H, S, D = shape
    qkv = check.make((B, H, 1 if decode else S, D), args.dtype, S, args.kv_heads)
    options = {"is_causal": args.causal and not decode, "enable_gqa": (args.kv_heads or H) != H}
    return [x.requires_grad_(args.backward) for x in qkv], options


def config_of(name, shape, args):
    """The config that runs. "default" is what flash_attention takes by itself."""
    B, H, S, D = shape
    capability = torch.cuda.get_device_capability() if check.GPU and name != "hopper" else (9, 0)
    best = configs.best(capability, D, check.DTYPES[args.dtype], B * H, S, S)
    return {**configs.CONFIGS, "blackwell": configs.BLACKWELL_CUTE}.get(name, best)


def library(function, q, k, v, is_causal, enable_gqa, **more):
    """function: a library's flash_attn_func. It takes [B, S, H, D] and needs no enable_gqa."""
    out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal, **more)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@functools.cache
def competitors():
    """{name: function(q, k, v, **options)} of SDPA and of the installed libraries."""
    found = {"PyTorch": F.scaled_dot_product_attention}
    for name in ("flash", "cudnn", "efficient"):
        only = sdpa_kernel(getattr(SDPBackend, f"{name.upper()}_ATTENTION"))
        found[f"SDPA {name}"] = only(F.scaled_dot_product_attention)
    # FlashAttention's package has the name of our file, which steps aside for these imports.
    path, ours = [*sys.path], sys.modules.pop("flash_attn")
    sys.path[:] = [folder for folder in path if os.path.realpath(folder or ".") != str(check.HERE)]
    for name, module in LIBRARIES:
        try:
            function = importlib.import_module(module).flash_attn_func
            found.setdefault(name, functools.partial(library, function))
        except Exception as error:  # not installed, or not for this GPU
            say(f"{name} ({module}) is left out: {error!r:.200}")
        if getattr(sys.modules.get("flash_attn"), "__file__", "") is None:
            del sys.modules["flash_attn"].__file__  # FA4's namespace package: inspect takes no None
    sys.path[:], sys.modules["flash_attn"] = path, ours
    if "FA4" in found:  # ours has the same bits at every run, FA4's only if asked
        found["FA4 deterministic"] = functools.partial(found["FA4"], deterministic=True)
    return found


def step(function, q, k, v, **options):
    """Forward and backward through autograd."""
    out = function(q, k, v, **options)
    return torch.autograd.grad(out, (q, k, v), out.detach())


# ---- Measuring -----------------------------------------------------------------------------------
def agree(found, expected):
    """Each 64 rows of a head, as a whole, are within 5% of SDPA's. check.py has the fine bounds."""
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape, f"its shape is {[*x.shape]}, SDPA's {[*y.shape]}"
        for a, b in zip(x.float().split(64, 2), y.float().split(64, 2)):
            error, size = (a - b).norm(dim=(2, 3)), b.norm(dim=(2, 3))
            assert (error <= 0.05 * size + 1e-3).all(), "its result is not SDPA's"


def take_turns(calls):
    """{name: ms of each round}. Random order: the GPU's clock depends on the call before."""
    rounds, do_bench = {name: [] for name in calls}, triton.testing.do_bench
    for seed in range(ROUNDS):
        for name in random.Random(seed).sample([*calls], len(calls)):
            rounds[name].append(do_bench(calls[name], WARMUP_MS, REP_MS, return_mode="median"))
    return rounds


def measure(functions, qkv, options, backward):
    """{name: ms of each round} of the functions that run and agree with SDPA.

    Each is replayed as a CUDA graph, without the host's time. Autograd runs a backward on the
    stream of its forward, so the forward runs on the stream that is captured.
    """
    do = torch.randn_like(qkv[0])
    if not backward:  # a forward has the same bits anyway
        functions = {name: x for name, x in functions.items() if name != "FA4 deterministic"}

    def prepare(function):
        if not backward:
            return lambda: [function(*qkv, **options)]
        leaves = [x.detach().requires_grad_() for x in qkv]  # new ones: autograd notes their stream
        out = function(*leaves, **options)
        return lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)

    expected = prepare(F.scaled_dot_product_attention)()
    torch.cuda.synchronize()
    stream, calls, replays = torch.cuda.Stream(), [], {}
    for name, function in functions.items():
        try:
            with torch.cuda.stream(stream):
                calls.append(prepare(function))  # keeps the tensors that the graph reads
                agree(calls[-1](), expected)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                calls[-1]()
            replays[name] = graph.replay
        except Exception as error:
            if name in REPORT:  # no row without them
                raise
            say(f"  {name} is left out: {error!r:.200}")
    return take_turns(replays)


def speedup(rounds, name):
    """Name's time over Helion's: of the medians, and the smallest and the largest of a round."""
    each = [other / ours for other, ours in zip(rounds[name], rounds["Helion"])]
    median = statistics.median(rounds[name]) / statistics.median(rounds["Helion"])
    return f"{median:.2f}x ({min(each):.2f} to {max(each):.2f})"


def run_row(name, shape, args):
    """Compare and time one shape: what --json keeps, with the cells of its row in the table."""
    functions = {"Helion": functools.partial(flash_attention, config=config_of(name, shape, args))}
    functions |= competitors()
    rounds = measure(functions, *inputs(shape, args), args.backward)
    ms = {name: statistics.median(times) for name, times in rounds.items()}
    flops = check.flops(shape) * (2.5 if args.backward else 1) / (2 if args.causal else 1)
    tflops = {name: flops / x / 1e9 for name, x in ms.items()}
    others = [name for name in ms if name not in REPORT]
    best = min(others, key=ms.get, default="PyTorch")
    cells = {
        "[B, H, S, D]": [*shape],
        "Helion (ms)": f"{ms['Helion']:.4f}",
        "PyTorch (ms)": f"{ms['PyTorch']:.4f}",
        "Speedup": speedup(rounds, "PyTorch"),
        "TFLOPS": f"{tflops['Helion']:.1f}",
        "Best competitor (ms), speedup": f"{best} {ms[best]:.4f}, {speedup(rounds, best)}",
    }
    r = {"shape": shape, "cells": cells, "ms": ms, "tflops": tflops, "rounds": rounds}
    if args.backward and not args.sweep:
        qkv, options = inputs(shape, args)
        steps = {n: functools.partial(step, functions[n], *qkv, **options) for n in REPORT}
        r["step_rounds"] = take_turns(steps)
        ours = statistics.median(r["step_rounds"]["Helion"])
        cells["Step (ms), over PyTorch"] = f"{ours:.4f}, {speedup(r['step_rounds'], 'PyTorch')}"
    for name in others if args.all or args.sweep else ():
        cells[f"{name} (TFLOPS), speedup"] = f"{tflops[name]:.1f}, {speedup(rounds, name)}"
    return r


def host_costs(config, shape, args):
    """Median us until a call returns on an idle GPU. Sizes are the same, or new to each call."""
    (B, H, S, D), rows = shape, []
    functions = functools.partial(flash_attention, config=config), F.scaled_dot_product_attention
    for name, function, calls in zip(REPORT, functions, (HOST_CALLS, REPLANNED_CALLS)):
        call = functools.partial(step, function) if args.backward else function
        rows.append({f"Host us at {[*shape]}": name})
        new = range(S, S + calls + 1)
        cases = {"same sizes": [S] * (HOST_CALLS + 1), "new prompt length": new}
        decode = {} if args.backward else {"one query, new key length": new}
        for column, lengths in {**cases, **decode}.items():
            times = []
            for length in lengths:
                qkv, options = inputs((B, H, length, D), args, column in decode)
                torch.cuda.synchronize()
                start = time.perf_counter()
                call(*qkv, **options)
                times.append(1e6 * (time.perf_counter() - start))
            rows[-1][column] = f"{statistics.median(times[1:]):.1f}"  # the first call compiles
    return rows


def decode(args):
    """Print kernel times of few queries, GB/s of k and v, and the others' time over Helion's."""
    rows = []
    for B, M, N in DECODE:
        say(f"decode: {[B, 32, M, N]}, {len(rows) + 1} of {len(DECODE)}")
        qkv = check.make((B, 32, M, 128), args.dtype, N, 8)
        functions = {"Helion": flash_attention} | competitors()
        rounds = measure(functions, qkv, {"enable_gqa": True, "is_causal": False}, False)
        us = {name: 1e3 * statistics.median(times) for name, times in rounds.items()}
        row = {"[B, H, M, N]": [B, 32, M, N], "Helion (us)": f"{us['Helion']:.1f}",
               "GB/s": f"{2e-3 * qkv[1].nbytes / us['Helion']:.0f}"}  # fmt: skip
        rows.append(row | {f"{name} (us), speedup": f"{us[name]:.1f}, {speedup(rounds, name)}"
                           for name in us if name != "Helion"})  # fmt: skip
    print_table(rows)
    return rows


# ---- Tables --------------------------------------------------------------------------------------
def print_table(rows):
    """rows: {column: cell}. A row may lack columns."""
    columns = [*dict.fromkeys(column for row in rows for column in row)]
    print()
    for line in (columns, ["---"] * len(columns), *([r.get(c, "") for c in columns] for r in rows)):
        print("|", " | ".join(str(cell).replace("|", "/") for cell in line), "|", flush=True)


def gpu_section(name, shapes, args, rows):
    """Append to rows what is measured, and print them. An interrupt prints those that there are."""
    try:
        for shape in shapes:
            say(f"{name}: {[*shape]}, {len(rows) + 1} of {len(shapes)}")
            torch.cuda.empty_cache()
            try:
                rows.append(run_row(name, shape, args))
            except Exception as error:
                cells = {"[B, H, S, D]": [*shape], "Failed": f"{error!r:.200}"}
                rows.append({"shape": shape, "cells": cells, "error": str(error)})
    finally:
        print_table([r["cells"] for r in rows])
    good = [r for r in rows if "error" not in r]
    if good and not args.sweep and name in ("hopper", "default"):  # others compile for each length
        r = min(good, key=lambda r: check.flops(r["shape"]))
        r["host_us"] = host_costs(config_of(name, r["shape"], args), r["shape"], args)
        print_table(r["host_us"])


def cpu_section(name, shapes, args, rows):
    """What is known without a GPU: a small result, the published times, and machine code."""
    B, H, S, D = shapes[0]
    config, group = config_of(name, shapes[0], args), H // (args.kv_heads or H)
    small = (1, 2 * group, min(S, 256), D)
    say(f"{name}: executing {[*small]} in Triton's interpreter, then compiling")
    q, k, v = check.make(small, args.dtype, heads=2)
    out = flash_attention(q, k, v, config=config, is_causal=args.causal, enable_gqa=group > 1)
    executed = check.compare(out, q, k, v, is_causal=args.causal)
    print(f"\nExecuted here at {[*small]}, and compared with float64: **{executed}**", flush=True)
    published = [x for x in check.PUBLISHED.get(name, []) if x[0] in shapes]
    if published:
        print_table([{"Published for a B200": [*shape], "Helion (ms)": f"{ms:.4f}", "PyTorch (ms)":
                      f"{pytorch:.4f}", "Speedup": f"{times:.2f}x", "TFLOPS": tflops}
                     for shape, ms, pytorch, times, tflops in published])  # fmt: skip
    sms = {"blackwell": [100], "hopper_forward": [90]}.get(getattr(config, "kernel", ""), [90, 100])
    case = D, args.dtype, args.causal, group, S
    codes = check.compile_in_child([(config, sm, *case) for sm in sms])
    print_table([{f"Machine code at D = {D}": f"sm_{sm}", **x} for sm, code in zip(sms, codes)
                 for x in (code, *code.pop("then", []))])  # fmt: skip
    rows.append({"executed": executed, "machine_code": codes})


def plot(path, record):
    import matplotlib.pyplot as plt

    names = "Helion", "SDPA flash", "SDPA cudnn", "FA2", "FA3", "FA4", "FA4 deterministic"
    figure, axes = plt.subplots(2, 2, figsize=(8, 7), sharex=True, sharey=True, layout="tight")
    for ax, (case, rows) in zip(axes.flat, record["tables"].items()):
        for i, name in enumerate(names):
            points = [(r["shape"][2], r["tflops"][name]) for r in rows if name in r.get("ms", ())]
            style = dict(label=name, color=f"C{i}", linewidth=3 if name == "Helion" else 1)
            if points:
                ax.semilogx(*zip(*points), "o-", base=2, **style)
        ax.set(title=case.partition(", ")[2], xticks=LENGTHS, xticklabels=LENGTHS)
        ax.legend(fontsize=7)
    plt.setp(axes, ylim=(0, None))
    about = f"TFLOPS by length, {TOKENS:,} tokens a batch, {record['about']}"
    figure.supxlabel(textwrap.fill(about, 130), fontsize=8)
    figure.savefig(path, dpi=150)


# ---- The command ---------------------------------------------------------------------------------
def bhsd(text):
    B, H, S, D = map(int, text.split(","))
    return B, H, S, D


def arguments():
    """The command line. A mistake is one line, and exit status 2."""
    wide = functools.partial(argparse.RawDescriptionHelpFormatter, width=100)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=wide)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}\n")
    add, switch = parser.add_argument, functools.partial(parser.add_argument, action="store_true")
    add("--config", choices=[*configs.CONFIGS, "hopper", "blackwell", "default"])
    add("--shape", type=bhsd, action="append", metavar="B,H,S,D", help="may be repeated")
    add("--dtype", choices=[*check.DTYPES], default="bfloat16")
    add("--kv-heads", type=int, metavar="N", help="heads of k and v; default: H")
    switch("--decode", help="time one to four queries and a cache of keys")
    switch("--causal")
    switch("--backward", help="dq, dk and dv, and a training step")
    switch("--all", help="show every competitor, not only the best")
    switch("--sweep", help="lengths from 512 to 16,384")
    add("--head-dim", type=int, default=128, metavar="D", help="of --sweep and --plot")
    add("--plot", metavar="FILE", help="draw four sweeps: forward, backward, dense, causal")
    add("--json", metavar="FILE", help="write everything that is measured")
    args = parser.parse_args()
    args.sweep |= args.plot is not None
    timed = args.backward or args.sweep or args.decode
    special = timed or args.causal or args.kv_heads is not None
    ours = special or args.shape
    names = [args.config] if args.config else ["default"] if ours else [*configs.CONFIGS]
    D = args.head_dim
    sweep = [(TOKENS // n, WIDTH // max(1, D), n, D) for n in LENGTHS if args.sweep]
    shapes = args.shape or sweep
    published = {name: [shape for shape, *_ in rows] for name, rows in check.PUBLISHED.items()}
    args.tables = {x: shapes or published.get(x, published["tile128"]) for x in names}
    dims = range(8, 257, 8) if names[0] in ("hopper", "default") else check.HEAD_DIMS
    folders = [os.path.dirname(os.path.abspath(x)) for x in (args.json, args.plot) if x]
    kv = 1 if args.kv_heads is None else args.kv_heads
    odd = [s for s in args.tables[names[0]] if min(*s, kv) < 1 or s[1] % kv or s[3] not in dims]
    mistakes = {
        "the report's configs: dense, forward, no GQA": special and names[0] in configs.CONFIGS,
        "--decode has shapes of its own, forward": args.decode and (
            args.backward or args.causal or args.sweep or args.config or args.shape),
        "--backward, --sweep, --plot and --decode need a GPU": timed and not check.GPU,
        "--plot needs matplotlib": args.plot and "matplotlib" not in INSTALLED,
        f"{odd[:1]}: sizes are positive, --kv-heads divides H, and D is in {dims}": odd,
        f"there is no folder {' or '.join(folders)}": not all(map(os.path.isdir, folders)),
    }
    for message in (message for message, made in mistakes.items() if made):
        parser.error(message)
    return args


def main():
    args = arguments()
    about = [torch.cuda.get_device_name() if check.GPU else "no GPU", time.strftime("%Y-%m-%d")]
    about += [f"{x} {importlib.metadata.version(x)}" for x in PACKAGES if x in INSTALLED]
    about += [f"cuDNN {torch.backends.cudnn.version()}", args.dtype, " ".join(sys.argv)]
    record = {"about": ", ".join(about), "tables": {}}
    print("Medians of CUDA graphs; steps and host times without one. PyTorch: SDPA's own choice. "
          "TFLOPS: 2 products forward, 5 backward, half of them if causal." if check.GPU
          else "**There is no GPU here: nothing below is timed on this machine.**")  # fmt: skip
    print("\n" + record["about"])
    cases = itertools.product(BOTH, BOTH) if args.plot else [(args.backward, args.causal)]
    try:
        if args.decode:
            record["tables"]["decode"] = decode(args)
            return 0
        for (args.backward, args.causal), name in itertools.product(cases, args.tables):
            names = name, ("forward", "backward")[args.backward], ("dense", "causal")[args.causal]
            title = ", ".join(names)
            print(f"\n## {title}")
            rows = record["tables"][title] = []
            (gpu_section if check.GPU else cpu_section)(name, args.tables[name], args, rows)
            used = dict.fromkeys(config_of(name, shape, args) for shape in args.tables[name])
            print(*(f"\n`{config!r}`" for config in used if not args.backward), sep="\n")
    finally:
        if args.json:
            with open(args.json, "w") as file:
                json.dump(record, file, indent=1)
    if args.plot:
        plot(args.plot, record)
    return int(any("error" in r for rows in record["tables"].values() for r in rows))


if __name__ == "__main__":
    sys.exit(main())
