"""Reproduce the report's tables: Helion against PyTorch's scaled_dot_product_attention (SDPA).

    python bench.py                         # the three published tables
    python bench.py --config tile128        # one of them; or hopper or blackwell, this project's own
    python bench.py --shape 1,16,2048,64    # your shape [B, H, S, D]; may be repeated
    python bench.py --config hopper --causal --kv-heads 8 --layout bshd   # other cases of attention
    python bench.py > table.md              # markdown goes to stdout, progress to stderr

Every row is compared with SDPA before its time is believed. Times are medians of
triton.testing.do_bench (L2 flushed before each call), in ms; the competitors take turns over
several rounds, so that clock drift hits all alike. The smallest and the largest speedup of a round
stand beside: read a difference as real only where both are on the same side of 1.
Without a GPU the same command shows what can be known without one.
"""
import argparse
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
import time
import typing

import check  # first: it decides between GPU and interpreter before triton is imported
import torch
import torch.nn.functional as F
import triton.testing
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import LOG2E, attention_kernel, configs, flash_attention

ROUNDS, WARMUP_MS, REP_MS = 5, 10, 50
GROWING = 100  # calls with one key more than the last

# Datasheet figures: dense bf16 TFLOPS, SMs, FLOP per clock and SM of the tensor cores, TB/s.
# B200: HGMX B200 datasheet, FLOP per clock from the FlashAttention-4 paper; the others: the GPU's own.
CHIPS = {
    "B200": (2250.0, 148, 8192, 8.0),
    "H200": (989.4, 132, 4096, 4.8),
    "H100": (989.4, 132, 4096, 3.35),
    "A100": (312.0, 108, 2048, 2.0),
}
EXP_PER_CLOCK = 16  # exponentials per clock and SM on all of these (CUDA Programming Guide, throughput table)


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def table(*head):
    print()
    row(*head)
    row(*("---" for _ in head))


def bracket(shape):
    return f"[{', '.join(map(str, shape))}]"


def first_line(error):  # some have no text at all
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def geomean(values):
    return math.exp(statistics.fmean(map(math.log, values)))


def versions():
    found = {name: importlib.metadata.version(name) for name in ("torch", "triton", "helion")}
    if importlib.util.find_spec("cutlass"):
        found["nvidia-cutlass-dsl"] = importlib.metadata.version("nvidia-cutlass-dsl")
    return found | {"cuda": torch.version.cuda}


def chip():
    """The key of CHIPS for the GPU at hand, or None."""
    return next((name for name in CHIPS if name in torch.cuda.get_device_name()), None)


# ---- The competitors -----------------------------------------------------------------------------


class Case(typing.NamedTuple):
    """What all rows of a run have in common."""

    dtype: str
    causal: bool
    kv_heads: int | None  # None: as many as q has
    layout: str

    def tensors(self, shape):
        """q, k, v: [B, H, S, D] whatever the layout in memory."""
        qkv = check.make(shape, self.dtype, heads=self.kv_heads)
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv] if self.layout == "bshd" else qkv

    def options(self, shape):
        """The keywords that say the same to SDPA and to flash_attention."""
        return {"is_causal": self.causal, "enable_gqa": self.kv_heads not in (None, shape[1])}

    def flops(self, shape):
        """As FlashAttention counts them, whatever a kernel computes beyond the diagonal."""
        return check.flops(shape) / (2 if self.causal else 1)


def sdpa(backend, q, k, v, **options):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, **options)


@functools.cache
def installed_libraries():
    """{name: function of [B, S, H, D] tensors} of the flash-attention packages that can be imported.

    One of them is called flash_attn, as our own file is: ours steps aside while it is looked for.
    """
    here = str(check.HERE)
    path, ours = list(sys.path), sys.modules.pop("flash_attn")
    sys.path[:] = [p for p in path if os.path.realpath(p or ".") != here]
    found = {}
    for name, module in (("FA2", "flash_attn"), ("FA3", "flash_attn_interface"), ("FA3", "fa3_fwd_interface"),
                         ("FA4", "flash_attn.cute")):  # fmt: skip
        try:
            if name not in found:
                found[name] = importlib.import_module(module).flash_attn_func
        except Exception as error:  # not installed, or not for this GPU: say so and go on
            say(f"{name} ({module}): not used, {first_line(error)[:100]}")
    sys.path[:], sys.modules["flash_attn"] = path, ours
    return found


