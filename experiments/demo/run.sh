#!/usr/bin/env bash
# The numbers of this page: three seeds, their controls, the tables. About two hours on two cores.
set -euo pipefail
selfcritique -m experiment=demo seed=0,1,2
selfcritique -m experiment=demo_shuffled seed=0,1,2 until=eval_rft eval.sampled_questions=0
selfcritique -m experiment=demo name=demo_dev seed=0,1,2 until=eval_base eval.split=dev eval.sampled_questions=0
selfcritique -m experiment=demo name=demo_longer seed=0,1,2 until=eval_base eval.split=dev eval.sampled_questions=0 model.sft.epochs=112.5
selfcritique experiment=demo name=demo_no_reference until=gate critic.ask.reference=none critic.gate.on_fail=warn
selfcritique compare 'runs=[outputs/demo/*/*,outputs/demo_shuffled/*/*]'
selfcritique compare 'runs=[outputs/demo_dev/*/*,outputs/demo_longer/*/*]'
