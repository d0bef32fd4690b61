"""Two small studies, of probes and of fine-tuning, that take long enough to be killed meanwhile."""

from __future__ import annotations

NUM_TRIALS = 24
PROBES = f"""
name: small
trials: {NUM_TRIALS}
cohort_size: 4
pruner: {{name: successive_halving, min_epochs: 2}}
sampler: {{name: tpe, startup_trials: 6}}
parameters:
  backbone: ffn
  image_size: 16
  head: [linear, mlp]
  hidden_sizes: {{when: {{head: mlp}}, choice: [[8], [16]]}}
  lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}
  weight_decay: {{low: 1.0e-2, high: 1, log: true}}
  batch_size: 32
  epochs: 40
"""
NUM_FINETUNES = 3
FINETUNES = f"""
name: fine
mode: finetune
trials: {NUM_FINETUNES}
cohort_size: 1
pruner: none
sampler: random
parameters:
  backbone: squeezenet1_1
  image_size: 32
  unfrozen_stages: [1, 2]
  lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}
  batch_size: 32
  epochs: 8
"""
