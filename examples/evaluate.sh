#!/usr/bin/env bash
# lm-evaluation-harness along the dial, offline, with a task in MMLU's format made from film reviews.
#   examples/evaluate.sh            alpha = 1 and 0.9; 40 questions in two formats, minutes on 2 CPU cores
#   examples/evaluate.sh 0.8 0.7    at these
# Needs pip install '.[harness]'. MMLU itself comes from the Hugging Face hub: use `--tasks mmlu --num_fewshot 5`
# instead of --include_path and --tasks. BATCH, MODEL and OUT change the batch size, the model and the folder.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
[ $# != 0 ] || set -- 1 0.9
out=${OUT:-outputs/endings}

python examples/endings.py "$out/tasks"
for alpha in "$@"; do
    zsaa-eval --model zsaa --model_args "pretrained=${MODEL:-smollm2-135m},alpha=$alpha" \
        --include_path "$out/tasks" --tasks endings_letters,endings_text \
        --batch_size "${BATCH:-8}" --log_samples --output_path "$out/alpha-$alpha-batch-${BATCH:-8}"
done
