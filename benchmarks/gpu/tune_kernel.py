"""Try sizes of the ragged attention kernel on a GPU: tile, warps, stages, programs; the fastest ones first.

Each row is the share of the bound by bytes that a call reaches for 1,024 to 131,072 slots of each of eight KV heads, in
the shape of Llama-3-8B and bfloat16, and the mean of all. The defaults stand in `kv_gym/live/ragged_kernel.py`.

Run: ``python benchmarks/gpu/tune_kernel.py --out runs/gpu``
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from run import bandwidth, kernel_seconds

from kv_gym.files import atomic_write
from kv_gym.live import ragged_kernel

SLOTS = (1024, 4096, 16384, 131072)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of tuning.json")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1 << 14, 1 << 15], help="bytes of keys in a tile")
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--programs", type=int, nargs="+", default=[528, 1056, 2112])
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 128, 256], help="fewest slots of a program")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is here, and a CPU cannot say what is fast on one")
    device = torch.device("cuda")
    speed, rows = bandwidth(device, 1 << 32), []
    choices = (args.tiles, args.warps, args.stages, args.programs, args.chunks)
    for values in itertools.product(*choices):
        sizes = dict(zip(("TILE_BYTES", "WARPS", "STAGES", "PROGRAMS", "MIN_CHUNK"), values, strict=True))
        for name, value in sizes.items():
            setattr(ragged_kernel, name, value)
        row: dict = dict(sizes)
        for kind in ("ragged", "equal"):
            for slots in SLOTS:
                nbytes, seconds = kernel_seconds(device, slots, kind, (8, 4, 128))
                row[f"{kind} {slots}"] = round(nbytes / speed / seconds, 3)
        row["mean"] = sum(value for name, value in row.items() if " " in name) / 8
        rows.append(row)
        print(json.dumps(row), flush=True)
    rows.sort(key=lambda row: -row["mean"])
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out / "tuning.json") as file:
        file.write_text(json.dumps({"card": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
