#!/usr/bin/env bash
# The numbers of this page, after experiments/smollm2/run.sh. DATA has the questions.
set -euo pipefail
DATA=${DATA:-../shared/data}
RUN=$(find outputs/smollm2 -mindepth 1 -maxdepth 1 | sort | tail -n 1)
selfcritique evaluate "model=[$RUN/checkpoint,$RUN/dpo]" sets=mathusereval limit=40 max_tokens=256 \
  "paths.mathusereval=$DATA/mathusereval/math-user-eval.jsonl" engine.kind=vllm engine.max_batch_tokens=8192 \
  "judge.model=$RUN/checkpoint" "judge.critic=$RUN/critic" judge.max_tokens=512
