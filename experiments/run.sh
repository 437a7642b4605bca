#!/usr/bin/env bash
# Every ablation with its tables, in the order of README.md, which says what each takes. Results lie in outputs/NAME/.
# Another machine: hydra/launcher=joblib (points at once, a core each) or submitit_slurm after any of the sweeps.
set -euo pipefail
selfcritique -m experiment=ablation_base seed=0,1,2
selfcritique experiment=lambda_beta
selfcritique experiment=dpo_stability
selfcritique experiment=no_critic
selfcritique experiment=no_critic name=no_critic_arms rft.select.by=critic 'arms=[sft,pool_sft]' "until='eval_base,eval_sft,eval_pool_sft,eval_rft'"
selfcritique experiment=no_critic name=no_critic_blind rft.select.by=critic critic.ask.reference=none critic.gate.on_fail=warn
selfcritique compare 'runs=[outputs/no_critic_arms/*/*,outputs/no_critic/*/*,outputs/no_critic_blind/*/*]'
selfcritique experiment=threshold
selfcritique experiment=critic_noise
selfcritique experiment=critic_data
selfcritique experiment=critic_size
selfcritique experiment=stages
selfcritique compare 'runs=[outputs/stages/*/*]'
selfcritique experiment=mixture
selfcritique compare 'runs=[outputs/mixture/*/*]' where=register=chatty
selfcritique experiment=heldout_families
selfcritique compare 'runs=[outputs/heldout_families/*/*]' where=family=boxes,reading
selfcritique experiment=rounds
selfcritique compare 'runs=[outputs/rounds/*/*]'
selfcritique compare 'runs=[outputs/rounds/*/*]' against=dpo,dpo_2
selfcritique critic-card 'critic=outputs/smollm2/*' "set=${BIGBENCH_MISTAKE:?the folder of BIG-Bench Mistake}" limit=120 'modes=[generate]' 'references=[answer]' probes=0
selfcritique experiment=model_size
selfcritique -m experiment=ablation_base name=model_size_lr 'model.tiny={hidden_size:128,intermediate_size:384,layers:3}' model.sft.lr=1e-3,2e-3 seed=0,1,2 until=eval_base
