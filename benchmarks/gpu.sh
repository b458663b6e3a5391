#!/usr/bin/env bash
# advxl beside PyTorch on a machine with an NVIDIA GPU:
#
#   benchmarks/gpu.sh target/release/advxl [PYTHON] [DEVICE]
#
# Builds nothing. The program was built with `--features cuda` (or vulkan), PYTHON has torch and timm, DEVICE is cuda if absent.
# First the gradients are compared with the processor's; then each piece of work is done in turn by one and the other, three
# times, with the largest batch that both can hold; last come the medians and their ratio.
# It was not run yet: no GPU was at hand (docs/gpu.md).
set -euo pipefail

program=${1:?the program, such as target/release/advxl}
python=${2:-python3}
device=${3:-cuda}
here=$(cd "$(dirname "$0")" && pwd)
lines=$(mktemp)
trap 'rm -f "$lines"' EXIT

echo "== gradients, beside the processor's in f32"
for precision in f32 bf16; do
    "$program" bench step --gradients --model vit_b16 --image-size 112 --batch 4 --precision "$precision" --device "$device"
done

run() { # model, pixels, attack steps, batches to try
    local model=$1 size=$2 steps=$3 batch
    shift 3
    for batch in "$@"; do
        work=(--model "$model" --image-size "$size" --attack-steps "$steps" --batch "$batch")
        # Whatever does not fit is tried with the next smaller batch, by both.
        "$program" bench step "${work[@]}" --repeats 2 --precision bf16 --device "$device" >/dev/null 2>&1 || continue
        "$python" "$here/gpu.py" "${work[@]}" --repeats 2 >/dev/null 2>&1 || continue
        echo "== $model at $size, PGD-$steps, batches of $batch"
        for _ in 1 2 3; do
            "$program" bench step "${work[@]}" --repeats 10 --precision bf16 --device "$device" | tee -a "$lines"
            "$python" "$here/gpu.py" "${work[@]}" | tee -a "$lines"
        done
        return
    done
    echo "== $model at $size, PGD-$steps: no batch of $* was held by both"
}
run vit_b16 112 1 1024 512 256 128
run vit_b16 224 3 256 128 64
run vit_l16 112 1 512 256 128 64
run vit_l16 224 3 128 64 32
run vit_l14 84 1 512 256 128 64

"$python" - "$lines" <<'SUMMARY'
import collections, json, statistics, sys

found = collections.defaultdict(lambda: collections.defaultdict(list))
for line in open(sys.argv[1]):
    one = json.loads(line)
    work = (one["model"], one["image_size"], one["attack_steps"], one["batch"])
    found[work][one["program"]].append(one)
print("model, pixels, steps, batch: program images/s, of the card's products, MiB")
for work, programs in found.items():
    rates = {name: statistics.median(one["images_per_second"] for one in all) for name, all in programs.items()}
    for name, all in programs.items():
        share = all[0].get("share_of_peak")
        print(*work, name, rates[name], "-" if share is None else share, all[0].get("device_memory_mib"), sep="  ")
    ours = max(rate for name, rate in rates.items() if name.startswith("advxl"))
    best = max(rate for name, rate in rates.items() if not name.startswith("advxl"))
    print(*work, f"advxl / PyTorch's best: {ours / best:.2f}", sep="  ")
SUMMARY