def library(function, causal, q, k, v):
    out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def competitors(q, k, v, options):
    """{name: callable} of everything that can run this row; PyTorch is SDPA's default dispatch."""
    B, H, S, D = q.shape
    found = {"PyTorch": functools.partial(F.scaled_dot_product_attention, q, k, v, **options)}
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("math", SDPBackend.MATH),
    ):
        # math stores scores, probabilities and a float32 copy of each, and k and v repeated for q's heads
        needs = 12 * B * H * S * S + 8 * B * H * S * D * options["enable_gqa"] if name == "math" else 0
        if needs < torch.cuda.mem_get_info()[0]:
            found[f"SDPA {name}"] = functools.partial(sdpa, backend, q, k, v, **options)
    for name, function in installed_libraries().items():
        found[name] = functools.partial(library, function, options["is_causal"], q, k, v)
    return found


def config_of(name, shape, case):
    """The Config of a table's row; "hopper" is the Plan that flash_attention takes there by itself."""
    if name == "blackwell":
        return configs.BLACKWELL_CUTE
    if name == "hopper":
        return configs.best((9, 0), shape[3], check.DTYPES[case.dtype], shape[2])
    return configs.CONFIGS[name]


def described(config):
    if isinstance(config, configs.Plan):
        return f"`{config.kernel}_kernel` in tiles of {config.block_m} queries x {config.block_n} keys, `{config.config!r}`"
    return f"`{config!r}`"


def default_backend(shape, case):
    """The SDPA backend that the default dispatch takes; its own answer, on a batch of 1."""
    return SDPBackend(torch._fused_sdp_choice(*case.tensors((1, *shape[1:])), **case.options(shape))).name


# ---- With a GPU ----------------------------------------------------------------------------------


def measure(functions):
    """{name: ms of each round} of those that run, each as a CUDA graph: a host that is slower than
    the GPU does not show. What a call costs with the host, call_cost measures."""
    alive, times = {}, {}
    for name, function in functions.items():
        try:
            function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
            alive[name], times[name] = graph.replay, []
        except Exception as error:
            if name in ("Helion", "PyTorch"):  # no row without them
                raise
            say(f"  {name} does not run this: {first_line(error)[:120]}")
    names = list(alive)
    for i in range(ROUNDS):  # another order each round: who runs before decides at which clock
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(
                triton.testing.do_bench(alive[name], warmup=WARMUP_MS, rep=REP_MS, return_mode="median")
            )
    return times


def ratios(r, name):
    """The smallest and the largest of name's time over Helion's, each of one round: the clock that a
    round had is then in both. The ratio of the medians is always between them."""
    each = [other / ours for other, ours in zip(r["rounds"][name], r["rounds"]["Helion"])]
    return min(each), max(each)


def call_cost(function, calls=200):
    """(host us, end-to-end us) of one call: until it returns, and until its result is there."""
    host, whole = [], []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        host.append((returned - start) * 1e6)
        whole.append((time.perf_counter() - start) * 1e6)
    return statistics.median(host), statistics.median(whole)


def growing_cost(plan, shape, case):
    """{name: host us} of a call with one query and a length of keys that was not there yet: a KV cache."""
    B, H, S, D = shape
    q, k, v = case.tensors((B, H, S + GROWING, D))
    q, options = q[:, :, :1].contiguous(), {**case.options(shape), "is_causal": False}  # it sees all keys
    helion_call, found = functools.partial(flash_attention, config=plan), {}
    for name, function in (("Helion", helion_call), ("PyTorch", F.scaled_dot_product_attention)):
        caches = iter([(k[:, :, :n], v[:, :, :n]) for n in range(S, S + GROWING)])
        found[name] = call_cost(lambda: function(q, *next(caches), **options), GROWING)[0]
    return found


