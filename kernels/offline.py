"""Compile every Triton kernel for GPUs that are not there, and gate what comes out.

    python -m moabench.kernels.offline                  # table for sm_80 and sm_90, bf16 and fp32; exit code
                                                        1 where a gate fails

Gates: no register spills (in fp32, whose products are no tensor-core work and which is for checking, at most
64 bytes), shared memory within the architecture's limit for one program, and tensor-core instructions (wgmma
or mma.sync) in bf16 kernels that are products. Needs Triton, no GPU, and must not run under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import backend

FILES = sorted(p.stem for p in (Path(__file__).parent / "triton").glob("*.py") if p.stem != "common")
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may use, by compute capability."""
PRODUCT = {80: r"mma\.sync", 90: r"wgmma\.mma_async|mma\.sync"}
UNALIGNED = {"T", "G", "R", "H", "E", "N", "K", "r", "row_stride", "site_stride", "eps"}
"""Integer arguments that are numbers of tokens, sites, ranks, routers or experts, or strides of scores: any
number."""
MOST_SPILLED = {"bf16": 0, "fp32": 64}
"""Bytes a thread."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one compilation came to."""

    name: str
    arch: int
    registers: int
    spilled: int
    """Bytes of local memory that a thread spills to."""
    shared: int
    """Bytes."""
    products: tuple[str, ...]
    """Tensor-core instructions found."""
    failures: tuple[str, ...] = ()


def compile_variant(variant, arch: int, dtype: str) -> Compiled:
    """Compile one variant and hold it against the gates."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = variant.constants | variant.tile.sizes
    signature = {name: variant.arguments.get(name, "constexpr") for name in variant.kernel.arg_names}
    options = {"num_warps": variant.tile.num_warps, "num_stages": variant.tile.num_stages}
    # Pointers, widths and strides of real tensors are multiples of 16: without the hint loads are scalar and
    # are not pipelined.
    aligned = [
        i
        for i, name in enumerate(variant.kernel.arg_names)
        if signature[name] != "constexpr" and name not in UNALIGNED
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = _resources(built.asm["cubin"])
    products = tuple(sorted(set(re.findall(PRODUCT[arch], built.asm["ptx"]))))
    one = Compiled(f"{variant.name} {dtype}", arch, registers, spilled, built.metadata.shared, products)
    return dataclasses.replace(one, failures=failures(one, variant.products, dtype))


def failures(one: Compiled, products: bool, dtype: str) -> tuple[str, ...]:
    """The gates that a compilation does not pass, in words. products: whether the kernel is a product."""
    found = []
    if one.spilled > MOST_SPILLED[dtype]:
        found.append(f"spills {one.spilled} bytes")
    if one.shared > SHARED[one.arch]:
        found.append(f"shared memory {one.shared} > {SHARED[one.arch]}")
    if products and dtype == "bf16" and not one.products:
        found.append("no tensor-core instruction")
    return tuple(found)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack (spills) of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def compiled(files: list[str], archs: list[int], dtypes: list[str], threads: int = 2) -> Iterator[Compiled]:
    """Every variant of `files`, for every architecture and dtype."""
    jobs = []
    for file in files:
        module = importlib.import_module(f"moabench.kernels.triton.{file}")
        jobs += [
            (v, arch, dtype) for dtype in dtypes for v in module.variants(DTYPES[dtype]) for arch in archs
        ]
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda job: compile_variant(*job), jobs)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="moabench.kernels.offline", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", metavar="file", help=f"of {', '.join(FILES)}; default: all")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED), default=sorted(SHARED))
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=sorted(DTYPES))
    args = parser.parse_args()
    if unknown := set(args.files) - set(FILES):
        parser.error(f"unknown file {', '.join(sorted(unknown))}: expected of {', '.join(FILES)}")
    if backend.interpreted():
        parser.error("TRITON_INTERPRET=1 is set: there is nothing to compile; unset it")
    failed = 0
    print(f"{'kernel':34s} {'sm':>3s} {'registers':>9s} {'spilled':>8s} {'shared':>8s}  products")
    for one in compiled(args.files or FILES, args.arch, args.dtype):
        failed += bool(one.failures)
        verdict = f"  FAILS: {'; '.join(one.failures)}" if one.failures else ""
        print(
            f"{one.name:34s} {one.arch:3d} {one.registers:9d} {one.spilled:8d} {one.shared:8d}  "
            f"{', '.join(one.products)}{verdict}"
        )
    print(f"{failed} failed" if failed else "all within the gates")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
