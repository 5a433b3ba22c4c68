#!/bin/bash
# GPT-2 124M on two machines of 8 GPUs under Slurm: sbatch config/slurm.sh [CONFIG.yaml ...] [--key=value ...]
# out_dir is on a disk that both machines see. Ranks that fail are restarted; a machine that fails, or the end of the
# time, has the job queued again, and it goes on from ckpt.pt.
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
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # ranks that restart meet at a new store; the old one names dead ranks

# five minutes before the end: every rank saves and ends, as at any SIGTERM (torchrun itself would die of USR1)
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
