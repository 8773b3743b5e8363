"""Compile the ragged attention kernel for GPUs that are not here, and show what the compiler made of it.

Triton compiles for a named architecture without a driver or a card. Each row is one variant of the kernel: shared
memory per block (the smallest limit of the named architectures is 99 KiB), tensor-core products, and
asynchronous 16-byte copies (the pipelined loads of keys and values).

Run: ``python benchmarks/gpu/compile_kernel.py``
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile

SHARED_LIMIT = 99 * 1024  # bytes a block may have on sm_86 and sm_89; sm_80 and sm_90 have more


def compiled(dtype: str, d: int, bits: int, arch: int, group: int = 4, whole: bool = False) -> dict:
    """The variant for query type `dtype`, heads of `d` channels and pairs in `bits` bits (0: the query's type)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kv_gym.live import ragged_kernel

    kernel = ragged_kernel._attend_chunk
    constants = ragged_kernel.constants(group, d, 4 if dtype == "fp32" else 2, bits, 32 if bits else 1, whole)
    constants["FLOAT32"] = dtype == "fp32"
    stored, grid = ("*u8", "*fp16") if bits else (f"*{dtype}", f"*{dtype}")
    types = {
        "query": f"*{dtype}", "keys": stored, "key_grid": grid, "values": stored, "value_grid": grid, "starts": "*i64",
        "lengths": "*i64", "out": f"*{dtype}" if whole else "*fp32", "lse": "*fp32", "scaling": "fp32", "chunk": "i32",
        "chunks": "i32",
    }  # fmt: skip
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    ptx = made.asm["ptx"]
    return {
        "dtype": dtype, "d": d, "bits": bits, "arch": arch, "shared": made.metadata.shared,
        "products": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma)", ptx)), "copies": ptx.count("cp.async.cg"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities without the dot")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp16", "fp32"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 80, 96, 128, 256], help="channels of a head")
    parser.add_argument("--bits", type=int, nargs="+", default=[0, 2, 4, 8])
    args = parser.parse_args()
    print("| type | channels | bits | sm | shared bytes | tensor-core products | async copies |\n|" + 7 * "---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for arch in args.arch:
            for dtype in args.dtypes:
                for d in args.sizes:
                    for bits in args.bits:
                        row = compiled(dtype, d, bits, arch)
                        print("|", " | ".join(map(str, row.values())), "|", flush=True)
                        if row["shared"] > SHARED_LIMIT:
                            raise SystemExit(f"{row['shared']} bytes of shared memory are above {SHARED_LIMIT}")


if __name__ == "__main__":
    main()
