#!/usr/bin/env bash
# One fine-tuning for the dial and its accuracy curve, on all GPUs of this machine; without any, on two CPU processes.
#   examples/multi_gpu.sh           DDP: each GPU holds the whole model
#   examples/multi_gpu.sh fsdp      FSDP 2: the weights are spread over the GPUs
# What follows goes to zsaa.experiment, e.g. --epochs 1 --model meta-llama/Llama-3.2-1B. batch_size counts per process.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
processes=$((gpus ? gpus : 2))
launch=(torchrun --standalone --nproc-per-node "$processes")
if [ "${1:-}" = fsdp ]; then
    shift
    [ "$gpus" != 0 ] || { echo "FSDP needs GPUs: accelerate does not shard on the CPU" >&2; exit 2; }
    launch=(accelerate launch --num_machines 1 --num_processes "$processes" --mixed_precision bf16 --dynamo_backend no
        --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_reshard_after_forward true
        --fsdp_state_dict_type SHARDED_STATE_DICT)
fi
"${launch[@]}" -m zsaa.experiment --task imdb --train 2000 --test 500 --epochs 1 --output-dir outputs/multi_gpu "$@"