def run_row(config, shape, case, growing):
    """Check and time one row; a dict for --json. Raises what the kernel raises."""
    q, k, v = case.tensors(shape)
    options = case.options(shape)
    helion_call = functools.partial(flash_attention, q, k, v, config=config, **options)
    out, reference = helion_call(), F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(out, reference, atol=2e-2, rtol=2e-2)  # every element, coarsely
    group = q.size(1) // k.size(1)
    for b, h in ((0, 0), (-1, -1)):  # two heads by flash-attention's bound against float64
        heads = ((out, h), (q, h), (k, h // group), (v, h // group))
        check.compare(*(x[b, i][None, None] for x, i in heads), is_causal=case.causal)
    del out, reference
    functions = {"Helion": helion_call, **competitors(q, k, v, options)}
    blackwell = config is configs.BLACKWELL_CUTE
    if blackwell and options == {"is_causal": False, "enable_gqa": False}:
        functions["tile128"] = functools.partial(flash_attention, q, k, v, config=configs.TILE128)
    rounds = measure(functions)
    ms = {name: statistics.median(times) for name, times in rounds.items()}
    growing &= isinstance(config, configs.Plan) and not blackwell  # others would compile for each length
    return {
        "shape": shape,
        "ms": ms,
        "rounds": rounds,
        "tflops": {name: case.flops(shape) / t / 1e9 for name, t in ms.items()},
        "backend": default_backend(shape, case),
        "call": {name: call_cost(functions[name]) for name in ("Helion", "PyTorch")},
        "growing": growing_cost(config, shape, case) if growing else None,  # host us
    }


def gpu_table(name, shapes, case):
    """One results table and its comparison. Returns (rows, whether a row failed)."""
    published = {r[0]: r[3] for r in check.PUBLISHED.get(name, [])}
    peak = CHIPS[chip()][0] if chip() and case.dtype != "float32" else None
    results, failed = [], False
    smallest = min(shapes, key=check.flops)
    backends = sorted({default_backend(shape, case) for shape in shapes})
    print(f"\n**PyTorch:** SDPA by its default dispatch, here {' and '.join(backends)}")
    table("Config [B, H, S, D]", "Helion (ms)", "PyTorch (ms)", "Speedup", "TFLOPS", "% of peak",
          "Published speedup (B200)", "Speedup of the rounds")  # fmt: skip
    for shape in shapes:
        say(f"{name} {bracket(shape)}")
        torch.cuda.empty_cache()
        try:
            r = run_row(config_of(name, shape, case), shape, case, shape == smallest)
        except Exception as error:
            failed = True
            row(bracket(shape), f"failed: {first_line(error)[:200]}".replace("|", "/"), *[""] * 6)
            results.append({"shape": shape, "error": str(error)[:2000]})
            continue
        results.append(r)
        low, high = ratios(r, "PyTorch")
        row(bracket(shape), f"{r['ms']['Helion']:.4f}", f"{r['ms']['PyTorch']:.4f}",
            f"{r['ms']['PyTorch'] / r['ms']['Helion']:.2f}x", f"{r['tflops']['Helion']:.1f}",
            f"{100 * r['tflops']['Helion'] / peak:.1f}" if peak else "",
            f"{published[shape]:.2f}x" if shape in published else "", f"{low:.2f}x to {high:.2f}x")  # fmt: skip
    good = [r for r in results if "error" not in r]
    if good:
        comparison(good)
    return results, failed


def comparison(results):
    """Helion against every competitor, the cost of a call, and the bars."""
    names = [n for n in dict.fromkeys(n for r in results for n in r["ms"]) if n not in ("Helion", "PyTorch")]
    best = lambda r: min((r["ms"][n] for n in names if n in r["ms"]), default=r["ms"]["PyTorch"])
    table("Config [B, H, S, D]", "Helion (ms)", *(f"{n} (ms, speedup, rounds)" for n in names),
          "Speedup over the best")  # fmt: skip
    for r in results:
        ms = r["ms"]
        cell = lambda n: "{:.4f} ({:.2f}x, {:.2f} to {:.2f})".format(ms[n], ms[n] / ms["Helion"], *ratios(r, n))
        cells = [cell(n) if n in ms else "" for n in names]
        row(bracket(r["shape"]), f"{ms['Helion']:.4f}", *cells, f"{best(r) / ms['Helion']:.2f}x")
    means = (geomean([r["ms"][n] / r["ms"]["Helion"] for r in results if n in r["ms"]]) for n in names)
    over_best = geomean([best(r) / r["ms"]["Helion"] for r in results])
    row("Geometric mean", "", *(f"{mean:.3f}x" for mean in means), f"{over_best:.3f}x")

    small = min(results, key=lambda r: check.flops(r["shape"]))
    table(f"One call at {bracket(small['shape'])}", "Kernel (us)", "Host (us)", "End to end (us)")
    for n, (host, whole) in small["call"].items():
        row(n, f"{1000 * small['ms'][n]:.1f}", f"{host:.1f}", f"{whole:.1f}")
    if small["growing"]:
        costs = ", ".join(f"{n} {host:.1f}" for n, host in small["growing"].items())
        print(f"\nOne query, and at each of {GROWING} calls one key more than at the last, from "
              f"{small['shape'][2]} on, as with a KV cache. Median host us: {costs}.")  # fmt: skip

    print("\n```text")
    top = max(t for r in results for t in r["tflops"].values())
    width = max(10, shutil.get_terminal_size().columns - 32)
    for r in results:
        print(f"{bracket(r['shape'])}, TFLOPS")
        for n, t in r["tflops"].items():
            print(f"  {n:15s} {t:7.1f} {'#' * max(1, round(width * t / top))}")
    print("```", flush=True)


# ---- Without a GPU -------------------------------------------------------------------------------


def floors(shape, chip_name, case):
    """Least time in ms that the chip's tensor cores, exponential units and memory each set.

    The clock is the one at which the datasheet's TFLOPS hold. Memory moves q, k, v, out once.
    """
    B, H, S, D = shape
    tflops, sms, flop_per_clock, tb = CHIPS[chip_name]
    hertz = tflops * 1e12 / (sms * flop_per_clock)
    return (
        case.flops(shape) / tflops / 1e9,
        case.flops(shape) / (4 * D) / (sms * EXP_PER_CLOCK * hertz) * 1e3,
        2 * B * (H + (case.kv_heads or H)) * S * D * 2 / tb / 1e9,
    )


def cpu_table(name, shapes, case):
    """What is known of a config without a GPU. Returns (rows, whether something failed)."""
    chip_name = "H200" if name == "hopper" else "B200"
    other = "tile128" if name == "blackwell" else name  # the report's best on that chip
    published = {r[0]: r[1:] for r in check.PUBLISHED.get(other, [])}
    peak, sms, _, tb = CHIPS[chip_name]
    which = (f" of {other}" if other != name else "") if published else " (none for this config)"
    print(f"\nPublished times{which}, and what the datasheet of the "
          f"{chip_name} allows: {peak:.0f} dense bf16 TFLOPS, {sms} SMs, {tb} TB/s.")  # fmt: skip
    table("Config [B, H, S, D]", "Helion (ms)", "PyTorch (ms)", "Speedup", "TFLOPS", "% of peak",
          "Tensor cores (ms)", "Exponentials (ms)", "Memory (ms)")  # fmt: skip
    results = []
    for shape in shapes:
        limits = floors(shape, chip_name, case)
        cells = [""] * 5
        if shape in published:
            ms, torch_ms, speedup, tflops = published[shape]
            cells = [f"{ms:.4f}", f"{torch_ms:.4f}", f"{speedup:.2f}x", f"{tflops:.1f}", f"{100 * tflops / peak:.1f}"]
        row(bracket(shape), *cells, *(f"{limit:.4f}" for limit in limits))
        results.append({"shape": shape, "published": published.get(shape), "floors_ms": limits})

    sms, source = ((100,), "cutlass-dsl") if name == "blackwell" else ((90, 100), "Triton")
    say(f"{name}: compiling for {' and '.join(f'sm_{sm}' for sm in sms)}")
    head_dim = shapes[0][3]
    print(f"\nMachine code for D = {head_dim}, {case.dtype}, from the compiler that {source} brings along:")
    table("Target", "Block sizes", "Threads", "Registers", "Spilled (bytes)", "Shared memory (bytes)",
          "CTAs per SM", "Tensor cores")  # fmt: skip
    used = dict.fromkeys(config_of(name, shape, case) for shape in shapes if shape[3] == head_dim)
    group = (case.causal, shapes[0][1] // (case.kv_heads or shapes[0][1])) if name == "blackwell" else ()
    jobs = [(config, sm, head_dim, case.dtype, *group) for config in used for sm in sms]
    codes = check.compile_in_child(jobs)
    for (config, sm, *_), code in zip(jobs, codes):
        target = f"sm_{sm}", [config.block_m, config.block_n] if isinstance(config, configs.Plan) else config.block_sizes
        if "error" in code:
            row(*target, f"does not compile: {code['error'].replace('|', '/')}", *[""] * 5)
        else:
            row(*target, *(code[k] for k in ("threads", "registers", "spilled", "shared", "ctas", "instruction")))

    small = (1, 2, min(shapes[0][2], 256), head_dim)
    say(f"{name}: executing {bracket(small)} in the interpreter")
    try:
        case = case._replace(kv_heads=case.kv_heads and max(1, small[1] * case.kv_heads // shapes[0][1]))
        q, k, v = case.tensors(small)
        out = flash_attention(q, k, v, config=config_of(name, shapes[0], case), **case.options(small))
        text, failed = check.compare(out, q, k, v, is_causal=case.causal), False
    except Exception as error:
        text, failed = f"FAILED: {error}", True
    print(f"\nExecuted on the CPU at {bracket(small)}, against a float64 reference: {text}", flush=True)
    return [*results, {"machine_code": codes, "executed": text}], failed


# ---- The command ---------------------------------------------------------------------------------


def shape_argument(text):
    try:
        shape = tuple(int(x) for x in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,H,S,D: four positive integers")
    if shape[3] % 8 or shape[3] > 256:
        raise argparse.ArgumentTypeError(f"head dim {shape[3]} in {text!r} is no multiple of 8 up to 256")
    return shape


def autotune(shape, case):
    """Run Helion's autotuner on the report's kernel and print a Config for configs.py."""
    q, k, v = (x.flatten(0, 1) for x in case.tensors(shape))
    arguments = (q, k, v, torch.empty_like(q), shape[3] ** -0.5 * LOG2E)
    config = attention_kernel.bind(arguments).autotune(arguments)
    print(f"TUNED = {config!r}  # {bracket(shape)}, {case.dtype}, {torch.cuda.get_device_name()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"bench.py: {message}\n")  # one line, no usage
    parser.add_argument("--config", choices=[*configs.CONFIGS, "hopper", "blackwell"], help="one table; default: the three published")
    parser.add_argument("--shape", type=shape_argument, action="append", metavar="B,H,S,D")
    parser.add_argument("--dtype", choices=list(check.DTYPES), default="bfloat16")
    parser.add_argument("--causal", action="store_true", help="is_causal=True, for all")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="heads of k and v; default: H, as many as q has")
    parser.add_argument("--layout", choices=("bhsd", "bshd"), default="bhsd", help="of q, k, v in memory")
    parser.add_argument("--json", metavar="FILE", help="also write everything that is printed, and versions")
    parser.add_argument("--autotune", type=shape_argument, metavar="B,H,S,D",
                        help="tune the report's kernel for this shape, print a Config")  # fmt: skip
    args = parser.parse_args()
    case = Case(args.dtype, args.causal, args.kv_heads, args.layout)
    shapes_of = lambda name: args.shape or [r[0] for r in check.PUBLISHED.get(name, check.PUBLISHED["tile128"])]
    if args.autotune and args.config in ("hopper", "blackwell"):
        parser.error(f"--autotune is for the report's kernel, not for {args.config}")
    if args.config not in ("hopper", "blackwell") and (args.causal or args.kv_heads is not None):
        parser.error("--causal and --kv-heads need --config hopper or blackwell: the report's are dense, with equal heads")
    for shape in shapes_of(args.config):
        if args.config != "hopper" and shape[3] not in check.HEAD_DIMS:
            parser.error(f"head dim {shape[3]} of {bracket(shape)} needs --config hopper: it is not one of {check.HEAD_DIMS}")
        if args.kv_heads is not None and (args.kv_heads < 1 or shape[1] % args.kv_heads):
            parser.error(f"--kv-heads {args.kv_heads} does not divide the {shape[1]} heads of {bracket(shape)}")
    if args.autotune:
        if not check.GPU:
            parser.error("--autotune needs a GPU")
        autotune(args.autotune, case)
        return 0

    gpu = torch.cuda.get_device_name() if check.GPU else "none"
    found = versions()
    if not check.GPU:
        print("**There is no GPU here: nothing below is a timing of this machine.**\n")
    now = datetime.datetime.now().isoformat(timespec="seconds")
    print(f"**Date:** {now}  \n**GPU:** {gpu}  \n**Dtype:** {check.DTYPES[case.dtype]}  ")
    kind = "causal (TFLOPS count half of dense, as FlashAttention counts them)" if case.causal else "dense"
    print(f"**Attention:** {kind}; {bracket(case.layout.upper())} in memory; heads of k, v: {case.kv_heads or 'H'}  ")
    print("**Versions:** " + ", ".join(f"{name} {version}" for name, version in found.items()))
    if check.GPU:
        print(f"**Timing:** median of {ROUNDS} rounds of do_bench medians, L2 flushed, competitors in turn, "
              "each replayed as a CUDA graph")  # fmt: skip
    record = {"date": now, "gpu": gpu, **case._asdict(), "versions": found, "command": sys.argv, "tables": {}}
    any_failed = False
    for name in [args.config] if args.config else configs.CONFIGS:
        shapes = shapes_of(name)
        print(f"\n## {name}")
        for config in dict.fromkeys(config_of(name, shape, case) for shape in shapes):
            print(f"\n{described(config)}")
        record["tables"][name], failed = (gpu_table if check.GPU else cpu_table)(name, shapes, case)
        any_failed |= failed
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)
        say(f"wrote {args.json}")
    return 1 if any_failed else 0


if __name__ == "__main__":
    sys.exit(main())
