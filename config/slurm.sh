#!/bin/bash
# GPT-2 124M on two machines of 8 GPUs under Slurm; other configs and keys may follow, as for train.py:
#   sbatch config/slurm.sh config/gpt2.yaml
# Loss and time: not measured yet. Both machines must see out_dir. Without Slurm, on each of the machines, one of which
# is called `first`:
#   export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#   torchrun --nnodes=2 --nproc_per_node=8 --max_restarts=3 --rdzv_backend=c10d --rdzv_endpoint=first:29500 \
#       train.py config/gpt2.yaml --init_from=auto
#
# When a rank fails, the others end too: at once, or after `timeout_s` if it hangs. torchrun then restarts all
# ranks, which resume from ckpt.pt with the losses of an unbroken run. When a machine fails, or the job's time is up,
# Slurm queues the job again. Without Slurm, give the same command on that machine again: the others wait for it, for
# --rdzv_conf=join_timeout=600 seconds. If the machine was `first`, which serves the rendezvous, give it on all.
#
# With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 restarted ranks rendezvous on a fresh store. Without it torchrun keeps the
# old one, which holds the addresses of dead ranks: a machine that comes back waits in vain for an address (`wait
# timeout, keys: .../MASTER_ADDR`), and gloo now and then calls a dead rank (`connectFullMesh: Connection refused`).
#SBATCH --job-name=robopoet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# five minutes before the end every rank saves and ends, as at any SIGTERM; torchrun itself would die of USR1
trap 'late=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=gpu --max_restarts=3 --shutdown_timeout=240 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:29500" \
    train.py "${@:-config/gpt2.yaml}" --init_from=auto &
wait $!  # returns early when USR1 comes
code=$?
if [ "$late" ]; then
    wait
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
