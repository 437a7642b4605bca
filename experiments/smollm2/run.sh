#!/usr/bin/env bash
# The numbers of this page, after `make setup-vllm`. DATA has MMLU and GSM8K, the text is a fifth of Python's help pages.
set -euo pipefail
DATA=${DATA:-../shared/data}
selfcritique experiment=smollm2
selfcritique experiment=smollm2 name=smollm2_sft 'arms=[sft]' eval.sampled_questions=0
RUN=$(find outputs/smollm2 -mindepth 1 -maxdepth 1 | sort | tail -n 1)
python -c "import json; from pydoc_data.topics import topics
for text in list(topics.values())[::5]: print(json.dumps({'text': text}))" > outputs/text.jsonl
selfcritique evaluate "model=[$RUN/checkpoint,$RUN/base,$RUN/rft,$RUN/dpo]" 'sets=[mmlu,text]' limit=200 window=128 \
  "paths.mmlu=$DATA/mmlu_stem/test_nonmath.jsonl" paths.text=outputs/text.jsonl engine.max_batch_tokens=16384
selfcritique evaluate "model=[$RUN/checkpoint,$RUN/base,$RUN/rft,$RUN/dpo]" sets=gsm8k limit=200 max_tokens=96 \
  "paths.gsm8k=$DATA/gsm8k/test.jsonl" engine.kind=vllm engine.max_batch_tokens=8192
selfcritique critic-card "critic=$RUN"
