#!/bin/bash

# Parameters
#SBATCH --account=speech
#SBATCH --array=0-2%2
#SBATCH --constraint='a100&ib'
#SBATCH --cpus-per-task=3
#SBATCH --error=FOLDER/run/logs/TIME/%A_%a_0_log.err
#SBATCH --gpus-per-node=2
#SBATCH --job-name='a name'
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/run/logs/TIME/%A_%a_0_log.out
#SBATCH --partition=low
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=10
#SBATCH --wckey=submitit

# setup
unset SLURM_EXPORT_ENV SRUN_EXPORT_ENV SBATCH_EXPORT SLURM_LABELIO
export PYTHONSAFEPATH=1
export PYTHONPATH=FOLDER/run/code/HASH"${PYTHONPATH:+:$PYTHONPATH}"
end_of_attempt() { code=$?; kill -KILL $guard 2>/dev/null; PYTHON FOLDER/run/code/HASH/launch/slurm/requeue.py FOLDER/run/logs/TIME $code; exit $code; }
PYTHON FOLDER/run/code/HASH/launch/slurm/requeue.py FOLDER/run/logs/TIME guard $$ & guard=$!; disown
trap end_of_attempt EXIT
trap : TERM USR1 USR2
PYTHON FOLDER/run/code/HASH/launch/slurm/requeue.py FOLDER/run/logs/TIME begin

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/run/logs/TIME/%A_%a_%t_log.out --error FOLDER/run/logs/TIME/%A_%a_%t_log.err --kill-on-bad-exit=1 --cpus-per-task=3 PYTHON -u FOLDER/run/code/HASH/launch/node.py -u -m submitit.core._submit FOLDER/run/logs/TIME
