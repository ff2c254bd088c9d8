"""An attention block of K experts as one CPU kernel (kernels/block.cpp): built where it is first needed, and its autograd.

PyTorch's operations pass every intermediate tensor through memory, and on a CPU that takes longer than the matrix products
between them (benchmarks/parts.py). The kernel is held to `Block`'s own operations by tests/syncrec/test_fused.py.
"""

import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

_SOURCE = Path(__file__).with_name("kernels") / "block.cpp"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++20", "-shared", "-fPIC", "-w")
_TILE = 384  # rows, few enough to stay in a core's L2 cache


class Unavailable(Exception):
    """Why there is no fused kernel on this machine, in a line."""


def chosen(kernel, x, post_norm):
    """True where the fused kernel is to run: `kernel` as in ModelConfig, x: its input.

    `auto` takes it where it can be had. Raises Unavailable for `fused` where it cannot.
    """
    if kernel == "plain":
        return False
    if x.device.type != "cpu" or not post_norm or x.dtype not in (torch.float32, torch.float64):
        if kernel == "fused":
            raise Unavailable(f"model.kernel=fused is for CPU, norm=post and fp32 or bf16; here is {x.device.type}: use auto")
        return False
    reason = _missing()
    if reason and kernel == "fused":
        raise Unavailable(f"model.kernel=fused: {reason}")
    return not reason


def block(x_KMR, starts_S, weights, heads, share, training, tile=None):
    """LayerNorm(y + drop(FFN(y))) with y = LayerNorm(x + drop(Attention(x))): (K, M, r).

    starts_S: where each sequence begins, and M, integers (S + 1). weights, (K, …, …) each: qkv, out, w1, w2, b1, b2, and scale
    and shift of both norms. Under autocast to bfloat16 the matrix products are in it, everything else in fp32. The masks of
    dropout come from one number of PyTorch's generator: they are the same however many threads there are.
    """
    half = torch.is_autocast_enabled("cpu") and x_KMR.dtype == torch.float32
    share = share if training else 0.0
    seed = int(torch.randint(2**62, ())) if share else 0
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_KMR, *weights))
    settings = heads, share, seed, half, keep, tile or _TILE
    return _Block.apply(x_KMR, starts_S.long(), settings, *weights)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_KMR, starts_S, settings, *weights):
        heads, share, seed, half, keep, tile = settings
        y_KMR, *kept = torch.ops.syncrec.block_forward(x_KMR, starts_S, weights, heads, share, seed, half, keep, tile)
        ctx.settings, ctx.given = (heads, share, seed, half, tile), len(weights)
        ctx.save_for_backward(x_KMR, starts_S, *weights, *kept)
        return y_KMR

    @staticmethod
    def backward(ctx, gradient):
        x_KMR, starts_S, *saved = ctx.saved_tensors
        weights, kept = saved[: ctx.given], saved[ctx.given :]
        x_gradient, *gradients = torch.ops.syncrec.block_backward(gradient, x_KMR, starts_S, weights, kept, *ctx.settings)
        return x_gradient, None, None, *gradients


@functools.cache
def _missing():
    """None where the kernel is loaded, else why it cannot be."""
    try:
        torch.ops.load_library(str(build()))
    except (Unavailable, OSError) as error:
        reason = str(error).splitlines()[0]
        logging.getLogger(__name__).warning("no fused CPU kernel, so experts run two to three times as long: %s", reason)
        return reason
    return None


def build() -> Path:
    """Compiles the kernel for this machine's processor, half a minute once, and returns the library. Raises Unavailable.

    Not by torch.utils.cpp_extension.load: it waits for ever for a build that was killed. Two processes that both find no
    library both build one, and the second replaces the first's by the same.
    """
    source = b"".join(path.read_bytes() for path in sorted(_SOURCE.parent.iterdir()) if path.suffix in (".cpp", ".h"))
    kind = "\n".join([*_FLAGS, torch.__version__, platform.machine(), _features()]).encode()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncrec"
    library = home / f"block-{hashlib.sha256(source + kind).hexdigest()[:16]}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        raise Unavailable("there is no C++ compiler (c++, g++ or $CXX)")
    partial = library.with_suffix(f".{os.getpid()}.partial")
    command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(partial)]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    try:
        home.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{compiler} cannot build it in {home}: {error.strerror}") from None
    if done.returncode:
        partial.unlink(missing_ok=True)
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise Unavailable(f"{compiler} cannot build {_SOURCE.name}: {errors[0]}")
    partial.replace(library)
    return library


def _features():
    """What the processor can do: a library built on one machine may stop another's process."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^(flags|Features)\s*:.*$", info.read_text(), re.M) if info.is_file() else None
    return found.group() if found else platform.processor()
